"""A V4 `config.json`, in the published form and in the one that transformers writes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from dspark_jax.errors import UserError
from dspark_jax.readers import Schema, check_fields, flag, integer, list_of, number, object_of, text
from dspark_jax.targets.config import (
    ExpertsConfig,
    LayerConfig,
    RopeConfig,
    TargetConfig,
    check_activation,
    common_fields,
    text_config,
)
from dspark_jax.targets.deepseek_v4.fake_quant import FP8_BLOCK

MODEL_TYPE = "deepseek_v4"
SPARSE_RATIO = 4
"""The ratio of compressed sparse attention (CSA), with overlapping windows and an indexer; other ratios are HCA's."""

_TYPES = {0: "sliding_attention", SPARSE_RATIO: "compressed_sparse_attention"}
_HEAVY = "heavily_compressed_attention"


@dataclass(frozen=True)
class V4LayerConfig(LayerConfig):
    """`ratio` tokens make one compressed entry; 0: the window alone. `hashed`: experts are chosen by token id."""

    ratio: int = 0
    hashed: bool = False

    @property
    def indexed(self) -> bool:
        """Whether entries overlap and an indexer selects those that a query attends to."""
        return self.ratio == SPARSE_RATIO


@dataclass(frozen=True, kw_only=True)
class V4Config(TargetConfig):
    """V4's fields in addition to a `TargetConfig`'s; `layers` are `V4LayerConfig`s, `drafter_blocks` counts `mtp.*`.

    `quantised_caches`: keys, entries and index rows are rounded as in the training of the served weights
    (fake_quant.py). `low_bit`: weights that the files quantise are kept as their codes (weights.py).
    """

    layers: tuple[V4LayerConfig, ...]
    window: int
    head_dim: int
    rope_dim: int
    query_rank: int
    output_rank: int
    output_groups: int
    index_heads: int
    index_dim: int
    index_top: int
    streams: int
    sinkhorn_iterations: int
    stream_eps: float
    routed_scale: float
    swiglu_limit: float
    drafter_blocks: int
    rope_theta: float
    quantised_caches: bool = False
    low_bit: bool = False

    @property
    def tap_limit(self) -> int:
        """A layer's tap is a mean over streams; the ids past the last layer tap one stream each, behind it."""
        return self.num_layers + self.streams

    @property
    def verifies_trees(self) -> bool:
        """Rings and windows are addressed by position, of which a tree's rows share some."""
        return False

    @property
    def widened(self) -> Self:
        """The config of the same model with all weights in a float dtype."""
        return replace(self, low_bit=False)

    @property
    def window_layer(self) -> V4LayerConfig:
        """The layer of a drafter's block: the window alone, with routed experts."""
        return V4LayerConfig(1, self.head_dim, RopeConfig(theta=self.rope_theta), window=self.window, sparse=True)


def v4_config(config: Mapping[str, Any]) -> V4Config:
    """Reads either form; UserError for features that are not implemented and for fields that contradict one another."""
    _refuse(config)

    count = config["num_hidden_layers"]
    ratios = _ratios(config)
    # Three facts have two spellings each; each helper reads both and refuses a file in which they disagree.
    hashed = _hash_layers(config)
    theta, compressed = _ropes(config)

    # Yarn is for layers with entries, whose keys may lie far back; layers with a window alone keep the plain rope.
    plain = RopeConfig(theta=theta)
    head_dim, window = config["head_dim"], config["sliding_window"]
    layers = tuple(
        V4LayerConfig(
            1, head_dim, compressed if ratio else plain, window=window, sparse=True, ratio=ratio, hashed=i < hashed
        )
        for i, ratio in enumerate(ratios[:count])
    )

    return V4Config(
        # `common_fields` needs an intermediate_size, which V4's file has for experts alone.
        **common_fields({**config, "intermediate_size": config["moe_intermediate_size"]}),
        layers=layers,
        tie_word_embeddings=False,
        experts=ExpertsConfig(
            config["n_routed_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"], normalise=True
        ),
        window=window,
        head_dim=head_dim,
        rope_dim=config["qk_rope_head_dim"],
        query_rank=config["q_lora_rank"],
        output_rank=config["o_lora_rank"],
        output_groups=config["o_groups"],
        index_heads=config["index_n_heads"],
        index_dim=config["index_head_dim"],
        index_top=config["index_topk"],
        streams=config["hc_mult"],
        sinkhorn_iterations=config["hc_sinkhorn_iters"],
        stream_eps=config["hc_eps"],
        routed_scale=config["routed_scaling_factor"],
        swiglu_limit=config["swiglu_limit"],
        drafter_blocks=len(ratios) - count,
        rope_theta=theta,
        quantised_caches=config.get("quantised_caches", False),
        # Both fields, as in the published files: fp8 for dense weights alone is a form that is not kept.
        low_bit=bool(config.get("quantization_config")) and config.get("expert_dtype") == "fp4",
    )


