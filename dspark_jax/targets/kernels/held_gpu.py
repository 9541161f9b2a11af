"""The GPU's kernel: the positions that a request holds, shared between several programs and joined by log-sum-exp.

Axes: R requests, G kv heads, M rows that share a kv head, S cached positions, J keys of a row's own block, H head dim,
P parts of what a request holds.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from dspark_jax.targets.kernels.softmax import MASKED, Sums, dot

HEAD_SIZES = (64, 128, 256)
BLOCK = 64
"""Positions that are read at once; the cache's size must be a multiple."""
PROGRAMS = 264
"""Programs at work together, two for each multiprocessor of an H100: fewer requests have their positions split."""
STAGE_BYTES = 192 * 2**10
"""Of a multiprocessor's shared memory, for the blocks that are on their way."""
LEAST_ROWS = 16
"""Smallest operand of a tensor core; rows and own keys are filled up to a power of two from here on."""


def attend(
    q: Float[Array, "r g m h"],
    keys: Float[Array, "r g s h"],
    values: Float[Array, "r g s h"],
    lengths: Int[Array, " r"],
    own_keys: Float[Array, "r g j h"],
    own_values: Float[Array, "r g j h"],
    lowest: Int[Array, "r m"] | None,
    within: Float[Array, "#r m j"] | None,
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "r g m h"]:
    """As the TPU's: attention over positions `lowest`..`lengths` - 1 and the own block; no other position is read."""
    requests, groups, count, size = q.shape
    own = own_keys.shape[2]
    rows, columns = _filled(count), _filled(own)
    parts = max(1, min(PROGRAMS // (requests * groups), keys.shape[2] // (2 * BLOCK)))

    # Keys that fill up the block are masked for all rows, rows that fill up the tile are cut off again.
    within = jnp.zeros((1, count, own), jnp.float32) if within is None else within
    within = jnp.pad(within, ((0, 0), (0, 0), (0, columns - own)), constant_values=MASKED)
    within, shared = _padded(within, 1, rows), len(within) == 1
    own_keys, own_values = (_padded(x, 2, columns) for x in (own_keys, own_values))
    lowest = jnp.zeros((requests, count), jnp.int32) if lowest is None else lowest
    first = jnp.maximum(jnp.min(lowest, axis=1), 0) // BLOCK

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda r, g, p: (r, g, 0, 0))

    one = pl.BlockSpec((None,), lambda r, g, p: (r,))
    part = [pl.BlockSpec((None, None, None, rows, width), lambda r, g, p: (r, g, p, 0, 0)) for width in (1, 1, size)]
    stages = STAGE_BYTES // (2 * BLOCK * size * keys.dtype.itemsize)
    operands = [first, lengths, _padded(q, 2, rows), keys, values, own_keys, own_values]
    made = pl.pallas_call(
        partial(_kernel, scale=scale, parts=parts),
        grid=(requests, groups, parts),
        in_specs=[
            one,
            one,
            whole(rows, size),
            *[whole(keys.shape[2], size)] * 2,
            *[whole(columns, size)] * 2,
            pl.BlockSpec((None, rows), lambda r, g, p: (r, 0)),
            pl.BlockSpec((None, rows, columns), lambda r, g, p: (0 if shared else r, 0, 0)),
        ],
        out_specs=part,
        out_shape=[jax.ShapeDtypeStruct((requests, groups, parts, rows, width), jnp.float32) for width in (1, 1, size)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=max(1, min(3, stages))),
        interpret=interpret,
        name="held_attention",
    )(*operands, _padded(lowest, 1, rows), within)

    return _joined(Sums(*(x[:, :, :, :count] for x in made))).astype(q.dtype)


def _joined(parts: Sums) -> Float[Array, "r g m h"]:
    """The result of sums [R, G, P, M, ..] of P parts."""
    weights = jnp.exp(parts.top - jnp.max(parts.top, axis=2, keepdims=True))
    total, out = (jnp.sum(weights * x, axis=2) for x in (parts.total, parts.out))
    return out / jnp.where(total > 0, total, 1.0)


def _kernel(
    first: Any, lengths: Any, q: Any, keys: Any, values: Any, own_keys: Any, own_values: Any, lowest: Any, within: Any,
    *kept: Any, scale: float, parts: int,
) -> None:  # fmt: skip
    """The sums of one part of what a request holds, for one kv head; the first part's have the own block in them."""
    part, rows, bound = pl.program_id(2), q[...], lowest[...]
    begin, length = first[...], lengths[...]

    # Positions that are held are split evenly, so that no program waits for one that has more.
    blocks = jnp.maximum((length + BLOCK - 1) // BLOCK - begin, 0)
    share = (blocks + parts - 1) // parts

    def step(block: Array, sums: Sums) -> Sums:
        here = pl.ds(block * BLOCK, BLOCK)
        places = block * BLOCK + jax.lax.broadcasted_iota(jnp.int32, (rows.shape[0], BLOCK), 1)
        seen = (places < length) & (places >= bound[:, None])
        scores = jnp.where(seen, dot(rows, keys[here, :], (1, 1)) * scale, MASKED)
        return sums.with_keys(scores, values[here, :])

    # The own block counts once; elsewhere it is masked, which leaves empty sums empty.
    scores = dot(rows, own_keys[...], (1, 1)) * scale + within[...]
    scores = jnp.where(part == 0, scores, MASKED)
    sums = Sums.empty(*rows.shape).with_keys(scores, own_values[...])

    start = begin + part * share
    sums = jax.lax.fori_loop(start, jnp.minimum(start + share, begin + blocks), step, sums)
    for ref, value in zip(kept, sums, strict=True):
        ref[...] = value


def _filled(count: int) -> int:
    return max(LEAST_ROWS, 1 << (count - 1).bit_length())


def _padded(x: Array, axis: int, count: int) -> Array:
    return jnp.pad(x, [(0, count - n if i == axis else 0) for i, n in enumerate(x.shape)])
