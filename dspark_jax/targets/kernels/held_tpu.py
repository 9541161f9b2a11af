"""The TPU's kernel: rows over the blocks of positions that their request holds, one request after the other.

Axes: R requests, W rows of a block, G kv heads, N query heads of each, M = N * W rows that share a kv head, S cached
positions, J keys of a row's own block, H head dim.
"""

from functools import partial
from typing import Any

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


def attend(
    q: Float[Array, "r w g n h"],
    keys: Float[Array, "r g s h"],
    values: Float[Array, "r g s h"],
    lengths: Int[Array, " r"],
    own_keys: Float[Array, "r j g h"],
    own_values: Float[Array, "r j g h"],
    lowest: Int[Array, "r w"] | None,
    within: Float[Array, "#r w j"] | None,
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "r w g n h"]:
    """Attention of each row over the positions `lowest`..`lengths` - 1 of its request and over its own block.

    Blocks of positions without a visible one are neither fetched nor computed.

    Args:
        q: rows.
        keys, values: cached; positions from `lengths` on may hold anything finite.
        lengths: positions held.
        own_keys, own_values: of the rows' own block.
        lowest: first position that a row sees; None: 0.
        within: added to the scores of the own block, 0 or `MASKED`; None: all of it is seen.
        scale: of the scores.
        interpret: run as plain jax, for tests on a CPU.
    """
    requests, width, groups, shared, size = q.shape
    rows = shared * width
    # Rows that share a kv head side by side: all (head, row) pairs of a group.
    q = q.transpose(0, 2, 3, 1, 4).reshape(requests, groups, rows, size)
    own_keys, own_values = own_keys.swapaxes(1, 2), own_values.swapaxes(1, 2)  # [R, G, J, H]
    lowest, within = (None if x is None else jnp.tile(x, (1, shared, 1)[: x.ndim]) for x in (lowest, within))

    span = keys.shape[2]
    block = min(BLOCK, span)

    # The first and the last block that a request's rows see; scalars, because they decide what is fetched.
    first = jnp.zeros_like(lengths) if lowest is None else jnp.maximum(jnp.min(lowest, axis=1), 0) // block
    count = jnp.maximum(-(-lengths // block) - first, 0)

    arrays = q, keys, values, own_keys, own_values
    out = _call((first, count, lengths), arrays, lowest, within, block, scale, interpret)
    return out.reshape(requests, groups, shared, width, size).transpose(0, 3, 1, 2, 4)


def _call(
    scalars: tuple[Array, Array, Array], arrays: tuple[Array, ...], lowest: Array | None, within: Array | None,
    block: int, scale: float, interpret: bool,
) -> Array:  # fmt: skip
    """The kernel on rows [R, G, M, H], bounds [R, M] and masks [1 or R, M, J]; a step of the grid is a block of `block`
    positions, for as many kv heads as `STEP_BYTES` allows."""
    q, keys, _, own_keys, _ = arrays
    requests, groups, rows, size = q.shape
    span = keys.shape[2]
    heads = _heads_of_a_step(groups, block * size * keys.dtype.itemsize)

    def cached(r: Array, h: Array, j: Array, first: Any, count: Any, lengths: Any) -> tuple[Any, ...]:
        # A step without a block of its own names the one before it again, which is not fetched twice.
        return r, h, first[r] + jnp.minimum(j, jnp.maximum(count[r] - 1, 0)), 0

    def of_request(r: Array, h: Array, j: Array, *scalars: Any) -> tuple[Any, ...]:
        return r, h, 0, 0

    by_row = pl.BlockSpec((1, heads, rows, size), of_request)
    by_block = pl.BlockSpec((1, heads, block, size), cached)
    own = pl.BlockSpec((1, heads, own_keys.shape[2], size), of_request)
    operands, specs = list(arrays), [by_row, by_block, by_block, own, own]

    if lowest is not None:
        operands.append(lowest[..., None])
        specs.append(pl.BlockSpec((1, rows, 1), lambda r, h, j, *scalars: (r, 0, 0)))
    if within is not None:
        one = len(within) == 1
        operands.append(within)
        specs.append(pl.BlockSpec((1, *within.shape[1:]), lambda r, h, j, *scalars: (0 if one else r, 0, 0)))

    column = pltpu.VMEM((heads, rows, 1), jnp.float32)
    flags = {"bounded": lowest is not None, "masked": within is not None, "ragged": bool(span % block)}
    return pl.pallas_call(
        partial(_kernel, scale=scale, **flags),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
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
    first: Any, count: Any, lengths: Any, q: Any, keys: Any, values: Any, own_keys: Any, own_values: Any, *refs: Any,
    scale: float, bounded: bool, masked: bool, ragged: bool,
) -> None:  # fmt: skip
    """One block of positions, for some kv heads of a request: folds it into the running sums of its rows."""
    given = list(refs)
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
        length, block = lengths[request], keys.shape[2]
        start = (first[request] + step) * block
        places = start + jax.lax.broadcasted_iota(jnp.int32, (q.shape[2], block), 1)
        seen = places < length if lowest is None else (places < length) & (places >= lowest[0])

        for head in heads:
            scores = jnp.where(seen, dot(q[0, head], keys[0, head], (1, 1)) * scale, MASKED)
            block_values = values[0, head]
            if ragged:
                # What lies behind the array's end may be NaN, which a weight of 0 would not hide.
                inside = start + jax.lax.broadcasted_iota(jnp.int32, block_values.shape, 0) < length
                block_values = jnp.where(inside, block_values, jnp.zeros_like(block_values))
            keep(head, Sums(*(ref[head] for ref in kept)).with_keys(scores, block_values))

    @pl.when(step == pl.num_programs(2) - 1)
    def _result() -> None:
        for head in heads:
            result[0, head] = Sums(*(ref[head] for ref in kept)).normalised().astype(result.dtype)
