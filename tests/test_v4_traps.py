"""The mistakes that a port of DeepSeek-V4 makes most easily: each is built in, and the reference numbers refuse it.

Run op by op, without jit: nothing is compiled twice, and a patched function is what runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import load_drafter, shared_tables
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.drafters.deepseek_v4 import dspark as stages
from dspark_jax.drafters.deepseek_v4.window import ring_positions
from dspark_jax.drafters.registry import Drafter
from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.config import RopeConfig
from dspark_jax.targets.deepseek_v4 import attention, compressor, experts, rope, state, streams
from dspark_jax.targets.deepseek_v4.attention import Indexer, V4Attention
from dspark_jax.targets.deepseek_v4.compressor import Compressor
from dspark_jax.targets.deepseek_v4.experts import Router
from dspark_jax.targets.deepseek_v4.streams import Collapse, Norm, Site
from dspark_jax.targets.target import Target
from tests.decoding_tiny import next_logits
from tests.golden_v4 import Decoder, Vectors, forget_traces
from tests.v4_tiny import VOCAB, v4_target

DATA = Path(__file__).parent / "data"
MTP_CASE, DSPARK_CASE = DATA / "deepseek_v4_mtp", DATA / "deepseek_v4_checkpoint"
Patch = pytest.MonkeyPatch


@cache
def loaded(case: Path) -> tuple[Vectors, Target, Drafter]:
    target = load_target(case / "target", dtype="float32", tokenizer=False)
    return Vectors(case), target, load_drafter(case / "target", target, dtype="float32")


def worst(vectors: Vectors, found: dict[str, Any]) -> float:
    """The largest error of any array in units of what the case allows."""
    results = [result for name, value in found.items() for result in vectors.close(name, value)]
    assert len(results) == len(found)
    return max(np.inf if np.isnan(error) else error / allowed for _, error, allowed, _ in results)


# The target: `target/p2` of the MTP case, whose layers are HCA, HCA, CSA and HCA, the first of them hashed


def target_error(change: Callable[[Any], None] = lambda model: None) -> float:
    vectors, target, _ = loaded(MTP_CASE)
    model = target.model(target.params)
    change(model)
    ids = jnp.asarray(vectors["target/p2/input_ids"][None], jnp.int32)
    with jax.disable_jit():
        made = [block.streams for block in model.blocks(ids, jnp.arange(ids.shape[1])[None], CausalRows())]
        logits = model.logits(model.final_norm(model.collapse(made[-1])))
    return worst(vectors, {"target/p2/streams": jnp.stack([x[0] for x in made]), "target/p2/logits": logits[0]})


def test_the_target_is_right_without_a_trap() -> None:
    assert target_error() < 1


def halves(x: Any, at: Any, inverse: bool = False) -> Any:
    size = 2 * at.cos.shape[-1]
    first, second = jnp.split(x[..., -size:], 2, axis=-1)
    sin = -at.sin if inverse else at.sin
    turned = jnp.concatenate([first * at.cos - second * sin, second * at.cos + first * sin], axis=-1)
    return jnp.concatenate([x[..., :-size], turned], axis=-1)


def per_stream(x: Any, fn: Any, eps: float) -> Any:
    return jnp.einsum("...f,cf->...c", streams.unit_rms(x, eps).reshape(*x.shape[:-2], -1), fn)


def transposed_write(self: Any, x: Any, y: Any, mixing: Any) -> Any:
    expand, carry = mixing
    return ORIGINAL["write"](self, x, y, (expand, carry.swapaxes(-1, -2)))


def halved_expand(self: Any, x: Any) -> Any:
    collapse, expand, carry = ORIGINAL["coefficients"](self, x)
    return collapse, expand / 2, carry


def routed(form: str) -> Callable[..., Any]:
    """A router with the bias in its weights, without a sum of 1, or with sigmoid scores."""

    def call(self: Any, x: Any, tokens: Any) -> Any:
        logits = x @ self.weight_de[...]
        scores = jax.nn.sigmoid(logits) if form == "sigmoid" else jnp.sqrt(jax.nn.softplus(logits))
        bias = 0 if self.hashed else self.bias[...]
        chosen = self.table_vk[...][tokens] if self.hashed else jax.lax.top_k(scores + bias, self.per_token)[1]
        weights = jnp.take_along_axis(scores + (bias if form == "bias" else 0), chosen, axis=-1)
        total = 1 if form == "sum" else jnp.sum(weights, axis=-1, keepdims=True)
        return weights / total * self.scale, chosen

    return call


def interleaved_groups(self: Any, mixed: Any, at: Any) -> Any:
    groups = self.oa_weight_gio.shape[0]
    apart = mixed.reshape(*mixed.shape[:-2], -1, groups, mixed.shape[-1])
    return ORIGINAL["output"](self, apart.swapaxes(-2, -3).reshape(mixed.shape), at)


def one_plus_weight(self: Any, x: Any) -> Any:
    return streams.unit_rms(x, self.eps) * (1 + self.weight[...])


ORIGINAL: dict[str, Any] = {
    "write": Site.write,
    "coefficients": Site.coefficients,
    "output": V4Attention.output,
    "pool": Compressor._pool,
    "visible": V4Attention._visible,
    "rope_at": rope.rope_at,
    "heads": rope.rotate_heads,
    "swiglu": experts.clamped_swiglu,
}

# Name -> (object, attribute, what takes its place).
TARGET_TRAPS: dict[str, list[tuple[Any, str, Any]]] = {
    "carry summed over its second index": [(Site, "write", transposed_write)],
    "expand without its factor": [(Site, "coefficients", halved_expand)],
    "a statistic for each stream": [(streams, "_signals", per_stream)],
    "the collapse as a mean": [(Collapse, "__call__", lambda self, x: jnp.mean(x, axis=-2))],
    "rope in halves": [(module, "rotate_tail", halves) for module in (rope, attention, compressor)],
    "no inverse rope": [(attention, "rotate_heads", lambda x, at, inverse=False: ORIGINAL["heads"](x, at))],
    "entries roped at their window's end": [
        (compressor, "rope_at", lambda config, size, at: ORIGINAL["rope_at"](config, size, at + 3))
    ],
    "series swapped": [(Compressor, "_pool", lambda self, rows, at: ORIGINAL["pool"](self, rows[..., ::-1, :], at))],
    "the window before left out": [
        (Compressor, "_pool", lambda self, rows, at: ORIGINAL["pool"](self, rows, jnp.zeros_like(at)))
    ],
    "entries visible a row late": [
        (V4Attention, "_visible", lambda self, r, s, w, at: ORIGINAL["visible"](self, r, s, w, at - 1))
    ],
    "all entries attended": [(Indexer, "select", lambda self, scores, visible: visible)],
    "queries without their norm": [(attention, "unit_rms", lambda x, eps: x)],
    "groups of heads interleaved": [(V4Attention, "output", interleaved_groups)],
    "the router's bias in the weights": [(Router, "__call__", routed("bias"))],
    "weights of no sum": [(Router, "__call__", routed("sum"))],
    "sigmoid scores": [(Router, "__call__", routed("sigmoid"))],
    "the gate clamped below too": [
        (experts, "clamped_swiglu", lambda g, u, m: ORIGINAL["swiglu"](jnp.clip(g, -m, m), u, m))
    ],
    "no clamp": [(experts, "clamped_swiglu", lambda g, u, m: jax.nn.silu(g) * u)],
    "gate and up exchanged": [(experts, "clamped_swiglu", lambda g, u, m: ORIGINAL["swiglu"](u, g, m))],
    "norms with 1 + w": [(Norm, "__call__", one_plus_weight)],
}


@pytest.mark.parametrize("name", TARGET_TRAPS)
def test_a_trap_in_the_target_is_caught(name: str, monkeypatch: Patch) -> None:
    for where, attribute, wrong in TARGET_TRAPS[name]:
        monkeypatch.setattr(where, attribute, wrong)
    assert target_error() > 10


def with_rope(rope_config: Callable[[RopeConfig], RopeConfig]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for block in model.layers:
            layer = block.attention.layer
            block.attention.layer = replace(layer, rope=rope_config(layer.rope))
            block.attention.compressor.rope = block.attention.layer.rope

    return change


def each(attribute: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A change of one attribute of every attention."""

    def change(model: Any) -> None:
        for block in model.layers:
            setattr(block.attention, attribute, value(getattr(block.attention, attribute)))

    return change


