"""The mistakes that a port of DeepSeek-V4's drafters makes most easily: each is built in, and the reference numbers
refuse it. Run op by op, without jit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dspark_jax.checkpoints.drafters import shared_tables
from dspark_jax.drafters.deepseek_v4 import dspark as stages
from dspark_jax.drafters.deepseek_v4.window import ring_positions
from dspark_jax.targets.deepseek_v4 import attention
from tests.v4_trapped import DSPARK_CASE, MTP_CASE, loaded, worst


def draft_error(change: Callable[[Any], None] = lambda model: None, group: str = "draft/c1", **wrong: Any) -> float:
    vectors, target, drafter = loaded(DSPARK_CASE)
    shared, model = shared_tables(target), drafter.model(drafter.params)
    change(model)
    taps = jnp.asarray(vectors[f"{group}/taps"][None])
    anchor, length = jnp.asarray(vectors[f"{group}/anchor_token"].reshape(1), jnp.int32), taps.shape[1]
    at = jnp.asarray([length + wrong.get("shift", 0)])
    with jax.disable_jit():
        state = model.prefill(shared, taps, None, jnp.asarray([length]))
        allowed = ring_positions(model.window, jnp.asarray([length])) >= wrong.get("first", 0)
        hidden = model.stream_states(shared, state, allowed, anchor, at)[1]
        base, drafts = model.base_logits(shared, hidden), vectors[f"{group}/draft_tokens"]
        first = [0] if wrong.get("first_token") else [int(anchor[0])]
        previous = model.markov_head.embed(jnp.asarray([[*first, *drafts[:-1].tolist()]]))
        bias = 0 if wrong.get("no_bias") else model.markov_head.bias(previous)
        read = model.norm(hidden) if wrong.get("normed") else hidden
        pair = (previous, read) if wrong.get("swapped") else (read, previous)
        weight = model.confidence_head.proj.weight_io[..., 0]
        confidence = jnp.concatenate(pair, axis=-1) @ weight
    found = {"hidden": hidden, "base_logits": base, "corrected_logits": base + bias, "confidence_logits": confidence}
    return worst(vectors, {f"{group}/{name}": value[0] for name, value in found.items()})


def test_the_drafter_is_right_without_a_trap() -> None:
    assert draft_error() < 1


@pytest.mark.parametrize(
    "wrong",
    [{"shift": -1}, {"first": 9}, {"first_token": 1}, {"no_bias": 1}, {"normed": 1}, {"swapped": 1}],
    ids=["anchor at p - 1", "a shorter context", "first token", "no Markov bias", "normed hidden", "[e ; h]"],
)
def test_a_trap_in_drafting_is_caught(wrong: dict[str, Any]) -> None:
    assert draft_error(**wrong) > 10


def causal_block(q: Any, parts: Any, sinks: Any, scale: float) -> Any:
    context, block = parts
    width = block.allowed.shape[-1]
    return attention.sink_attention(q, [context, block._replace(allowed=block.allowed & jnp.tri(width, dtype=bool))],
                                    sinks, scale)  # fmt: skip


def sliding_window(q: Any, parts: Any, sinks: Any, scale: float) -> Any:
    """Every query a window of its own: row k loses the k oldest positions (slots 8.. hold them at p = 24, w = 16)."""
    context, block = parts
    age = jnp.arange(context.keys.shape[-2])
    lost = (age - 8) % 16 < jnp.arange(q.shape[-3])[:, None]
    return attention.sink_attention(q, [context._replace(allowed=context.allowed & ~lost), block], sinks, scale)


@pytest.mark.parametrize("wrong", [causal_block, sliding_window])
def test_a_wrong_mask_of_the_block_is_caught(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "sink_attention", wrong)
    assert draft_error() > 10


def test_norms_and_heads_of_the_wrong_model_are_caught() -> None:
    _, target, _ = loaded(DSPARK_CASE)
    outer = target.model(target.params)

    def targets_norm(model: Any) -> None:
        model.norm = outer.final_norm

    def targets_collapse(model: Any) -> None:
        model.collapse = outer.collapse

    def every_slot(model: Any) -> None:
        model.config = replace(model.config, mask_token_id=int(loaded(DSPARK_CASE)[0]["draft/c1/anchor_token"]))

    def normed_context(model: Any) -> None:
        plain = model.main_context
        model.main_context = lambda taps: model.stages[0].attention_norm(plain(taps))

    def rope_of_entries(model: Any) -> None:
        for stage in model.stages:
            stage.attention.layer = replace(stage.attention.layer, rope=target.config.layers[0].rope)

    for change in (targets_norm, targets_collapse, every_slot, normed_context, rope_of_entries):
        assert draft_error(change) > 10, change.__name__


def test_traps_of_mtp_are_caught() -> None:
    vectors, target, drafter = loaded(MTP_CASE)
    shared, model = shared_tables(target), drafter.model(drafter.params)
    group = "mtp/c1"
    made, ids = jnp.asarray(vectors[f"{group}/target_streams"][None]), jnp.asarray(vectors[f"{group}/ids"][None])
    outer = target.model(target.params)

    def error(given: Any, tokens: Any) -> float:
        with jax.disable_jit():
            found = model.inputs(shared, given.reshape(*given.shape[:2], -1), tokens)
        return worst(vectors, {f"{group}/input": found[0]})

    mean = jnp.broadcast_to(jnp.mean(made, axis=2, keepdims=True), made.shape)
    normed = jnp.broadcast_to(outer.final_norm(outer.collapse(made))[:, :, None], made.shape)
    assert error(made, ids[:, 1:]) < 1
    assert min(error(made, ids[:, :-1]), error(mean, ids[:, 1:]), error(normed, ids[:, 1:])) > 10
