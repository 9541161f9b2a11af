"""Gemma 4, Llama and Qwen3-MoE targets: layouts, refusals, placement, drafters of their blocks, losslessness."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from dspark_jax import EngineConfig, SamplingParams, generate, load_target
from dspark_jax.checkpoints.huggingface import save_target
from dspark_jax.checkpoints.target_tables import describe_target, load_layers
from dspark_jax.drafters.registry import drafter_hf_config, new_drafter, read_config, skeleton
from dspark_jax.errors import UserError
from dspark_jax.sharding import make_mesh, split
from dspark_jax.targets.config import ExpertsConfig, LayerConfig
from dspark_jax.targets.joined import apart
from dspark_jax.targets.moe import SparseMLP, all_experts, experts_one_by_one, grouped_experts
from dspark_jax.targets.registry import TARGETS, read_target_config
from dspark_jax.training.schedule import make_optimizer
from tests.decoding_tiny import next_logits, prompts, run_python
from tests.families_tiny import FAMILIES, GEMMA, LLAMA, MOE, gemma_pair, write_family


def same(a: dict, b: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def multimodal(hf_config: dict[str, Any], outer: str) -> dict[str, Any]:
    inner = {k: v for k, v in hf_config.items() if k != "dtype"} | {"model_type": f"{outer}_text"}
    return {"model_type": outer, "text_config": inner, "dtype": hf_config["dtype"], "vision_config": {"depth": 3}}


# Folders


@pytest.mark.parametrize("outer", ["gemma4", "gemma4_unified"])
def test_multimodal_and_text_only_folders_hold_the_same_target(tmp_path: Path, outer: str) -> None:
    text = load_target(write_family(tmp_path / "text", "gemma"))
    save_target(tmp_path / "whole", multimodal(GEMMA, outer), text.params, "float32")
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    assert "model.language_model.layers.3.self_attn.q_norm.weight" in stored
    # Towers beside the language model are read past.
    save_file(stored | {"model.vision_tower.w": np.ones(3)}, tmp_path / "whole" / "model.safetensors")
    whole = load_target(tmp_path / "whole")
    same(whole.params, text.params)
    assert replace(whole.config, model_type=text.config.model_type) == text.config
    assert whole.stop_tokens == text.stop_tokens == (1,)
    # A text-only config beside multimodal tensors is found too.
    (tmp_path / "whole" / "config.json").write_text((tmp_path / "text" / "config.json").read_text())
    same(load_target(tmp_path / "whole").params, text.params)
    described = describe_target(tmp_path / "whole")
    layers, norm = load_layers(described, (1,), mesh=make_mesh(devices=jax.devices()[:1]))
    same((layers[1], norm), (apart(text.params, text.config)["layers"][1], text.params["final_norm"]))


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_bit_for_bit(tmp_path: Path, name: str) -> None:
    first = write_family(tmp_path / "a", name)
    target = load_target(first)
    save_target(tmp_path / "b", target.hf_config, target.params, "float32")
    for file in ("config.json", "model.safetensors"):
        assert (first / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_names_are_the_families_own(tmp_path: Path) -> None:
    gemma = set(load_file(write_family(tmp_path / "gemma", "gemma") / "model.safetensors"))
    for name in ("layer_scalar", "post_feedforward_layernorm.weight", "self_attn.v_proj.weight"):
        assert f"model.layers.0.{name}" in gemma
    assert "model.layers.1.self_attn.v_proj.weight" not in gemma and "lm_head.weight" not in gemma
    moe = load_file(write_family(tmp_path / "moe", "moe") / "model.safetensors")
    assert moe["model.layers.1.mlp.gate.weight"].shape == (8, 32)
    assert moe["model.layers.1.mlp.experts.7.down_proj.weight"].shape == (32, 16)
    assert "model.layers.0.mlp.up_proj.weight" in moe and "model.layers.1.mlp.up_proj.weight" not in moe
    llama = set(load_file(write_family(tmp_path / "llama", "llama") / "model.safetensors"))
    assert "model.layers.0.mlp.down_proj.bias" in llama and "model.layers.0.self_attn.q_norm.weight" not in llama


@pytest.mark.subprocesses
def test_eight_devices_hold_their_parts_only() -> None:
    run_python("-m", "tests.families_tiny", *FAMILIES)


# Config fields


def test_layers_have_sizes_of_their_own() -> None:
    config = read_target_config(GEMMA)
    assert config.kv_shapes == ((2, 8), (1, 16), (2, 8), (1, 16))
    assert [layer.window for layer in config.layers] == [6, None, 6, None]
    assert [layer.values_are_keys for layer in config.layers] == [False, True, False, True]
    plain = read_target_config(GEMMA | {"attention_k_eq_v": False, "global_head_dim": None, "layer_types": None})
    assert plain.kv_shapes == ((2, 8),) * 4  # the global number of kv heads counts with K = V only
    assert [layer.window for layer in plain.layers] == [6, 6, 6, None]  # every sixth layer and the last one are global
    sparse = read_target_config(MOE | {"num_hidden_layers": 6, "mlp_only_layers": [3]})
    assert [layer.sparse for layer in sparse.layers] == [False, True, False, False, False, True]
    assert sparse.experts == ExpertsConfig(count=8, per_token=2, intermediate_size=16, normalise=True)


def test_multimodal_files_say_outside_whether_the_head_is_tied() -> None:
    whole = multimodal(GEMMA, "gemma4")
    assert read_target_config(whole).tie_word_embeddings
    assert not read_target_config(whole | {"tie_word_embeddings": False}).tie_word_embeddings


def test_proportional_rope_turns_a_part_of_the_head() -> None:
    frequencies, factor = read_target_config(GEMMA).layers[1].rope.inverse_frequencies(16)
    expected = [5e4 ** (-2 * i / 16) for i in range(4)] + [0.0] * 4
    np.testing.assert_allclose(frequencies, expected)
    assert factor == 1.0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": (GEMMA | {"enable_moe_block": True}, "Gemma 4 targets with mixtures of experts are not supported"),
    "per-layer inputs": (GEMMA | {"hidden_size_per_layer_input": 8}, "with per-layer inputs are not supported"),
    "per-layer inputs by default": (
        {k: v for k, v in GEMMA.items() if k != "hidden_size_per_layer_input"},
        "hidden_size_per_layer_input 256",
    ),
    "shared keys": (GEMMA | {"num_kv_shared_layers": 2}, "layers that share keys and values are not supported"),
    "both directions": (GEMMA | {"use_bidirectional_attention": "all"}, "attention in both directions"),
    "activation": (GEMMA | {"hidden_activation": "silu"}, "hidden_activation 'silu'; gemma4_text targets are"),
    "no rope": (
        GEMMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "has sliding_attention layers and no rope_parameters for them",
    ),
    "no heads": ({k: v for k, v in GEMMA.items() if k != "head_dim"}, "no field 'head_dim', which a gemma4_text"),
    "other wrapper": (
        {"model_type": "llava", "text_config": LLAMA},
        "model_type 'llava'; targets that load here are deepseek_v4, gemma4, gemma4_text, gemma4_unified",
    ),
    "partial rope": (
        LLAMA | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
        r"RoPE 'default' on a part \(0.5\) of each head",
    ),
    "parallel sums": (LLAMA | {"pretraining_tp": 2}, "pretraining_tp 2"),
    "too few experts": (MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok 9; expected 1 to the 8 experts"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_in_a_sentence(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refused:
        read_target_config(config)
    assert str(refused.value).endswith(".")


def test_a_new_kind_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "llama_next", TARGETS["llama"])
    assert read_target_config(LLAMA | {"model_type": "llama_next"}).model_type == "llama_next"


# What they compute


def test_embedding_scale_is_rounded_to_the_storage_dtype(tmp_path: Path) -> None:
    """sqrt(32) = 5.6569 is 5.65625 in bfloat16 (docs/algorithm.md, rule 60)."""
    target = load_target(write_family(tmp_path, "gemma"), dtype="bfloat16")
    rows = target.model(target.params).embed(jnp.arange(5))
    table = np.asarray(target.params["embed_weight_vd"][:5], np.float32)
    np.testing.assert_array_equal(np.asarray(rows), (table * np.float32(5.65625)).astype(rows.dtype))


def test_logits_are_capped(tmp_path: Path) -> None:
    target = load_target(write_family(tmp_path, "gemma"))
    (tmp_path / "config.json").write_text(json.dumps(GEMMA | {"final_logit_softcapping": None}))
    logits, raw = (next_logits(t, np.arange(20)[None]) for t in (target, load_target(tmp_path)))
    np.testing.assert_allclose(logits, 7.0 * np.tanh(raw / 7.0), atol=1e-6)
    assert np.abs(raw).max() > 3.0  # else the cap changes little


def test_all_forms_of_the_experts_agree() -> None:
    """Grouped products are what TPUs run, all experts on all rows what both are held against."""
    layer = LayerConfig(1, 8, read_target_config(MOE).layers[0].rope, sparse=True)
    config = replace(read_target_config(MOE), layers=(layer,))
    mlp = SparseMLP(config, rngs=nnx.Rngs(0))
    rows = jax.random.normal(jax.random.key(1), (13, 32))
    weights, chosen = mlp.route(rows)
    np.testing.assert_allclose(jnp.sum(weights, axis=1), 1.0, atol=1e-6)
    how = rows, weights, chosen, mlp.stack, lambda gate, up: jax.nn.silu(gate) * up
    found = grouped_experts(*how)
    np.testing.assert_allclose(found, all_experts(*how), atol=2e-6)
    np.testing.assert_allclose(found, experts_one_by_one(*how), atol=2e-6)
    np.testing.assert_allclose(found, mlp(rows), atol=2e-6)
    assert jax.export.export(jax.jit(mlp.__call__), platforms=["tpu"])(rows).platforms == ("tpu",)


# Drafters of their blocks


def test_drafters_of_a_multimodal_gemma_target() -> None:
    target = multimodal(GEMMA, "gemma4_unified")
    config = drafter_hf_config(
        target, num_layers=2, target_layer_ids=(0, 2), mask_token_id=4, num_key_value_heads=2, head_dim=24
    )
    assert config["architectures"] == ["Gemma4DSparkModel"]
    assert (config["target_model_type"], config["target_text_model_type"]) == ("gemma4_unified", "gemma4_unified_text")
    assert config["model_type"] == "gemma4_unified_text" and "text_config" not in config
    assert config["enable_moe_block"] is False and config["layer_types"] == ["full_attention"] * 2
    read = read_config(config)
    assert read.backbone.kv_shapes == ((2, 24),) * 2 and read.backbone.layers[0].window is None
    # Sliding entries in a drafter's file change nothing: its layers are global ones (docs/algorithm.md, rule 64).
    assert read_config(config | {"layer_types": ["sliding_attention"] * 2}) == read
    paths = flatten_dict(split(skeleton(config))[1])
    assert ("backbone", "layers", 0, "layer_scalar") in paths
    # Values are keys.
    assert paths["backbone", "layers", 0, "attention", "kv_weight_dy"].shape[1] == 2 * 24


@pytest.mark.parametrize("target", [LLAMA, MOE], ids=["llama", "moe"])
def test_drafters_of_other_targets_are_dense_qwen3_blocks(target: dict[str, Any]) -> None:
    config = drafter_hf_config(target, num_layers=1, target_layer_ids=(0,), mask_token_id=4)
    assert config["model_type"] == "qwen3" and config["architectures"] == ["Qwen3DSparkModel"]
    assert not {"mlp_bias", "num_experts", "moe_intermediate_size", "decoder_sparse_step"} & set(config)
    backbone = read_config(config).backbone
    assert backbone.query_key_norm and backbone.experts is None and backbone.hidden_size == 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"final_logit_softcapping": 9.0}, "the drafter's final_logit_softcapping is 7.0, the target has 9.0"),
        ({"final_logit_softcapping": None}, "the drafter's final_logit_softcapping is 7.0, the target has None"),
    ],
)
def test_a_drafter_of_another_cap_is_refused(fields: dict[str, Any], message: str) -> None:
    config = drafter_hf_config(GEMMA, num_layers=1, target_layer_ids=(0,), mask_token_id=4)
    with pytest.raises(UserError, match=message):
        read_config(config).check_target(read_target_config(GEMMA | fields))


def test_layer_scalars_are_no_trained_parameters() -> None:
    """No gradient reaches them (test_golden has the others'), and weight decay passes them by."""
    config = drafter_hf_config(GEMMA, num_layers=1, target_layer_ids=(0,), mask_token_id=4, markov_rank=4)
    params = new_drafter("fresh", config, jax.random.key(0)).params
    optimizer = make_optimizer(lambda step: 0.1, (0.9, 0.999), 1e-8, weight_decay=0.5, clip_norm=1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    flat = flatten_dict(updates)
    assert not np.any(flat["backbone", "layers", 0, "layer_scalar"])
    assert np.any(flat["backbone", "layers", 0, "input_norm", "weight"])


@pytest.mark.long
@pytest.mark.lossless
def test_speculation_is_lossless_on_gemma() -> None:
    """Windows, two cache shapes, the cap and the scaled embedding under rejection and rollback: plain greedy tokens."""
    target, drafter = gemma_pair()
    rows = prompts(12, 64, seed=4)
    how = SamplingParams(24), EngineConfig(4, policy="fixed", rounds_per_dispatch=4)
    plain = generate(target, None, rows, *how)
    found = generate(target, drafter, rows, *how)
    assert [g.tokens for g in found] == [g.tokens for g in plain]
    for tokens, generation in zip(rows[:3], plain[:3], strict=True):  # and plain ones are the uncached argmax
        whole = np.asarray([*tokens, *generation.tokens])[None]
        greedy = np.argmax(next_logits(target, whole)[0], axis=-1)
        assert greedy[len(tokens) - 1 : -1].tolist() == list(generation.tokens)
    accepted = sum(g.committed for g in found) / sum(g.rounds for g in found)
    assert 1.2 < accepted < 4.8, accepted
