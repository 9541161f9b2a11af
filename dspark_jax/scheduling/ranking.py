"""Drafts of all requests ranked by prefix survival (docs/algorithm.md, rules 73 to 78).

Axes: R request slots, K block position, M = R * K drafts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Ranked(NamedTuple):
    """All drafts by falling survival (ties: the lower position, then the lower slot), those past a cap last."""

    survival: Float[Array, " m"]  # 0 past a cap
    owner: Int[Array, " m"]  # request
    valid: Bool[Array, " m"]  # within the request's cap
    grid: Float[Array, "r k"]  # survival a, not ranked
    caps: Int[Array, " r"]  # most drafts of each request

    def lengths(self, count: Array) -> Int[Array, " r"]:
        """How many drafts of each request are among the first `count`."""
        if self.caps.shape[0] == 1:  # spares a single request the scatter
            return count[None].astype(jnp.int32)

        # The first `count` of a request's drafts are a prefix of its block, since survival falls along it.
        inside = (jnp.arange(self.owner.shape[0]) < count).astype(jnp.int32)
        return jnp.zeros(self.caps.shape, jnp.int32).at[self.owner].add(inside)

    def forecast(self, count: Array, conditional: Float[Array, " k"]) -> Float[Array, " m"]:
        """Forecast survival, falling, of the drafts after the first `count`.

        Only the frontier's own survival is read, one entry per request: later entries of the grid depend on tokens
        whose verification is still to be decided (docs/algorithm.md, rules 78 and 80).
        """
        # [R, 1]: the frontier of each request is the draft behind its admitted ones.
        lengths = self.lengths(count)[:, None]
        position = jnp.arange(self.grid.shape[1])
        shown = jnp.take_along_axis(self.grid, jnp.minimum(lengths, self.grid.shape[1] - 1), axis=1)

        # The frontier's survival times the historical conditional survival of the positions behind it.
        logs = jnp.cumsum(jnp.log(conditional))
        behind = jnp.exp(logs - jnp.take(logs, jnp.minimum(lengths, self.grid.shape[1] - 1)))

        # Clamped frontiers, of requests whose whole block is admitted, are masked here.
        open_ = (position >= lengths) & (position < self.caps[:, None])
        values = jnp.where(open_, shown * behind, 0.0)
        return -jnp.sort(-values.ravel()) if values.shape[0] > 1 else _left_aligned(values[0], lengths[0, 0])


def survival(confidences: Float[Array, "r k"]) -> Float[Array, "r k"]:
    """a_k = c_1 ... c_k, multiplied from the left so that rounding never makes it rise with k: `rank` relies on it."""
    columns = [confidences[:, 0]]
    for k in range(1, confidences.shape[1]):
        columns.append(columns[-1] * confidences[:, k])
    return jnp.stack(columns, axis=1)


def rank(grid: Float[Array, "r k"], caps: Int[Array, " r"]) -> Ranked:
    """Rank the drafts of a survival `grid` that does not rise along k: the best n then form a prefix of each block, so
    one sort equals admission along the frontier (docs/algorithm.md, rules 74 and 78).

    Args:
        grid: survival a, in [0, 1].
        caps: the most drafts of each request that may be admitted.
    """
    requests, block = grid.shape
    inside = jnp.arange(block) < caps[:, None]

    # Position-major, so that the stable sort breaks ties by position and within a request keeps the order of the block.
    flat, owner = grid.T.ravel(), jnp.tile(jnp.arange(requests, dtype=jnp.int32), block)

    # Keys ascend: -a in [-1, 0] for drafts within a cap, 1 for the others, which therefore come last.
    keys = jnp.where(inside.T.ravel(), -flat, 1.0)
    if requests > 1:
        keys, owner = jax.lax.sort((keys, owner), num_keys=1, is_stable=True)

    valid = keys <= 0
    return Ranked(jnp.where(valid, -keys, 0.0), owner, valid, grid, caps)


def _left_aligned(values: Float[Array, " k"], start: Array) -> Float[Array, " k"]:
    """values[start:] followed by zeros: the falling order of values that are zero before `start` and fall after it."""
    index = jnp.arange(values.shape[0]) + start
    return jnp.where(index < values.shape[0], jnp.take(values, index, mode="clip"), 0.0)
