"""Every kind of drafter: drafting is what training teaches, files come back, chunks change nothing."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter, shared_tables
from dspark_jax.drafters.paired import OwnRows, PairedState
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.drafters.registry import DRAFTERS, drafter_hf_config, kind_name, new_drafter, read_config
from dspark_jax.errors import UserError
from dspark_jax.roofline.training import training_flops
from dspark_jax.serving.generate import generate
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.attention import CausalRows, KeysValues
from dspark_jax.targets.target import Target
from dspark_jax.training.objective import Objective
from dspark_jax.training.registry import make_objective
from dspark_jax.training.rollout import supervised_positions
from dspark_jax.training.schedule import learning_rate_schedule, make_optimizer
from dspark_jax.training.step import abstract_train_state, init_train_state, make_train_step
from dspark_jax.training.terms import LossOptions
from tests.decoding_tiny import kind_pair, prompts, taps_of
from tests.drafters_tiny import write_pair
from tests.forced import forced_blocks
from tests.test_training import _intermediates

OPTIONS = LossOptions(ce_alpha=1.0, l1_alpha=0.9, confidence_alpha=1.0, decay_gamma=4.0, anchor_chunk=3)
LENGTH = 14


def features_of(target: Target, taps: tuple[int, ...], tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The taps and the last hidden states of whole rows."""

    @jax.jit
    def run(params: dict) -> tuple[jax.Array, jax.Array]:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        out = target.model(params)(tokens, positions, CausalRows(), taps)
        return out.taps, out.hidden

    return run(target.params)


def batch_from(kind: str, tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray) -> dict[str, jax.Array]:
    """Rows of tokens with what the target makes of them, zeros behind their ends."""
    target, drafter = kind_pair(kind)
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    ids = jnp.asarray(tokens * real, jnp.int32)
    taps, hidden = features_of(target, drafter.config.target_layer_ids, ids)
    return {
        "input_ids": ids,
        "loss_mask": jnp.asarray(mask & real, jnp.uint8),
        "lengths": jnp.asarray(lengths, jnp.int32),
        "features": taps * real[..., None],
        "last_hidden": hidden * real[..., None],
    }


@cache
def batch_of(kind: str, rows: int = 4) -> dict[str, jax.Array]:
    """Rows of several lengths of random tokens, with gaps in their masks."""
    rng = np.random.default_rng(2)
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, rows)
    tokens = rng.integers(0, 6, (rows, LENGTH))
    mask = (np.arange(LENGTH) >= 2) & (rng.random((rows, LENGTH)) > 0.1)
    return batch_from(kind, tokens, lengths, mask)


