"""The losses of blocks as sums, computed a chunk of anchors at a time; terms.py has the terms.

Axes: B batch row, T context position, N anchor block, C chunk, K block position, D hidden, V vocab.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dspark_jax.drafters.protocol import BlockDrafter, SharedTables
from dspark_jax.training.anchors import Blocks
from dspark_jax.training.terms import LossOptions, Sums, block_terms

Batch = Mapping[str, Array]


def block_sums(
    build: Callable[[dict], BlockDrafter],
    params: dict,
    shared: SharedTables,
    batch: Batch,
    blocks: Blocks,
    options: LossOptions,
) -> Sums:
    """Sums of the loss terms and metrics over all blocks; see `terms.block_terms` for the names.

    The context is computed once a row. Then each chunk of anchors runs backbone, heads, logits and sums, and
    repeats that in the backward pass, so nothing of size [N K, V] or [T + N K]^2 exists. `build` casts the parameters;
    it runs inside the chunk, so that gradients add up over chunks in the parameters' float32.
    """
    # The context does not depend on the anchors, so it is computed once (docs/algorithm.md, rule 19).
    # [B, T, ...] in the compute dtype, the form in which decoding caches it.
    narrow = build(params).train_context(shared, batch["features"], batch["input_ids"], batch.get("segments"))
    # The context's gradient is a sum over chunks too, so chunks take it in float32.
    context = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)

    def chunk(part: Blocks) -> Sums:
        # The round trip is exact: these values came from the narrow dtype.
        stored = jax.tree.map(lambda x, like: x.astype(like.dtype), context, narrow)
        return _chunk_sums(build(params), shared, stored, batch["last_hidden"], part, options)

    count, anchor_chunk = blocks.anchors.shape[1], options.anchor_chunk
    # One chunk needs neither a scan nor rematerialisation.
    if count <= anchor_chunk:
        return chunk(blocks)

    parts = jax.tree.map(lambda x: split_anchors(x, anchor_chunk), blocks)
    # Rematerialised, so that the backward pass keeps no chunk's logits (docs/algorithm.md, rule 49). A scan needs no
    # barrier against common subexpressions, hence prevent_cse=False.
    body = jax.checkpoint(chunk, prevent_cse=False)
    # The shapes come from the function that the scan runs, so that it is traced once for both.
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(body, jax.tree.map(lambda x: x[0], parts))
    )

    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, body(part)), None), zeros, parts)[0]


def split_anchors(x: Array, size: int) -> Array:
    """[B, N, ...] -> [chunks, B, size, ...]; N is padded with zeros: dummy blocks of weight 0."""
    padding = [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)]
    # The scan needs chunks of one shape. Padded blocks have keep False and weight 0.
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _chunk_sums(
    model: BlockDrafter, shared: SharedTables, context: Any, last_hidden: Array, blocks: Blocks, options: LossOptions
) -> Sums:
    # [B, C, K, V] logits exist here and in the backward pass of this chunk only.
    out = model.train_outputs(shared, context, blocks.previous, blocks.anchors, blocks.starts)
    return block_terms(out, target_logits(shared, last_hidden, blocks), blocks, model.vocabulary, options)


def target_logits(shared: SharedTables, last_hidden: Float[Array, "b t d"], blocks: Blocks) -> Float[Array, "b n k v"]:
    """float32 logits of the target for every label, from its last hidden state one position before (docs/algorithm.md,
    rule 39)."""
    # [B, N K, 1] indices gather rows of [B, T, D], which become [B, N, K, D].
    rows = blocks.sources.reshape(blocks.sources.shape[0], -1, 1)
    hidden = jnp.take_along_axis(last_hidden, rows, axis=1).reshape(*blocks.sources.shape, -1)
    # The target's law is a label: no gradient flows into it.
    return jax.lax.stop_gradient(shared.logits(hidden.astype(shared.head.dtype)))
