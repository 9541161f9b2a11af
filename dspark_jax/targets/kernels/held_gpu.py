"""The GPU's kernel: the positions that a request holds, shared between several programs and joined by log-sum-exp.

Operands are read as they lie, since every kernel that prepares one takes as long as this one in a small round.

Axes: R requests, W rows of a block, G kv heads, N query heads of each, M rows that share a kv head, S cached positions,
J keys of a row's own block, H head dim, P parts of what a request holds; of a cache in pages, U pages of C positions,
of which a request has at most T.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from dspark_jax.targets.kernels import layer_gpu
from dspark_jax.targets.kernels.layer_gpu import power
from dspark_jax.targets.kernels.softmax import MASKED, Sums, dot

HEAD_SIZES = (64, 128, 256)
BLOCK = 64
"""Positions that are read at once, or those of a page if it is smaller; the cache's size must be a multiple."""
PROGRAMS = 264
"""Programs at work together, two for each multiprocessor of an H100: fewer requests have their positions split."""
STAGE_BYTES = 192 * 2**10
"""Of a multiprocessor's shared memory, for the blocks that are on their way."""
TILE_BYTES = 80 * 2**10
"""Of the rows that share a kv head and of the own block's keys and values, at most: with more of them the blocks on
their way no longer fit."""
LEAST = 16
"""Rows and columns of a tensor core's smallest product."""


