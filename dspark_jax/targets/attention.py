"""Attention cores. A decoder layer passes its q, k, v to an `Attend`, which alone decides the keys they attend to.

Axes: B batch, T context position, N block, K block position, Q query heads, G kv heads (groups), H head dim,
M = N*(Q/G)*K rows that share one kv head. Scores and softmax are float32 whatever the storage dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.targets.block_rows import PackedRows, TreeRows
from dspark_jax.targets.kernels.causal import causal_attention
from dspark_jax.targets.kernels.held import held_attention
from dspark_jax.targets.kernels.ranges import platform_with_kernels
from dspark_jax.targets.products import product

# A CPU reads caches from this size on chunk by chunk, no further than they are held. Taking a chunk out of the cache is
# a copy, which costs more than reading a smaller cache whole.
LARGE, HELD_CHUNK = 2048, 512
# Large and finite: a row without keys gives zeros instead of NaN, and -inf - -inf never happens in the merge.
MASKED = -1e30


class KeysValues(NamedTuple):
    """One layer's keys (after k-norm and RoPE) and values; cached ones are head-major [B, G, T, H]: a `Prefix`."""

    keys: Array
    values: Array

    @property
    def size(self) -> int:
        return self.keys.shape[2]

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    @property
    def step(self) -> int:
        return HELD_CHUNK

    def chunk(self, number: Int[Array, ""]) -> "tuple[KeysValues, Array]":
        # The last chunk lies further left where the size is no multiple.
        at = jnp.minimum(number * HELD_CHUNK, self.size - HELD_CHUNK)
        return KeysValues(*(jax.lax.dynamic_slice_in_dim(x, at, HELD_CHUNK, axis=2) for x in self)), at


class Prefix(Protocol):
    """A layer's cached keys and values as attention reads them, chunk by chunk; `KeysValues` can be read at once too.

    size: T, the positions that a request may hold. heads: G. step: the positions C of a chunk.
    """

    @property
    def size(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def step(self) -> int: ...

    def chunk(self, number: Int[Array, ""]) -> tuple[KeysValues, Array]:
        """(keys and values [B, G, C, H] of positions number * C.., the first position); where fewer than C are left,
        the last C of all."""
        ...


class Attend(Protocol):
    """q [*n, Q, H], k and v [*n, G, H] of layer `layer` -> attention output [*n, Q, H]."""

    def __call__(self, layer: int, q: Array, k: Array, v: Array, *, scale: float, window: int | None) -> Array: ...


@dataclass(frozen=True)
class CausalRows:
    """Causal attention within right-padded rows [B, T]; `segments` (0 = padding) keeps packed conversations apart.

    By a kernel on TPUs and NVIDIA's GPUs, where the shapes fit. Elsewhere `query_chunk` bounds the float32 scores to
    [B, Q, query_chunk, T]; longer rows are mapped chunk by chunk.
    """

    segments: Int[Array, "b t"] | None = None
    query_chunk: int = 512

    def __call__(self, layer: int, q: Array, k: Array, v: Array, *, scale: float, window: int | None) -> Array:
        length = q.shape[1]
        # Head-major, like cached keys, so that one core serves rows and caches.
        keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, G, T, H]
        if platform := platform_with_kernels(keys):
            return causal_attention(q, keys, values, self.lowest(length, window), scale=scale, platform=platform)

        # A length that is not a multiple of `query_chunk` takes the whole score matrix at once: pad long rows to one.
        if length <= self.query_chunk or length % self.query_chunk:
            return self._rows(q, keys, values, 0, scale, window)

        starts = jnp.arange(0, length, self.query_chunk)

        def chunk(start: Array) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(q, start, self.query_chunk, axis=1)
            return self._rows(rows, keys, values, start, scale, window)

        # Without the checkpoint the backward pass would keep every chunk's scores, the very memory that chunking saves.
        out = jax.lax.map(jax.checkpoint(chunk), starts)  # [chunks, B, chunk, Q, H]
        return jnp.moveaxis(out, 0, 1).reshape(q.shape)

    def lowest(self, length: int, window: int | None) -> Int[Array, "#b t"]:
        """The first position that each one sees."""
        edge = jnp.maximum(jnp.arange(length) - (window or length) + 1, 0)[None]
        return edge if self.segments is None else jnp.maximum(edge, segment_starts(self.segments))

    def _rows(
        self, q: Array, keys: Array, values: Array, start: int | Array, scale: float, window: int | None
    ) -> Array:
        # `start` is the position of the first query row; the keys always begin at position 0.
        rows = start + jnp.arange(q.shape[1])[:, None]
        columns = jnp.arange(keys.shape[2])[None, :]
        allowed = columns <= rows

        # docs/algorithm.md, rule 25: a key at k is visible to a query at q iff q - w < k <= q.
        if window is not None:
            allowed &= columns > rows - window
        allowed = allowed[None]

        if self.segments is not None:
            # Padding is segment 0 and would see padding; its outputs are never read.
            mine = jax.lax.dynamic_slice_in_dim(self.segments, start, q.shape[1], axis=1)
            allowed = allowed & (mine[:, :, None] == self.segments[:, None, :])

        # N = 1 block without keys of its own: the row itself is the prefix.
        out = prefix_block_attention(q[:, None], None, KeysValues(keys, values), allowed[:, None], None, scale=scale)
        return out[:, 0]