def without_ape(model: Any) -> None:
    for block in model.layers:
        block.attention.compressor.ape.set_value(jnp.zeros_like(block.attention.compressor.ape[...]))


def without_sink(model: Any) -> None:
    for block in model.layers:
        block.attention.sink.set_value(jnp.full_like(block.attention.sink[...], -1e9))


def shared_unclamped(model: Any) -> None:
    for block in model.layers:
        block.mlp.shared.limit = 1e9


MODEL_TRAPS: dict[str, Callable[[Any], None]] = {
    "yarn forgotten": with_rope(lambda config: RopeConfig(theta=config.theta)),
    "the plain theta": with_rope(lambda config: replace(config, theta=1e4)),
    "a window of one more": each("window", lambda window: window + 1),
    "no place in the window": without_ape,
    "no sink": without_sink,
    "the shared expert unclamped": shared_unclamped,
}


@pytest.mark.parametrize("name", MODEL_TRAPS)
def test_a_wrong_setting_of_the_target_is_caught(name: str) -> None:
    assert target_error(MODEL_TRAPS[name]) > 10


def test_index_scores_have_a_relu_before_heads_are_summed() -> None:
    """Against numpy, on products of both signs; of equal scores the earlier entry is selected."""
    target = v4_target(7)
    indexer = target.model(target.params).layers[1].attention.indexer
    rng = np.random.default_rng(5)
    q, weights, keys = (rng.normal(size=shape) for shape in ((2, 3, 2, 8), (2, 3, 2), (2, 6, 8)))
    products = np.einsum("rwqh,rnh->rwqn", q, keys)
    expected = np.einsum("rwq,rwqn->rwn", weights, np.maximum(products, 0)) * (2 * 8) ** -0.5
    found = indexer.scores(*(jnp.asarray(x, jnp.float32) for x in (q, weights, keys)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    chosen = indexer.select(jnp.zeros((1, 1, 6)), jnp.asarray([[[False, True, True, True, True, False]]]))
    assert chosen[0, 0].tolist() == [False, True, True, False, False, False]


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_the_carry_is_sinkhorns_after_exactly_so_many_turns(iterations: int) -> None:
    """In float64, columns first and last; one turn less, rows first, and no epsilon are all told apart."""
    logits = np.random.default_rng(0).normal(size=(5, 4, 4)) * 3
    eps = 1e-3

    def scaled(turns: int, first: int = -2, eps: float = eps) -> np.ndarray:
        b = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) + eps
        for turn in range(2 * turns - 1):
            axis = first if turn % 2 == 0 else -3 - first
            b = b / (b.sum(axis, keepdims=True) + eps)
        return b

    found = np.asarray(streams.doubly_stochastic(jnp.asarray(logits, jnp.float32), iterations, eps))
    np.testing.assert_allclose(found, scaled(iterations), atol=3e-6)
    for wrong in (scaled(iterations + 1), scaled(iterations, first=-1), scaled(iterations, eps=0.0)):
        assert np.abs(found - wrong).max() > 1e-4


def test_collapse_weights_have_their_epsilon() -> None:
    """Where sigmoids vanish, the epsilon is what is left."""
    target = v4_target(7)
    site = target.model(target.params).layers[0].attention_site
    site.base.set_value(jnp.full_like(site.base[...], -60.0))
    collapse, expand, _ = site.coefficients(jnp.ones((1, 4, 16)))
    np.testing.assert_allclose(collapse, site.eps, rtol=1e-3)
    assert float(jnp.max(expand)) < 1e-9


def test_taps_are_means_over_streams_of_layer_outputs() -> None:
    """Not what the collapse makes of them, and not what the layer was given; each stream has an id of its own."""
    target = v4_target(7)
    model, ids = target.model(target.params), jnp.asarray([[1, 2, 3, 4, 5]])
    with jax.disable_jit():
        made = [block.streams for block in model.blocks(ids, jnp.arange(5)[None], CausalRows())]
        taps = model(ids, jnp.arange(5)[None], CausalRows(), (0, 2, 3, 4, 5, 6)).taps
    expected = [jnp.mean(made[0], axis=-2), jnp.mean(made[2], axis=-2), made[2].reshape(1, 5, -1)]
    np.testing.assert_allclose(taps, jnp.concatenate(expected, axis=-1), atol=1e-5)
    assert taps.shape[-1] == target.config.tap_width((0, 2, 3, 4, 5, 6))


# Drafters


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
def test_a_wrong_mask_of_the_block_is_caught(wrong: Any, monkeypatch: Patch) -> None:
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

    for change in (targets_norm, targets_collapse, every_slot, normed_context):
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


# Rollback


@pytest.fixture(autouse=True)
def traced_anew() -> Iterator[None]:
    """No decoder of a trap may be one that was traced without it, nor serve a later test."""
    forget_traces()
    yield
    forget_traces()


@contextmanager
def shorter(part: str) -> Iterator[None]:
    """A decode state in which one kind of ring is a row too short."""
    right = state.empty_state

    def wrong(config: Any, requests: int, size: int, width: int, dtype: Any) -> Any:
        made = []
        for layer, kind in zip(right(config, requests, size, width, dtype), config.layers, strict=True):
            if part == "window":
                layer = layer._replace(window=layer.window[:, 1:])
            elif part == "indexer" and kind.indexed:
                layer = layer._replace(indexer=layer.indexer._replace(raw=layer.indexer.raw[:, 1:]))
            elif part in ("CSA", "HCA") and kind.ratio and kind.indexed == (part == "CSA"):
                layer = layer._replace(main=layer.main._replace(raw=layer.main.raw[:, 1:]))
            made.append(layer)
        return tuple(made)

    from dspark_jax.targets.deepseek_v4 import model as model_module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "empty_state", wrong)
        yield


