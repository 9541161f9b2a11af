"""DSpark: drafting equals its teacher-forced pass, sees what it may see, and takes heads from a registry."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.drafters.heads import MARKOV_HEADS, MarkovHead
from dspark_jax.drafters.registry import Drafter, drafter_hf_config
from dspark_jax.errors import UserError
from dspark_jax.targets.attention import KeysValues
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.kv_cache import append_rows, empty_cache, insert_rows
from dspark_jax.targets.registry import read_target_config
from tests.drafters_tiny import HIDDEN, TAPS, VOCAB, target_hf_config, tiny_drafter, tiny_tables
from tests.forced import Forced, forced_blocks

SIZE = 24
POSITIONS = jnp.array([3, 9, 0])
ANCHORS = jnp.array([11, 7, 30])


def greedy(logits: jax.Array, k: int, ids: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The best token, and its law over all tokens; over the candidates in the places of their ids, 0 elsewhere."""
    best, law = jnp.argmax(logits, axis=-1).astype(jnp.int32), jax.nn.softmax(logits, axis=-1)
    if ids is None:
        return best, law
    whole = jnp.put_along_axis(jnp.zeros((len(ids), VOCAB)), ids, law, axis=-1, inplace=False)
    return jnp.take_along_axis(ids, best[:, None], axis=-1)[:, 0], whole


def drafted_law(out: Forced) -> jax.Array:
    """The law [R, K, V] that blocks [R, 1, K] are drafted from."""
    if out.selector is None:
        return jax.nn.softmax(out.logits[:, 0])
    ids, law = out.selector.candidates[:, 0], jax.nn.softmax(out.selector.scores[:, 0])
    return jnp.put_along_axis(jnp.zeros((*ids.shape[:2], VOCAB)), ids, law, axis=-1, inplace=False)


def features(seed: int = 0, length: int = 12) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (3, length, len(TAPS) * HIDDEN))


@partial(jax.jit, static_argnums=0)
def _draft(graphdef: nnx.GraphDef, params: dict, taps: jax.Array) -> Any:
    model = nnx.merge(graphdef, params)
    small = model.prefill(tiny_tables(), taps, jnp.zeros(taps.shape[:2], jnp.int32), POSITIONS)
    state = insert_rows(model.init_state(3, SIZE, jnp.float32), small, jnp.arange(3))
    return model.draft(tiny_tables(), state, ANCHORS, POSITIONS, greedy)


def draft_with(drafter: Drafter, taps: jax.Array) -> Any:
    return _draft(drafter.graphdef, drafter.params, taps)


@pytest.mark.parametrize("head", [*MARKOV_HEADS, None])
def test_greedy_draft_is_the_teacher_forced_pass(head: str | None) -> None:
    fields = {"markov_head_type": head} if head else {"markov_rank": 0, "enable_confidence_head": False}
    drafter, taps = tiny_drafter(**fields), features()
    drafted = draft_with(drafter, taps)

    def forced(params: dict) -> Any:
        model = drafter.model(params)
        previous = jnp.concatenate([ANCHORS[:, None], drafted.tokens[:, :-1]], axis=1)[:, None]
        return forced_blocks(model, tiny_tables(), model.context(taps), previous, POSITIONS[:, None])

    out = jax.jit(forced)(drafter.params)
    np.testing.assert_array_equal(jnp.argmax(drafted_law(out), axis=-1), drafted.tokens)
    np.testing.assert_allclose(drafted_law(out), drafted.law, atol=1e-6)
    if head is None:
        assert drafted.confidence is None and out.confidence is None
    else:
        np.testing.assert_allclose(out.confidence[:, 0], drafted.confidence, atol=1e-5)
        other = draft_with(tiny_drafter(markov_head_type="vanilla" if head != "vanilla" else "rnn"), taps)
        assert not np.allclose(other.law, drafted.law, atol=1e-4)


def test_context_ends_strictly_before_the_anchor() -> None:
    drafter, taps = tiny_drafter(), features()
    base = draft_with(drafter, taps).law
    for row, position in enumerate(POSITIONS):
        later = draft_with(drafter, taps.at[row, position:].add(3.0)).law
        np.testing.assert_array_equal(later, base)
        if position > 0:
            before = draft_with(drafter, taps.at[row, position - 1].add(3.0)).law
            assert not np.allclose(before[row], base[row], atol=1e-4)
            np.testing.assert_array_equal(np.delete(before, row, 0), np.delete(base, row, 0))


def test_block_positions_are_the_anchors_own() -> None:
    """The same context and anchor one position later is another question, by RoPE alone."""
    drafter = tiny_drafter()
    taps, tables = features(length=8), tiny_tables()

    def at(params: dict, start: int) -> jax.Array:
        model = drafter.model(params)
        state = model.commit(
            tables,
            model.init_state(3, SIZE, jnp.float32),
            taps,
            jnp.zeros((3, 8), jnp.int32),
            jnp.zeros(3, jnp.int32),
            None,
        )
        return model.draft(tables, state, ANCHORS, jnp.full((3,), start), greedy).law

    run = jax.jit(at)
    # Positions 8 and on hold zeros, which are no context; so only the rotation differs.
    assert not np.allclose(run(drafter.params, 6), run(drafter.params, 7), atol=1e-5)