# Drafting


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_drafts_are_what_training_predicts(kind: str) -> None:
    """From a state that was prefilled, committed in pieces and rolled back, at three anchors."""
    target, drafter = kind_pair(kind)
    shared, starts = shared_tables(target), jnp.asarray([6, 9, 5])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 6, (3, LENGTH)), jnp.int32)
    taps, _ = features_of(target, drafter.config.target_layer_ids, tokens)
    anchors = jnp.take_along_axis(tokens, starts[:, None], 1)[:, 0]

    def greedy(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(logits, -1).astype(jnp.int32), jax.nn.softmax(logits)

    @jax.jit
    def draft(params: dict) -> tuple[Any, Any]:
        model = drafter.model(params)
        whole = model.prefill(shared, taps, tokens, starts)
        state = model.init_state(3, 32, jnp.float32)
        first = model.prefill(shared, taps[:, :3], tokens[:, :3], jnp.full((3,), 3))
        cache = jax.tree.map(lambda x, new: x.at[:, :, :3].set(new), state.cache, first.cache)
        state = PairedState(cache, first.hidden)
        for at in (3, 5, 7):  # a commit of 2 rows and 2 refused ones, until the anchor is reached
            rows = slice(at, at + 4)
            counts = jnp.clip(starts - at, 0, 2)
            state = model.commit(shared, state, taps[:, rows], tokens[:, rows], jnp.minimum(starts, at), counts)
        return model.draft(shared, whole, anchors, starts, greedy), model.draft(shared, state, anchors, starts, greedy)

    drafted, pieces = draft(drafter.params)
    np.testing.assert_allclose(pieces.law, drafted.law, atol=1e-5)
    columns = starts[:, None] + 1 + jnp.arange(drafter.config.block_size)
    forced = tokens.at[jnp.arange(3)[:, None], columns].set(drafted.tokens)

    @jax.jit
    def teach(params: dict) -> jax.Array:
        model = drafter.model(params)
        if kind == "mtp":
            context = model.train_context(shared, taps, forced)
            return forced_blocks(model, shared, context, forced[:, None, :1], starts[:, None]).logits[:, 0]
        hidden = model.train_outputs(shared, taps, forced)
        return jnp.moveaxis(model.logits(shared, hidden)[:, jnp.arange(3), starts - 1], 0, 1)

    np.testing.assert_allclose(jax.nn.softmax(teach(drafter.params)), drafted.law, atol=1e-5)


def test_attention_in_chunks_of_queries_is_the_whole() -> None:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    q, prefix = normal(2, 12, 4, 6), KeysValues(normal(2, 2, 12, 6), normal(2, 2, 12, 6))
    earlier, own = KeysValues(normal(2, 12, 2, 6), normal(2, 12, 2, 6)), (normal(2, 12, 2, 6), normal(2, 12, 2, 6))
    limits = jnp.broadcast_to(jnp.arange(12), (2, 12))
    whole, parts = (OwnRows(prefix, limits, (earlier,), query_chunk=size) for size in (12, 4))
    found = [attend(0, q, *own, scale=0.4, window=None) for attend in (whole, parts)]
    np.testing.assert_allclose(*found, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", DRAFTERS)
def test_files_come_back_bit_for_bit(tmp_path: Path, kind: str, dtype: str) -> None:
    target, _ = write_pair(tmp_path / "target")
    hf_config = drafter_hf_config(
        target.hf_config, kind=kind, num_layers=1, target_layer_ids=taps_of(kind, 4), mask_token_id=5, block_size=4,
        markov_rank=6,
    )  # fmt: skip
    drafter = new_drafter(kind, hf_config, jax.random.key(1))
    save_drafter(tmp_path / "a", drafter, target, dtype=dtype)
    loaded = load_drafter(tmp_path / "a", target)
    assert kind_name(loaded.hf_config) == kind and type(loaded.config) is DRAFTERS[kind].module.config_type
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), drafter.params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), loaded.params, expected)
    save_drafter(tmp_path / "b", loaded, target)
    for name in ("config.json", "model.safetensors", "dspark.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


LAYER = {
    "input_layernorm.weight": (8,),
    "post_attention_layernorm.weight": (8,),
    "self_attn.o_proj.weight": (8, 8),
    "self_attn.q_norm.weight": (4,),
    "self_attn.k_norm.weight": (4,),
    "mlp.gate_proj.weight": (8, 8),
    "mlp.up_proj.weight": (8, 8),
    "mlp.down_proj.weight": (8, 8),
}


@pytest.mark.parametrize(
    ("kind", "inputs", "own"),
    [
        ("eagle3", 16, {"fc.weight": (8, 16), "layers.0.hidden_norm.weight": (8,)}),
        ("mtp", 8, {"enorm.weight": (8,), "hnorm.weight": (8,), "eh_proj.weight": (8, 16)}),
    ],
)
def test_names_and_shapes(tmp_path: Path, kind: str, inputs: int, own: dict[str, tuple[int, ...]]) -> None:
    target, drafter = kind_pair(kind, num_hidden_layers=3)
    save_drafter(tmp_path, drafter, target)
    stored = {name: array.shape for name, array in load_file(tmp_path / "model.safetensors").items()}
    projections = {f"self_attn.{x}_proj.weight": (n, inputs) for x, n in (("q", 8), ("k", 4), ("v", 4))}
    layer = {f"layers.0.{name}": shape for name, shape in (LAYER | projections).items()}
    frozen = {"embed_tokens.weight": (6, 8), "lm_head.weight": (6, 8)}
    assert stored == {**layer, **own, **frozen, "norm.weight": (8,)}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [f"Qwen3{DRAFTERS[kind].architecture}"]
    if kind == "eagle3":
        assert (config["ttt_length"], config["step_loss_decay"], config["draft_num_hidden_layers"]) == (3, 0.8, 1)
    else:
        assert (config["block_size"], config["target_layer_ids"]) == (1, [2])


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("eagle3", {"num_layers": 2}, "An Eagle3 drafter has 2 layers; expected 1"),
        ("eagle3", {"target_layer_ids": (-1, 0)}, "expected layers from 0 on"),
        ("mtp", {"target_layer_ids": (0, 1)}, "expected the target's last layer alone, 3"),
        ("mtp", {"num_layers": 2}, "An MTP drafter has 2 layers"),
        ("dspark", {"mask_token_id": None}, "--drafter.mask-token-id"),
        ("medusa", {}, "no drafter kind 'medusa'; expected one of dflash, dspark, eagle3, mtp"),
    ],
)
def test_impossible_drafters_are_refused(kind: str, fields: dict[str, Any], message: str) -> None:
    target = kind_pair("dspark", num_hidden_layers=4)[0]
    given = {"num_layers": 1, "target_layer_ids": taps_of(kind, 4), "mask_token_id": 0}
    with pytest.raises(UserError, match=message):
        drafter_hf_config(target.hf_config, kind=kind, **given | fields)


