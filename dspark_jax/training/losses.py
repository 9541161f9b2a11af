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
from dspark_jax.training.terms import LossOptions, Sums, confidence_sums, law_sums, row_sums
from dspark_jax.training.vocabulary_chunks import kernel_for, row_terms
from dspark_jax.training.vocabulary_terms import Asked, RowTerms

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
    (docs/algorithm.md, rule 49). With `vocabulary_chunk` all anchors are one chunk, and `row_terms` makes logits.

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
    count = blocks.anchors.shape[1]
    size = count if options.vocabulary_chunk else min(options.anchor_chunk, count)
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
    if options.vocabulary_chunk:
        found = _row_terms(model, shared, rows, last_hidden, blocks, options)
        total, sums, accept = row_sums(found, blocks, options)
        return total, (sums, accept)

    # [B, C, K, V] logits exist here alone.
    made, targets = model.train_logits(shared, rows), target_logits(shared, last_hidden, blocks)
    total, sums, accept = law_sums(made, targets, blocks, model.vocabulary, options)
    return total, (sums, accept)


def target_logits(shared: SharedTables, last_hidden: Float[Array, "b t d"], blocks: Blocks) -> Float[Array, "b n k v"]:
    """float32 logits of the target for every label, from its last hidden state one position before (docs/algorithm.md,
    rule 39)."""
    # The target's law is a label: no gradient flows into it.
    return jax.lax.stop_gradient(shared.logits(_target_rows(shared, last_hidden, blocks)))


def _target_rows(shared: SharedTables, last_hidden: Array, blocks: Blocks) -> Float[Array, "b n k d"]:
    # [B, N K, 1] indices gather rows of [B, T, D], which become [B, N, K, D].
    rows = blocks.sources.reshape(blocks.sources.shape[0], -1, 1)
    hidden = jnp.take_along_axis(last_hidden, rows, axis=1).reshape(*blocks.sources.shape, -1)
    return hidden.astype(shared.head.dtype)


def _row_terms(
    model: BlockDrafter, shared: SharedTables, rows: BlockRows, last_hidden: Array, blocks: Blocks, options: LossOptions
) -> RowTerms:
    """The terms [B, C, K] of rows whose logits are not made as a whole."""
    tables = model.logit_tables(shared)
    if tables is None:
        raise ValueError("the logits of this drafter are no products alone: vocabulary_chunk must be 0")

    hidden = rows.hidden.reshape(-1, rows.hidden.shape[-1])
    latent = None if rows.latent is None else rows.latent.reshape(-1, rows.latent.shape[-1])
    asked = Asked(
        soft=options.soft_ce_alpha > 0 or options.lk_mixed_alpha > 0,
        overlap=options.lk_alpha > 0,
        softcap=shared.softcap,
        chunk=options.vocabulary_chunk,
        kernel=kernel_for(hidden, latent, tables),
    )
    target = _target_rows(shared, last_hidden, blocks).reshape(-1, last_hidden.shape[-1])
    found = row_terms(hidden, latent, tables.markov, target, tables.head, blocks.labels.reshape(-1), asked)
    return jax.tree.map(lambda x: x.reshape(blocks.labels.shape), found)
