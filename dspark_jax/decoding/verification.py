"""The verify pass: the target on the blocks of all requests, packed into as few rows as they need.

Axes: R request slots, W rows of a block (anchor and drafts; 1 in plain rounds), V vocab, P packed rows of a bucket.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dspark_jax.targets.attention import CachedBlock, PackedRows
from dspark_jax.targets.decoder import Cache, TargetModel


class VerifyOutput(NamedTuple):
    """Target results on the [R, W] grid; cells past a request's verify length are junk or zero."""

    logits: Array
    taps: Array
    kv: Any


def verify(
    target: TargetModel,
    buckets: Sequence[int],
    tap_layers: tuple[int, ...],
    cache: Cache,
    block: Int[Array, "r w"],
    starts: Int[Array, " r"],
    wanted: Bool[Array, "r w"],
) -> tuple[VerifyOutput, Int[Array, ""]]:
    """The target on the `wanted` rows, in the smallest of `buckets` that holds them, and that bucket.

    `block` [anchor, x_1..x_K] of every request, the anchor at position `starts`. Buckets of R W rows and more stand for
    one with a row for every cell. The cache is a read-only operand of the switch: branches that updated it would copy
    it whole every round.
    """
    needed = jnp.sum(wanted)
    sizes = (*(size for size in buckets if size < block.size), block.size)
    choice = jnp.sum(needed > jnp.asarray(sizes))  # the last bucket holds every row, so this is in range
    branches = [partial(_verify_bucket, target, size, tap_layers) for size in sizes]
    operands = (cache, block, starts, wanted)
    if len(branches) == 1:
        # Still a branch: in straight-line code XLA may write a layer's new K/V before its attention has read the
        # cache, and so copies the whole cache first, every round.
        out = jax.lax.cond(needed > 0, branches[0], partial(zeros_of, branches[0]), *operands)
    else:
        out = jax.lax.switch(choice, branches, *operands)
    return out, jnp.asarray(sizes)[choice]


def _verify_bucket(
    target: TargetModel,
    size: int,
    tap_layers: tuple[int, ...],
    cache: Cache,
    block: Array,
    starts: Array,
    wanted: Array,
) -> VerifyOutput:
    requests, width = block.shape
    positions = starts[:, None] + jnp.arange(width)
    if size == block.size:  # every cell has its row: no packing to undo
        out = target(block, positions, CachedBlock(cache, starts), tap_layers)
        return VerifyOutput(target.logits(out.hidden), out.taps, out.kv)
    index = jnp.nonzero(wanted.ravel(), size=size, fill_value=block.size)[0]
    packed = PackedRows(index, requests, width)
    attend = CachedBlock(cache, starts, packed)
    out = target(packed.from_grid(block), packed.from_grid(positions), attend, tap_layers)
    grid = packed.to_grid
    return VerifyOutput(grid(target.logits(out.hidden)), grid(out.taps), out.kv)


def zeros_of(branch: Callable, *operands: Any) -> Any:
    """Zeros in the shape of what `branch` returns."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(branch, *operands))