def refuse_later_versions(config: Mapping[str, Any], where: str) -> None:
    """UserError for the config.json of DeepSeek-V4.1, target or drafter: it shares half of V4's fields and is of
    another architecture, with taps, streams and tensors of its own."""
    for named in (config.get("model_type"), text_config(config).get("model_type")):
        if str(named).startswith(MODEL_TYPE) and named != MODEL_TYPE:
            raise UserError(
                f"{where} has model_type {named!r}, a later architecture than DeepSeek-V4; of its family {MODEL_TYPE} "
                "alone is implemented. Give a V4 folder."
            )


# Field -> the values that have no effect here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "norm_topk_prob": (True,),
    "topk_method": ("noaux_tc",),
    "tie_word_embeddings": (False, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
}


V4_FIELDS: Schema = {
    **{
        name: integer(1, 1 << 24)
        for name in (
            "qk_rope_head_dim", "q_lora_rank", "o_lora_rank", "o_groups", "index_n_heads", "index_head_dim",
            "index_topk", "n_routed_experts", "hc_mult", "hc_sinkhorn_iters",
        )
    },
    "num_hash_layers": integer(0, 1024),
    "hc_eps": number(0, 1),
    "routed_scaling_factor": number(above=0),
    "swiglu_limit": number(above=0),
    "compress_rope_theta": number(above=1),
    "compress_ratios": list_of(integer(0, 1 << 20), least=1, most=2048),
    "compress_rates": object_of(integer(1, 1 << 20)),
    "quantised_caches": flag(),
    "mlp_layer_types": list_of(text(), most=1024),
}  # fmt: skip


def _refuse(config: Mapping[str, Any]) -> None:
    """UserError for mistyped fields and for variants that are not implemented."""
    check_fields(config, V4_FIELDS, "config.json")
    check_activation(config, "hidden_act", "silu")

    # An unknown variant must not load as the known one: its outputs would be wrong without a sign.
    for field, neutral in _NEUTRAL.items():
        if (found := config.get(field, neutral[0])) not in neutral:
            raise UserError(
                f"config.json has {field} {found!r}; deepseek_v4 targets are implemented with {neutral[0]!r} only."
            )

    heads, groups = config["num_attention_heads"], config["o_groups"]
    if heads % groups:
        raise UserError(f"config.json has {heads} heads in {groups} o_groups; the heads must divide into the groups.")

    if not 1 <= config["num_experts_per_tok"] <= config["n_routed_experts"]:
        raise UserError(
            f"config.json has num_experts_per_tok {config['num_experts_per_tok']}; expected 1 to the "
            f"{config['n_routed_experts']} experts there are."
        )

    # The last channels of keys, entries and index rows are turned in pairs.
    rope, narrowest = config["qk_rope_head_dim"], min(config["head_dim"], config["index_head_dim"])
    if rope % 2 or rope > narrowest:
        raise UserError(
            f"config.json has qk_rope_head_dim {rope}; expected an even number of at most {narrowest}, the smaller of "
            "head_dim and index_head_dim."
        )
    if config.get("quantised_caches"):
        _check_rounding(config["head_dim"] - rope, config["index_head_dim"])


def _check_rounding(still: int, index: int) -> None:
    """UserError for sizes that fake_quant.py cannot round: `still` channels of a key that are not rotated, in whole
    blocks, and the `index` channels of an index row, which a Hadamard matrix turns."""
    blocks = still > 0 and (still < FP8_BLOCK or still % FP8_BLOCK == 0)
    if not blocks or index & (index - 1):
        raise UserError(
            f"config.json asks for quantised_caches with {still} channels of a key unrotated and an index_head_dim of "
            f"{index}; expected at most {FP8_BLOCK} of the former or a multiple of it, and a power of two."
        )


