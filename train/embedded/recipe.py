"""Settings of the embedded target, its learning rate, and the counters of its run."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from .tokenizer import END, PAD, VOCABULARY


@dataclass(frozen=True)
class Recipe:
    """Settings of the embedded target: data, model and schedule."""

    output: Path = Path("assets/embedded_target")
    run_dir: Path = Path("runs/embedded_target")
    minutes: float = 55.0  # wall-clock budget of the whole run, interruptions not counted
    steps: int = 0  # if positive, the schedule's length; the clock is then ignored
    seed: int = 0
    rows: int = 8
    length: int = 256
    learning_rate: float = 3e-3
    warmup: int = 150
    weight_decay: float = 0.1
    context_weight: float = 0.3
    code: float = 0.45
    chat: float = 0.25
    math: float = 0.30
    save_minutes: float = 4.0
    hidden: int = 160
    layers: int = 10
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 448
    context: int = 1024

    def shares(self) -> dict[str, float]:
        return {"code": self.code, "chat": self.chat, "math": self.math}

    def hf_config(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The model's config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "max_position_embeddings": self.context,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "sliding_window": None,
            # A head of its own would add a tenth to a model of this size.
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "bos_token_id": None,
            "eos_token_id": tokenizer.token_to_id(END),
            "pad_token_id": tokenizer.token_to_id(PAD),
        }


class Progress(NamedTuple):
    """Host-side counters: optimizer steps, supervised and unsupervised tokens seen, seconds spent."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def learning_rate(recipe: Recipe, step: int, fraction: float) -> float:
    """Linear warm-up by steps, times a cosine from the full rate to a hundredth of it at fraction 1 of the run."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return recipe.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0))))
