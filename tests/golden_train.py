"""Golden checks of the target's forward pass and of DSpark training: activations, losses, metrics, gradients, schedule.

`check_train` takes a model case with a Qwen3 target, `check_schedule` the case `aux`. Both
yield (name, max_abs_err, tolerance, ok); gradient errors are relative to the tensor's largest entry.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from dspark_jax.checkpoints.deepspec import drafter_tensor_map
from dspark_jax.checkpoints.drafters import load_drafter, shared_tables
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.tensors import stored_tensors
from dspark_jax.drafters.registry import Drafter
from dspark_jax.targets.attention import CausalRows, prefix_mask
from dspark_jax.targets.target import Target
from dspark_jax.training.anchors import Blocks, eligible_anchors
from dspark_jax.training.losses import target_logits
from dspark_jax.training.objective import Batch, BlockObjective
from dspark_jax.training.schedule import learning_rate_schedule
from dspark_jax.training.terms import LossOptions, accept_rate, total_variation_l1
from tests.forced import forced_blocks

Result = tuple[str, float, float, bool]
ATOL, RTOL, GRADIENT_TOLERANCE = 2e-4, 1e-4, 1e-3
# Less than a row's anchors, so that the losses and gradients compared are those of the chunked path, padding included.
ANCHOR_CHUNK = 3
# No divisor of a vocabulary here: the last chunk begins among the ids of the one before it.
VOCABULARY_CHUNK = 60


def close(name: str, found: Any, expected: Any, valid: np.ndarray | None = None) -> Result:
    """Within atol + rtol |expected| wherever `valid` (leading axes); the entry nearest to failing is reported."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return f"{name} shape {found.shape} for {expected.shape}", float("inf"), ATOL, False
    if valid is not None:
        found, expected = found[valid], expected[valid]
    if not found.size:
        return name, 0.0, ATOL, True
    error, allowed = np.abs(found - expected), ATOL + RTOL * np.abs(expected)
    worst = np.unravel_index(np.argmax(error / allowed), error.shape)
    return name, float(error[worst]), float(allowed[worst]), bool(np.all(error <= allowed))


def exact(name: str, found: Any, expected: Any, valid: np.ndarray | None = None) -> Result:
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape == expected.shape and valid is not None:
        found, expected = found[valid], expected[valid]
    same = found.shape == expected.shape and bool(np.all(found == expected))
    return name, 0.0 if same else 1.0, 0.0, same


def relative(name: str, found: np.ndarray, expected: np.ndarray) -> Result:
    error = float(np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), 1e-8))
    return name, error, GRADIENT_TOLERANCE, error <= GRADIENT_TOLERANCE


def check_train(case: str | Path) -> Iterator[Result]:
    """All groups of a DSpark or DFlash case but those of decoding."""
    case = Path(case)
    vectors, meta = np.load(case / "vectors.npz"), json.loads((case / "meta.json").read_text())
    target = load_target(case / "target", dtype="float32", tokenizer=False)
    drafter = load_drafter(case / "draft", target, dtype="float32")
    batch = {
        "input_ids": jnp.asarray(vectors["train/input_ids"], jnp.int32),
        "loss_mask": jnp.asarray(vectors["train/loss_mask"]),
        "features": jnp.asarray(vectors["train/target_hidden_states"]),
        "last_hidden": jnp.asarray(vectors["train/target_last_hidden_states"]),
    }
    given = meta["loss_args"]
    options = LossOptions(
        ce_alpha=given["ce_loss_alpha"],
        l1_alpha=given["l1_loss_alpha"],
        confidence_alpha=given["confidence_head_alpha"],
        decay_gamma=given["loss_decay_gamma"] or 0.0,
        anchor_chunk=ANCHOR_CHUNK,
    )
    objective = BlockObjective(drafter.graphdef, drafter.config, options)
    yield from check_target(vectors, target, drafter)
    yield from check_blocks(vectors, target, drafter, objective, batch)
    yield from check_losses(vectors, meta, target, drafter, objective, batch)