def _ratios(config: Mapping[str, Any]) -> list[int]:
    """One ratio per layer and one 0 per drafter block: `compress_ratios`, or transformers' `layer_types`."""
    count, types = config["num_hidden_layers"], config.get("layer_types")
    rates = config.get("compress_rates") or {}

    ratios: Any = config.get("compress_ratios")
    named: list[int] | None = None
    if types is not None:
        if len(types) < count:
            raise UserError(f"config.json lists {len(types)} layer_types for {count} layers; it must name every layer.")
        named = [_ratio_of(kind, rates) for kind in types[:count]]

        # Without a rate, a type says no more than that the layer is heavily compressed.
        if ratios is not None and _HEAVY not in rates:
            named = [r if t == _HEAVY and r not in _TYPES else n for t, n, r in zip(types, named, ratios, strict=False)]

    if ratios is None:
        ratios = named

    # A KeyError, because the registry turns it into the sentence about a missing field.
    if ratios is None:
        raise KeyError("compress_ratios")
    ratios = list(ratios)

    # Blocks past the layers are drafters', which have no compressed entries.
    if len(ratios) < count or any(ratios[count:]) or min(ratios) < 0:
        raise UserError(
            f"config.json has compress_ratios {ratios} for {count} layers; expected one a layer, 0 or more, then one 0 "
            "for each mtp block; copy the file again."
        )

    if named is not None and named != ratios[:count]:
        raise UserError(
            f"config.json contradicts itself: compress_ratios are {ratios[:count]}, layer_types with compress_rates "
            f"say {named}; remove the wrong ones."
        )

    return ratios


def _ratio_of(kind: str, rates: Mapping[str, int]) -> int:
    """The ratio of one of transformers' layer types; UserError for unknown types and contradicting rates."""
    if kind == _TYPES[0]:
        return 0
    if kind not in (_TYPES[SPARSE_RATIO], _HEAVY):
        raise UserError(
            f"config.json has layer type {kind!r}; deepseek_v4 targets use {', '.join(_TYPES.values())} and {_HEAVY}."
        )

    # The published ratios are the defaults: 4 for CSA, 128 for HCA.
    ratio = rates.get(kind, SPARSE_RATIO if kind == _TYPES[SPARSE_RATIO] else 128)

    # The ratio alone tells CSA from HCA everywhere else, so the two must not overlap.
    if (ratio == SPARSE_RATIO) != (kind == _TYPES[SPARSE_RATIO]) or ratio < 1:
        raise UserError(f"config.json gives {kind} the ratio {ratio}; only {_TYPES[SPARSE_RATIO]} has {SPARSE_RATIO}.")

    return ratio


def _hash_layers(config: Mapping[str, Any]) -> int:
    """The number of first layers whose experts are chosen by token id."""
    types = config.get("mlp_layer_types")
    named = None if types is None else [kind == "hash_moe" for kind in types[: config["num_hidden_layers"]]]
    if named is not None and named != sorted(named, reverse=True):
        raise UserError(f"config.json has mlp_layer_types {types}; hash_moe layers must come before all others.")

    # Either form may state it; where both do, they must agree.
    hashed = config.get("num_hash_layers", None if named is None else sum(named))
    if hashed is None:
        raise KeyError("num_hash_layers")

    if named is not None and sum(named) != hashed:
        raise UserError(
            f"config.json contradicts itself: num_hash_layers is {hashed}, mlp_layer_types name {sum(named)}; remove "
            "the wrong one."
        )

    return hashed


def _ropes(config: Mapping[str, Any]) -> tuple[float, RopeConfig]:
    """(theta of window-only layers, the rope of layers with entries): yarn scales only the latter."""
    parameters = config.get("rope_parameters") or {}
    main, entries = parameters.get("main") or {}, parameters.get("compress") or {}
    theta = main.get("rope_theta", config.get("rope_theta"))
    compressed = entries.get("rope_theta", config.get("compress_rope_theta"))
    if theta is None or compressed is None:
        raise KeyError("rope_theta" if theta is None else "compress_rope_theta")

    # The published form has one scaling for the file; transformers nests it under the kind of layer it is for.

    scaling = {**(entries or config.get("rope_scaling") or {})}
    scaling.pop("rope_theta", None)
    scaling.pop("partial_rotary_factor", None)

    if scaling.setdefault("rope_type", scaling.get("type", "default")) not in ("yarn", "default"):
        raise UserError(
            f"config.json asks for RoPE scaling {scaling['rope_type']!r}; deepseek_v4 targets use yarn or none."
        )

    # Yarn stretches positions but does not scale scores here: its factor on cos and sin is 1.
    scaling["attention_factor"] = 1.0
    read = {"max_position_embeddings": config["max_position_embeddings"], "rope_theta": compressed}
    return float(theta), RopeConfig.from_hf_dict({**read, "rope_parameters": scaling})