def test_commit_in_pieces_is_prefill_and_rollback_is_a_length() -> None:
    drafter, taps = tiny_drafter(), features()

    def pieces(params: dict) -> Any:
        model = drafter.model(params)
        state, none = model.init_state(3, SIZE, jnp.float32), jnp.zeros((3, 5), jnp.int32)
        state = model.commit(
            tiny_tables(), state, features(9)[:, :5], none, jnp.full((3,), 2), None
        )  # drafts that were refused
        for start in (0, 4, 8):
            rows = jnp.pad(taps[:, start : start + 4], ((0, 0), (0, 1), (0, 0)), constant_values=7.0)
            state = model.commit(tiny_tables(), state, rows, none, jnp.full((3,), start), jnp.full((3,), 4))
        return state, model.prefill(tiny_tables(), taps, none, POSITIONS)

    state, whole = jax.jit(pieces)(drafter.params)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a[:, :, :12], b, atol=1e-6)


def test_cache_writes_go_where_they_say() -> None:
    cache = empty_cache([(2, 4)] * 2, 3, 8, jnp.bfloat16)
    rows = jnp.arange(3 * 2 * 2 * 4, dtype=jnp.float32).reshape(3, 2, 2, 4)
    grown = append_rows(cache, (KeysValues(rows, -rows), KeysValues(rows + 1, rows)), jnp.array([0, 3, 6]))
    assert grown[0].keys.dtype == jnp.bfloat16
    for request, start in enumerate((0, 3, 6)):
        np.testing.assert_array_equal(grown[0].values[request, :, start : start + 2], -rows[request].swapaxes(0, 1))
        assert int(jnp.sum(jnp.any(grown[1].keys[request] != 0, axis=(0, 2)))) == 2
    moved = insert_rows(grown, jax.tree.map(lambda x: x[:2, :, 3:5] * 0 + 9, grown), jnp.array([2, 0]))
    np.testing.assert_array_equal(moved[1].values[1], grown[1].values[1])
    np.testing.assert_array_equal(moved[1].values[2, :, :2], jnp.full((2, 2, 4), 9.0))
    np.testing.assert_array_equal(moved[1].values[2, :, 2:], grown[1].values[2, :, 2:])


def test_a_new_head_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(MarkovHead):
        def step(self, state: Any, embedding: jax.Array, hidden: jax.Array) -> tuple[jax.Array, Any]:
            return 2.0 * embedding, state

    with pytest.raises(UserError, match="markov_head_type is 'doubled'; expected one of gated, rnn, selector, vanilla"):
        tiny_drafter(markov_head_type="doubled")
    monkeypatch.setitem(MARKOV_HEADS, "doubled", Doubled)
    doubled, vanilla = tiny_drafter(markov_head_type="doubled"), tiny_drafter()
    taller = dict(vanilla.params["markov_head"], w2_vr=vanilla.params["markov_head"]["w2_vr"] * 2)
    same = replace(vanilla, params=dict(vanilla.params, markov_head=taller))
    np.testing.assert_allclose(draft_with(doubled, features()).law, draft_with(same, features()).law, atol=1e-6)


def test_bfloat16_drafter_keeps_logits_and_confidence_in_float32() -> None:
    drafter = tiny_drafter()
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), drafter.params)
    low["confidence_head"] = drafter.params["confidence_head"]
    found = draft_with(replace(drafter, params=low), features())
    assert found.law.dtype == found.confidence.dtype == jnp.float32


def test_config_is_the_targets_with_fields_over_it() -> None:
    target = target_hf_config(layer_types=["sliding_attention"] * 4, use_sliding_window=True, sliding_window=4)
    before = dict(target)
    config = drafter_hf_config(target, num_layers=2, target_layer_ids=(0, 2), mask_token_id=9, intermediate_size=16)
    assert target == before
    assert config["architectures"] == ["Qwen3DSparkModel"] and config["model_type"] == "qwen3"
    assert (config["num_target_layers"], config["num_hidden_layers"]) == (4, 2)
    assert config["layer_types"] == ["full_attention"] * 2 and config["tie_word_embeddings"] is False
    expected = {
        "mask_token_id": 9, "target_layer_ids": [0, 2], "num_anchors": 512, "block_size": 7, "markov_rank": 256,
        "markov_head_type": "vanilla", "enable_confidence_head": True, "confidence_head_with_markov": True,
        "dtype": "bfloat16", "intermediate_size": 16, "rope_theta": 5000.0, "rms_norm_eps": 1e-5, "head_dim": 10,
        "target_config_sha256": config_sha256(target),
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    dflash = drafter_hf_config(
        target, num_layers=1, target_layer_ids=(0,), mask_token_id=9, markov_rank=0, enable_confidence_head=False
    )
    assert "markov_head_type" not in dflash and "confidence_head_with_markov" not in dflash


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_layer_ids": (0, 3)}, "the last layer of the 4-layer target being forbidden"),
        ({"target_layer_ids": (2, 1)}, "strictly increasing"),
        ({"target_layer_ids": (-2, 1)}, "each a whole number from -1"),
        ({"target_layer_ids": ()}, "1 or more, each a whole number"),
        ({"mask_token_id": VOCAB}, "outside its vocabulary of 61 tokens"),
        ({"block_size": 0}, "block_size = 0; expected a whole number from 1"),
    ],
)
def test_impossible_drafters_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_drafter(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 60}, "Vocabulary mismatch: the drafter has 61 tokens, the target 60"),
        ({"num_hidden_layers": 5}, "Target/drafter mismatch: the drafter's num_target_layers is 4, the target has 5"),
        ({"hidden_size": 32}, "Target/drafter mismatch: the drafter's hidden_size is 24, the target has 32"),
    ],
)
def test_a_drafter_of_another_target_is_refused(change: dict[str, int], message: str) -> None:
    other = read_target_config(target_hf_config(**change))
    with pytest.raises(UserError, match=message):
        tiny_drafter().config.check_target(other)
