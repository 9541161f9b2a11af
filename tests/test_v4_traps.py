"""The mistakes that a port of DeepSeek-V4's target makes most easily: each is built in, reference numbers refuse it.

Run op by op, without jit: nothing is compiled twice, and a patched function is what runs.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dspark_jax.checkpoints.huggingface import parameter_dtypes
from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.config import RopeConfig
from dspark_jax.targets.deepseek_v4 import attention, compressor, experts, rope, streams
from dspark_jax.targets.deepseek_v4.attention import Indexer, V4Attention
from dspark_jax.targets.deepseek_v4.compressor import Compressor
from dspark_jax.targets.deepseek_v4.config import v4_config
from dspark_jax.targets.deepseek_v4.experts import Router
from dspark_jax.targets.deepseek_v4.streams import Collapse, Norm, Site
from tests.v4_tiny import v4_hf_config, v4_target
from tests.v4_trapped import MTP_CASE, largest, loaded, worst

Patch = pytest.MonkeyPatch


# `target/p2` of the MTP case, whose layers are HCA, HCA, CSA and HCA, the first of them hashed


CAUGHT = 10


def target_error(change: Callable[[Any], None] = lambda model: None) -> float:
    """Of the first layer that is caught, or the largest of all layers and the logits."""
    vectors, target, _ = loaded(MTP_CASE)
    model = target.model(target.params)
    change(model)
    ids = jnp.asarray(vectors["target/p2/input_ids"][None], jnp.int32)
    expected, found = vectors["target/p2/streams"], 0.0
    with jax.disable_jit():
        for layer, block in enumerate(model.blocks(ids, jnp.arange(ids.shape[1])[None], CausalRows())):
            results = vectors.close_to(f"layer {layer}", block.streams[0], expected[layer])
            found = max(found, largest(list(results)))
            if found > CAUGHT:
                return found
        assert layer + 1 == len(expected)
        logits = model.logits(model.final_norm(model.collapse(block.streams)))
    return max(found, worst(vectors, {"target/p2/logits": logits[0]}))


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
    assert target_error() > CAUGHT


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
    assert target_error(MODEL_TRAPS[name]) > CAUGHT


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
    """Where sigmoids vanish, the epsilon is what is left, in a block's sites and before the head."""
    target = v4_target(7)
    model = target.model(target.params)
    site, head = model.layers[0].attention_site, model.collapse
    site.base.set_value(jnp.full_like(site.base[...], -60.0))
    collapse, expand, _ = site.coefficients(jnp.ones((1, 4, 16)))
    np.testing.assert_allclose(collapse, site.eps, rtol=1e-3)
    assert float(jnp.max(expand)) < 1e-9
    head.base.set_value(jnp.full_like(head.base[...], -60.0))
    np.testing.assert_allclose(head(jnp.ones((1, 4, 16))), 4 * head.eps, rtol=1e-3)


def test_taps_are_means_over_streams_of_layer_outputs() -> None:
    """Not what the collapse makes of them, and not what the layer was given; each stream has an id of its own."""
    vectors, target, _ = loaded(MTP_CASE)  # whose operations are compiled already
    model, ids = target.model(target.params), jnp.asarray(vectors["target/p2/input_ids"][None], jnp.int32)
    rows, wanted = jnp.arange(ids.shape[1])[None], (0, 2, 4, 5, 6, 7)
    with jax.disable_jit():
        made = [block.streams for block in model.blocks(ids, rows, CausalRows())]
        taps = model(ids, rows, CausalRows(), wanted).taps
    expected = [jnp.mean(made[0], axis=-2), jnp.mean(made[2], axis=-2), made[3].reshape(*ids.shape, -1)]
    np.testing.assert_allclose(taps, jnp.concatenate(expected, axis=-1), atol=1e-5)
    assert taps.shape[-1] == target.config.tap_width(wanted)


def test_yarn_is_for_layers_with_entries_alone() -> None:
    """The window's layers, and the blocks of drafters, keep the plain rope of their own theta."""
    config = v4_config(v4_hf_config())
    plain = RopeConfig(theta=5000.0)
    assert config.layers[0].rope == plain == config.window_layer.rope
    assert {(layer.rope.kind, layer.rope.theta) for layer in config.layers[1:]} == {("yarn", 80000.0)}
    assert config.layers[1].rope.inverse_frequencies(4)[1] == 1.0


def test_nothing_is_rounded_to_bfloat16_in_routers_and_sites() -> None:
    """A model in bfloat16, against float64 on the same numbers: float32 all the way through."""
    target, rng = v4_target(7), np.random.default_rng(0)
    flat = flatten_dict(target.params)
    kinds = parameter_dtypes(target.config, flat, jnp.bfloat16)
    block = target.model(unflatten_dict({path: x.astype(kinds[path]) for path, x in flat.items()})).layers[1]

    x = jnp.asarray(rng.normal(size=(9, 16)), jnp.bfloat16)
    weights, chosen = block.mlp.router(x, jnp.zeros((9,), jnp.int32))
    logits = np.asarray(x, np.float64) @ np.asarray(block.mlp.router.weight_de[...], np.float64)
    scores = np.take_along_axis(np.sqrt(np.log1p(np.exp(logits))), np.asarray(chosen), axis=-1)
    np.testing.assert_allclose(weights, scores / scores.sum(-1, keepdims=True) * 1.5, rtol=1e-5)

    given, site = rng.normal(size=(9, 4, 16)), block.attention_site
    collapse, expand, _ = site.coefficients(jnp.asarray(given, jnp.float32))
    unit = given.reshape(9, -1) / np.sqrt(np.mean(given**2, axis=(1, 2)) + 1e-5)[:, None]
    fn, base, scale = (np.asarray(part[...], np.float64) for part in (site.fn, site.base, site.scale))
    signals = unit @ fn.T
    for found, at, factor in ((collapse, 0, 1.0), (expand, 1, 2.0)):
        part = slice(4 * at, 4 * at + 4)
        sigmoid = factor / (1 + np.exp(-(signals[:, part] * scale[at] + base[part])))
        np.testing.assert_allclose(found, sigmoid, rtol=1e-5, atol=2e-6)


def test_long_blocks_attend_chunk_by_chunk_as_at_once(monkeypatch: Patch) -> None:
    """Prompts beyond a chunk of queries: each chunk meets its own band of the window's keys."""
    target = v4_target(7)
    ids = jnp.asarray(np.random.default_rng(4).integers(0, 6, (2, 24)), jnp.int32)

    def hidden() -> Any:
        rows = jnp.broadcast_to(jnp.arange(24), (2, 24))
        return jax.jit(lambda params: target.model(params)(ids, rows, CausalRows()).hidden)(target.params)

    whole = hidden()
    monkeypatch.setattr(attention, "QUERY_CHUNK", 8)
    np.testing.assert_allclose(hidden(), whole, atol=1e-5)
