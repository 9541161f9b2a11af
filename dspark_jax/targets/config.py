"""A target's architecture, read once from a Hugging Face `config.json`; no second default anywhere else."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark_jax.errors import UserError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `kind` is default, linear, yarn or llama3; the other fields are the kind's own parameters."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    # yarn
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @classmethod
    def from_hf_dict(cls, config: Mapping[str, Any]) -> "RopeConfig":
        """Reads `rope_parameters` (transformers 5) or top-level `rope_theta` and `rope_scaling` (golden/NOTES 72)."""
        scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = scaling.get("rope_theta", config.get("rope_theta"))
        if theta is None:
            raise UserError("config.json gives no rope_theta, neither at top level nor under rope_parameters; add it.")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "linear", "yarn", "llama3"):
            raise UserError(
                f"config.json asks for RoPE scaling {kind!r}; this target reads default, linear, yarn and llama3."
            )
        original = scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
        factor = scaling.get("factor")
        if factor is None:
            factor = config["max_position_embeddings"] / original if kind == "yarn" else 1.0
        optional = {
            name: scaling[name]
            for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor",
                         "high_freq_factor")
            if scaling.get(name) is not None
        }  # fmt: skip
        return cls(
            theta=float(theta),
            kind=kind,
            factor=float(factor),
            original_max_positions=int(original),
            attention_factor=scaling.get("attention_factor"),
            **optional,
        )

    def inverse_frequencies(self, head_dim: int) -> tuple[list[float], float]:
        """([head_dim / 2] inverse frequencies, factor on cos and sin), as transformers' ROPE_INIT_FUNCTIONS."""
        plain = [self.theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
        if self.kind == "linear":
            return [f / self.factor for f in plain], 1.0
        if self.kind == "yarn":
            return self._yarn(plain, head_dim)
        if self.kind == "llama3":
            return [self._llama3(f) for f in plain], 1.0
        return plain, 1.0

    def _yarn(self, plain: list[float], head_dim: int) -> tuple[list[float], float]:
        def correction(rotations: float) -> float:
            turns = self.original_max_positions / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = correction(self.beta_fast), correction(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        frequencies = []
        for i, frequency in enumerate(plain):
            extrapolated = 1.0 - min(max((i - low) / (high - low), 0.0), 1.0)
            frequencies.append(frequency / self.factor * (1.0 - extrapolated) + frequency * extrapolated)
        return frequencies, self._yarn_attention_factor()

    def _yarn_attention_factor(self) -> float:
        def mscale(scale: float, m: float = 1.0) -> float:
            return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return mscale(self.factor, self.mscale) / mscale(self.factor, self.mscale_all_dim)
        return mscale(self.factor)

    def _llama3(self, frequency: float) -> float:
        wavelength = 2 * math.pi / frequency
        if wavelength < self.original_max_positions / self.high_freq_factor:
            return frequency
        if wavelength > self.original_max_positions / self.low_freq_factor:
            return frequency / self.factor
        smooth = (self.original_max_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        return (1 - smooth) * frequency / self.factor + smooth * frequency


@dataclass(frozen=True)
class TargetConfig:
    """Qwen3 dense architecture. `windows[l]` is layer l's sliding window in tokens, None for full attention."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    max_positions: int
    initializer_range: float
    dtype: str

    @classmethod
    def from_hf_dict(cls, config: Mapping[str, Any]) -> "TargetConfig":
        """Raises UserError naming the field when one is missing or asks for what this target doesn't implement."""
        model_type = config.get("model_type")
        if model_type != "qwen3":
            raise UserError(f"config.json has model_type {model_type!r}; this version loads 'qwen3' (dense) targets.")
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise UserError(f"config.json has hidden_act {activation!r}; Qwen3 targets use 'silu'.")
        try:
            return cls(
                model_type=model_type,
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=config["num_attention_heads"],
                num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
                head_dim=config.get("head_dim") or 128,
                rms_norm_eps=config["rms_norm_eps"],
                rope=RopeConfig.from_hf_dict(config),
                attention_bias=bool(config.get("attention_bias", False)),
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                windows=_windows(config),
                max_positions=config["max_position_embeddings"],
                initializer_range=config.get("initializer_range", 0.02),
                dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
            )
        except KeyError as missing:
            raise UserError(f"config.json has no field {missing}, which a Qwen3 target needs; add it.") from None


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Per-layer window, as transformers reads it: `sliding_window` counts only under `use_sliding_window`, and the
    layer types come from `max_window_layers` when the file has none."""
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    types = config.get("layer_types")
    if types is None:
        first_sliding = config.get("max_window_layers", 28)
        types = ["sliding_attention" if window and i >= first_sliding else "full_attention" for i in range(layers)]
    if len(types) < layers:
        raise UserError(f"config.json lists {len(types)} layer_types for {layers} layers; it must name every layer.")
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise UserError(
            f"config.json has layer type {unknown[0]!r}; Qwen3 targets use full_attention and sliding_attention."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types[:layers])


def config_sha256(config: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of the fields that decide what the model computes, not of paths and versions."""
    ignored = {"_name_or_path", "transformers_version", "use_cache", "architectures", "dtype", "torch_dtype"}
    kept = {key: value for key, value in config.items() if key not in ignored}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
