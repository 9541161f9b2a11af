"""Drafts of all requests ranked by prefix survival (docs/algorithm.md, rules 73 to 78).

Axes: R request slots, K block position, M = R * K drafts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Ranked(NamedTuple):
    """All drafts by falling survival (ties: the lower position, then the lower slot), those past a cap last."""

    survival: Float[Array, " m"]
    owner: Int[Array, " m"]  # request
    valid: Bool[Array, " m"]  # within the request's cap
    grid: Float[Array, "r k"]
    caps: Int[Array, " r"]

    def lengths(self, count: Array) -> Int[Array, " r"]:
        """How many drafts of each request are among the first `count`."""
        if self.caps.shape[0] == 1:
            return count[None].astype(jnp.int32)
        inside = (jnp.arange(self.owner.shape[0]) < count).astype(jnp.int32)
        return jnp.zeros(self.caps.shape, jnp.int32).at[self.owner].add(inside)

    def forecast(self, count: Array, conditional: Float[Array, " k"]) -> Float[Array, " m"]:
        """Survival, falling, of the drafts behind the first `count`, forecast from the frontier's alone."""
        lengths = self.lengths(count)[:, None]
        position = jnp.arange(self.grid.shape[1])
        shown = jnp.take_along_axis(self.grid, jnp.minimum(lengths, self.grid.shape[1] - 1), axis=1)
        # The frontier's survival times the historical conditional survival of the positions behind it.
        logs = jnp.cumsum(jnp.log(conditional))
        behind = jnp.exp(logs - jnp.take(logs, jnp.minimum(lengths, self.grid.shape[1] - 1)))
        open_ = (position >= lengths) & (position < self.caps[:, None])
        values = jnp.where(open_, shown * behind, 0.0)
        return -jnp.sort(-values.ravel()) if values.shape[0] > 1 else _left_aligned(values[0], lengths[0, 0])


def survival(confidences: Float[Array, "r k"]) -> Float[Array, "r k"]:
    """a_k = c_1 ... c_k, multiplied from the left so that rounding never lets it rise with k."""
    columns = [confidences[:, 0]]
    for k in range(1, confidences.shape[1]):
        columns.append(columns[-1] * confidences[:, k])
    return jnp.stack(columns, axis=1)


def rank(grid: Float[Array, "r k"], caps: Int[Array, " r"]) -> Ranked:
    """The drafts of a survival `grid`, which does not rise along k: so the best n hold a prefix of each request."""
    requests, block = grid.shape
    inside = jnp.arange(block) < caps[:, None]
    # Position-major, so that the stable sort breaks ties by position and within a request keeps the order of the block.
    flat, owner = grid.T.ravel(), jnp.tile(jnp.arange(requests, dtype=jnp.int32), block)
    keys = jnp.where(inside.T.ravel(), -flat, 1.0)
    if requests > 1:
        keys, owner = jax.lax.sort((keys, owner), num_keys=1, is_stable=True)
    valid = keys <= 0
    return Ranked(jnp.where(valid, -keys, 0.0), owner, valid, grid, caps)


def _left_aligned(values: Float[Array, " k"], start: Array) -> Float[Array, " k"]:
    """values[start:] and then zeros: the falling sort of values that are zero before `start`."""
    index = jnp.arange(values.shape[0]) + start
    return jnp.where(index < values.shape[0], jnp.take(values, index, mode="clip"), 0.0)