def rollback_error(width: int = 4) -> float:
    """Blocks of which 0 to `width` rows are kept, against whole passes. Twice a block is dropped whole at the last row
    of a window, where the next one reads as far back as any does."""
    target, rng = v4_target(7), np.random.default_rng(3)
    decoder, kept = Decoder(target, width, size=64), list(rng.integers(0, VOCAB, 9))
    decoder.prefill(np.asarray(kept))
    blocks, rows = [], []
    for count in (0, 1, 0, 4, 2, 0, 3, 0, 1, 4, 0, 4, 3, 0, 2):
        block = rng.integers(0, VOCAB, width)
        blocks.append(np.pad([*kept, *block], (0, 64 - len(kept) - width)))
        rows.append((len(kept), decoder.feed(block, count)))
        kept += list(block[:count])
    whole = next_logits(target, np.asarray(blocks))
    return max(float(np.abs(found - row[at : at + width]).max()) for (at, found), row in zip(rows, whole, strict=True))


def test_rollback_is_right_without_a_trap() -> None:
    assert rollback_error() < 1e-4


@pytest.mark.parametrize("part", ["window", "CSA", "indexer", "HCA"])
def test_a_ring_that_is_a_row_short_is_caught(part: str) -> None:
    with shorter(part):
        assert rollback_error() > 1e-3


def test_stale_entries_are_caught(monkeypatch: Patch) -> None:
    """Entries of windows that rejected rows closed must be written again by the true ones."""

    def first_wins(entries: Any, rows: Any, slots: Any, first: Any) -> Any:
        made = ORIGINAL_WRITE(entries, rows, slots, first)
        return jnp.where(jnp.any(entries != 0, axis=-1, keepdims=True), entries, made)

    monkeypatch.setattr(state, "write_entries", first_wins)
    assert rollback_error() > 1e-3


ORIGINAL_WRITE = state.write_entries
