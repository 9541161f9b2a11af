"""Pruned draft vocabularies: exact laws, losses against a plain computation, files of two layouts, the choice."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.tensors import TensorFolder
from dspark_jax.checkpoints.vocabulary_maps import stored_vocabulary
from dspark_jax.drafters.registry import Drafter, drafter_hf_config, new_drafter, with_draft_head
from dspark_jax.drafters.vocabulary import DraftVocabulary
from dspark_jax.errors import UserError
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.requests import Request, SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target
from dspark_jax.training.registry import make_objective
from dspark_jax.training.terms import LossOptions, total_variation_l1
from tests.decoding_tiny import kind_pair
from tests.drafters_tiny import VOCAB, target_hf_config, tiny_batch, tiny_drafter, tiny_tables, write_pair
from tests.forced import forced_blocks
from tests.test_lossless import SLOTS, exact_law, p_value, samples
from tests.tiny import write_tiny_target
from train.draft_vocabulary import main as choose

ODD = DraftVocabulary.of(range(1, VOCAB, 2), VOCAB)
WHOLE = DraftVocabulary.of(range(VOCAB), VOCAB)
OPTIONS = LossOptions(ce_alpha=0.3, l1_alpha=0.9, confidence_alpha=1.0, decay_gamma=4.0, anchor_chunk=4)


def test_ids_go_there_and_back() -> None:
    made = DraftVocabulary.of([17, 1, 3, 9], 20)
    np.testing.assert_array_equal(made.ids, [1, 3, 9, 17])
    assert DraftVocabulary(made.bits, 20) == made
    np.testing.assert_array_equal(made.restrict(jnp.arange(40.0).reshape(2, 20)), [[1, 3, 9, 17], [21, 23, 29, 37]])
    np.testing.assert_array_equal(made.local(jnp.asarray([1, 2, 17])), [0, 4, 3])


@pytest.mark.parametrize("ids", [[], [1, 1], [20], [-1]])
def test_other_ids_are_refused(ids: list[int]) -> None:
    with pytest.raises(UserError, match="one or more different ids below 20"):
        DraftVocabulary.of(ids, 20)


@pytest.mark.parametrize("bits", ["", "AAAA", "?"])
def test_bits_of_another_vocabulary_are_refused(bits: str) -> None:
    with pytest.raises(UserError, match="expected one for each of the target's 61 tokens"):
        DraftVocabulary(bits, VOCAB).ids  # noqa: B018


def sums(drafter: Drafter, params: dict) -> tuple[dict, dict]:
    """Sums of the loss on a made-up batch, and their gradient."""
    objective, batch, shared = make_objective(drafter.hf_config, OPTIONS, jnp.float32), tiny_batch(), tiny_tables()
    plan = objective.plan(batch, jax.random.key(5))

    def loss(params: dict) -> tuple[jax.Array, dict]:
        made = objective.sums(params, shared, batch, plan.rows)
        return objective.loss(made, plan.denominator), made

    grads, made = jax.jit(jax.grad(loss, has_aux=True))(params)
    return made, grads


def test_the_whole_vocabulary_pruned_to_itself_trains_the_same() -> None:
    plain, pruned = tiny_drafter(), tiny_drafter(draft_vocabulary=WHOLE)
    params = with_draft_head(pruned.hf_config, plain.params, tiny_tables().head)
    (expected, wanted), (found, grads) = sums(plain, plain.params), sums(pruned, params)
    assert not np.any(grads.pop("draft_head_pd"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), grads, wanted)


def test_mass_that_cannot_be_drafted_counts_as_lost() -> None:
    """The variation is that of the law spread over all tokens, and labels outside have no cross-entropy."""
    plain, pruned = tiny_drafter(), tiny_drafter(draft_vocabulary=ODD)
    markov = plain.params["markov_head"] | {"w2_vr": plain.params["markov_head"]["w2_vr"][ODD.ids]}
    params = with_draft_head(pruned.hf_config, plain.params | {"markov_head": markov}, tiny_tables().head)
    objective, batch, shared = make_objective(pruned.hf_config, OPTIONS, jnp.float32), tiny_batch(), tiny_tables()
    blocks = objective.plan(batch, jax.random.key(5)).rows
    found = objective.sums(params, shared, batch, blocks)

    model = pruned.model(params)
    context = model.train_context(shared, batch["features"], batch["input_ids"])
    logits = forced_blocks(model, shared, context, blocks.previous, blocks.anchors).logits
    logits = jnp.full((*logits.shape[:-1], VOCAB), -jnp.inf).at[..., ODD.ids].set(logits)
    rows = blocks.sources.reshape(blocks.sources.shape[0], -1, 1)
    hidden = jnp.take_along_axis(batch["last_hidden"], rows, axis=1).reshape(*blocks.sources.shape, -1)
    variation = total_variation_l1(logits, shared.logits(hidden))
    np.testing.assert_allclose(found["l1"], jnp.sum(blocks.weights * variation), rtol=1e-5)

    label = jnp.take_along_axis(jax.nn.log_softmax(logits), blocks.labels[..., None], axis=-1)[..., 0]
    entropy = jnp.sum(jnp.where(jnp.isfinite(label), -blocks.weights * label, 0.0))
    np.testing.assert_allclose(found["ce"], entropy, rtol=1e-5)


@cache
def small_pair() -> tuple[Target, Drafter]:
    """Six tokens, of which the drafter may draft three."""
    target, fresh = kind_pair("dspark")
    vocabulary = DraftVocabulary.of([0, 2, 5], target.config.vocab_size)
    hf_config = fresh.hf_config | {"draft_vocabulary": vocabulary.bits, "draft_vocab_size": vocabulary.size}
    pruned = new_drafter("pruned", hf_config, jax.random.key(0))
    markov = fresh.params["markov_head"] | {"w2_vr": fresh.params["markov_head"]["w2_vr"][vocabulary.ids]}
    params = with_draft_head(hf_config, fresh.params | {"markov_head": markov}, target.params["head_weight_vd"])
    return target, replace(pruned, params=params)


@pytest.mark.lossless
@pytest.mark.parametrize("law", [{}, {"temperature": 1.4, "top_k": 4, "top_p": 0.9}])
def test_samples_follow_the_targets_law(law: dict[str, float]) -> None:
    target, drafter = small_pair()
    engine = Engine(target, drafter, EngineConfig(SLOTS, 20, "fixed", buckets=(SLOTS * 4,)))
    tokens, accepted = samples(engine.loop, engine.params, 3, batches=40, **law)
    exact = exact_law(target, **law)
    assert accepted > 0.1
    assert p_value(tokens[:, :3], exact.sum(3)) > 1e-3
    assert p_value(tokens[:, 1:], exact.sum(0)) > 1e-3


def test_nothing_else_is_drafted() -> None:
    target, drafter = small_pair()
    engine = Engine(target, drafter, EngineConfig(SLOTS, 20, "fixed", buckets=(SLOTS * 4,)))
    drafted: list[np.ndarray] = []
    engine.recorder = lambda holders, record: drafted.append(record.draft_tokens)
    for index in range(8):
        engine.submit(index, Request([1, 4, 2], SamplingParams(max_new_tokens=6, temperature=1.0)))
    while not engine.idle:
        engine.step()
    assert set(np.unique(np.concatenate(drafted)[:, :8])) <= {0, 2, 5}


@pytest.mark.parametrize("layout", ["deepspec", "speculators"])
@pytest.mark.parametrize("copies", [True, False])
def test_folders_come_back(tmp_path: Path, layout: str, copies: bool) -> None:
    target, fresh = write_pair(tmp_path / "target", dtype="float32", draft_vocabulary=ODD)
    params = with_draft_head(fresh.hf_config, fresh.params, target.params["embed_weight_vd"])
    save_drafter(tmp_path / "d", replace(fresh, params=params), target, layout=layout, frozen_copies=copies)
    loaded = load_drafter(tmp_path / "d", target)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert loaded.hf_config["draft_vocabulary"] == ODD.bits and loaded.config.draft_vocabulary == ODD
    stored = load_file(tmp_path / "d" / "model.safetensors")
    if layout == "speculators":
        np.testing.assert_array_equal(np.arange(ODD.size) + stored["d2t"], ODD.ids)
        np.testing.assert_array_equal(stored["t2d"], ODD.member)
        assert json.loads((tmp_path / "d" / "config.json").read_text())["draft_vocab_size"] == ODD.size
        assert stored["lm_head.weight"].shape[0] == ODD.size
    else:
        assert ("draft_head.weight" in stored) == copies
    with pytest.raises(UserError, match="Write it in the speculators layout"):
        save_drafter(tmp_path / "s", replace(fresh, params=params), target, layout="specforge")


def test_another_targets_head_and_broken_maps_are_refused(tmp_path: Path) -> None:
    target, fresh = write_pair(tmp_path / "target", dtype="float32", draft_vocabulary=ODD)
    save_drafter(tmp_path / "d", fresh, target, layout="speculators")
    with pytest.raises(UserError, match="frozen draft_head.weight is not"):
        load_drafter(tmp_path / "d", target)
    params = with_draft_head(fresh.hf_config, fresh.params, target.params["embed_weight_vd"])
    save_drafter(tmp_path / "e", replace(fresh, params=params), target, layout="speculators")
    weights = tmp_path / "e" / "model.safetensors"
    stored = load_file(weights)
    for broken, said in (
        ({"d2t": stored["d2t"][::-1].copy()}, "does not name 30"),
        ({"t2d": ~ODD.member}, "contradict"),
    ):
        save_file(stored | broken, weights)
        with pytest.raises(UserError, match=said):
            load_drafter(tmp_path / "e", target)
    save_file({name: tensor for name, tensor in stored.items() if name != "d2t"}, weights)
    with pytest.raises(UserError, match="no tensor d2t"):
        load_drafter(tmp_path / "e", target)


def test_ids_and_differences_are_told_apart_or_refused(tmp_path: Path) -> None:
    """A table of low ids ascends as differences do, and differences of scattered ids as low ids do."""
    low = DraftVocabulary.of([*range(19), 20], VOCAB)
    target, fresh = write_pair(tmp_path / "target", dtype="float32", draft_vocabulary=low)
    params = with_draft_head(fresh.hf_config, fresh.params, target.params["embed_weight_vd"])
    save_drafter(tmp_path / "d", replace(fresh, params=params), target, layout="speculators")
    weights = tmp_path / "d" / "model.safetensors"
    stored = load_file(weights)
    as_ids = stored | {"d2t": low.ids.astype(np.int64)}

    save_file(as_ids, weights)
    assert load_drafter(tmp_path / "d", target, compare_manifest=False).config.draft_vocabulary == low
    save_file({name: tensor for name, tensor in as_ids.items() if name != "t2d"}, weights)
    with pytest.raises(UserError, match="d2t in .* can be read as target ids and as their differences"):
        load_drafter(tmp_path / "d", target)

    # Equal neighbours are differences, and ids that leave the vocabulary as differences are ids: no t2d is needed.
    for table, ids in ((stored["d2t"], low.ids), (high := np.arange(VOCAB - 20, VOCAB), high)):
        save_file({"d2t": np.asarray(table, np.int64)}, weights)
        np.testing.assert_array_equal(stored_vocabulary(TensorFolder(tmp_path / "d"), 20, VOCAB).ids, ids)


def test_sizes_that_prune_nothing_and_configs_without_the_whole(tmp_path: Path) -> None:
    target, fresh = write_pair(tmp_path / "target")
    save_drafter(tmp_path / "d", fresh, target)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    for size in (None, VOCAB):
        (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"draft_vocab_size": size}))
        loaded = load_drafter(tmp_path / "d", target, compare_manifest=False)
        assert loaded.config == fresh.config and "draft_vocab_size" not in loaded.hf_config

    config.pop("vocab_size")
    (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"draft_vocab_size": 20}))
    with pytest.raises(UserError, match="no field 'vocab_size'"):
        load_drafter(tmp_path / "d", target, compare_manifest=False)


def test_the_choice_follows_the_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_target(tmp_path / "target")
    said = [("a", "zzzz"), ("b", "qqqq zz"), ("a", "zz"), ("b", "zzxx")]
    rows = [
        {
            "id": str(i),
            "domain": domain,
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}],
        }
        for i, (domain, text) in enumerate(said)
    ]
    file = tmp_path / "conversations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choose(["--target", str(folder), "--conversations", str(file), "--size", "6", "--output", str(tmp_path / "v.json")])
    made = json.loads((tmp_path / "v.json").read_text())
    assert len(made["ids"]) == 6 and made["ids"] == sorted(set(made["ids"]))
    assert 0 < made["kept"]["b"] < 1 and set(made["kept"]) == {"all", "b"}
    assert "kept, b" in capsys.readouterr().out


def test_config_of_a_new_drafter_names_its_vocabulary() -> None:
    fields = {"num_layers": 1, "target_layer_ids": (0,), "mask_token_id": 0}
    hf = drafter_hf_config(target_hf_config(), **fields, draft_vocabulary=ODD)
    assert hf["draft_vocabulary"] == ODD.bits and hf["draft_vocab_size"] == ODD.size