# Training


@cache
def objective_of(kind: str, dtype: Any = jnp.float32, **changes: Any) -> Objective:
    return make_objective(kind_pair(kind)[1].hf_config, replace(OPTIONS, **changes), dtype)


def value_and_gradient(kind: str, task: Any, batch: dict) -> Any:
    return gradient_program(kind, task)(kind_pair(kind)[1].params, batch, task.plan(batch, jax.random.key(5)))


@cache
def gradient_program(kind: str, task: Any) -> Any:
    shared = shared_tables(kind_pair(kind)[0])

    def loss(params: dict, batch: dict, plan: Any) -> Any:
        sums = task.sums(params, shared, batch, plan.rows)
        return task.loss(sums, plan.denominator), task.metrics(sums | plan.sums, LENGTH)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_chunks_change_nothing(kind: str) -> None:
    batch = batch_of(kind)
    (whole, expected), gradient = value_and_gradient(kind, objective_of(kind, anchor_chunk=64), batch)
    (loss, metrics), found = value_and_gradient(kind, objective_of(kind), batch)
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, gradient)
    assert all(np.any(x) for x in jax.tree.leaves(found))


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_micro_batches_are_one_batch(kind: str) -> None:
    target, drafter = kind_pair(kind)
    schedule = learning_rate_schedule(1e-2, 20, 0.1)
    adamw = make_optimizer(schedule, (0.9, 0.999), 1e-8, 0.0, 1.0)
    made = []
    for parts in (1, 2):
        step = make_train_step(objective_of(kind), adamw, schedule, accumulation_steps=parts)
        state = init_train_state(drafter.hf_config, adamw, seed=0, params=drafter.params)
        made.append(step(state, shared_tables(target), batch_of(kind)))
    (one, expected), (two, metrics) = made
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), two.params, one.params)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_no_logits_of_all_positions_exist() -> None:
    target, drafter = kind_pair("eagle3")
    task, batch, shared = objective_of("eagle3"), batch_of("eagle3"), shared_tables(target)
    plan = task.plan(batch, jax.random.key(0))
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: task.loss(task.sums(p, shared, batch, plan.rows), plan.denominator)))(
        drafter.params
    )
    steps, vocab = drafter.config.block_size, target.config.vocab_size
    shapes = [v.shape for v in _intermediates(jaxpr) if v.shape and v.shape[-1] == vocab]
    assert max(int(np.prod(shape)) for shape in shapes) <= 4 * OPTIONS.anchor_chunk * (steps + 2) * vocab
    assert 4 * LENGTH * vocab > 4 * OPTIONS.anchor_chunk * 3 * vocab


def test_bfloat16_rollouts_sum_gradients_in_float32() -> None:
    batch = batch_of("eagle3")
    (exact, _), expected = value_and_gradient("eagle3", objective_of("eagle3"), batch)
    (loss, _), found = value_and_gradient("eagle3", objective_of("eagle3", jnp.bfloat16), batch)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(loss, exact, rtol=3e-2)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (found, expected))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99


def test_supervised_positions_end_before_the_last_real_token() -> None:
    mask = jnp.asarray([[0, 1, 1, 1, 0], [2, 0, 1, 1, 1]], jnp.uint8)
    found = supervised_positions(mask, jnp.asarray([4, 5]))
    np.testing.assert_array_equal(found, [[0, 1, 1, 0, 0], [1, 0, 1, 1, 0]])


def test_drawn_rollouts_stand_for_all_positions() -> None:
    """All drawn: the whole loss, gradient and figures. Fewer: each position at its own law, weighted up to the row."""
    batch = batch_of("eagle3")
    (expected, wanted), gradient = value_and_gradient("eagle3", objective_of("eagle3"), batch)
    whole = objective_of("eagle3", rollout_positions=LENGTH)
    (loss, metrics), found = value_and_gradient("eagle3", whole, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, gradient)

    every, some = (
        objective_of("eagle3", rollout_positions=count).plan(batch, jax.random.key(1)).rows for count in (LENGTH, 3)
    )
    np.testing.assert_allclose(some.weights.sum(1), every.weights.sum(1))
    assert some.positions.shape == (4, 3) and np.all(every.weights.sum(1) > 3)
    for row in range(4):
        # A drawn position is supervised as it is among all.
        kept = int(np.sum(every.weights[row] > 0))
        at = np.searchsorted(every.positions[row, :kept], some.positions[row])
        np.testing.assert_array_equal(every.valid[row][at], some.valid[row])


