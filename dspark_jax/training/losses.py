"""Cross-entropy, total variation and confidence losses as sums, computed a chunk of anchors at a time.

Axes: B batch row, T context position, N anchor block, C chunk, K block position, D hidden, V vocab.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dspark_jax.drafters.protocol import BlockDrafter, BlockOutput, SharedTables
from dspark_jax.drafters.vocabulary import DraftVocabulary
from dspark_jax.training.anchors import Blocks

# Added to the summed weights: the loss of a batch without supervision is 0, not NaN (docs/algorithm.md, rule 41).
EPSILON = 1e-6

Sums = dict[str, Array]
Batch = Mapping[str, Array]


@dataclass(frozen=True)
class LossOptions:
    """L = ce_alpha L_ce + l1_alpha L_tv + confidence_alpha L_conf (docs/algorithm.md, rule 41).

    Attributes:
        ce_alpha, l1_alpha, confidence_alpha: weights of the terms.
        decay_gamma: g of the slot weights exp(-k / g), rule 40; None or <= 0 weighs all slots alike.
        anchor_chunk: anchors of a row whose logits [B, anchor_chunk, K, V] are in memory at once.
    """

    ce_alpha: float
    l1_alpha: float
    confidence_alpha: float
    decay_gamma: float | None
    anchor_chunk: int

    def total(self, sums: Sums, denominator: Array) -> Array:
        """The loss, [] float32, from weighted sums and the global sum of weights (+ EPSILON) that all terms share."""
        # Terms are combined before the division: they share one denominator, whichever of them there are.
        loss = self.ce_alpha * sums["ce"] + self.l1_alpha * sums["l1"]
        if "confidence" in sums:
            loss = loss + self.confidence_alpha * sums["confidence"]
        return loss / denominator


def block_sums(
    build: Callable[[dict], BlockDrafter],
    params: dict,
    shared: SharedTables,
    batch: Batch,
    blocks: Blocks,
    anchor_chunk: int,
) -> Sums:
    """Sums of the loss terms and metrics over all blocks; see `_terms` for the names.

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
        return _chunk_sums(build(params), shared, stored, batch["last_hidden"], part)

    count = blocks.anchors.shape[1]
    # One chunk needs neither a scan nor rematerialisation.
    if count <= anchor_chunk:
        return chunk(blocks)

    parts = jax.tree.map(lambda x: _split_anchors(x, anchor_chunk), blocks)
    # Rematerialised, so that the backward pass keeps no chunk's logits (docs/algorithm.md, rule 49). A scan needs no
    # barrier against common subexpressions, hence prevent_cse=False.
    body = jax.checkpoint(chunk, prevent_cse=False)
    # The shapes come from the function that the scan runs, so that it is traced once for both.
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(body, jax.tree.map(lambda x: x[0], parts))
    )

    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, body(part)), None), zeros, parts)[0]


def _split_anchors(x: Array, size: int) -> Array:
    """[B, N, ...] -> [chunks, B, size, ...]; N is padded with zeros: dummy blocks of weight 0."""
    padding = [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)]
    # The scan needs chunks of one shape. Padded blocks have keep False and weight 0.
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _chunk_sums(model: BlockDrafter, shared: SharedTables, context: Any, last_hidden: Array, blocks: Blocks) -> Sums:
    # [B, C, K, V] logits exist here and in the backward pass of this chunk only.
    out = model.train_outputs(shared, context, blocks.previous, blocks.anchors, blocks.starts)
    return _terms(out, target_logits(shared, last_hidden, blocks), blocks, model.vocabulary)


def target_logits(shared: SharedTables, last_hidden: Float[Array, "b t d"], blocks: Blocks) -> Float[Array, "b n k v"]:
    """float32 logits of the target for every label, from its last hidden state one position before (docs/algorithm.md,
    rule 39)."""
    # [B, N K, 1] indices gather rows of [B, T, D], which become [B, N, K, D].
    rows = blocks.sources.reshape(blocks.sources.shape[0], -1, 1)
    hidden = jnp.take_along_axis(last_hidden, rows, axis=1).reshape(*blocks.sources.shape, -1)
    # The target's law is a label: no gradient flows into it.
    return jax.lax.stop_gradient(shared.logits(hidden.astype(shared.head.dtype)))


