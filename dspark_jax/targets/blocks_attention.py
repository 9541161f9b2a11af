"""Attention of many blocks over a shared prefix, as training differentiates it: scores exist for a few blocks at a
time.

The backward pass makes the weights again from the log-sum-exp of each row, so that nothing but the result is stored.
Where all blocks are one chunk, their weights are kept instead: no more than the backward pass would hold.

Axes: B batch, T context position, N block, C blocks of a chunk, K block position, Q query heads, G kv heads (groups),
r = Q/G, H head dim, M = r*C*K rows that share one kv head. Scores and sums are float32; products take the storage
dtype.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dspark_jax.targets.attention import MASKED, KeysValues

CHUNK = 64
"""Blocks whose scores [B, Q, CHUNK * K, T] exist at once."""


class _Part(NamedTuple):
    """A chunk of blocks, or all of them with the chunks as a first axis."""

    q: Array  # [B, C, K, Q, H]
    block: KeysValues  # [B, C, G, K, H]
    allowed: Array  # [B, C, K or 1, T]


def blocks_attention(
    q: Float[Array, "b n k q h"],
    block: KeysValues,
    prefix: KeysValues,
    allowed: Bool[Array, "b n #k t"],
    *,
    scale: float,
    chunk: int = CHUNK,
) -> Float[Array, "b n k q h"]:
    """N blocks of K rows, each attending the `allowed` positions of a prefix [B, G, T, H] and all of its own block.

    The values of `attention.prefix_block_attention`, in chunks of `chunk` blocks and with a gradient of its own, whose
    cotangents are rounded to the operands' dtype (docs/algorithm.md, rule 42).
    """
    count, chunk = q.shape[1], min(chunk, q.shape[1])
    # Head-major, as products have their batch axes first.
    whole = _Part(q, jax.tree.map(lambda x: x.swapaxes(2, 3), block), allowed)

    # Blocks that fill the last chunk see no prefix, and their results are cut off.
    parts = jax.tree.map(lambda x: _split(x, chunk), whole)
    out = _attend(scale, parts, prefix)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :count]


def _split(x: Array, size: int) -> Array:
    """[B, N, ...] -> [chunks, B, size, ...], N filled up with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, parts: _Part, prefix: KeysValues) -> Array:
    return _forward(scale, parts, prefix)[0]


def _forward(scale: float, parts: _Part, prefix: KeysValues) -> tuple[Array, tuple[Any, ...]]:
    def chunk(part: _Part) -> tuple[Array, tuple[Array, ...]]:
        rows = _rows(part.q, prefix)
        scores, inner = _scores(rows, part, prefix, scale)

        # All keys compete in one softmax. A row sees its own block at least, so no maximum is MASKED.
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.max(inner, axis=-1, keepdims=True))
        weights, own = jnp.exp(scores - top), jnp.exp(inner - top)
        total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.sum(own, axis=-1, keepdims=True)

        out = (_onto("bgmt,bgth->bgmh", weights, prefix.values) + _of_block(own, part.block.values)) / total
        whole = len(parts.q) == 1
        return _unstacked(out, part.q), (weights, own, total) if whole else (top + jnp.log(total),)

    out, kept = _mapped(chunk, parts)
    return out, (parts, prefix, out, kept)


def _backward(scale: float, kept: tuple[Any, ...], cotangent: Array) -> tuple[_Part, KeysValues]:
    parts, prefix, out, sums = kept

    def chunk(given: tuple[_Part, Array, tuple[Array, ...], Array]) -> tuple[KeysValues, tuple[Array, KeysValues]]:
        part, out, sums, cotangent = given
        rows, pulled = _rows(part.q, prefix), _rows(cotangent, prefix)
        weights, own = _weights(rows, part, prefix, scale, sums)

        # d score = weight (d weight - Σ weight d weight), and that sum is the result times its cotangent.
        mean = jnp.sum(pulled.astype(jnp.float32) * _rows(out, prefix), axis=-1, keepdims=True)
        d_scores = weights * (_product("bgmh,bgth->bgmt", pulled, prefix.values) - mean) * scale
        d_inner = own * (_inner(pulled, part.block.values) - mean) * scale

        d_rows = _onto("bgmt,bgth->bgmh", d_scores, prefix.keys) + _of_block(d_inner, part.block.keys)
        d_prefix = KeysValues(_onto("bgmt,bgmh->bgth", d_scores, rows), _onto("bgmt,bgmh->bgth", weights, pulled))
        d_block = KeysValues(_to_block(d_inner, rows, part), _to_block(own, pulled, part))
        return d_prefix, (_unstacked(d_rows, part.q), d_block)

    given = parts, out, sums, cotangent
    if len(out) == 1:
        d_prefix, made = chunk(jax.tree.map(lambda x: x[0], given))
        d_rows, d_block = jax.tree.map(lambda x: x[None], made)
    else:
        # The prefix's gradient is a sum over chunks, in float32.
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), prefix)

        def step(total: KeysValues, given: Any) -> tuple[KeysValues, Any]:
            more, made = chunk(given)
            return jax.tree.map(jnp.add, total, more), made

        d_prefix, (d_rows, d_block) = jax.lax.scan(step, start, given)

    d_prefix = jax.tree.map(lambda d, x: d.astype(x.dtype), d_prefix, prefix)
    return _Part(d_rows, d_block, None), d_prefix  # type: ignore[arg-type]