def takes(
    q: Float[Array, "r w q h"],
    keys: Float[Array, "r g s h"] | Float[Array, "u c gh"],
    own: Float[Array, "r j g h"],
    tables: Array | None,
) -> bool:
    """Whether the kernel can be compiled for rows with these keys of their block over such a cache, of which it reads
    whole blocks, or over pages with `tables`."""
    tile = Tile.of(q.shape[1], q.shape[2] // own.shape[2], own.shape[1])
    fits = (tile.rows * tile.heads + 2 * tile.columns) * q.shape[3] * keys.dtype.itemsize <= TILE_BYTES
    whole = keys.shape[2] % BLOCK == 0 if tables is None else keys.shape[1] >= LEAST
    return fits and whole and q.shape[3] in HEAD_SIZES


def attend(
    q: Float[Array, "r w g n h"],
    keys: Float[Array, "r g s h"] | Float[Array, "u c gh"],
    values: Float[Array, "r g s h"] | Float[Array, "u c gh"],
    lengths: Int[Array, " r"],
    own_keys: Float[Array, "r j g h"],
    own_values: Float[Array, "r j g h"],
    lowest: Int[Array, "r w"] | None,
    within: Float[Array, "#r w j"] | None,
    tables: Int[Array, "r t"] | None = None,
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "r w g n h"]:
    """As the TPU's: attention over positions `lowest`..`lengths` - 1 and the own block; no other position is read."""
    requests, width, groups, shared, size = q.shape
    tile, span = Tile.of(width, shared, own_keys.shape[1]), keys.shape[2]
    cached, read = pl.BlockSpec((None, None, span, size), lambda r, g, p: (r, g, 0, 0)), BLOCK
    if tables is not None:
        pages, page = keys.shape[:2]
        span, read = tables.shape[1] * page, min(BLOCK, page)
        cached = pl.BlockSpec((pages, page, size), lambda r, g, p: (0, 0, g))
    parts = max(1, min(PROGRAMS // (requests * groups), span // (2 * read)))

    one = pl.BlockSpec((None,), lambda r, g, p: (r,))
    block = pl.BlockSpec((None, tile.columns, None, size), lambda r, g, p: (r, 0, g, 0))
    operands: list[Array] = [lengths, q, keys, values, own_keys, own_values]
    specs = [
        one, pl.BlockSpec((None, tile.rows, None, tile.heads, size), lambda r, g, p: (r, 0, g, 0, 0)),
        cached, cached, block, block,
    ]  # fmt: skip
    if lowest is not None:
        operands += [lowest, jnp.maximum(jnp.min(lowest, axis=1), 0) // read]
        specs += [pl.BlockSpec((None, tile.rows), lambda r, g, p: (r, 0)), one]
    if within is not None:
        for_all = len(within) == 1
        operands.append(within)
        specs.append(pl.BlockSpec((None, tile.rows, tile.columns), lambda r, g, p: (0 if for_all else r, 0, 0)))

    if tables is not None:
        operands.append(tables)
        specs.append(pl.BlockSpec((None, tables.shape[1]), lambda r, g, p: (r, 0)))

    widths, stages = (1, 1, size), STAGE_BYTES // (2 * read * size * keys.dtype.itemsize)
    given = {"bounded": lowest is not None, "masked": within is not None, "paged": tables is not None}
    made = pl.pallas_call(
        partial(_kernel, scale=scale, parts=parts, read=read, tile=tile, **given),
        grid=(requests, groups, parts),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((None, None, None, tile.rows, tile.heads, n), lambda r, g, p: (r, g, p, 0, 0, 0))
            for n in widths
        ],
        out_shape=[jax.ShapeDtypeStruct((requests, groups, parts, width, shared, n), jnp.float32) for n in widths],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=max(1, min(3, stages))),
        interpret=interpret,
        name="held_attention",
    )(*operands)
    return layer_gpu.joined(*made, dtype=q.dtype, interpret=interpret)


class Tile(NamedTuple):
    """A tile of rows: W of `rows` and N of `heads` places are taken, and J of `columns` of the own block's keys. Sizes
    are powers of two, and products of `LEAST` rows and columns at least."""

    width: int
    rows: int
    shared: int
    heads: int
    own: int
    columns: int

    @classmethod
    def of(cls, width: int, shared: int, own: int) -> "Tile":
        """The smallest tile for W rows of N heads each and J own keys."""
        rows = power(width)
        return cls(width, rows, shared, power(max(shared, LEAST // rows)), own, power(max(own, LEAST)))

    def taken(self) -> Array:
        """[rows, heads, 1]: the places that hold a row."""
        shape = (self.rows, self.heads, 1)
        row, head = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        return (row < self.width) & (head < self.shared)

    def flat(self, x: Array) -> Array:
        """[rows, 1 or heads, n] -> [rows * heads, n]."""
        return jnp.broadcast_to(x, (self.rows, self.heads, x.shape[2])).reshape(self.rows * self.heads, x.shape[2])


def _kernel(
    lengths: Any, q: Any, keys: Any, values: Any, own_keys: Any, own_values: Any, *refs: Any, scale: float, parts: int,
    read: int, tile: Tile, bounded: bool, masked: bool, paged: bool,
) -> None:  # fmt: skip
    """The sums of one part of what a request holds, for one kv head; the first part's have the own block in them."""
    given, part, length = list(refs), pl.program_id(2), lengths[...]
    # Places beyond the operands' sizes are masked where they are read: they belong to others, or to nothing.
    taken, here = tile.taken(), (pl.ds(0, tile.rows), pl.ds(0, tile.heads))
    rows = tile.flat(plgpu.load(q.at[*here, :], mask=jnp.broadcast_to(taken, q.shape), other=0))
    bound, begin = jnp.zeros((len(rows), 1), jnp.int32), jnp.int32(0)
    if bounded:
        exists = jax.lax.broadcasted_iota(jnp.int32, (tile.rows,), 0) < tile.width
        lowest = plgpu.load(given.pop(0).at[pl.ds(0, tile.rows)], mask=exists, other=0)
        bound, begin = tile.flat(lowest[:, None, None]), given.pop(0)[...]
    within = given.pop(0) if masked else None
    table = given.pop(0) if paged else None

    # Positions that are held are split evenly, so that no program waits for one that has more.
    blocks = jnp.maximum((length + read - 1) // read - begin, 0)
    share = (blocks + parts - 1) // parts

    def step(block: Array, sums: Sums) -> Sums:
        at: tuple[Any, ...] = (pl.ds(block * read, read),)
        if table is not None:
            in_page = keys.shape[1] // read
            at = table[block // in_page], pl.ds(block % in_page * read, read)
        places = block * read + jax.lax.broadcasted_iota(jnp.int32, (len(rows), read), 1)
        scores = dot(rows, keys[*at, :], (1, 1)) * scale
        return sums.with_keys(jnp.where((places < length) & (places >= bound), scores, MASKED), values[*at, :])

    # The own block counts once; elsewhere it is masked, which leaves empty sums empty.
    columns = pl.ds(0, tile.columns)
    theirs = jax.lax.broadcasted_iota(jnp.int32, (tile.columns, q.shape[-1]), 0) < tile.own
    mine = [plgpu.load(ref.at[columns, :], mask=theirs, other=0) for ref in (own_keys, own_values)]
    scores = dot(rows, mine[0], (1, 1)) * scale
    if within is not None:
        shape = (tile.rows, tile.columns)
        inside = [jax.lax.broadcasted_iota(jnp.int32, shape, axis) < n for axis, n in ((0, tile.width), (1, tile.own))]
        added = plgpu.load(within.at[here[0], columns], mask=inside[0] & inside[1], other=0)
        scores += tile.flat(jnp.broadcast_to(added[:, None], (tile.rows, tile.heads, tile.columns)))
    counts = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < tile.own) & (part == 0)
    sums = Sums.empty(*rows.shape).with_keys(jnp.where(counts, scores, MASKED), mine[1])

    start = begin + part * share
    sums = jax.lax.fori_loop(start, jnp.minimum(start + share, begin + blocks), step, sums)
    for ref, value in zip(given, sums, strict=True):
        places = (tile.rows, tile.heads, value.shape[1])
        plgpu.store(ref.at[*here, :], value.reshape(places), mask=jnp.broadcast_to(taken, places))
