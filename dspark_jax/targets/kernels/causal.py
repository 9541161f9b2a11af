"""Causal attention of whole rows by the kernels of `ranges.py`: a prompt's or a training sequence's scores stay on the
chip.

Axes: B batch, T position, Q query heads, G kv heads, n = Q/G, H head dim, M = T * n rows that share a kv head.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dspark_jax.targets.kernels.ranges import Ranges, over_mesh


def causal_attention(
    q: Float[Array, "b t q h"],
    keys: Float[Array, "b g t h"],
    values: Float[Array, "b g t h"],
    lowest: Int[Array, "#b t"],
    *,
    scale: float,
    platform: str,
    interpret: bool = False,
) -> Float[Array, "b t q h"]:
    """Each position sees positions `lowest`..itself. Differentiable.

    `platform`, "tpu" or "gpu": whose kernels; `interpret`: run as plain jax, for tests on a CPU.
    """
    b, t, heads, h = q.shape
    groups = keys.shape[1]
    # Positions come first among the rows of a head: a block of rows then covers few of them, and few blocks of keys.
    rows = q.reshape(b, t, groups, -1, h).transpose(0, 2, 1, 3, 4).reshape(b, groups, -1, h)

    def of_rows(x: Array) -> Array:
        return jnp.repeat(jnp.broadcast_to(x, (b, t)), heads // groups, axis=1)

    ranges = Ranges(of_rows(lowest), of_rows(jnp.arange(1, t + 1)))
    out, _ = over_mesh(rows, keys, values, ranges, scale, platform, interpret)
    return out.reshape(b, groups, t, -1, h).transpose(0, 2, 1, 3, 4).reshape(q.shape)
