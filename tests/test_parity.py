"""The Qwen3 target against transformers on PyTorch, float32: every layer's hidden states, logits, cached decoding."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax import EngineConfig, SamplingParams, generate, load_target
from dspark_jax.targets.registry import read_target_config
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
CONFIGS: dict[str, dict[str, Any]] = {
    "theta, eps, one kv head, tied": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 517.0},
        "rms_norm_eps": 1e-2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "wide heads, bias": {"head_dim": 24, "attention_bias": True, "num_key_value_heads": 4},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16,
            "beta_fast": 20.0, "beta_slow": 2.0,
        },
    },
    "yarn, own attention factor, not truncated": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32,
            "attention_factor": 1.3, "truncate": False,
        },
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
    },
    "window by layer types": {
        "use_sliding_window": True, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "window by max_window_layers": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "window not used": {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0},
}  # fmt: skip


def reference(folder: Path, fields: dict[str, Any]) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return saved_reference(folder, Qwen3ForCausalLM, Qwen3Config(**SHAPES | fields, attn_implementation="eager"))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Target, Path]:
    folder = tmp_path_factory.mktemp("parity")
    model = reference(folder, CONFIGS[request.param])
    return model, load_target(folder, dtype="float32"), folder


def test_hidden_states_and_logits(pair: tuple[Any, Target, Path]) -> None:
    model, target, _ = pair
    ids, seen = tokens(), list[np.ndarray]()
    # transformers norms its last hidden state; what a tap of the last layer is, a forward hook tells.
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].numpy()))
    states, expected = torch_outputs(model, ids)
    hook.remove()
    taps, hidden, logits = outputs(target, ids)
    np.testing.assert_allclose(taps[:, :, -1], seen[0], atol=ATOL)
    for layer, state in enumerate(states[:-1]):
        np.testing.assert_allclose(taps[:, :, layer], state, atol=ATOL, err_msg=f"layer {layer - 1}")
    np.testing.assert_allclose(hidden, states[-1], atol=ATOL)
    np.testing.assert_allclose(logits, expected, atol=ATOL)
    assert np.std(expected) > 0.3  # else the comparison says little


# What a config does to a pass, it does to rows behind a cache by the same positions: of each kind of mask and rope one.
CACHED = ("theta, eps, one kv head, tied", "yarn", "window by layer types")


@pytest.mark.parametrize("pair", CACHED, indirect=True)
def test_cached_decoding(pair: tuple[Any, Target, Path]) -> None:
    model, target, _ = pair
    check_cached_decoding(target, torch_outputs(model, tokens())[1], ATOL)


def test_old_spelling_of_the_config_is_the_same(pair: tuple[Any, Target, Path]) -> None:
    """Files written before transformers 5: rope_theta at top level, rope_scaling beside it with `type`."""
    _, target, folder = pair
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    assert read_target_config(config) == target.config


@pytest.mark.parametrize("pair", CACHED[1:], indirect=True)
def test_bfloat16_is_as_close_as_pytorchs(pair: tuple[Any, Target, Path]) -> None:
    """Rounding errors against float32 are of the size that transformers makes in bfloat16."""
    import torch
    from transformers import Qwen3ForCausalLM

    model, _, folder = pair
    ids = tokens()
    exact = torch_outputs(model, ids)[1]
    theirs = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    low = load_target(folder, dtype="bfloat16")

    def error(logits: np.ndarray) -> float:
        return float(np.sqrt(np.mean((logits - exact) ** 2)))

    assert error(outputs(low, ids)[2]) < 1.5 * error(torch_outputs(theirs, ids)[1])


@pytest.mark.parametrize("name", ["yarn", "window by layer types"])
def test_greedy_generation(tmp_path: Path, name: str) -> None:
    model = reference(tmp_path, CONFIGS[name])
    target = load_target(tmp_path)
    rows = [row[: 3 + 5 * i].tolist() for i, row in enumerate(tokens(4))]
    found = generate(target, None, rows, SamplingParams(24), EngineConfig(2))
    for row, generation in zip(rows, found, strict=True):
        assert list(generation.tokens) == torch_greedy(model, row, 24)