def total_variation_l1(draft_logits: Array, other_logits: Array) -> Array:
    """‖softmax(draft) - softmax(other)‖_1 over the last axis: the full sum, twice the total variation distance."""
    return jnp.sum(jnp.abs(jax.nn.softmax(draft_logits, axis=-1) - jax.nn.softmax(other_logits, axis=-1)), axis=-1)


def accept_rate(l1: Array) -> Array:
    """c*_k = 1 - ½ ‖p^d_k - p^t_k‖_1, the probability that a token drawn from p^d is accepted; no gradient flows
    through it (docs/algorithm.md, rule 36)."""
    return jax.lax.stop_gradient(jnp.clip(1.0 - 0.5 * l1, 0.0, 1.0))


def pruned_variation_l1(
    draft_logits: Float[Array, "*n p"], other_logits: Float[Array, "*n v"], vocabulary: DraftVocabulary
) -> Float[Array, "*n"]:
    """`total_variation_l1` of a drafter that drafts `vocabulary` alone: [*n] float32.

    p^d is 0 outside the vocabulary, so the other law's mass there counts in full.
    """
    # The softmax is over the whole vocabulary first: the target's law is not renormalised to what can be drafted.
    other = vocabulary.restrict(jax.nn.softmax(other_logits, axis=-1))
    inside = jnp.sum(jnp.abs(jax.nn.softmax(draft_logits, axis=-1) - other), axis=-1)
    # Rounding can put the mass inside slightly above 1.
    return inside + jnp.maximum(1.0 - jnp.sum(other, axis=-1), 0.0)


def _terms(out: BlockOutput, targets: Array, blocks: Blocks, vocabulary: DraftVocabulary | None) -> Sums:
    """The additive sums of a chunk, float32.

    Returns:
        `ce`, `l1`, `confidence`: weighted sums of the terms; `weight`: sum of the weights.
        `accept`, `supervised`: [K], sums over supervised slots without weights, and their number.
        `tau`, `blocks`: expected committed tokens of blocks with a supervised slot, and the number of these blocks.
        `confidence_*`: weighted sums of the confidence head's errors, without a gradient.
    """
    weights, supervised = blocks.weights, blocks.supervised
    if vocabulary is None:
        labels, learnable = blocks.labels, weights
        # [B, C, K] float32, the whole sum and not half of it (docs/algorithm.md, rule 41).
        l1 = total_variation_l1(out.logits, targets)
    else:
        # No drafter can learn a label that it cannot draft; the variation counts it as lost, as decoding will.
        labels = vocabulary.local(blocks.labels)
        learnable = weights * (labels < vocabulary.size)
        labels = jnp.minimum(labels, vocabulary.size - 1)
        l1 = pruned_variation_l1(out.logits, targets, vocabulary)

    # [B, C, K]
    label_logits = jnp.take_along_axis(out.logits, labels[..., None], axis=-1)[..., 0]
    accept = accept_rate(l1)
    # The probability that the whole prefix survives; an unsupervised slot ends it (docs/algorithm.md, rule 45).
    survival = jnp.cumprod(accept * supervised, axis=-1)
    used = jnp.any(supervised, axis=-1)

    sums = {
        "ce": jnp.sum(learnable * (jax.nn.logsumexp(out.logits, axis=-1) - label_logits)),
        "l1": jnp.sum(weights * l1),
        # Weighted by the decay, the denominator of all terms; the counts below are unweighted (docs/algorithm.md,
        # rule 45).
        "weight": jnp.sum(weights),
        "accept": jnp.sum(accept * supervised, axis=(0, 1)),
        "supervised": jnp.sum(supervised, axis=(0, 1), dtype=jnp.float32),
        "tau": jnp.sum(used * (1.0 + jnp.sum(survival, axis=-1))),
        "blocks": jnp.sum(used, dtype=jnp.float32),
    }

    if out.confidence is not None:
        # softplus(z) - z c* is the cross-entropy of sigmoid(z) against c*, without overflow.
        bce = jax.nn.softplus(out.confidence) - out.confidence * accept
        # For the record alone; the loss's own gradient goes through `bce`.
        predicted = jax.lax.stop_gradient(jax.nn.sigmoid(out.confidence))
        sums["confidence"] = jnp.sum(weights * bce)
        sums["confidence_bias"] = jnp.sum(weights * (predicted - accept))
        sums["confidence_abs_error"] = jnp.sum(weights * jnp.abs(predicted - accept))
        sums["confidence_cumprod_bias"] = jnp.sum(weights * (jnp.cumprod(predicted * supervised, axis=-1) - survival))

    return sums
