"""The terms of the loss of one chunk of blocks, from the laws of drafter and target (docs/algorithm.md, rules 41, 118
to 120, 123 and 127).

Axes: B batch row, C chunk of anchors, K block position, V vocab, P draft vocabulary, E candidates of a selector, *n any
leading axes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.config.schema import LossSettings
from dspark_jax.drafters.protocol import BlockLogits, SelectorOutput
from dspark_jax.drafters.vocabulary import DraftVocabulary
from dspark_jax.targets.products import product
from dspark_jax.training.anchors import Blocks
from dspark_jax.training.vocabulary_terms import RowTerms

# Added to the summed weights: the loss of a batch without supervision is 0, not NaN (docs/algorithm.md, rule 41).
EPSILON = 1e-6

# D-PACE's floor a: a slot that is never accepted still passes on half of the weight behind it.
PACE_FLOOR = 0.5
# The rate at which the mixed LK loss goes over from KL to total variation as acceptance rises.
LK_RATE = 3.0

# Accepted lengths of a selector, and what a slot must have for its prefix to go on.
_LENGTHS = {"tau_oracle": "recall", "tau_greedy": "right"}

Sums = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class LossOptions(LossSettings):
    """L = Σ alpha · term over the terms whose alpha is not 0 (docs/algorithm.md, rules 41 and 118 to 120).

    Attributes:
        anchor_chunk: anchors of a row whose logits [B, anchor_chunk, K, V] are in memory at once; the others are those
            of `LossSettings`.
        vocabulary_chunk: where it is not 0, ids whose logits [B, N, K, vocabulary_chunk] are, of all anchors.
    """

    anchor_chunk: int
    vocabulary_chunk: int = 0

    @property
    def alphas(self) -> dict[str, float]:
        """Weight of each term, by its name in the sums."""
        return {
            "ce": self.ce_alpha,
            "soft_ce": self.soft_ce_alpha,
            "l1": self.l1_alpha,
            "lk": self.lk_alpha,
            "lk_mixed": self.lk_mixed_alpha,
            "length": self.length_alpha,
            "confidence": self.confidence_alpha,
            "selector": self.selector_alpha,
        }

    @property
    def decay(self) -> float | None:
        """g of the slot weights that follow from masks alone; None for D-PACE, whose factor follows from the laws."""
        return self.decay_gamma if self.slot_weights == "decay" else None

    def total(self, sums: Sums, denominator: Array) -> Array:
        """The loss, [] float32, from the sums and the global sum of weights (+ EPSILON) that all terms share."""
        # Terms are combined before the division: they share one denominator, whichever of them there are. `laws` is
        # what the gradient flows through; the sums of its terms are figures.
        confidence = self.confidence_alpha * sums["confidence"] if "confidence" in sums else 0.0
        return (sums["laws"] + confidence) / denominator


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
    return inside + mass_outside(other)


def mass_outside(law: Float[Array, "*n p"]) -> Float[Array, "*n"]:
    """The mass that a law has outside of the ids that it was restricted to."""
    # Rounding can put the mass inside slightly above 1.
    return jnp.maximum(1.0 - jnp.sum(law, axis=-1), 0.0)


@jax.custom_vjp
def label_terms(
    logits: Float[Array, "*n p"], law: Float[Array, "*n p"], labels: Int[Array, "*n"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """(cross-entropy of the labels, ‖softmax(logits) - law‖_1), differentiable by the logits alone.

    The gradient is written out, so that both terms share one pass over the vocabulary in either direction.
    """
    return _label_forward(logits, law, labels)[0]


def _label_forward(logits: Array, law: Array, labels: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    top = jnp.max(logits, axis=-1, keepdims=True)
    log_total = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))
    apart, q = _apart(logits, law, top, log_total)

    # d ‖q - p‖_1 / d logit_v = q_v (sign_v - Σ_u sign_u q_u).
    l1, pull = jnp.sum(jnp.abs(apart), axis=-1), jnp.sum(jnp.sign(apart) * q, axis=-1)
    label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    entropy = (log_total + top)[..., 0] - label
    return (entropy, l1), (logits, law, labels, top, log_total, pull)


def _label_backward(kept: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Array, None, None]:
    logits, law, labels, top, log_total, pull = kept
    of_entropy, of_l1 = (x[..., None] for x in cotangents)
    apart, q = _apart(logits, law, top, log_total)

    # Summed by row first, so that two numbers of a row are spread over the vocabulary and not three.
    made = q * ((of_entropy - of_l1 * pull[..., None]) + of_l1 * jnp.sign(apart))
    return _less_at_label(made, of_entropy, labels), None, None


def _less_at_label(x: Array, less: Array, labels: Array) -> Array:
    """x [*n, P], less what is [*n, 1], at each row's label."""

    # In the pass that makes `x`; a CPU's compiler would write both operands of that subtraction to memory.
    def compared(x: Array, less: Array, labels: Array) -> Array:
        return x - jnp.where(jnp.arange(x.shape[-1]) == labels[..., None], less, 0.0)

    def scattered(x: Array, less: Array, labels: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        return rows.at[jnp.arange(len(rows)), labels.reshape(-1)].add(-less.reshape(-1)).reshape(x.shape)

    return jax.lax.platform_dependent(x, less, labels, cpu=scattered, default=compared)


def _apart(logits: Array, law: Array, top: Array, log_total: Array) -> tuple[Array, Array]:
    """(q - p, q) of the law q of the logits."""
    # Not the exponentials of the sum over again, divided: a compiler would keep those, [*n, V], in memory.
    q = jnp.exp((logits - top) - log_total)
    return q - law, q


label_terms.defvjp(_label_forward, _label_backward)


def soft_terms(
    draft_logits: Float[Array, "*n p"],
    target_logits: Float[Array, "*n v"],
    l1: Float[Array, "*n"],
    vocabulary: DraftVocabulary | None,
    options: LossOptions,
) -> Sums:
    """The terms against the target's whole law that the options ask for, [*n] float32 each (docs/algorithm.md, rule
    118). Mass of the target outside a pruned vocabulary is left out, as labels outside it are."""
    wanted = {name for name in ("soft_ce", "lk", "lk_mixed") if options.alphas[name] > 0}
    if not wanted:
        return {}

    # Normalised over the whole vocabulary, then restricted to what can be drafted.
    log_p = jax.nn.log_softmax(target_logits, axis=-1)
    log_p = log_p if vocabulary is None else vocabulary.restrict(log_p)
    log_q = jax.nn.log_softmax(draft_logits, axis=-1)
    terms: Sums = {}

    if "lk" in wanted:
        # In logs, so that the gradient does not vanish where acceptance does: 1 - ½ L1 would lose its digits there.
        terms["lk"] = -jax.nn.logsumexp(jnp.minimum(log_p, log_q), axis=-1)

    p = jnp.exp(log_p)
    entropy = -jnp.sum(p * log_q, axis=-1)
    if "soft_ce" in wanted:
        terms["soft_ce"] = entropy
    if "lk_mixed" in wanted:
        divergence = entropy + jnp.sum(p * log_p, axis=-1)
        terms["lk_mixed"] = _mixed(divergence, l1)

    return terms


def _mixed(divergence: Array, l1: Array) -> Array:
    share = jnp.exp(-LK_RATE * accept_rate(l1))
    return share * divergence + (1.0 - share) * 0.5 * l1


def selector_terms(
    made: SelectorOutput, base: Float[Array, "*n p"], p: Float[Array, "*n p"], options: LossOptions
) -> tuple[Float[Array, "*n"], Sums]:
    """(Σ_v min(p^d, p^t) of a selector's law, its cross-entropy and figures, [*n] float32 each; docs/algorithm.md, rule
    123). `p` is the target's law over the draft vocabulary."""
    kept = jnp.take_along_axis(p, made.candidates, axis=-1)
    accept = jnp.sum(jnp.minimum(jax.nn.softmax(made.scores, axis=-1), kept), axis=-1)
    label = jnp.argmax(p, axis=-1)
    hits = made.candidates == label[..., None]
    found = jnp.any(hits, axis=-1)

    if options.selector_target == "law":
        # Over what can be drafted: no candidate is put in, and mass outside changes no score.
        share = kept / jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        entropy = -jnp.sum(share * jax.nn.log_softmax(made.scores, axis=-1), axis=-1)
    else:
        # Where the label is no candidate it takes the place of the last one, in the loss alone.
        successor = jnp.take(made.successors, label, axis=0)
        pair = product("...r,...r->...", made.latent, successor)
        own = jnp.take_along_axis(base, label[..., None], axis=-1)[..., 0] + pair
        last = jnp.where(found, made.scores[..., -1], own)
        entropy = jax.nn.logsumexp(made.scores.at[..., -1].set(last), axis=-1) - own

    right = found & jnp.take_along_axis(hits, jnp.argmax(made.scores, axis=-1)[..., None], axis=-1)[..., 0]
    return accept, {"selector": entropy, "recall": found, "right": right}


def pace_weights(accept: Float[Array, "*n k"], supervised: Bool[Array, "*n k"]) -> Float[Array, "*n k"]:
    """D-PACE's w_j = Σ_{m >= j} Π_{i <= m} s_i over supervised slots, s_i = a + (1 - a) accept_i (arXiv 2605.18810,
    with acceptance in place of the label's probability; docs/algorithm.md, rule 119)."""
    steps = PACE_FLOOR + (1.0 - PACE_FLOOR) * accept
    reached = jnp.cumprod(jnp.where(supervised, steps, 1.0), axis=-1) * supervised
    # What is behind slot j, itself included: never rising, since every term is positive.
    behind = jnp.cumsum(reached[..., ::-1], axis=-1)[..., ::-1]
    # Weights are no part of the model: through them, the loss would fall by lowering acceptance.
    return jax.lax.stop_gradient(behind * supervised)


def length_term(l1: Float[Array, "*n k"], supervised: Bool[Array, "*n k"]) -> Float[Array, "*n"]:
    """-log of a block's expected committed tokens 1 + Σ_k Π_{i <= k} a_i, a = 1 - ½ L1 (docs/algorithm.md, rule 127).

    The gradient weighs each slot by the probability that its prefix is accepted and by what is expected behind it,
    which slot weights only estimate.
    """
    # Not `accept_rate`, through which no gradient flows.
    return -jnp.log1p(jnp.sum(_survival(jnp.clip(1.0 - 0.5 * l1, 0.0, 1.0), supervised), axis=-1))


def law_sums(
    out: BlockLogits, targets: Array, blocks: Blocks, vocabulary: DraftVocabulary | None, options: LossOptions
) -> tuple[Array, Sums, Float[Array, "b c k"]]:
    """(Σ alpha · term over the terms of the laws, additive sums, acceptance) of a chunk, float32.

    Returns:
        Of the sums:
        `ce`, `l1`, `length`, and those of `soft_terms`: weighted sums of the terms.
        `weight`: the sum of the weights that follow from masks, the denominator of all terms.
        `accept`, `supervised`: [K], sums over supervised slots without weights, and their number.
        `tau`, `blocks`: expected committed tokens of blocks with a supervised slot, and the number of these blocks.
        `selector`, and `recall`, `tau_oracle`, `tau_greedy` of a selector: its cross-entropy; how many labels are among
        the candidates; expected committed tokens if every such label were chosen, and if the likeliest candidate is.
    """
    accept, terms = _base_terms(out.logits, targets, blocks, vocabulary, options)
    l1, choice = terms["l1"], Sums()
    if out.selector is not None:
        p = jax.nn.softmax(targets, axis=-1)
        p = p if vocabulary is None else vocabulary.restrict(p)
        # What is accepted follows from the law that is drafted from; the terms so far are of the base logits.
        overlap, choice = selector_terms(out.selector, out.logits, p, options)
        l1 = 2.0 * (1.0 - overlap)
        accept = accept_rate(l1)
        terms["selector"] = choice["selector"]

    return _weighted(terms, l1, accept, choice, blocks, options)


def row_sums(found: RowTerms, blocks: Blocks, options: LossOptions) -> tuple[Array, Sums, Float[Array, "b c k"]]:
    """`law_sums` of laws of which the terms [B, C, K] of rows are known; for a drafter with the target's vocabulary and
    no selector."""
    wanted, l1 = {name for name, alpha in options.alphas.items() if alpha > 0}, found.l1
    terms = {"ce": blocks.supervised * found.entropy, "l1": l1}
    if "lk" in wanted and found.overlap is not None:
        terms["lk"] = -found.overlap
    if "soft_ce" in wanted and found.cross is not None:
        terms["soft_ce"] = found.cross
    if "lk_mixed" in wanted and found.cross is not None and found.own is not None:
        terms["lk_mixed"] = _mixed(found.cross + found.own, l1)
    return _weighted(terms, l1, accept_rate(l1), Sums(), blocks, options)


def _weighted(
    terms: Sums, l1: Array, accept: Array, choice: Sums, blocks: Blocks, options: LossOptions
) -> tuple[Array, Sums, Array]:
    """What `law_sums` returns, of the terms [B, C, K] and a selector's figures."""
    supervised, weights = blocks.supervised, _slot_weights(accept, blocks, options)
    sums = {name: jnp.sum(weights * term) for name, term in terms.items()}
    if options.length_alpha > 0:
        sums["length"] = jnp.sum(blocks.weights * length_term(l1, supervised)[..., None])
    total = sum((options.alphas[name] * sums[name] for name in sums), jnp.zeros(()))

    # From masks alone, whatever the terms are weighted by: the denominator is known before the pass and is the same for
    # every shard (docs/algorithm.md, rule 44).
    sums["weight"] = jnp.sum(blocks.weights)
    sums |= _figures(accept, choice, supervised)

    return total, sums, accept


def confidence_sums(
    logits: Float[Array, "b n k"], accept: Float[Array, "b n k"], blocks: Blocks, options: LossOptions
) -> Sums:
    """`confidence`, the weighted sum of the confidence head's cross-entropy against acceptance, and `confidence_*`,
    those of its errors, without a gradient."""
    survival = _survival(accept, blocks.supervised)
    if options.confidence_weights == "reach":
        # A scheduler reads c_k only where the prefix before it survived (docs/algorithm.md, rule 120).
        before = jnp.pad(survival[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=1.0)
        weights = before * blocks.supervised
    else:
        weights = _slot_weights(accept, blocks, options)
    return _confidence_sums(logits, weights, accept, survival, blocks)


def _slot_weights(accept: Array, blocks: Blocks, options: LossOptions) -> Array:
    return pace_weights(accept, blocks.supervised) if options.slot_weights == "d_pace" else blocks.weights


def _survival(accept: Array, supervised: Array) -> Array:
    """The probability that the whole prefix survives; an unsupervised slot ends it (docs/algorithm.md, rule 45)."""
    return jnp.cumprod(accept * supervised, axis=-1)


def _base_terms(
    logits: Array, targets: Array, blocks: Blocks, vocabulary: DraftVocabulary | None, options: LossOptions
) -> tuple[Float[Array, "b c k"], Sums]:
    """(acceptance by the law of `logits`, the terms of that law), [B, C, K] float32 each."""
    law = law_of(targets)
    labels, learnable, outside = blocks.labels, blocks.supervised, jnp.zeros(())
    if vocabulary is not None:
        # No drafter can learn a label that it cannot draft; the variation counts it as lost, as decoding will.
        labels = vocabulary.local(blocks.labels)
        learnable = blocks.supervised & (labels < vocabulary.size)
        labels = jnp.minimum(labels, vocabulary.size - 1)
        law = vocabulary.restrict(law)
        outside = mass_outside(law)

    # The whole sum and not half of it (docs/algorithm.md, rule 41).
    entropy, inside = label_terms(logits, law, labels)
    l1 = inside + outside
    terms = {"ce": learnable * entropy, "l1": l1}
    return accept_rate(l1), terms | soft_terms(logits, targets, l1, vocabulary, options)


def law_of(logits: Float[Array, "*n v"]) -> Float[Array, "*n v"]:
    """softmax(logits) in the form of which the platform's compiler writes least."""

    # Made again from the logits; the exponentials, divided, would be kept in memory beside them.
    def again(logits: Array) -> Array:
        return jnp.exp(jax.nn.log_softmax(logits, axis=-1))

    # On a CPU the product of the head makes exponentials in place of its logits, in all threads; their sum alone, made
    # from logits, is one thread's work and 7 % of a step of 49,152 ids.
    return jax.lax.platform_dependent(logits, cpu=jax.nn.softmax, default=again)


def _figures(accept: Array, choice: Sums, supervised: Array) -> Sums:
    """Unweighted sums over supervised slots and blocks (docs/algorithm.md, rule 45); `choice` is a selector's, or
    empty."""
    used = jnp.any(supervised, axis=-1)

    def committed(prefix: Array) -> Array:
        return jnp.sum(used * (1.0 + jnp.sum(prefix, axis=-1)))

    sums = {
        "accept": jnp.sum(accept * supervised, axis=(0, 1)),
        "supervised": jnp.sum(supervised, axis=(0, 1), dtype=jnp.float32),
        "tau": committed(_survival(accept, supervised)),
        "blocks": jnp.sum(used, dtype=jnp.float32),
    }
    if choice:
        sums |= {name: committed(jnp.cumprod(choice[hit] * supervised, axis=-1)) for name, hit in _LENGTHS.items()}
        sums["recall"] = jnp.sum(choice["recall"] * supervised, dtype=jnp.float32)

    return sums


def _confidence_sums(logits: Array, weights: Array, accept: Array, survival: Array, blocks: Blocks) -> Sums:
    """Sums of the confidence head's cross-entropy by `weights`, and of its errors by the weights of the masks."""
    # softplus(z) - z c* is the cross-entropy of sigmoid(z) against c*, without overflow.
    bce = jax.nn.softplus(logits) - logits * accept
    # For the record alone; the loss's own gradient goes through `bce`.
    predicted = jax.lax.stop_gradient(jax.nn.sigmoid(logits))
    cumulative = jnp.cumprod(predicted * blocks.supervised, axis=-1)

    return {
        "confidence": jnp.sum(weights * bce),
        "confidence_bias": jnp.sum(blocks.weights * (predicted - accept)),
        "confidence_abs_error": jnp.sum(blocks.weights * jnp.abs(predicted - accept)),
        "confidence_cumprod_bias": jnp.sum(blocks.weights * (cumulative - survival)),
    }
