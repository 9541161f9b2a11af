"""The verify pass: the target on the blocks of all requests, packed into as few rows as they need.

Axes: R request slots, W rows of a block (anchor and drafts; 1 in plain rounds), V vocab, P packed rows of a bucket.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dspark_jax.targets.attention import CachedBlock
from dspark_jax.targets.block_rows import PackedRows, TreeRows
from dspark_jax.targets.decoder import Cache, TargetModel


class VerifyOutput(NamedTuple):
    """Target results on the [R, W] grid; cells past a request's verify length are junk or zero.

    Attributes:
        logits: [R, W, V].
        taps: [R, W, m D], the outputs of the tapped layers, concatenated.
        kv: K/V of the rows, in the form that the target's `append` takes.
    """

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
    tree: TreeRows | None = None,
) -> tuple[VerifyOutput, Int[Array, ""]]:
    """Run the target on the `wanted` rows, packed into the smallest of `buckets` that holds them.

    The cache is a read-only operand of the switch: branches that updated it would copy all of it in every round.

    Args:
        target: the model.
        buckets: token counts, ascending; those of R W rows and more stand for one with a row for every cell.
        tap_layers: layers whose outputs are returned.
        cache: holds the positions < `starts` of each request.
        block: [anchor, x_1..x_K] of each request.
        starts: positions of the anchors.
        wanted: the cells to run.
        tree: places of the rows where they form a tree; None: a chain.
    Returns:
        (results on the grid, tokens of the bucket that ran).
    """
    # The bucket follows from verify lengths that are already decided, so choosing it anticipates nothing
    # (docs/algorithm.md, rule 79).
    needed = jnp.sum(wanted)
    sizes = (*(size for size in buckets if size < block.size), block.size)
    choice = jnp.sum(needed > jnp.asarray(sizes))  # the last bucket holds every row, so this is in range

    branches = [partial(_verify_bucket, target, size, tap_layers) for size in sizes]
    operands = (cache, block, starts, wanted, tree)
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
    tree: TreeRows | None,
) -> VerifyOutput:
    # A tree's rows share positions: those of one level all stand at the same one.
    requests, width = block.shape

    positions = starts[:, None] + (jnp.arange(width) if tree is None else tree.offsets)
    # What slots without rows hold need not be read.
    held = jnp.where(wanted[:, 0], starts, 0)

    if size == block.size:  # every cell has its row: no packing to undo
        out = target(block, positions, CachedBlock(cache, starts, tree=tree, held=held), tap_layers)
        return VerifyOutput(target.logits(out.hidden), out.taps, out.kv)

    # `fill_value` is one past the grid: rows that fill up the bucket are dropped by `to_grid`.
    index = jnp.nonzero(wanted.ravel(), size=size, fill_value=block.size)[0]
    packed = PackedRows(index, requests, width)

    # Dense layers run on the P packed rows; only the attention core returns to the grid (docs/algorithm.md, rule 81).
    attend = CachedBlock(cache, starts, packed, tree, held)
    out = target(packed.from_grid(block), packed.from_grid(positions), attend, tap_layers)

    # [P, ...] -> [R, W, ...]; The target has put K/V on the grid already, layer by layer.
    grid = packed.to_grid
    return VerifyOutput(grid(target.logits(out.hidden)), grid(out.taps), out.kv)


def zeros_of(branch: Callable, *operands: Any) -> Any:
    """Zeros with the tree, shapes and dtypes that `branch` returns; nothing is run."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(branch, *operands))
