"""DFlash 2's parts: local convolutions, the selector, the waiting anchor, their loss; alone and in combinations."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.drafters.config import ConvolutionConfig
from dspark_jax.drafters.convolution import convolve
from dspark_jax.drafters.protocol import SelectorOutput
from dspark_jax.drafters.registry import drafter_hf_config, graft_target_layers
from dspark_jax.drafters.vocabulary import DraftVocabulary
from dspark_jax.errors import UserError
from dspark_jax.serving.generate import generate
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.joined import apart
from dspark_jax.training.terms import LossOptions, selector_terms
from tests.decoding_tiny import kind_pair, prompts
from tests.drafters_tiny import HIDDEN, TAPS, VOCAB, target_hf_config, tiny_drafter, tiny_tables
from tests.forced import forced_blocks
from tests.test_drafter import ANCHORS, POSITIONS, drafted_law, features

CONVOLUTION: dict[str, Any] = {"conv_kernel_size": 2, "conv_group_size": 8}
OPTIONS = LossOptions(1.0, 0.0, 0.0, decay_gamma=0.0, anchor_chunk=4)


def forced(drafter: Any, previous: jax.Array, taps: jax.Array) -> Any:
    def run(params: dict) -> Any:
        model = drafter.model(params)
        return forced_blocks(model, tiny_tables(), model.context(taps), previous, POSITIONS[:, None])

    return jax.jit(run)(drafter.params)


def test_a_convolution_is_its_sum() -> None:
    rng = np.random.default_rng(0)
    values, base, delta = (rng.standard_normal(shape) for shape in ((2, 4, 6), (3, 6), (2, 4, 3, 2)))
    expected = np.zeros_like(values)
    for block, i, channel in np.ndindex(values.shape):
        for tap in range(min(3, i + 1)):
            kernel = base[tap, channel] + delta[block, i, tap, channel // 3]
            expected[block, i, channel] += kernel * values[block, i - tap, channel]
    found = convolve(*(jnp.asarray(x, jnp.float32) for x in (values, base, delta)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_fresh_convolution_is_none_bit_for_bit() -> None:
    """Also in the random numbers of all other parameters, and in the context, which no convolution sees."""
    plain, convolved = tiny_drafter(), tiny_drafter(**CONVOLUTION)
    assert convolved.config.convolution == ConvolutionConfig(2, 8)
    previous = jax.random.randint(jax.random.key(0), (3, 1, 4), 0, VOCAB)
    expected, found = (forced(drafter, previous, features()) for drafter in (plain, convolved))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_convolved_rows_see_the_rows_before_them_alone() -> None:
    """Through attention every row sees every other, so the blocks' attention is taken out."""
    drafter = tiny_drafter(num_layers=1, **CONVOLUTION)
    layer = drafter.params["backbone"]["layers"][0]
    noise = {name: jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), layer[name])
             for name in ("attention_conv", "mlp_conv")}  # fmt: skip
    silent = layer["attention"] | {"o_weight_pd": jnp.zeros_like(layer["attention"]["o_weight_pd"])}
    backbone = drafter.params["backbone"] | {"layers": {0: {**layer, **noise, "attention": silent}}}
    params = drafter.params | {"backbone": backbone}

    def rows(x: jax.Array) -> jax.Array:
        model = drafter.model(params)
        context = model.context(features(length=5)[:1])
        return model.backbone(x[None], jnp.array([[3, 4]]), context)[0]

    rows = jax.jit(rows)
    run = jax.jit(rows)
    x = jax.random.normal(jax.random.key(2), (2, 4, HIDDEN))
    base = run(x)
    for block, row in np.ndindex(2, 4):
        moved = np.any(np.asarray(run(x.at[block, row].add(1.0)) != base), axis=-1)
        # Two convolutions of two taps each: the row itself and the two behind it, of its own block.
        assert np.argwhere(moved).tolist() == [[block, i] for i in range(row, min(row + 3, 4))]


