"""Mixtures of experts: each token's MLP is a weighted sum of a few experts'.

`mix_experts`, the product over a stack of experts, is shared by every family; each family has a router of its own.

Axes: *n any leading axes of token rows, N of them flattened, K experts of a token, D hidden, F expert width, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.sharding import param
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.expert_mesh import over_experts
from dspark_jax.targets.expert_tiles import PackedExperts, experts_by_tile
from dspark_jax.targets.low_bit import PackedMatrix

Activation = Callable[[Array, Array], Array]
"""(gate [N, F], up [N, F]) -> what `down` projects."""


class ExpertStack(NamedTuple):
    """Stacked weights of E experts: gate and up [E, D, F], down [E, F, D]."""

    gate: Any
    up: Any
    down: Any


def mix_experts(
    rows: Float[Array, "n d"],
    weights: Float[Array, "n k"],
    chosen: Int[Array, "n k"],
    stack: ExpertStack | PackedExperts,
    activation: Activation,
) -> Float[Array, "n d"]:
    """Σ_k weights_k expert_{chosen_k}(row). No expert has a capacity, so a row's result depends on that row alone."""

    def by_tile(rows: Array, weights: Array, chosen: Array, stack: PackedExperts) -> Array:
        return experts_by_tile(rows, weights, chosen, stack, activation)

    def by_platform(rows: Array, weights: Array, chosen: Array, stack: ExpertStack) -> Array:
        def grouped(rows: Array, weights: Array, chosen: Array) -> Array:
            return grouped_experts(rows, weights, chosen, stack, activation)

        def apart(rows: Array, weights: Array, chosen: Array) -> Array:
            return experts_one_by_one(rows, weights, chosen, stack, activation)

        # Grouped products are one instruction on TPUs; elsewhere XLA expands them to [E, N per_token, D].
        return jax.lax.platform_dependent(rows, weights, chosen, tpu=grouped, default=apart)

    # The axes of F, which gate and up give and down takes.
    if isinstance(stack, PackedExperts):
        gate, down = PackedMatrix(2, 2), PackedMatrix(1, 1)
        return over_experts(by_tile, rows, weights, chosen, stack, PackedExperts(gate, gate, down))
    return over_experts(by_platform, rows, weights, chosen, stack, ExpertStack(2, 2, 1))


def grouped_experts(
    rows: Array, weights: Array, chosen: Array, stack: ExpertStack, activation: Activation
) -> Float[Array, "n d"]:
    """The (row, expert) pairs sorted by expert, through ragged products: the work of the chosen experts only. Ids
    outside 0 .. E - 1 add nothing."""
    count, k = chosen.shape
    here = (chosen >= 0) & (chosen < len(stack.gate))

    # Pairs are numbered row-major, n * K + k; `order` lists them by expert, each expert's in row order. Those of no
    # expert here come last, behind all groups.
    group = jnp.where(here, chosen, len(stack.gate)).ravel()
    order = jnp.argsort(group, stable=True)  # [N K]
    sizes = jnp.zeros((len(stack.gate) + 1,), jnp.int32).at[group].add(1)[:-1]  # [E], rows of each expert
    gathered = jnp.take(rows, order // k, axis=0)  # [N K, D]

    # [N K, F]; each run of `sizes[e]` rows meets expert e's weights alone.
    inner = activation(jax.lax.ragged_dot(gathered, stack.gate, sizes), jax.lax.ragged_dot(gathered, stack.up, sizes))
    out = jax.lax.ragged_dot(inner, stack.down, sizes)

    # Undoing the sort, not adding pairs to rows by scatter, fixes the order of each row's sum on every backend.
    pairs = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(count, k, -1)
    # Selected and not multiplied by 0: rows behind the groups may hold anything.
    pairs = jnp.where(here[..., None], pairs, 0)
    return jnp.einsum("nk,nkd->nd", weights.astype(pairs.dtype), pairs)


def experts_one_by_one(
    rows: Array, weights: Array, chosen: Array, stack: ExpertStack, activation: Activation
) -> Float[Array, "n d"]:
    """One expert after the other on all rows, in the memory of one dense MLP; experts that no row chose are skipped,
    and ids outside 0 .. E - 1 add nothing."""

    def add(total: Array, expert: tuple[Array, ...]) -> tuple[Array, None]:
        index, gate, up, down = expert

        # [N, 1]: 0 for rows that did not choose this expert, so that the product may run on all of them.
        share = jnp.sum(jnp.where(chosen == index, weights, 0), axis=1, keepdims=True).astype(rows.dtype)

        def run(total: Array) -> Array:
            return total + share * (activation(rows @ gate, rows @ up) @ down)

        # At decode widths most experts have no row: the branch skips reading their weights.
        return jax.lax.cond(jnp.any(chosen == index), run, lambda total: total, total), None

    return jax.lax.scan(add, jnp.zeros_like(rows), (jnp.arange(len(stack.gate)), *stack))[0]


def all_experts(
    rows: Array, weights: Array, chosen: Array, stack: ExpertStack, activation: Activation
) -> Float[Array, "n d"]:
    """Every expert on every row in one einsum, E/K times the work: the form that tests hold the others against."""
    share = jnp.einsum("nk,nke->ne", weights, jax.nn.one_hot(chosen, len(stack.gate), dtype=weights.dtype))
    gate = jnp.einsum("nd,edf->nef", rows, stack.gate)
    up = jnp.einsum("nd,edf->nef", rows, stack.up)
    return jnp.einsum("ne,nef,efd->nd", share.astype(rows.dtype), activation(gate, up), stack.down)


class SparseMLP(nnx.Module):
    """Σ_e w_e down_e(silu(gate_e x) * up_e x) over the `per_token` experts with the largest router probabilities.

    Probabilities are float32; the weights of the sum have x's dtype, as in the reference.
    """

    def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
        experts = config.experts
        if experts is None:
            raise ValueError("a sparse layer needs the config's experts")

        d, e, f, std = config.hidden_size, experts.count, experts.intermediate_size, config.initializer_range

        def weight(*shape: int) -> Array:
            return jax.random.normal(rngs.params(), shape, jnp.float32) * std

        # Stacked [E, ...] with "experts" as an axis, so that a mesh can split them whole.
        self.router_weight_de = param(weight(d, e), "embed", "experts")
        self.gate_weight_edf = param(weight(e, d, f), "experts", "embed", "mlp")
        self.up_weight_edf = param(weight(e, d, f), "experts", "embed", "mlp")
        self.down_weight_efd = param(weight(e, f, d), "experts", "mlp", "embed")
        self.experts = experts

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(rows)
        return mix_experts(rows, weights, chosen, self.stack, _swiglu).reshape(x.shape)

    def parts(self, x: Float[Array, "*n d"]) -> Float[Array, "1 *n d"]:
        """The mixture's output as a sum of one part, as `layers.MLP` has it of several."""
        return self(x)[None]

    @property
    def stack(self) -> ExpertStack:
        """The experts' weights as arrays."""
        return ExpertStack(self.gate_weight_edf[...], self.up_weight_edf[...], self.down_weight_efd[...])

    def route(self, rows: Float[Array, "n d"]) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
        """Weights [N, K] and ids [N, K] of each row's experts."""
        # The softmax is over all experts, before the choice: unnormalised weights sum to less than 1.
        probs = jax.nn.softmax((rows @ self.router_weight_de[...]).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probs, self.experts.per_token)

        if self.experts.normalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)

        return weights.astype(rows.dtype), chosen


def _swiglu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up
