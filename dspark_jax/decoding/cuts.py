"""Top-k and top-p as thresholds, found by bisection on masses: a cut needs neither a sort nor a row gathered whole.

Over a vocabulary on several devices, each adds up its own part of a mass and only these sums are exchanged. On a CPU
the 31 passes over a row take a tenth to a thirtieth of the time of sorting it (`infer.studies.cuts`, docs/log.md).

Axes: R request slots, V vocab; `*n` any leading axes that start with R.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Distances are finite or infinite floats of one sign, whose bits count up with them: integers to bisect exactly.
_INFINITY = 0x7F800000

# Candidates tried in one pass. A CPU runs a loop for each; elsewhere a pass costs the latency of an exchange.
_CPU_WAYS, _WAYS = 2, 16
PASSES = 8
"""Passes that a search takes elsewhere than on a CPU: 16 to this power spans all 31 bits."""


def truncated(
    scaled: Float[Array, "r *n v"], top_k: Int[Array, " r"], top_p: Float[Array, " r"]
) -> Float[Array, "r *n v"]:
    """-inf outside the top-k, then outside the smallest subset of those whose renormalised mass reaches top_p.

    Tokens tied with the last one kept are kept too (docs/algorithm.md, rule 8). A row without a cut is left as it is,
    bit for bit.

    Args:
        scaled: logits over temperature less their largest, so that the largest is 0.
        top_k: tokens kept; 0: off.
        top_p: mass kept; from 1 on: off.
    """
    # [R] -> [R, *n]: a cut is one threshold a row.
    rows = scaled.shape[:-1]
    top_k, top_p = (jnp.broadcast_to(x.reshape(-1, *(1,) * (len(rows) - 1)), rows) for x in (top_k, top_p))
    distance = jax.lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32)

    # Counts are sums of ones, exact in float32 below 2^24 tokens.
    most = jnp.minimum(top_k, scaled.shape[-1]).astype(jnp.float32)
    limit = _reaching(distance, jnp.ones_like(scaled), most, top_k > 0)

    # top-p cuts by the mass of what top-k left. The first token always stays, even at top_p = 0.
    weights = jnp.where(distance <= limit[..., None], jnp.exp(scaled), 0.0)
    goal = jnp.maximum(top_p * jnp.sum(weights, axis=-1), jnp.finfo(jnp.float32).tiny)
    limit = jnp.minimum(limit, _reaching(distance, weights, goal, top_p < 1.0))

    return jnp.where(distance <= limit[..., None], scaled, -jnp.inf)


def _reaching(
    distance: Int[Array, "*n v"], weights: Float[Array, "*n v"], goal: Float[Array, "*n"], wanted: Bool[Array, "*n"]
) -> Int[Array, "*n"]:
    """The smallest distance within which each row's weights add up to its goal; infinity where none is wanted."""
    find = partial(jax.lax.while_loop, lambda bounds: jnp.any(bounds[1] - bounds[0] > 1))

    def search(ways: int, distance: Array, weights: Array, goal: Array, wanted: Array) -> Array:
        def narrowed(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            return _narrowed(ways, bounds, distance, weights, goal)

        # Too near, and far enough; a row without a cut starts where the others end, so that it costs no pass.
        far = jnp.full_like(distance[..., 0], _INFINITY)
        return find(narrowed, (jnp.where(wanted, -1, far - 1), far))[1]

    # Exact either way: both find the same number.
    operands = (distance, weights, goal, wanted)
    return jax.lax.platform_dependent(*operands, cpu=partial(search, _CPU_WAYS), default=partial(search, _WAYS))


def _narrowed(
    ways: int, bounds: tuple[Array, Array], distance: Array, weights: Array, goal: Array
) -> tuple[Array, Array]:
    """Bounds [*n] (too near, far enough) one `ways`-th as far apart, and at most 1 where they were `ways` apart."""
    near, far = bounds
    steps, width = jnp.arange(1, ways), (far - near)[..., None]
    # width * steps // ways, whose product would overflow.
    tried = near[..., None] + width // ways * steps + width % ways * steps // ways

    within = distance[..., None, :] <= tried[..., None]
    enough = jnp.sum(jnp.where(within, weights[..., None, :], 0.0), axis=-1) >= goal[..., None]

    near = jnp.maximum(near, jnp.max(jnp.where(enough, near[..., None], tried), axis=-1))
    return near, jnp.minimum(far, jnp.min(jnp.where(enough, tried, far[..., None]), axis=-1))