def test_grafted_layers_keep_their_convolutions() -> None:
    drafter = tiny_drafter(**CONVOLUTION)
    layers = apart(drafter.params, drafter.config.backbone)["backbone"]["layers"]
    bare = [{name: part for name, part in layers[i].items() if not name.endswith("_conv")} for i in (0, 1)]
    made = graft_target_layers(drafter.hf_config, drafter.params, bare, drafter.params["backbone"]["norm"])
    assert set(made["backbone"]["layers"][0]) == set(drafter.params["backbone"]["layers"][0])


@pytest.mark.parametrize("vocabulary", [None, DraftVocabulary.of(range(1, VOCAB, 2), VOCAB)])
@pytest.mark.parametrize("waits", [False, True])
def test_the_walk_is_the_best_of_all_pairs(vocabulary: Any, waits: bool) -> None:
    """x_k from brute force over every pair of candidates, and the law from the softmax of their scores."""
    options = {"markov_head_type": "selector", "selector_top_k": 5, "draft_vocabulary": vocabulary}
    drafter = tiny_drafter(num_layers=1, sample_from_anchor=not waits, **options)
    head = {name: 6 * leaf for name, leaf in drafter.params["markov_head"].items() if name != "hidden_projection"}
    drafter = replace(drafter, params=drafter.params | {"markov_head": drafter.params["markov_head"] | head})
    taps = features()

    def walk(logits: jax.Array, k: int, ids: jax.Array) -> tuple[jax.Array, Any]:
        best = jnp.take_along_axis(ids, jnp.argmax(logits, axis=-1)[:, None], axis=-1)[:, 0]
        return best, (ids, jax.nn.softmax(logits))

    def run(params: dict) -> Any:
        model = drafter.model(params)
        state = model.prefill(tiny_tables(), taps, jnp.zeros((3, 12), jnp.int32), POSITIONS)
        hidden = model.draft_hidden(tiny_tables(), state, ANCHORS, POSITIONS)
        out = model.draft(tiny_tables(), state, ANCHORS, POSITIONS, walk)
        return out, hidden, model.base_logits(tiny_tables(), hidden)

    drafted, hidden, base = jax.device_get(jax.jit(run)(drafter.params))
    known = np.arange(VOCAB) if vocabulary is None else vocabulary.ids
    predecessors, successors = (
        np.asarray(drafter.params["markov_head"][name], np.float64) for name in ("w1_vr", "w2_vr")
    )
    projection = np.asarray(drafter.params["markov_head"]["hidden_projection"]["weight_io"], np.float64)
    for request in range(3):
        before = int(ANCHORS[request])
        for k in range(4):
            ids = np.argsort(-base[request, k], kind="stable")[:5]
            pairs = [(predecessors[before] * (hidden[request, k] @ projection)) @ successors[c] for c in ids]
            scores = base[request, k, ids] + np.array(pairs)
            np.testing.assert_array_equal(drafted.law[0][request, k], known[ids])
            law = np.exp(scores - scores.max())
            np.testing.assert_allclose(drafted.law[1][request, k], law / law.sum(), atol=1e-5)
            before = int(known[ids[np.argmax(scores)]])
            assert drafted.tokens[request, k] == before


