"""The losses of blocks as sums, their logits a chunk of anchors at a time; terms.py has the terms.

Axes: B batch row, T context position, N anchor block, C chunk, K block position, D hidden, V vocab.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from dspark_jax.drafters.protocol import BlockDrafter, BlockRows, SharedTables
from dspark_jax.training.anchors import Blocks
from dspark_jax.training.chunks import summed
from dspark_jax.training.terms import LossOptions, Sums, confidence_sums, law_sums

Batch = Mapping[str, Array]


def block_sums(
    build: Callable[[dict], BlockDrafter],
    cast: Callable[[dict], dict],
    params: dict,
    shared: SharedTables,
    batch: Batch,
    blocks: Blocks,
    options: LossOptions,
) -> Sums:
    """Sums of the loss terms and metrics over all blocks; `terms.law_sums` and `confidence_sums` have the names.

    Context and blocks pass the drafter once, all anchors together. Then each chunk of anchors makes its logits, its
    sums and their gradient at once, so that nothing of size [N K, V] exists and no logits are made twice
    (docs/algorithm.md, rule 49).

    Args:
        build: the drafter of parameters in the compute dtype.
        cast: parameters, or some of them, in the compute dtype.
        params: float32 masters.
        shared, batch, blocks, options: as the objective has them.
    """
    narrow = cast(params)
    model = build(narrow)
    # The context does not depend on the anchors, so it is computed once (docs/algorithm.md, rule 19).
    context = model.train_context(shared, batch["features"], batch["input_ids"], batch.get("segments"))
    rows = model.train_rows(shared, context, blocks.previous, blocks.anchors, blocks.starts)

    # Parameters that logits are made of are given as masters, in which their gradients add up over chunks.
    flat = flatten_dict(params)
    tables = unflatten_dict({path: flat[path] for path in model.logit_params if path in flat})
    size = min(options.anchor_chunk, blocks.anchors.shape[1])
    parts, chunks = jax.tree.map(lambda x: split_anchors(x, size), (rows._replace(confidence=None), blocks))

    constants = (jax.lax.stop_gradient(narrow), shared), batch["last_hidden"]
    laws, sums, accept = summed(partial(_chunk, build, options), cast, tables, parts, chunks, constants)
    sums = {"laws": laws} | sums

    if rows.confidence is None:
        return sums
    # [chunks, B, C, K] -> [B, N, K]: the labels of the confidence head.
    accept = jnp.moveaxis(accept, 0, 1).reshape(len(accept[0]), -1, accept.shape[-1])[:, : blocks.anchors.shape[1]]
    return sums | confidence_sums(rows.confidence, jax.lax.stop_gradient(accept), blocks, options)


def split_anchors(x: Array, size: int) -> Array:
    """[B, N, ...] -> [chunks, B, size, ...]; N is padded with zeros: dummy blocks of weight 0."""
    padding = [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)]
    # The scan needs chunks of one shape. Padded blocks have keep False and weight 0.
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _chunk(
    build: Callable[[dict], BlockDrafter], options: LossOptions, tables: dict, rows: BlockRows, blocks: Blocks,
    constants: tuple[tuple[dict, SharedTables], Array],
) -> tuple[Array, tuple[Sums, Array]]:  # fmt: skip
    """(the weighted terms of the laws, (their sums, acceptance [B, C, K])) of a chunk of anchors."""
    (params, shared), last_hidden = constants
    model = build(unflatten_dict(flatten_dict(params) | flatten_dict(tables)))

    # [B, C, K, V] logits exist here alone.
    made, targets = model.train_logits(shared, rows), target_logits(shared, last_hidden, blocks)
    total, sums, accept = law_sums(made, targets, blocks, model.vocabulary, options)
    return total, (sums, accept)


def target_logits(shared: SharedTables, last_hidden: Float[Array, "b t d"], blocks: Blocks) -> Float[Array, "b n k v"]:
    """float32 logits of the target for every label, from its last hidden state one position before (docs/algorithm.md,
    rule 39)."""
    # [B, N K, 1] indices gather rows of [B, T, D], which become [B, N, K, D].
    rows = blocks.sources.reshape(blocks.sources.shape[0], -1, 1)
    hidden = jnp.take_along_axis(last_hidden, rows, axis=1).reshape(*blocks.sources.shape, -1)
    # The target's law is a label: no gradient flows into it.
    return jax.lax.stop_gradient(shared.logits(hidden.astype(shared.head.dtype)))