def check_target(vectors: Any, target: Target, drafter: Drafter) -> Iterator[Result]:
    """Logits and every layer's hidden states of a padded batch; then the features that training was given."""
    layers = tuple(range(-1, target.config.num_layers - 1))

    def run(params: dict, tokens: jax.Array, mask: jax.Array, taps: tuple[int, ...]) -> tuple:
        model = target.model(params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        out = model(tokens, positions, CausalRows(mask), taps)
        return model.logits(out.hidden), out.hidden, out.taps

    forward = jax.jit(run, static_argnums=3)
    mask = np.asarray(vectors["target/attention_mask"])
    tokens = jnp.asarray(vectors["target/input_ids"], jnp.int32)
    logits, hidden, taps = forward(target.params, tokens, jnp.asarray(mask, jnp.int32), layers)
    valid = mask == 1
    yield close("target/logits", logits, vectors["target/logits"], valid)
    yield close("target/last_hidden_state", hidden, vectors["target/last_hidden_state"], valid)
    states = np.stack([*np.split(np.asarray(taps), len(layers), axis=-1), np.asarray(hidden)])
    yield close("target/hidden_states", states[:, valid], vectors["target/hidden_states"][:, valid])

    mask = np.asarray(vectors["train/batch_attention_mask"])
    tokens = jnp.asarray(vectors["train/input_ids"], jnp.int32)
    _, hidden, taps = forward(target.params, tokens, jnp.asarray(mask, jnp.int32), drafter.config.target_layer_ids)
    yield close("train/target_hidden_states", taps, vectors["train/target_hidden_states"], mask == 1)
    yield close("train/target_last_hidden_states", hidden, vectors["train/target_last_hidden_states"], mask == 1)


def check_blocks(
    vectors: Any, target: Target, drafter: Drafter, objective: BlockObjective, batch: Batch
) -> Iterator[Result]:
    """Masks, labels and the teacher-forced forward pass at the given anchors."""
    anchors = jnp.asarray(vectors["train/anchor_positions"], jnp.int32)
    keep = np.asarray(vectors["train/block_keep_mask"])
    blocks: Blocks = objective.plan_at(batch, anchors, jnp.asarray(keep)).rows
    shared = shared_tables(target)

    def run(params: dict) -> tuple:
        model = drafter.model(params)
        out = forced_blocks(model, shared, model.context(batch["features"]), blocks.previous, blocks.anchors)
        return out, target_logits(shared, batch["last_hidden"], blocks)

    out, aligned = jax.jit(run)(drafter.params)
    length, size = batch["input_ids"].shape[1], drafter.config.block_size
    yield exact("train/candidate_mask", eligible_anchors(batch["loss_mask"]), vectors["train/candidate_mask"])
    inputs = np.full((*keep.shape, size), drafter.config.mask_token_id)
    inputs[..., 0] = np.where(keep, blocks.previous[..., 0], drafter.config.mask_token_id)
    yield exact("train/noise_ids", inputs.reshape(len(keep), -1), vectors["train/noise_ids"])
    visible = np.broadcast_to(prefix_mask(anchors, length, size), (*keep.shape, size, length))
    expected = vectors["train/attention_mask"][..., :length].reshape(*keep.shape, size, length)
    yield exact("train/attention_mask", visible, expected, keep)
    yield exact("train/prev_token_ids", blocks.previous, vectors["train/prev_token_ids"], keep)
    yield exact("train/target_ids", blocks.labels, vectors["train/target_ids"], keep)
    yield exact("train/eval_mask", blocks.supervised, vectors["train/eval_mask"])
    yield close("train/loss_weight_mask", blocks.weights, vectors["train/loss_weight_mask"])
    yield close("train/block_hidden", out.hidden, vectors["train/block_hidden"], keep)
    yield close("train/draft_logits", out.logits, vectors["train/draft_logits"], keep)
    yield close("train/aligned_target_logits", aligned, vectors["train/aligned_target_logits"], keep)
    rate = accept_rate(total_variation_l1(out.logits, aligned))
    yield close("train/accept_rate", rate, vectors["train/accept_rate"], keep)
    if "train/confidence_pred" in vectors:
        yield close("train/confidence_pred", out.confidence, vectors["train/confidence_pred"], keep)


def check_losses(
    vectors: Any, meta: dict, target: Target, drafter: Drafter, objective: BlockObjective, batch: Batch
) -> Iterator[Result]:
    """Numerators, denominators, totals, metrics and gradients; then other weights, and two ranks with a row each."""
    anchors = jnp.asarray(vectors["train/anchor_positions"], jnp.int32)
    keep = jnp.asarray(vectors["train/block_keep_mask"])
    shared, options = shared_tables(target), objective.options
    plan = objective.plan_at(batch, anchors, keep)

    (total, sums), gradients = _gradient(objective, drafter, shared, batch, plan)
    absent = np.zeros(())
    terms = (("ce", True), ("l1", options.l1_alpha > 0), ("confidence", "confidence" in sums))
    for term, present in terms:
        yield close(f"loss/{term}_loss_num", sums[term] if present else absent, vectors[f"loss/{term}_loss_num"])
        denominator = plan.denominator if present else absent
        yield close(f"loss/{term}_loss_den", denominator, vectors[f"loss/{term}_loss_den"])
    yield close("loss/total", total, vectors["loss/total"])

    metrics = objective.metrics(sums | plan.sums, batch["input_ids"].shape[1])
    for name in sorted(n for n in vectors.files if n.startswith("metrics/train/")):
        yield close(name, metrics.get(name.removeprefix("metrics/train/"), np.nan), vectors[name])

    # The same without a whole row of logits.
    fused = replace(objective, options=replace(options, vocabulary_chunk=VOCABULARY_CHUNK))
    (of_chunks, _), others = _gradient(fused, drafter, shared, batch, plan)
    yield close("loss/total by chunks of the vocabulary", of_chunks, vectors["loss/total"])
    for which, found in (("", gradients), (" by chunks of the vocabulary", others)):
        stored = stored_tensors(drafter_tensor_map(drafter.config, flatten_dict(found)), found, None)
        for name in sorted(n for n in vectors.files if n.startswith("grads/")):
            yield relative(name + which, stored[name.removeprefix("grads/")], vectors[name])

    yield close("loss/total_alt_nodecay", _other_total(objective, meta, drafter, shared, batch, anchors, keep),
                vectors["loss/total_alt_nodecay"])  # fmt: skip
    ranks = len(vectors["loss/dp2_rank_losses"])
    yield close("loss/dp2_rank_losses", _rank_losses(objective, drafter, shared, batch, plan, ranks),
                vectors["loss/dp2_rank_losses"])  # fmt: skip


def _gradient(objective: BlockObjective, drafter: Drafter, shared: Any, batch: Batch, plan: Any) -> Any:
    """((loss, sums), gradient)."""

    def loss(params: dict) -> tuple[jax.Array, dict]:
        sums = objective.sums(params, shared, batch, plan.rows)
        return objective.loss(sums, plan.denominator), sums

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(drafter.params)


def _other_total(
    objective: BlockObjective, meta: dict, drafter: Drafter, shared: Any, batch: Batch, anchors: Any, keep: Any
) -> Any:
    """The loss under the weights that the array's description names, all anchors in one chunk."""
    named = dict(re.findall(r"(\w+)=([\w.]+)", meta["arrays"]["loss/total_alt_nodecay"]["meaning"]))
    other = replace(
        objective.options,
        ce_alpha=float(named["ce"]),
        l1_alpha=float(named["l1"]),
        confidence_alpha=float(named["conf"]),
        decay_gamma=None if named["gamma"] == "None" else float(named["gamma"]),
        anchor_chunk=anchors.shape[1],
    )
    objective = replace(objective, options=other)
    plan = objective.plan_at(batch, anchors, keep)
    return objective.loss(jax.jit(objective.sums)(drafter.params, shared, batch, plan.rows), plan.denominator)


def _rank_losses(
    objective: BlockObjective, drafter: Drafter, shared: Any, batch: Batch, plan: Any, ranks: int
) -> np.ndarray:
    """What the reference's ranks backpropagate: their own numerators over the global denominator, times the ranks."""
    sums = jax.jit(objective.sums)
    parts = [jax.tree.map(lambda x, rank=rank: x[rank::ranks], (dict(batch), plan.rows)) for rank in range(ranks)]
    losses = [objective.loss(sums(drafter.params, shared, *part), plan.denominator) for part in parts]
    return np.stack(losses) * ranks


def check_schedule(case: str | Path) -> Iterator[Result]:
    """The case `aux`: learning rates in float64 to the last digits, and as a compiled step computes them."""
    case = Path(case)
    vectors, meta = np.load(case / "vectors.npz"), json.loads((case / "meta.json").read_text())
    for name in sorted(n for n in vectors.files if n.startswith("lr/")):
        meaning = meta["arrays"][name]["meaning"]
        base = float(re.search(r"lr ([\d.e+-]+)", meaning)[1])
        ratio, total = re.search(r"int\(([\d.]+)\*(\d+)\)", meaning).groups()
        schedule = learning_rate_schedule(base, int(total), float(ratio))
        steps = np.arange(len(vectors[name]))
        for kind, found, tolerance in (
            ("", schedule(steps, np), 1e-15),
            (" compiled", jax.jit(jax.vmap(schedule))(steps), 1e-6 * base),
        ):
            error = float(np.max(np.abs(np.asarray(found, np.float64) - vectors[name])))
            yield name + kind, error, tolerance, error <= tolerance