_attend.defvjp(_forward, _backward)


def _weights(
    rows: Array, part: _Part, prefix: KeysValues, scale: float, sums: tuple[Array, ...]
) -> tuple[Array, Array]:
    """The weights of prefix and own block, from what the forward pass kept of them."""
    if len(sums) > 1:
        weights, own, total = sums
        return weights / total, own / total
    scores, inner = _scores(rows, part, prefix, scale)
    return jnp.exp(scores - sums[0]), jnp.exp(inner - sums[0])


def _mapped(chunk: Any, parts: Any) -> Any:
    """`chunk` of each part, stacked; a single one needs no loop."""
    if len(jax.tree.leaves(parts)[0]) > 1:
        return jax.lax.map(chunk, parts)
    return jax.tree.map(lambda x: x[None], chunk(jax.tree.map(lambda x: x[0], parts)))


def _rows(x: Array, prefix: KeysValues) -> Array:
    """[B, C, K, Q, H] -> [B, G, M, H]: the rows that share a kv head, in one matrix."""
    b, c, k, _, h = x.shape
    groups = prefix.keys.shape[1]
    return x.reshape(b, c, k, groups, -1, h).transpose(0, 3, 4, 1, 2, 5).reshape(b, groups, -1, h)


def _unstacked(rows: Array, like: Array) -> Array:
    """The inverse of `_rows`, in the shape and dtype of `like`."""
    (b, c, k, _, h), groups = like.shape, rows.shape[1]
    return rows.reshape(b, groups, -1, c, k, h).transpose(0, 3, 4, 1, 2, 5).reshape(like.shape).astype(like.dtype)


def _scores(rows: Array, part: _Part, prefix: KeysValues, scale: float) -> tuple[Array, Array]:
    """(scores [B, G, M, T] against the prefix, [B, G, M, K] against the own block), float32."""
    b, groups, m, _ = rows.shape
    scores = _product("bgmh,bgth->bgmt", rows, prefix.keys) * scale

    # The mask differs by block, and by row where there is a window.
    c, k = part.q.shape[1:3]
    apart = scores.reshape(b, groups, -1, c, k, scores.shape[-1])
    scores = jnp.where(part.allowed[:, None, None], apart, MASKED).reshape(scores.shape)
    return scores, _inner(rows, part.block.keys) * scale


def _inner(rows: Array, own: Array) -> Array:
    """[B, G, M, K]: products of rows with each of their own block's keys or values [B, C, G, K, H]."""
    b, c, groups, k, h = own.shape
    apart = rows.reshape(b, groups, -1, c, k, h)
    return _product("bgrckh,bcgjh->bgrckj", apart, own).reshape(b, groups, -1, k)


def _of_block(weights: Array, own: Array) -> Array:
    """[B, G, M, H]: the own block's keys or values [B, C, G, K, H] summed by weights [B, G, M, K]."""
    b, c, groups, k, h = own.shape
    apart = weights.reshape(b, groups, -1, c, k, k)
    return _onto("bgrckj,bcgjh->bgrckh", apart, own).reshape(b, groups, -1, h)


def _to_block(weights: Array, rows: Array, part: _Part) -> Array:
    """[B, C, G, K, H]: rows [B, G, M, H] summed over a block by weights [B, G, M, K], for each of its keys."""
    b, c, groups, k, h = part.block.keys.shape
    apart = weights.reshape(b, groups, -1, c, k, k)
    made = _onto("bgrckj,bgrckh->bcgjh", apart, rows.reshape(b, groups, -1, c, k, h))
    return made.astype(part.block.keys.dtype)


def _onto(equation: str, weights: Array, x: Array) -> Array:
    """A product of float32 weights, rounded to the dtype of `x`, with a float32 result."""
    return _product(equation, weights.astype(x.dtype), x)


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
