"""Routed experts whose weights stay packed: tiles of rows of one expert, whose weights are widened for that tile alone.

A widened stack would take four times the memory of the packed one, so no product may see more than one expert's weights
in bfloat16. Experts that no row chose are neither read nor widened.

Axes: N token rows, K experts of a row, D hidden, F expert width, E experts, T rows of a tile.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dspark_jax.targets.low_bit import PackedMatrix

SMALLEST_TILE, LARGEST_TILE = 8, 256


class PackedExperts(NamedTuple):
    """Codes of E experts: gate and up [E, D, F], down [E, F, D], two inputs in a byte."""

    gate: PackedMatrix
    up: PackedMatrix
    down: PackedMatrix

    @property
    def experts(self) -> int:
        """E."""
        return self.gate.codes.shape[0]

    def run(self, expert: Array, rows: Array, activation: Callable[[Array, Array], Array]) -> Array:
        """One expert on rows [T, D]."""
        gate, up, down = (matrix.at(expert) for matrix in self)
        return down.product(activation(gate.product(rows), up.product(rows)))


def experts_by_tile(
    rows: Float[Array, "n d"],
    weights: Float[Array, "n k"],
    chosen: Int[Array, "n k"],
    stack: PackedExperts,
    activation: Callable[[Array, Array], Array],
) -> Float[Array, "n d"]:
    """Σ_k weights_k expert_{chosen_k}(row); ids outside 0 .. E - 1 add nothing. Not differentiable in reverse."""
    count, k = chosen.shape
    tile = tile_rows(count * k, stack.experts)

    # Pairs are numbered n K + k; `order` lists them by expert, those of no expert here last.
    group = jnp.where((chosen >= 0) & (chosen < stack.experts), chosen, stack.experts).ravel()
    order = jnp.pad(jnp.argsort(group, stable=True), (0, tile))  # a tile may reach past the last pair

    # Each expert's run of pairs takes as many tiles as it needs; the loop's length is the number of all of them.
    sizes = jnp.zeros((stack.experts + 1,), jnp.int32).at[group].add(1)[:-1]  # [E]
    tiles, first = -(-sizes // tile), jnp.cumsum(sizes) - sizes
    ends = jnp.cumsum(tiles)
    shares = weights.ravel()

    def run(step: Array, total: Array) -> Array:
        # All ends are compared at once: a binary search would be a loop within the loop.
        expert = jnp.searchsorted(ends, step, side="right", method="compare_all")
        at = first[expert] + (step - ends[expert] + tiles[expert]) * tile
        real = at + jnp.arange(tile) < first[expert] + sizes[expert]

        pair = jax.lax.dynamic_slice(order, (at,), (tile,))
        mixed = stack.run(expert, jnp.take(rows, pair // k, axis=0), activation)
        share = jnp.take(shares, pair)[:, None] * mixed.astype(jnp.float32)

        # A row chooses an expert once, so no row is in a tile twice; rows past the run's end are dropped.
        return total.at[jnp.where(real, pair // k, count)].add(share, mode="drop")

    # The bound is traced, so that only tiles with rows are run; a fixed one would visit every expert.
    total = jax.lax.fori_loop(0, ends[-1], run, jnp.zeros(rows.shape, jnp.float32))
    return total.astype(rows.dtype)


def tile_rows(pairs: int, experts: int) -> int:
    """T: the power of two at or above the mean number of rows of an expert, within bounds."""
    # Smaller tiles would widen an expert more often than needed, larger ones multiply rows of padding.
    mean = max(1, -(-pairs // experts))
    return min(max(1 << (mean - 1).bit_length(), SMALLEST_TILE), LARGEST_TILE)
