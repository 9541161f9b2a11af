"""Golden checks of Eagle3: the training-time test, its losses, metrics and gradients; drafting and greedy transcripts.

Each check takes a case folder and yields (name, max_abs_err, tolerance, ok), as `tests.golden_train` does.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from dspark_jax.checkpoints.deepspec import drafter_tensor_map
from dspark_jax.checkpoints.drafters import load_drafter, shared_tables
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.checkpoints.tensors import stored_tensors
from dspark_jax.drafters.paired import shift_left
from dspark_jax.drafters.registry import Drafter
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.targets.attention import CausalRows, prefix_mask
from dspark_jax.targets.target import Target
from dspark_jax.training.objective import Batch
from dspark_jax.training.rollout import RolloutObjective, supervised_positions
from dspark_jax.training.terms import LossOptions
from tests.golden_decode import NEW_TOKENS, check_transcripts, play
from tests.golden_train import Result, check_target, close, exact, relative

# Positions a chunk: less than a row's, and no divisor of it, so that the compared losses are those of padded chunks.
CHUNK = 5


def load_case(case: Path) -> tuple[Any, Target, Drafter]:
    """A case without target weights has the target's tables in the drafter's frozen copies, enough for training."""
    if (case / "target" / "model.safetensors").exists():
        target = load_target(case / "target", dtype="float32", tokenizer=False)
    else:
        stored = load_file(case / "draft" / "model.safetensors")
        tables = {"embed_weight_vd": stored["embed_tokens.weight"], "head_weight_vd": stored["lm_head.weight"]}
        described = describe_target(case / "target", tokenizer=False)
        target = replace(described, params=jax.tree.map(jnp.asarray, tables))
    return np.load(case / "vectors.npz"), target, load_drafter(case / "draft", target, dtype="float32")


def check_train(case: str | Path) -> Iterator[Result]:
    """The groups target, train, loss, metrics and grads."""
    case = Path(case)
    vectors, target, drafter = load_case(case)
    given = json.loads((case / "meta.json").read_text())["loss_args"]
    config = drafter.config
    yield exact("config/ttt_length", config.block_size, given["ttt_length"])
    yield exact("config/step_loss_decay", config.step_loss_decay, given["step_loss_decay"])
    batch = {
        "input_ids": jnp.asarray(vectors["train/input_ids"], jnp.int32),
        "loss_mask": jnp.asarray(vectors["train/loss_mask"]),
        "lengths": jnp.asarray(vectors["train/batch_attention_mask"].sum(1), jnp.int32),
        "features": jnp.asarray(vectors["train/target_hidden_states"]),
        "last_hidden": jnp.asarray(vectors["train/target_last_hidden_states"]),
    }
    objective = RolloutObjective(drafter.graphdef, config, LossOptions(anchor_chunk=CHUNK))
    if "target/logits" in vectors:
        yield from check_target(vectors, target, drafter)
    yield from check_rollout(vectors, target, drafter, batch)
    yield from check_losses(vectors, target, drafter, objective, batch)


def check_rollout(vectors: Any, target: Target, drafter: Drafter, batch: Batch) -> Iterator[Result]:
    """Tokens, masks and hidden states of every step, where this and all earlier steps have a query."""
    shared, steps = shared_tables(target), drafter.config.block_size

    def run(params: dict) -> tuple:
        model = drafter.model(params)
        hidden = model.train_outputs(shared, batch["features"], batch["input_ids"])
        return hidden, model.logits(shared, hidden)

    hidden, logits = jax.jit(run)(drafter.params)
    valid = np.cumprod(vectors["train/query_valid"], axis=0).astype(bool)
    rows, length = batch["input_ids"].shape
    mask = np.asarray(supervised_positions(batch["loss_mask"], batch["lengths"]))
    limits = jnp.broadcast_to(jnp.arange(length), (rows, length))
    before = np.asarray(prefix_mask(limits, length, 1))[:, :, 0] | np.eye(length, dtype=bool)
    for s in range(steps):
        tokens = shift_left(batch["input_ids"], s + 1)
        yield exact(f"train/step_input_ids {s}", tokens, vectors["train/step_input_ids"][s])
        yield exact(f"train/rope_position_ids {s}", limits + s, vectors["train/rope_position_ids"][s])
        positions = np.asarray(shift_left(jnp.asarray(mask), s))
        yield exact(f"train/position_masks {s}", positions, vectors["train/position_masks"][s])
        own = [np.broadcast_to(np.eye(length, dtype=bool), before.shape)] * s
        seen = np.concatenate([before, *own], axis=-1)
        yield exact(f"train/attention_mask_step{s}", seen, vectors[f"train/attention_mask_step{s}"], valid[s])
    yield close("train/draft_hidden_states", hidden, vectors["train/draft_hidden_states"], valid)
    yield close("train/draft_logits", logits, vectors["train/draft_logits"], valid)
    targets = shared.logits(batch["last_hidden"])
    yield close("train/target_logits", targets, vectors["train/target_logits"])
    probs = np.asarray(jax.nn.softmax(targets))[:, 1:]
    yield close("train/target_probs_padded", probs, vectors["train/target_probs_padded"][:, : length - 1])


def check_losses(
    vectors: Any, target: Target, drafter: Drafter, objective: RolloutObjective, batch: Batch
) -> Iterator[Result]:
    shared, plan = shared_tables(target), objective.plan(batch, jax.random.key(0))

    def loss(params: dict) -> tuple[jax.Array, dict]:
        sums = objective.sums(params, shared, batch, plan.rows)
        return objective.loss(sums, plan.denominator), sums

    (total, sums), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(drafter.params)
    yield close("loss/normalizers", [plan.denominator] * drafter.config.block_size, vectors["loss/normalizers"])
    yield close("loss/step_losses", sums["ploss"] / plan.denominator, vectors["loss/step_losses"])
    yield close("loss/total", total, vectors["loss/total"])
    metrics = objective.metrics(sums | plan.sums, batch["input_ids"].shape[1])
    for name in sorted(n for n in vectors.files if n.startswith("metrics/train/")):
        yield close(name, metrics.get(name.removeprefix("metrics/train/"), np.nan), vectors[name])
    stored = stored_tensors(drafter_tensor_map(drafter.config, flatten_dict(gradients)), gradients, None)
    for name in sorted(n for n in vectors.files if n.startswith("grads/")):
        yield relative(name, stored[name.removeprefix("grads/")], vectors[name])


def check_decode(case: str | Path) -> Iterator[Result]:
    """The groups infer and decode_t0*."""
    vectors, target, drafter = load_case(Path(case))
    if "infer/prompt_ids" in vectors:
        yield from check_first_rounds(vectors, target, drafter)
    for group in sorted({name.split("/")[0] for name in vectors.files if name.startswith("decode_t0")}):
        yield from check_transcripts(group, vectors, target, drafter, stops_drafting=True)


def check_first_rounds(vectors: Any, target: Target, drafter: Drafter) -> Iterator[Result]:
    """The tokens of three rounds through the compiled loop, and the logits of drafter and target behind them."""
    prompt = vectors["infer/prompt_ids"].tolist()
    tokens, records = play(target, drafter, prompt, SamplingParams(NEW_TOKENS, stop_tokens=()))
    width = len(tokens) + drafter.config.block_size

    @jax.jit
    def run(params: dict, sequence: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = target.model(params)
        out = model(sequence, jnp.arange(width)[None], CausalRows(), drafter.config.target_layer_ids)
        return model.logits(out.hidden), out.taps

    @jax.jit
    def rollout(params: dict, taps: jax.Array, sequence: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = drafter.model(params)
        hidden = model.train_outputs(shared_tables(target), taps, sequence)
        return hidden, model.logits(shared_tables(target), hidden)

    def padded(sequence: list[int]) -> jax.Array:
        return jnp.asarray([sequence + [0] * (width - len(sequence))], jnp.int32)

    logits, taps = run(target.params, padded(tokens))
    count = len(prompt)
    yield close("infer/prefill_last_logits", logits[0, count - 1], vectors["infer/prefill_last_logits"])
    yield exact("infer/anchor_token", tokens[count], vectors["infer/anchor_token"])
    yield exact("infer/shifted_prompt_ids", tokens[1 : count + 1], vectors["infer/shifted_prompt_ids"])
    yield close("infer/prefill_context_features", taps[:, :count], vectors["infer/prefill_context_features"])
    hidden, _ = rollout(drafter.params, taps, padded(tokens))
    yield close("infer/prefill_draft_hidden", hidden[0, :, :count], vectors["infer/prefill_draft_hidden"])
    for r in range(3):
        name, record = f"infer/r{r}", records[r]
        start = int(vectors[f"{name}_start"])
        yield exact(f"{name}_start", record.anchors, start)
        block = [*tokens[: start + 1], *record.draft_tokens.tolist()]
        yield exact(f"{name}_verify_input_ids", block[start:], vectors[f"{name}_verify_input_ids"][0])
        yield exact(f"{name}_accepted", record.accepted, vectors[f"{name}_accepted"])
        yield exact(f"{name}_next_token", record.next_token, vectors[f"{name}_next_token"])
        verify, _ = run(target.params, padded(block))
        yield close(f"{name}_target_logits", verify[:, start : len(block)], vectors[f"{name}_target_logits"])
        # Teacher-forced on its own drafts, the row before the anchor drafts what the loop drafted.
        _, drafted = rollout(drafter.params, taps, padded(block))
        expected = vectors["infer/draft_logits_first_rounds"][r]
        yield close(f"infer/draft_logits_first_rounds {r}", drafted[:, 0, start - 1], expected)
