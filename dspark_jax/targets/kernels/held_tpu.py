"""The TPU's kernel: rows over the blocks of positions that their request holds, one request after the other.

Axes: R requests, W rows of a block, G kv heads, N query heads of each, M = N * W rows that share a kv head, S cached
positions, J keys of a row's own block, H head dim; P pages of C positions, of which a request has at most T.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dspark_jax.targets.kernels.softmax import MASKED, Sums, dot

HEAD_SIZES = (128, 256, 512)
"""Whole tiles: a cache of smaller heads would be laid out anew for the kernel in every round."""
BLOCK = 256
"""Positions that are fetched at once: long enough that a step's fixed cost stays below its transfer."""
STEP_BYTES = 2**19
"""Keys of a step at most, over all of its kv heads; values take as much, and both are held twice."""
MOST_PAGES = 8
"""Pages that a step fetches at most, each by itself: smaller ones than `BLOCK` needs have shorter steps."""
TILE_BYTES = 32
"""Of a column of the smallest tile: a page holds whole tiles of positions."""


def takes(
    q: Float[Array, "r w q h"], keys: Float[Array, "r g s h"] | Float[Array, "p c gh"], tables: Array | None
) -> bool:
    """Whether the kernel can be compiled for rows over such a cache, or over pages with `tables`."""
    whole = tables is None or keys.shape[1] * keys.dtype.itemsize % TILE_BYTES == 0
    return whole and q.shape[-1] in HEAD_SIZES