def segment_starts(segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """The first position of each position's segment; subtracted from a position, it gives the place within."""
    # The first column always starts a segment, whatever its id.
    changes = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    # Starts increase along the row, so a running maximum carries the latest one forward.
    return jax.lax.cummax(jnp.where(changes, jnp.arange(segments.shape[1]), 0), axis=1)


@dataclass(frozen=True)
class CachedBlock:
    """A block of new rows per request, attending the request's cached prefix and, causally, the block itself.

    The cache is only read. `lengths` [R] are the valid cached positions (the block starts there). With `packed`, the
    layer's rows are [P, ...] and only this core sees the [R, W] grid; without, they are [R, W, ...] already. Without
    `tree` the rows are a chain. `held` [R]: the lengths of requests whose rows matter, 0 for the others, whose cached
    positions are not read; None: all matter.
    """

    cache: Sequence[Prefix]
    lengths: Int[Array, " r"]
    packed: PackedRows | None = None
    tree: TreeRows | None = None
    held: Int[Array, " r"] | None = None

    def __call__(self, layer: int, q: Array, k: Array, v: Array, *, scale: float, window: int | None) -> Array:
        if self.packed is not None:
            # Only here do rows meet other rows of their request, so only here are they put side by side.
            q, k, v = (self.packed.to_grid(x) for x in (q, k, v))  # [P, ...] -> [R, W, ...]

        # The block is causal: zero cells that pad a shorter request come after its real rows, which do not see them.
        offsets, within = None, causal_block(q.shape[1], window)[None]
        if self.tree is not None:
            offsets, within = self.tree.offsets[:, None], tree_block(self.tree, window)

        held = self.lengths if self.held is None else self.held
        lowest = lowest_seen(self.lengths[:, None], q.shape[1], window, offsets=offsets)
        # A failing draft would fail the rows before it.
        apart = q.shape[1] > 1
        out = block_attention(q, KeysValues(k, v), self.cache[layer], held, lowest, within, scale=scale, apart=apart)
        return out if self.packed is None else self.packed.from_grid(out)


def prefix_mask(
    lengths: Int[Array, "b n"],
    size: int,
    width: int,
    window: int | None = None,
    starts: Int[Array, "b n"] | None = None,
) -> Bool[Array, "b n #k t"]:
    """Cached position t is visible to row k of a block starting at `lengths` iff t < lengths (and in the window, and
    not before the block's segment, which begins at `starts`)."""
    # Every later position of the cache is junk: rejected drafts, or an earlier request of the slot.
    columns = jnp.arange(size)
    allowed = columns < lengths[:, :, None, None]  # [B, N, 1, T]

    lowest = lowest_seen(lengths, width, window, starts)
    return allowed if lowest is None else allowed & (columns >= lowest[..., None])


def lowest_seen(
    lengths: Int[Array, "b n"],
    width: int,
    window: int | None = None,
    starts: Int[Array, "b n"] | None = None,
    offsets: Int[Array, "b n k"] | None = None,
) -> Int[Array, "b n #k"] | None:
    """The first cached position that each row of `prefix_mask` sees; None where all see position 0. Rows stand at
    lengths + `offsets`; None: at 0, 1, .."""
    # Packed conversations: the context of another segment in the same row is not this block's.
    first = None if starts is None else starts[:, :, None]
    if window is None:
        return first

    # The window's lower edge moves with the row; without a window all rows see the same.
    edge = lengths[:, :, None] + (jnp.arange(width) if offsets is None else offsets) - window + 1
    return edge if first is None else jnp.maximum(edge, first)


def causal_block(width: int, window: int | None = None) -> Bool[Array, "k k"]:
    """Which of a block's own keys each of its rows sees: itself and earlier ones, within the window."""
    # Offsets within the block, not positions: all of a block's rows shift together.
    rows, columns = jnp.arange(width)[:, None], jnp.arange(width)[None, :]
    allowed = columns <= rows
    return allowed if window is None else allowed & (columns > rows - window)


def tree_block(tree: TreeRows, window: int | None = None) -> Bool[Array, "r w w"]:
    """`causal_block` of rows that form a tree, a mask for each request."""
    seen = tree.seen
    if window is not None:
        seen &= tree.offsets[:, None, :] > tree.offsets[:, :, None] - window
    return seen


def block_attention(
    q: Float[Array, "r k q h"],
    block: KeysValues,
    prefix: Prefix,
    held: Int[Array, " r"],
    lowest: Int[Array, "r 1 #k"] | None,
    within: Bool[Array, "#r k j"] | None,
    *,
    scale: float,
    apart: bool = False,
) -> Float[Array, "r k q h"]:
    """One block of K rows for each request over what the request holds and over the block's own keys [R, J, G, H].

    An accelerator reads the positions `lowest`..`held` - 1 of a request alone, by a kernel where the shapes fit
    (targets/kernels/held.py). `within`: own keys that a row sees; None: all. Not differentiable. `apart`: a row whose
    own key or value is not finite gives NaN, and the others see zeros there; J = K.
    """

    def einsum(own_keys: Array, own_values: Array) -> Array:
        allowed = prefix_mask(held[:, None], prefix.size, q.shape[1])
        if lowest is not None:
            allowed &= jnp.arange(allowed.shape[-1]) >= lowest[..., None]
        own = KeysValues(own_keys[:, None], own_values[:, None])
        inner = None if within is None else within[:, None, None, None]
        most = jnp.max(held)
        return prefix_block_attention(q[:, None], own, prefix, allowed, inner, scale=scale, held=most)[:, 0]

    bound = None if lowest is None else lowest[:, 0]
    return held_attention(q, *block, prefix, held, bound, within, scale, einsum, apart)


def prefix_block_attention(
    q: Float[Array, "b n k q h"],
    block: KeysValues | None,
    prefix: Prefix,
    prefix_allowed: Bool[Array, "b n #k t"],
    block_allowed: Bool[Array, "#b #g #n #r k k"] | Bool[Array, "k k"] | None,
    *,
    scale: float,
    held: Int[Array, ""] | None = None,
) -> Float[Array, "b n k q h"]:
    """N blocks of K rows, each attending a shared prefix [B, G, T, H] and its own block [B, N, K, G, H].

    The two score matrices are computed apart and merged by log-sum-exp, so nothing of size [T + N K]^2 exists and the
    prefix is never copied next to the block. `block` None: the prefix only. `block_allowed` None: all of the block.
    `held`: the allowed positions are all below it, so that a CPU need not read those behind; None: all of the prefix is
    read, which alone can be differentiated.
    """
    b, n, k, q_heads, h = q.shape
    groups = prefix.heads
    rows = q.reshape(b, n, k, groups, q_heads // groups, h).transpose(0, 3, 1, 4, 2, 5)  # [B, G, N, Q/G, K, H]

    inner = None
    if block is not None:
        inner = product("bgnrkh,bnjgh->bgnrkj", rows, block.keys) * scale  # [B, G, N, Q/G, K, K]
        if block_allowed is not None:
            inner = jnp.where(block_allowed, inner, MASKED)

    if not isinstance(prefix, KeysValues):
        # Pages lie anywhere: to read all of them at once would take a copy as large as a cache that has none.
        reach = jnp.asarray(prefix.size if held is None else held)
        out = _in_chunks(rows, inner, block, prefix, prefix_allowed, scale, reach)
    elif held is None or prefix.size < LARGE:
        out = _at_once(rows, inner, block, prefix, prefix_allowed, scale)
    else:
        # An accelerator reads a whole cache faster than its parts in turn.
        out = jax.lax.platform_dependent(
            cpu=lambda: _in_chunks(rows, inner, block, prefix, prefix_allowed, scale, held),
            default=lambda: _at_once(rows, inner, block, prefix, prefix_allowed, scale),
        )
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(q.shape).astype(q.dtype)


def _scores(rows: Array, keys: Array, allowed: Array, scale: float) -> Array:
    """[B, G, N, Q/G, K, T] float32 scores of the rows [B, G, N, Q/G, K, H] against keys [B, G, T, H]."""
    # One matrix product per (batch, kv head): all rows that share the head are stacked as M = N * (Q/G) * K rows.
    stacked = rows.reshape(*rows.shape[:2], -1, rows.shape[-1])  # [B, G, M, H]
    scores = product("bgmh,bgth->bgmt", stacked, keys) * scale

    # The mask differs by block and row, so the stacked rows are told apart again.
    scores = scores.reshape(*rows.shape[:-1], -1)
    return jnp.where(allowed[:, None, :, None], scores, MASKED)


def _weighted(weights: Array, values: Array) -> Array:
    """[B, G, N, Q/G, K, H] float32: the values [B, G, T, H] summed by weights [B, G, N, Q/G, K, T]."""
    # Weights are cast to the values' dtype, as kernels do; their sum stays float32.
    flat = weights.reshape(*weights.shape[:2], -1, weights.shape[-1]).astype(values.dtype)
    out = product("bgmt,bgth->bgmh", flat, values)
    return out.reshape(*weights.shape[:-1], -1)


def _of_block(weights: Array, block: KeysValues) -> Array:
    """The block's own values summed by weights [B, G, N, Q/G, K, K]."""
    weights = weights.astype(block.values.dtype)
    return product("bgnrkj,bnjgh->bgnrkh", weights, block.values)


def _at_once(
    rows: Array, inner: Array | None, block: KeysValues | None, prefix: KeysValues, allowed: Array, scale: float
) -> Array:
    """Attention of the rows [B, G, N, Q/G, K, H], float32, over the whole prefix."""
    scores = _scores(rows, prefix.keys, allowed, scale)
    top = jnp.max(scores, axis=-1, keepdims=True)

    # All keys compete in one softmax, so the block's scores are taken against the same maximum as the prefix's.
    if inner is not None:
        top = jnp.maximum(top, jnp.max(inner, axis=-1, keepdims=True))

    # A row without keys has maximum MASKED; the floor lies far above it, so its weights are exp(-5e29) = 0 and not
    # exp(0) = 1, a uniform mean (docs/algorithm.md, rule 24). The shift cancels in the quotient: it needs no gradient.
    top = jax.lax.stop_gradient(jnp.maximum(top, MASKED / 2))

    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _weighted(weights, prefix.values)

    if inner is not None and block is not None:
        inner = jnp.exp(inner - top)
        total = total + jnp.sum(inner, axis=-1, keepdims=True)
        out = out + _of_block(inner, block)

    # Only a row without any key has a total of 0, and its sum of values is 0 as well.
    return out / jnp.where(total > 0, total, 1.0)


def _in_chunks(
    rows: Array,
    inner: Array | None,
    block: KeysValues | None,
    prefix: Prefix,
    allowed: Array,
    scale: float,
    held: Array,
) -> Array:
    """As `_at_once`, reading the prefix chunk by chunk up to `held`: the block first, then a running softmax.

    A chunk in which a row sees no key leaves the row's sums as they are, bit for bit, so that a request's result does
    not depend on how much the others hold.
    """
    width = prefix.step
    floor = jnp.full((*rows.shape[:-1], 1), MASKED / 2, jnp.float32)
    start = floor, jnp.zeros_like(floor), jnp.zeros(rows.shape, jnp.float32)
    if inner is not None and block is not None:
        top = jnp.maximum(floor, jnp.max(inner, axis=-1, keepdims=True))
        weights = jnp.exp(inner - top)
        start = top, jnp.sum(weights, axis=-1, keepdims=True), _of_block(weights, block)

    def step(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = sums
        # Where a last chunk lies further left than its number says, what was read before counts once.
        (keys, values), at = prefix.chunk(number)
        mask = jax.lax.dynamic_slice_in_dim(allowed, at, width, axis=3)
        mask &= at + jnp.arange(width) >= number * width

        scores = _scores(rows, keys, mask, scale)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        # 1 exactly where the maximum stays.
        less, weights = jnp.exp(top - higher), jnp.exp(scores - higher)
        total = less * total + jnp.sum(weights, axis=-1, keepdims=True)
        return higher, total, less * out + _weighted(weights, values)

    _, total, out = jax.lax.fori_loop(0, (held + width - 1) // width, step, start)
    return out / jnp.where(total > 0, total, 1.0)
