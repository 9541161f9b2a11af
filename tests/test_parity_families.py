"""Llama, Qwen3-MoE and Gemma 4 targets against transformers on PyTorch, float32, as test_parity does it for Qwen3."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax import EngineConfig, SamplingParams, generate, load_target
from dspark_jax.drafters.registry import drafter_hf_config, new_drafter
from dspark_jax.targets.target import Target
from tests.parity import (
    SHAPES,
    check_cached_decoding,
    outputs,
    saved_reference,
    tokens,
    torch_greedy,
    torch_outputs,
)

pytestmark = pytest.mark.parity

ATOL = 2e-5
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
MOE = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}
GEMMA = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 5,
    "global_head_dim": 24,
    "hidden_size_per_layer_input": 0,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 9e4, "partial_rotary_factor": 0.4, "factor": 2.0},
    },
}
# Name -> (transformers' names of model and config, fields over SHAPES).
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, llama3 rope, tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, biases, wide heads": (
        "Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "num_key_value_heads": 1},
    ),
    "moe, normalised": ("Qwen3Moe", MOE),
    "moe, dense layers between": (
        "Qwen3Moe",
        MOE | {
            "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False,
            "num_experts_per_tok": 3, "attention_bias": True, "use_sliding_window": True, "sliding_window": 6,
        },
    ),
    "gemma, K = V, capped, tied": (
        "Gemma4",
        GEMMA | {
            "attention_k_eq_v": True, "attention_bias": True, "num_global_key_value_heads": 1,
            "final_logit_softcapping": 2.5,
            "tie_word_embeddings": True,
        },
    ),
    "gemma, own values, default pattern": (
        "Gemma4Unified",
        GEMMA | {
            "num_hidden_layers": 6, "layer_types": None, "num_global_key_value_heads": 1, "hidden_size": 48,
            "rope_parameters": None,
        },
    ),
}  # fmt: skip


def reference(folder: Path, name: str) -> Any:
    import transformers

    family, fields = CONFIGS[name]
    config_class = f"{family}{'TextConfig' if family.startswith('Gemma4') else 'Config'}"
    made = getattr(transformers, config_class)(**SHAPES | fields, attn_implementation="eager")
    model_class = getattr(transformers, f"{family}ForCausalLM")
    return saved_reference(folder, model_class, made, query_norm=0.3 if family.startswith("Gemma4") else 1.0)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Target]:
    folder = tmp_path_factory.mktemp("parity")
    return reference(folder, request.param), load_target(folder, dtype="float32")


def test_hidden_states_and_logits(pair: tuple[Any, Target]) -> None:
    model, target = pair
    ids = tokens()
    states, expected = torch_outputs(model, ids)
    taps, hidden, logits = outputs(target, ids)
    for layer, state in enumerate(states[:-1]):
        np.testing.assert_allclose(taps[:, :, layer], state, atol=ATOL, rtol=2e-6, err_msg=f"layer {layer - 1}")
    np.testing.assert_allclose(hidden, states[-1], atol=ATOL, rtol=2e-6)
    np.testing.assert_allclose(logits, expected, atol=ATOL, rtol=2e-6)
    assert np.std(expected) > 0.3  # else the comparison says little


# Of each family one, with what sets it apart.
CACHED = (
    "llama, biases, wide heads", "moe, dense layers between", "gemma, K = V, capped, tied",
    "gemma, own values, default pattern",
)  # fmt: skip


@pytest.mark.parametrize("pair", CACHED, indirect=True)
def test_cached_decoding(pair: tuple[Any, Target]) -> None:
    model, target = pair
    check_cached_decoding(target, torch_outputs(model, tokens())[1], ATOL)


@pytest.mark.lossless
@pytest.mark.parametrize("name", ["moe, dense layers between", "gemma, K = V, capped, tied"])
def test_greedy_generation_with_drafts(tmp_path: Path, name: str) -> None:
    """Prompts shorter and longer than the sliding window, with slots reused: transformers' tokens. Without drafts:
    Gemma's in test_target_families, Qwen3's in test_parity."""
    model = reference(tmp_path, name)
    target = load_target(tmp_path)
    config = drafter_hf_config(
        target.hf_config, num_layers=1, target_layer_ids=(-1, 1), mask_token_id=95, block_size=3, markov_rank=4,
        dtype="float32",
    )  # fmt: skip
    rows = [row[: 3 + 7 * i].tolist() for i, row in enumerate(tokens(3))]
    expected = [torch_greedy(model, row, 16) for row in rows]
    engine = EngineConfig(2, policy="fixed", buckets=(8,))
    found = generate(target, new_drafter("fresh", config, jax.random.key(1)), rows, SamplingParams(16), engine)
    assert [list(generation.tokens) for generation in found] == expected