def attend(
    q: Float[Array, "r w g n h"],
    keys: Float[Array, "r g s h"] | Float[Array, "p c gh"],
    values: Float[Array, "r g s h"] | Float[Array, "p c gh"],
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
    """Attention of each row over the positions `lowest`..`lengths` - 1 of its request and over its own block.

    Blocks of positions without a visible one are neither fetched nor computed.

    Args:
        q: rows.
        keys, values: cached, or all requests' pages; positions from `lengths` on may hold anything finite.
        lengths: positions held.
        own_keys, own_values: of the rows' own block.
        lowest: first position that a row sees; None: 0.
        within: added to the scores of the own block, 0 or `MASKED`; None: all of it is seen.
        tables: the pages of each request in the order of its positions; those behind `lengths` may be any numbers.
        scale: of the scores.
        interpret: run as plain jax, for tests on a CPU.
    """
    requests, width, groups, shared, size = q.shape
    rows = shared * width
    # Rows that share a kv head side by side: all (head, row) pairs of a group.
    q = q.transpose(0, 2, 3, 1, 4).reshape(requests, groups, rows, size)
    own_keys, own_values = own_keys.swapaxes(1, 2), own_values.swapaxes(1, 2)  # [R, G, J, H]
    lowest, within = (None if x is None else jnp.tile(x, (1, shared, 1)[: x.ndim]) for x in (lowest, within))

    cache: _Slots | _Pages
    if tables is None:
        cache = _Slots(keys.shape[2], size)
    else:
        cache = _Pages(keys.shape[1], size, tables.shape[1])

    # The first and the last block that a request's rows see; scalars, because they decide what is fetched.
    block = cache.block
    first = jnp.zeros_like(lengths) if lowest is None else jnp.maximum(jnp.min(lowest, axis=1), 0) // block
    count = jnp.maximum(-(-lengths // block) - first, 0)
    scalars: tuple[Array, ...] = first, count, lengths
    if tables is not None:
        # In one row, since the scalars' memory would pad each request's to 128 numbers. No page lies behind the pool,
        # not even for a request without any, which sees nothing of it.
        scalars += (jnp.minimum(tables, len(keys) - 1).reshape(-1),)

    arrays = q, keys, values, own_keys, own_values
    out = _call(cache, scalars, arrays, lowest, within, scale, interpret)
    return out.reshape(requests, groups, shared, width, size).transpose(0, 3, 1, 2, 4)


class _Cache(Protocol):
    """How a step's keys, or values, lie in the cached array: in one part or in several, each of which is fetched by
    itself.

    block: positions of a step. parts: of a step's block. ragged: whether a request's last block may lie partly behind
    the array's end.
    """

    @property
    def block(self) -> int: ...
    @property
    def parts(self) -> int: ...
    @property
    def ragged(self) -> bool: ...

    def specs(self, heads: int) -> list[pl.BlockSpec]:
        """The parts of a step's block for `heads` kv heads, on the grid of `_call`."""
        ...

    def read(self, parts: Sequence[Any], head: int) -> Array:
        """[block, H]: one head of a step's block."""
        ...


@dataclass(frozen=True)
class _Slots:
    """Keys [R, G, S, H]: a block is one stretch of each head."""

    span: int
    size: int

    @property
    def block(self) -> int:
        return min(BLOCK, self.span)

    @property
    def parts(self) -> int:
        return 1

    @property
    def ragged(self) -> bool:
        return bool(self.span % self.block)

    def specs(self, heads: int) -> list[pl.BlockSpec]:
        return [pl.BlockSpec((1, heads, self.block, self.size), lambda r, h, j, *s: (r, h, _block_of(r, j, *s), 0))]

    def read(self, parts: Sequence[Any], head: int) -> Array:
        return parts[0][0, head]


@dataclass(frozen=True)
class _Pages:
    """Keys [P, C, G * H]: a block is a few pages, each wherever the table says."""

    page: int
    size: int
    most: int  # pages of a request

    @property
    def block(self) -> int:
        return self.page * self.parts

    @property
    def parts(self) -> int:
        return max(1, min(MOST_PAGES, BLOCK // self.page, self.most))

    @property
    def ragged(self) -> bool:
        return False

    def specs(self, heads: int) -> list[pl.BlockSpec]:
        shape = 1, self.page, heads * self.size
        return [pl.BlockSpec(shape, partial(self._at, place)) for place in range(self.parts)]

    def _at(self, place: int, r: Array, h: Array, j: Array, *scalars: Any) -> tuple[Any, ...]:
        # Behind the last page that is held comes that page again: the table names none there.
        first, count, lengths, tables = scalars
        # Cut, not floored, which asks the compiler for a sign: there are no negative lengths.
        last = jnp.maximum(jax.lax.div(lengths[r] + (self.page - 1), jnp.int32(self.page)), 1) - 1
        number = jnp.minimum(_block_of(r, j, first, count) * self.parts + place, last)
        return tables[r * self.most + number], 0, h

    def read(self, parts: Sequence[Any], head: int) -> Array:
        channels = pl.ds(head * self.size, self.size)
        return jnp.concatenate([part[0, :, channels] for part in parts])


def _block_of(r: Array, j: Array, first: Any, count: Any, *scalars: Any) -> Array:
    """The block of positions of step j. A step without one names the last one again, which is not fetched twice."""
    return first[r] + jnp.minimum(j, jnp.maximum(count[r] - 1, 0))


def _call(
    cache: _Cache, scalars: tuple[Array, ...], arrays: tuple[Array, ...], lowest: Array | None, within: Array | None,
    scale: float, interpret: bool,
) -> Array:  # fmt: skip
    """The kernel on rows [R, G, M, H], bounds [R, M] and masks [1 or R, M, J]; a step of the grid is a block of cached
    positions, for as many kv heads as `STEP_BYTES` allows."""
    q, keys, values, own_keys, own_values = arrays
    requests, groups, rows, size = q.shape
    heads = _heads_of_a_step(groups, cache.block * size * keys.dtype.itemsize)

    def of_request(r: Array, h: Array, j: Array, *scalars: Any) -> tuple[Any, ...]:
        return r, h, 0, 0

    by_row = pl.BlockSpec((1, heads, rows, size), of_request)
    by_block = cache.specs(heads)
    own = pl.BlockSpec((1, heads, own_keys.shape[2], size), of_request)
    operands = [q, own_keys, own_values, *[keys] * len(by_block), *[values] * len(by_block)]
    specs = [by_row, own, own, *by_block, *by_block]

    if lowest is not None:
        operands.append(lowest[..., None])
        specs.append(pl.BlockSpec((1, rows, 1), lambda r, h, j, *scalars: (r, 0, 0)))
    if within is not None:
        one = len(within) == 1
        operands.append(within)
        specs.append(pl.BlockSpec((1, *within.shape[1:]), lambda r, h, j, *scalars: (0 if one else r, 0, 0)))

    column = pltpu.VMEM((heads, rows, 1), jnp.float32)
    return pl.pallas_call(
        partial(_kernel, cache=cache, scale=scale, bounded=lowest is not None, masked=within is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            # No step is made for blocks that no request has.
            grid=(requests, groups // heads, jnp.maximum(jnp.max(scalars[1]), 1)),
            in_specs=specs,
            out_specs=by_row,
            scratch_shapes=[column, column, pltpu.VMEM((heads, rows, size), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="held_attention",
    )(*scalars, *operands)


def _heads_of_a_step(groups: int, bytes_of_one: int) -> int:
    """How many kv heads one step computes: a divisor of G, as large as `STEP_BYTES` allows."""
    return max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * bytes_of_one <= STEP_BYTES))


def _kernel(
    first: Any, count: Any, lengths: Any, *refs: Any, cache: _Cache, scale: float, bounded: bool, masked: bool
) -> None:
    """One block of positions, for some kv heads of a request: folds it into the running sums of its rows."""
    # A table of pages is for fetching alone.
    q, own_keys, own_values, *given = refs[1:] if isinstance(cache, _Pages) else refs
    keys, values, given = given[: cache.parts], given[cache.parts : 2 * cache.parts], given[2 * cache.parts :]
    lowest = given.pop(0) if bounded else None
    within = given.pop(0) if masked else None
    result, *kept = given
    request, step = pl.program_id(0), pl.program_id(2)
    heads = range(q.shape[1])

    def keep(head: int, sums: Sums) -> None:
        for ref, value in zip(kept, sums, strict=True):
            ref[head] = value

    # The block's own keys come first: they are there for every row, so that a maximum above the floor is known early.
    @pl.when(step == 0)
    def _own() -> None:
        for head in heads:
            rows = q[0, head]
            scores = dot(rows, own_keys[0, head], (1, 1)) * scale
            scores = scores if within is None else scores + within[0]
            keep(head, Sums.empty(*rows.shape).with_keys(scores, own_values[0, head]))

    @pl.when(step < count[request])
    def _cached() -> None:
        length = lengths[request]
        start = (first[request] + step) * cache.block
        places = start + jax.lax.broadcasted_iota(jnp.int32, (q.shape[2], cache.block), 1)
        seen = places < length if lowest is None else (places < length) & (places >= lowest[0])

        for head in heads:
            scores = jnp.where(seen, dot(q[0, head], cache.read(keys, head), (1, 1)) * scale, MASKED)
            block_values = cache.read(values, head)
            if cache.ragged:
                # What lies behind the array's end may be NaN, which a weight of 0 would not hide.
                inside = start + jax.lax.broadcasted_iota(jnp.int32, block_values.shape, 0) < length
                block_values = jnp.where(inside, block_values, jnp.zeros_like(block_values))
            keep(head, Sums(*(ref[head] for ref in kept)).with_keys(scores, block_values))

    @pl.when(step == pl.num_programs(2) - 1)
    def _result() -> None:
        for head in heads:
            result[0, head] = Sums(*(ref[head] for ref in kept)).normalised().astype(result.dtype)