def test_a_single_drawn_position_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has one query, as drafting has, whose kernels have no derivative."""
    monkeypatch.setenv("DSPARK_ATTENTION", "kernel")
    (loss, _), gradient = value_and_gradient("eagle3", objective_of("eagle3", rollout_positions=1), batch_of("eagle3"))
    assert np.isfinite(loss) and all(np.any(x) for x in jax.tree.leaves(gradient))


def test_padding_and_neighbours_do_not_reach_a_rows_loss() -> None:
    """Junk behind a row's end leaves its metrics; only the divisor counts the padding."""
    batch = batch_of("eagle3")
    real = np.arange(LENGTH) < np.asarray(batch["lengths"])[:, None]
    junk = dict(batch, input_ids=jnp.where(real, batch["input_ids"], 3))
    junk["features"] = jnp.where(real[..., None], batch["features"], 9.0)
    (loss, metrics), _ = value_and_gradient("eagle3", objective_of("eagle3"), junk)
    (expected, wanted), _ = value_and_gradient("eagle3", objective_of("eagle3"), batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["tau_greedy"], wanted["tau_greedy"], rtol=1e-6)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_every_kind_learns_and_decodes_losslessly(kind: str) -> None:
    """On the target's own answers the loss falls, the step compiles once, and decoding with what was learnt gives the
    same answers again, from fewer passes."""
    target, drafter = kind_pair(kind)
    schedule = learning_rate_schedule(1e-2, 20, 0.1)
    adamw = make_optimizer(schedule, (0.9, 0.999), 1e-8, 0.0, 1.0)
    step = make_train_step(objective_of(kind), adamw, schedule, accumulation_steps=2)
    asked, sampling = prompts(8, target.config.vocab_size, 3, longest=6), SamplingParams(16)
    plain = generate(target, None, asked, sampling)
    rows = [[*g.prompt_tokens, *g.tokens] for g in plain]
    padded = np.array([row + [0] * (24 - len(row)) for row in rows])
    answers = np.arange(24) >= np.array([len(p) - 1 for p in asked])[:, None]
    batch, shared = batch_from(kind, padded, np.array([len(row) for row in rows]), answers), shared_tables(target)
    state, losses = init_train_state(drafter.hf_config, adamw, seed=0, params=drafter.params), []
    for _ in range(40):
        state, metrics = step(state, shared, batch)
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1 and np.mean(losses[-3:]) < np.mean(losses[:3])
    assert 1.0 <= metrics["tau_probabilistic"] <= drafter.config.block_size + 1
    drafted = replace(drafter, params=state.params)
    found = generate(target, drafted, asked, sampling, EngineConfig(8, policy="fixed"))
    assert [g.tokens for g in found] == [g.tokens for g in plain]
    accepted, verified = (sum(sum(getattr(g, at)) for g in found) for at in ("accepted_at", "verified_at"))
    assert verified / 5 < accepted < verified, f"{accepted} of {verified} drafts accepted"


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_counted_operations_are_those_of_the_program(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 10 %: the compiler also counts elementwise work, and attention to rows that the mask hides."""
    rows, length, size, vocab = 2, 256, 256, 4096
    dims = {"hidden_size": size, "intermediate_size": 512, "vocab_size": vocab, "num_hidden_layers": 4, "head_dim": 64}
    dims |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    taps = taps_of(kind, 4)
    hf_config = drafter_hf_config(
        {"model_type": "qwen3", "max_position_embeddings": 512, **dims},
        kind=kind, num_layers=1, target_layer_ids=taps, mask_token_id=3, num_anchors=length,
    )  # fmt: skip
    monkeypatch.setattr(jax, "checkpoint", lambda f, **_: f)  # recomputation is not counted
    schedule = learning_rate_schedule(1e-3, 10, 0.1)
    adamw = make_optimizer(schedule, (0.9, 0.99), 1e-8, 0.0, 1.0)
    objective = make_objective(hf_config, replace(OPTIONS, anchor_chunk=length), jnp.float32)
    shapes = {"features": (rows, length, len(taps) * size), "last_hidden": (rows, length, size)}
    batch = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    integers = {"input_ids": (rows, length), "loss_mask": (rows, length), "lengths": (rows,)}
    batch |= {name: jax.ShapeDtypeStruct(shape, "int32") for name, shape in integers.items()}
    table = jax.ShapeDtypeStruct((vocab, size), "float32")
    step = make_train_step(objective, adamw, schedule)
    lowered = step.lower(abstract_train_state(hf_config, adamw), SharedTables(table, table), batch)
    counted = training_flops(read_config(hf_config), rows, length)
    assert lowered.cost_analysis()["flops"] == pytest.approx(counted, rel=0.1)
