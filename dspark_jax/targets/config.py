"""A target's architecture, read once from a Hugging Face `config.json`, with no second default anywhere else.

`registry.read_target_config` reads one; each family's reader in the files beside this one builds it.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from dspark_jax.errors import UserError
from dspark_jax.readers import check_fields, require_object, shown
from dspark_jax.targets.fields import ROPE_FIELDS, refuse_rotations

ROPE_KINDS = ("default", "linear", "yarn", "llama3", "proportional")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one of `ROPE_KINDS`; each field after `factor` belongs to the kinds named above it."""

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
    # proportional: the part of the head's frequencies that turn at all
    partial_factor: float = 1.0

    @classmethod
    def from_hf_dict(cls, config: Mapping[str, Any], layer_type: str | None = None) -> "RopeConfig":
        """Reads `rope_parameters` (transformers 5) or top-level `rope_theta` and `rope_scaling`.

        layer_type: its entry of `rope_parameters`, in families that give each type of layer its own.
        Raises UserError for a field of another type or range, and for rotations that are not implemented.
        """
        scaling = _rope_scaling(config, layer_type)
        theta = scaling.get("rope_theta", config.get("rope_theta"))
        if theta is None:
            raise UserError("config.json gives no rope_theta, neither at top level nor under rope_parameters; add it.")

        kind = _rope_kind(scaling)
        partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0

        # Other kinds would turn the first channels of a head only, which `Rope.rotate` by halves cannot express.
        if partial != 1.0 and kind != "proportional":
            raise UserError(
                f"config.json asks for RoPE {kind!r} on a part ({partial}) of each head; only 'proportional' RoPE has "
                "a partial_rotary_factor here."
            )

        # Kinds that stretch positions need the length the model was first trained on; the others never read it.
        original = scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]

        # A yarn file may give the original length alone: transformers then takes the ratio of the two lengths.
        factor = scaling.get("factor")
        if factor is None:
            factor = config["max_position_embeddings"] / original if kind == "yarn" else 1.0

        # Absent fields keep the dataclass's defaults, so that each default is written once.
        optional = {name: scaling[name] for name in _OPTIONAL_ROPE_FIELDS if scaling.get(name) is not None}

        # The blend between the two factors divides by their difference.
        if kind == "llama3" and optional.get("low_freq_factor", 1.0) >= optional.get("high_freq_factor", 4.0):
            raise UserError(
                f"config.json has {shown(dict(scaling))} as its llama3 RoPE; expected low_freq_factor below "
                "high_freq_factor; correct the file or copy it again."
            )

        return cls(
            theta=float(theta),
            kind=kind,
            factor=float(factor),
            original_max_positions=int(original),
            attention_factor=scaling.get("attention_factor"),
            partial_factor=float(partial),
            **optional,
        )

    def inverse_frequencies(self, head_dim: int) -> tuple[list[float], float]:
        """([head_dim / 2] inverse frequencies, factor on cos and sin), as transformers' ROPE_INIT_FUNCTIONS."""
        # The exponent is over the full head_dim for all kinds, for 'proportional' too (docs/algorithm.md, rule 65).
        plain = [self.theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
        if self.kind == "proportional":
            # Frequencies past the turning part are 0, not absent: their pairs keep their angle, and H stays whole.
            turning = int(self.partial_factor * head_dim // 2)
            return [f / self.factor if i < turning else 0.0 for i, f in enumerate(plain)], 1.0

        if self.kind == "linear":
            return [f / self.factor for f in plain], 1.0

        # YaRN alone has a factor on cos and sin; through q and k it scales the scores by its square.
        if self.kind == "yarn":
            return self._yarn(plain, head_dim)
        if self.kind == "llama3":
            return [self._llama3(f) for f in plain], 1.0
        return plain, 1.0

    def _yarn(self, plain: list[float], head_dim: int) -> tuple[list[float], float]:
        """YaRN (arXiv 2309.00071): long waves are interpolated, short ones kept, with a ramp in between."""

        def correction(rotations: float) -> float:
            # The index, as a real number, of the frequency that turns `rotations` times over the original length.
            turns = self.original_max_positions / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = correction(self.beta_fast), correction(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # The ramp runs over the indices between the two; indices outside exist in no head.
        low, high = max(low, 0), min(high, head_dim - 1)

        # Equal ends would divide by zero below.
        if low == high:
            high += 0.001

        frequencies = []
        for i, frequency in enumerate(plain):
            extrapolated = 1.0 - min(max((i - low) / (high - low), 0.0), 1.0)
            frequencies.append(frequency / self.factor * (1.0 - extrapolated) + frequency * extrapolated)

        return frequencies, self._yarn_attention_factor()

    def _yarn_attention_factor(self) -> float:
        """The factor on cos and sin; DeepSeek's files give it as a ratio of two mscales, others not at all."""

        def mscale(scale: float, m: float = 1.0) -> float:
            return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

        # An explicit factor in the file wins over the formula.
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return mscale(self.factor, self.mscale) / mscale(self.factor, self.mscale_all_dim)
        return mscale(self.factor)

    def _llama3(self, frequency: float) -> float:
        """Llama 3's scaling of one frequency: kept if short, divided by `factor` if long, blended in between."""
        wavelength = 2 * math.pi / frequency  # in tokens

        if wavelength < self.original_max_positions / self.high_freq_factor:
            return frequency
        if wavelength > self.original_max_positions / self.low_freq_factor:
            return frequency / self.factor

        # 0 at the longest wave that is divided whole, 1 at the shortest that is kept.
        smooth = (self.original_max_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        return (1 - smooth) * frequency / self.factor + smooth * frequency


_OPTIONAL_ROPE_FIELDS = (
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
)


def _rope_scaling(config: Mapping[str, Any], layer_type: str | None) -> Mapping[str, Any]:
    """The checked object that describes the rotation; {} where the file has none."""
    refuse_rotations(config, "config.json")
    where = "config.json, under rope_parameters or rope_scaling,"

    # transformers 5 writes `rope_parameters`, earlier versions `rope_scaling` (docs/algorithm.md, rule 69).
    scaling = require_object(config.get("rope_parameters") or config.get("rope_scaling") or {}, where)
    if layer_type is not None:
        scaling = require_object(scaling.get(layer_type) or {}, where)
    check_fields(scaling, ROPE_FIELDS, where)
    return scaling


def _rope_kind(scaling: Mapping[str, Any]) -> str:
    """One of ROPE_KINDS; UserError for another."""
    # transformers once wrote the key as `type`, and both spellings are in published files.
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise UserError(
            f"config.json asks for RoPE scaling {kind!r}; targets here read {', '.join(ROPE_KINDS[:-1])} and "
            f"{ROPE_KINDS[-1]}."
        )
    return kind


@dataclass(frozen=True)
class LayerConfig:
    """The sizes in which decoder layers of one target may differ. `window` is in tokens, None for full attention."""

    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    window: int | None = None
    values_are_keys: bool = False  # V is k_proj's raw output: there is no v_proj
    sparse: bool = False  # the MLP is a mixture of the target's experts


@dataclass(frozen=True)
class ExpertsConfig:
    """Experts of width `intermediate_size`, `per_token` of them for each token; `normalise`: their weights sum to 1."""

    count: int
    per_token: int
    intermediate_size: int
    normalise: bool


@dataclass(frozen=True)
class TargetConfig:
    """A decoder-only architecture. `model_type` names the family, which picks the kind of decoder layer."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    layers: tuple[LayerConfig, ...]
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_positions: int
    initializer_range: float
    dtype: str
    attention_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = True
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    experts: ExpertsConfig | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """(kv heads, head dim) of every layer: what `kv_cache.empty_cache` takes."""
        return tuple((layer.num_kv_heads, layer.head_dim) for layer in self.layers)

    @property
    def widened(self) -> Self:
        """The same model with all weights in a float dtype; families that keep stored codes override this."""
        return self

    @property
    def verifies_trees(self) -> bool:
        """Whether rows of a block may form a tree; not where a row's position alone says what it sees."""
        return True

    @property
    def tap_limit(self) -> int:
        """The ids that may be tapped are below this one: a layer each, and in some families more of the same width."""
        return self.num_layers

    def tap_width(self, tap_layers: Sequence[int]) -> int:
        """Channels m D of the features that m taps give."""
        return len(tap_layers) * self.hidden_size


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config.json: `text_config` of a multimodal file, else the file itself."""
    # Multimodal files of every family keep the language model's fields under this one name.
    return config["text_config"] if isinstance(config.get("text_config"), Mapping) else config


def common_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The TargetConfig fields that all families spell alike."""
    return {
        "model_type": config["model_type"],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_heads": config["num_attention_heads"],
        "rms_norm_eps": config["rms_norm_eps"],
        "max_positions": config["max_position_embeddings"],
        "initializer_range": config.get("initializer_range", 0.02),
        # transformers 5 renamed the field; published files have either.
        "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        "attention_bias": bool(config.get("attention_bias", False)),
    }


def check_activation(config: Mapping[str, Any], field: str, expected: str) -> None:
    """UserError where the file names another activation than the family's; an absent field means that one."""
    found = config.get(field, expected)
    if found != expected:
        raise UserError(
            f"config.json has {field} {found!r}; {config['model_type']} targets are implemented with {expected!r} only."
        )


def layer_types(config: Mapping[str, Any], default: Sequence[str]) -> list[str]:
    """One of full_attention and sliding_attention a layer; UserError when the file names too few or others."""
    # More types than layers are accepted: some files list those of further modules behind them.
    types = config.get("layer_types") or default

    layers = config["num_hidden_layers"]
    if len(types) < layers:
        raise UserError(f"config.json lists {len(types)} layer_types for {layers} layers; it must name every layer.")

    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise UserError(
            f"config.json has layer type {unknown[0]!r}; {config['model_type']} targets use full_attention and "
            "sliding_attention."
        )

    return list(types[:layers])


def config_sha256(config: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of the fields that decide what the model computes, not of paths and versions."""
    # The storage dtype is left out: a cache made from a bfloat16 copy serves a float32 one of the same weights.
    ignored = {"_name_or_path", "transformers_version", "use_cache", "architectures", "dtype", "torch_dtype"}
    # Sorted keys below: the order of a file's fields is no part of the model.
    kept = {key: value for key, value in config.items() if key not in ignored}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
