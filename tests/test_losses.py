"""Terms and weights of the loss: gradients by finite differences, plain computations, what they agree with."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dspark_jax.config.schema import LossSettings
from dspark_jax.drafters.protocol import BlockLogits
from dspark_jax.drafters.vocabulary import DraftVocabulary
from dspark_jax.training.anchors import Blocks
from dspark_jax.training.spec import loss_options
from dspark_jax.training.terms import (
    LossOptions,
    confidence_sums,
    label_terms,
    law_of,
    law_sums,
    length_term,
    pace_weights,
    pruned_variation_l1,
    soft_terms,
)
from dspark_jax.training.terms import total_variation_l1 as variation

V = 7
NONE = LossOptions(0.0, 0.0, 0.0, decay_gamma=0.0, anchor_chunk=1)
SOFT = ("soft_ce", "lk", "lk_mixed")


def logits(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*shape, V)) * 1.5


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("pruned", [False, True])
def test_gradients_are_those_of_finite_differences(name: str, pruned: bool) -> None:
    vocabulary = DraftVocabulary.of([0, 2, 3, 6], V) if pruned else None
    draft, target = logits(0, 3)[..., : 4 if pruned else V], logits(1, 3)
    options = replace(NONE, **{f"{name}_alpha": 1.0})

    def total(draft: jax.Array, share: jax.Array | None = None) -> jax.Array:
        l1 = variation(draft, target) if vocabulary is None else pruned_variation_l1(draft, target, vocabulary)
        terms = soft_terms(draft, target, l1, vocabulary, options)
        assert set(terms) == {name}
        return jnp.sum(terms[name])

    if name != "lk_mixed":
        check_grads(total, (draft,), order=1, modes=("rev",), atol=2e-3, rtol=2e-3, eps=1e-2)
        return

    # λ is held: the gradient is the mixture of the two gradients at today's λ.
    def held(draft: jax.Array) -> jax.Array:
        l1 = variation(draft, target) if vocabulary is None else pruned_variation_l1(draft, target, vocabulary)
        kl = soft_terms(draft, target, l1, vocabulary, replace(NONE, soft_ce_alpha=1.0))["soft_ce"]
        return jnp.sum(share * kl + (1 - share) * 0.5 * l1)

    l1 = variation(draft, target) if vocabulary is None else pruned_variation_l1(draft, target, vocabulary)
    share = jnp.exp(-3 * (1 - 0.5 * l1))
    check_grads(held, (draft,), order=1, modes=("rev",), atol=2e-3, rtol=2e-3, eps=1e-2)
    np.testing.assert_allclose(jax.grad(total)(draft), jax.grad(held)(draft), atol=1e-6)


def test_lk_is_the_log_of_acceptance_and_cross_entropy_of_a_certain_target() -> None:
    draft, target = logits(0, 5), logits(1, 5)
    options = replace(NONE, lk_alpha=1.0)
    found = soft_terms(draft, target, variation(draft, target), None, options)["lk"]
    p, q = jax.nn.softmax(target), jax.nn.softmax(draft)
    np.testing.assert_allclose(found, -np.log(np.minimum(p, q).sum(-1)), rtol=1e-5)

    certain = jnp.zeros((5, V)).at[:, 2].set(1e4)
    # Acceptance far below float32's smallest number: the value and its gradient stay.
    far = draft.at[:, 2].add(-300.0)
    for given in (draft, far):
        value, gradient = jax.value_and_grad(
            lambda x: jnp.sum(soft_terms(x, certain, variation(x, certain), None, options)["lk"])
        )(given)
        np.testing.assert_allclose(value, -jax.nn.log_softmax(given)[:, 2].sum(), rtol=1e-5)
        np.testing.assert_allclose(gradient, jax.nn.softmax(given) - jax.nn.one_hot(2, V), atol=1e-5)

    kept = DraftVocabulary.of([1, 2, 5], V)
    few = draft[:, :3]
    l1 = pruned_variation_l1(few, target, kept)
    np.testing.assert_allclose(jnp.exp(-soft_terms(few, target, l1, kept, options)["lk"]), 1 - 0.5 * l1, rtol=1e-5)


def test_pace_weights_are_the_expected_drafts_behind_a_slot() -> None:
    accept = jnp.array([[0.8, 0.4, 0.6, 0.1], [0.8, 0.4, 0.6, 0.1]])
    supervised = jnp.array([[True] * 4, [True, True, False, False]])
    steps = 0.5 + 0.5 * np.asarray(accept)
    expected = np.zeros((2, 4))
    for row, length in enumerate((4, 2)):
        for j in range(length):
            expected[row, j] = sum(np.prod(steps[row, : m + 1]) for m in range(j, length))
    found = pace_weights(accept, supervised)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.all(np.diff(found[0]) < 0)
    # Without the block's end in the sum, slots that do not exist would add to the weights before them.
    assert found[1, 0] < found[0, 0]
    assert not np.any(jax.grad(lambda x: jnp.sum(pace_weights(x, supervised)))(accept))


def test_accepted_length_as_a_loss_weighs_slots_by_what_is_accepted_behind_them() -> None:
    accept, supervised = jnp.array([0.8, 0.4, 0.6, 0.1]), jnp.array([True, True, True, False])
    a, b, c = 0.8, 0.8 * 0.4, 0.8 * 0.4 * 0.6
    value, slopes = jax.value_and_grad(lambda x: length_term(2 * (1 - x), supervised))(accept)
    assert float(value) == pytest.approx(-np.log(1 + a + b + c))
    # d / d log a_k: the drafts accepted from slot k on; none behind the block's end.
    expected = np.array([a + b + c, b + c, c, 0.0]) / (1 + a + b + c)
    np.testing.assert_allclose(-slopes * accept, expected, atol=1e-6)

    # In the whole loss it is of the laws' own acceptance, in the mean over the masks' weights.
    out, targets, confidence, blocks = chunk()
    options = replace(NONE, length_alpha=2.0)
    p, q = jax.nn.softmax(targets), jax.nn.softmax(out.logits)
    both = np.minimum(p, q).sum(-1)[0]
    lengths = 1 + np.array([both[0, 0] * (1 + both[0, 1] * (1 + both[0, 2])), both[1, 0]])
    weights = np.asarray(blocks.weights)[0].sum(-1)
    wanted = -2.0 * np.sum(weights * np.log(lengths)) / weights.sum()
    np.testing.assert_allclose(total(options, out, targets, confidence, blocks), wanted, rtol=1e-5)


def chunk() -> tuple[BlockLogits, jax.Array, jax.Array, Blocks]:
    """(logits, the target's, logits of the confidence head, blocks): two blocks of three slots, the second of which
    ends after the first."""
    supervised = jnp.array([[[True, True, True], [True, False, False]]])
    index = jnp.zeros((1, 2, 3), jnp.int32)
    labels = jnp.array([[[1, 2, 3], [4, 0, 0]]])
    weights = supervised * jnp.exp(-jnp.arange(3) / 2.5)
    blocks = Blocks(index[..., 0], index[..., 0] > -1, None, index, labels, index, supervised, weights)
    return BlockLogits(logits(0, 1, 2, 3)), logits(1, 1, 2, 3), logits(3, 1, 2)[..., :3], blocks


def total(options: LossOptions, out: BlockLogits, targets: jax.Array, confidence: jax.Array, blocks: Blocks) -> Any:
    laws, sums, accept = law_sums(out, targets, blocks, None, options)
    sums |= {"laws": laws} | confidence_sums(confidence, accept, blocks, options)
    return options.total(sums, sums["weight"])


def plain(out: BlockLogits, targets: jax.Array, confidence: jax.Array) -> tuple[Any, ...]:
    """(p, log q, acceptance, cross-entropy of the confidence) in float64."""
    draft, target = np.asarray(out.logits, np.float64), np.asarray(targets, np.float64)
    log_q = draft - np.log(np.exp(draft).sum(-1, keepdims=True))
    p = np.exp(target) / np.exp(target).sum(-1, keepdims=True)
    accept = np.minimum(p, np.exp(log_q)).sum(-1)
    z = np.asarray(confidence, np.float64)
    return p, log_q, accept, np.log1p(np.exp(z)) - z * accept


@pytest.mark.parametrize("pruned", [False, True])
def test_labels_and_variation_have_the_gradient_of_their_plain_form(pruned: bool) -> None:
    """In float32 that of autodiff, through which it need not go, and that of finite differences."""
    size = 4 if pruned else V
    draft, labels = logits(0, 6)[..., :size], jnp.array([0, 1, 2, 3, 0, 1])
    law = jax.nn.softmax(logits(1, 6), axis=-1)[..., :size]
    weights = jax.random.uniform(jax.random.key(2), (2, 6))

    def by_rule(draft: jax.Array) -> jax.Array:
        entropy, l1 = label_terms(draft, law, labels)
        return jnp.sum(weights[0] * entropy + weights[1] * l1)

    def by_autodiff(draft: jax.Array) -> jax.Array:
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(draft), labels[:, None], axis=-1)[:, 0]
        l1 = jnp.sum(jnp.abs(jax.nn.softmax(draft) - law), axis=-1)
        return jnp.sum(weights[0] * entropy + weights[1] * l1)

    found, expected = (jax.value_and_grad(f)(draft) for f in (by_rule, by_autodiff))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    check_grads(by_rule, (draft,), order=1, modes=("rev",), atol=2e-3, rtol=2e-3, eps=1e-2)


def test_exponentials_of_a_law_are_made_once_on_a_cpu_and_twice_where_they_would_be_kept() -> None:
    traced = jax.jit(law_of).trace(logits(2, 3))
    for platform, times in (("cpu", 1), ("tpu", 2), ("cuda", 2)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.exponential ") == times, platform
    np.testing.assert_allclose(law_of(logits(2, 3)), jax.nn.softmax(logits(2, 3)), rtol=1e-6)


def test_the_shipped_drafters_loss() -> None:
    """0.5 cross-entropy against the target's law + 2 total variation + 1 confidence, slot weights exp(-k / 2.5)."""
    settings = LossSettings(ce_alpha=0.0, soft_ce_alpha=0.5, l1_alpha=1.0, decay_gamma=2.5)
    out, targets, confidence, blocks = chunk()
    p, log_q, accept, bce = plain(out, targets, confidence)
    weights = np.asarray(blocks.weights, np.float64)
    expected = np.sum(weights * (-0.5 * (p * log_q).sum(-1) + 2 * (1 - accept) + bce)) / weights.sum()
    found = total(loss_options(settings, 1), out, targets, confidence, blocks)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_pace_and_reach_by_hand() -> None:
    options = replace(NONE, ce_alpha=1.0, confidence_alpha=1.0, slot_weights="d_pace", confidence_weights="reach")
    out, targets, confidence, blocks = chunk()
    blocks = blocks._replace(weights=blocks.supervised * 1.0)
    found = total(options, out, targets, confidence, blocks)
    _, log_q, accept, bce = plain(out, targets, confidence)
    s, expected = 0.5 + 0.5 * accept[0], 0.0
    for n, length in enumerate((3, 1)):
        for k in range(length):
            pace = sum(np.prod(s[n, : m + 1]) for m in range(k, length))
            label = int(blocks.labels[0, n, k])
            expected += -pace * log_q[0, n, k, label] + np.prod(accept[0, n, :k]) * bce[0, n, k]
    # By the number of supervised slots, not by the sum of the weights.
    np.testing.assert_allclose(found, expected / 4, rtol=1e-5)