def test_training_sees_what_drafting_does_where_the_anchor_waits() -> None:
    drafter = tiny_drafter(num_layers=1, sample_from_anchor=False, **CONVOLUTION)
    taps, tokens = features(), jax.random.randint(jax.random.key(4), (3, 4), 0, VOCAB)
    previous = jnp.concatenate([ANCHORS[:, None], tokens[:, :-1]], axis=1)[:, None]

    def given(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        return tokens[:, k], jax.nn.softmax(logits)

    def run(params: dict) -> Any:
        model = drafter.model(params)
        state = model.prefill(tiny_tables(), taps, jnp.zeros((3, 12), jnp.int32), POSITIONS)
        return model.draft(tiny_tables(), state, ANCHORS, POSITIONS, given).law

    law = jax.jit(run)(drafter.params)
    np.testing.assert_allclose(drafted_law(forced(drafter, previous, taps)), law, atol=1e-6)


def test_the_selectors_loss_by_hand() -> None:
    rng = np.random.default_rng(0)
    base, latent, successors = (rng.standard_normal(shape) for shape in ((2, 6), (2, 3), (6, 3)))
    ids = np.argsort(-base, axis=-1)[:, :3]
    whole = base + latent @ successors.T
    scores = np.take_along_axis(whole, ids, axis=-1)
    # The first row's label is its second candidate, the second row's none of them.
    labels = np.array([ids[0, 1], np.argsort(-base[1])[4]])
    p = np.full((2, 6), 0.1)
    p[[0, 1], labels] = 0.5
    made = SelectorOutput(*(jnp.asarray(x) for x in (ids, scores, latent, successors)))
    accept, found = selector_terms(made, jnp.asarray(base), jnp.asarray(p), OPTIONS)

    candidates = [ids[0], [*ids[1, :2], labels[1]]]
    expected = [np.log(np.exp(whole[i, c]).sum()) - whole[i, labels[i]] for i, c in enumerate(candidates)]
    np.testing.assert_allclose(found["selector"], expected, rtol=1e-5)
    law = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(accept, np.minimum(law, np.take_along_axis(p, ids, -1)).sum(-1), rtol=1e-5)
    # A label that was put in never counts as found, however likely it then is.
    assert found["recall"].tolist() == [True, False]
    assert found["right"].tolist() == [bool(np.argmax(scores[0]) == 1), False]

    _, soft = selector_terms(made, jnp.asarray(base), jnp.asarray(p), replace(OPTIONS, selector_target="law"))
    share = np.take_along_axis(p, ids, -1) / np.take_along_axis(p, ids, -1).sum(-1, keepdims=True)
    np.testing.assert_allclose(soft["selector"], -(share * np.log(law)).sum(-1), rtol=1e-5)


COMBINED = (("selector_top_k", 3), ("conv_kernel_size", 2), ("conv_group_size", 4))


@pytest.mark.lossless
@pytest.mark.parametrize("tree", [0, 12])
def test_combinations_decode_losslessly(tree: int, tmp_path: Path) -> None:
    """A selector and convolutions with a confidence head: plain decoding's text under the scheduler where the anchor
    waits, and in trees where it predicts."""
    options = (*COMBINED, ("sample_from_anchor", tree > 0))
    target, drafter = kind_pair("dspark", head="selector", spread=0.8, options=options)
    assert drafter.config.enable_confidence_head
    # Steps that cost the same however many tokens they verify, so that drafting pays.
    flat = {"sample_batch_tokens": [1, 64], "sample_steps_per_sec": [100.0] * 2, "max_batch_tokens": 64}
    (tmp_path / "sps.json").write_text(json.dumps(flat))
    given, plain = prompts(8, 6, seed=3, longest=6), EngineConfig(4, 64, "fixed")
    scheduled = replace(plain, policy="causal", sps=tmp_path / "sps.json")
    sampling = SamplingParams(16, 1.0, seed=5, mode="coupled") if tree else SamplingParams(16)
    alone = generate(target, None, given, sampling, plain)
    found = generate(target, drafter, given, sampling, replace(plain, tree=tree) if tree else scheduled)
    assert [g.tokens for g in found] == [g.tokens for g in alone]
    assert sum(sum(g.accepted_at) for g in found) > 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"markov_head_type": "selector", "selector_top_k": 99}, "selector_top_k is 99; it drafts 61 tokens"),
        ({"conv_kernel_size": 2, "conv_group_size": 7}, "conv_group_size is 7; expected a divisor of its hidden_size"),
    ],
)
def test_impossible_parts_are_refused(fields: dict[str, Any], message: str) -> None:
    given = {"num_layers": 1, "target_layer_ids": TAPS, "mask_token_id": 5} | fields
    with pytest.raises(UserError, match=message):
        drafter_hf_config(target_hf_config(), **given)
