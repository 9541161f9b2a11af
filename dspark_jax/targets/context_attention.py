"""Attention of training blocks by kernels: the context's scores never leave the chip, forward or backward.

Axes: B batch, T context position, N block, K block position, Q query heads, G kv heads, n = Q/G, H head dim,
M = N * n * K rows that share a kv head.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dspark_jax.targets.attention import KeysValues
from dspark_jax.targets.kernels.ranges import Ranges, over_mesh
from dspark_jax.targets.products import product


def context_attention(
    q: Float[Array, "b n k q h"],
    block: KeysValues,
    prefix: KeysValues,
    anchors: Int[Array, "b n"],
    lowest: Int[Array, "b n #k"] | None,
    *,
    scale: float,
    platform: str,
    interpret: bool = False,
) -> Float[Array, "b n k q h"]:
    """The values of `blocks_attention.blocks_attention`: rows see positions `lowest`..anchor - 1 of the prefix
    [B, G, T, H] (None: from 0 on) and all of their own block [B, N, K, G, H].

    Anchors in ascending order are fastest: neighbouring blocks are computed together. `platform`, "tpu" or "gpu": whose
    kernels; `interpret`: run as plain jax, for tests on a CPU.
    """
    b, n, k, heads, h = q.shape
    groups = prefix.keys.shape[1]
    rows = q.reshape(b, n, k, groups, -1, h).transpose(0, 3, 1, 4, 2, 5)  # [B, G, N, n, K, H]

    def of_rows(x: Array) -> Array:
        """[B, N, #K] -> [B, M]."""
        return jnp.broadcast_to(x[:, :, None], (b, n, heads // groups, k)).reshape(b, -1)

    low = jnp.zeros_like(anchors)[..., None] if lowest is None else jnp.maximum(lowest, 0)
    ranges = Ranges(of_rows(low), of_rows(anchors[..., None]))
    outer, log_sum = over_mesh(rows.reshape(b, groups, -1, h), *prefix, ranges, scale, platform, interpret)
    outer, log_sum = outer.reshape(rows.shape).astype(jnp.float32), log_sum.reshape(*rows.shape[:-1], 1)

    # The block's own scores are few; both parts are joined by their sums of exp(score). The shift needs no gradient.
    inner = product("bgnrkh,bnjgh->bgnrkj", rows, block.keys) * scale
    top = jax.lax.stop_gradient(jnp.maximum(log_sum, jnp.max(inner, axis=-1, keepdims=True)))
    weights, share = jnp.exp(inner - top), jnp.exp(log_sum - top)
    own = product("bgnrkj,bnjgh->bgnrkh", weights.astype(block.values.dtype), block.values)
    out = (share * outer + own) / (share + jnp.sum(weights, axis=-1, keepdims=True))
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(q.shape).astype(q.dtype)
