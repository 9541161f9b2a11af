"""Kinds of drafters by name, and `Drafter`, a drafter on disk or in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dspark_jax.config.schema import DrafterSettings
from dspark_jax.drafters.config import (
    FAMILIES,
    TARGET_SHA_FIELD,
    DrafterConfig,
    drafter_family,
    extended,
    family_fields,
)
from dspark_jax.drafters.deepseek_v4.dspark import V4DSpark
from dspark_jax.drafters.deepseek_v4.mtp import V4MTP
from dspark_jax.drafters.dspark import DFlash, DSpark
from dspark_jax.drafters.eagle3 import Eagle3
from dspark_jax.drafters.mtp import MTP
from dspark_jax.errors import UserError
from dspark_jax.sharding import split
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.joined import apart, together
from dspark_jax.targets.panels import in_panels
from dspark_jax.targets.registry import read_target_config


@dataclass(frozen=True)
class DrafterKind:
    """One kind of drafter.

    architecture: the name in config.json without the family's prefix (`Qwen3DSparkModel`).
    extension: the same for drafters with parts that readers of `architecture` do not know, so that they refuse it.
    module: called as `module(config, rngs=...)`, implements `protocol.DrafterModel`.
    objective: the name in `training.registry` that trains it.
    families: the prefixes it is published with.
    trees: whether it drafts trees, by a method `draft_tree`.
    """

    architecture: str
    module: Any
    objective: str
    families: tuple[str, ...] = FAMILIES
    trees: bool = False
    extension: str = ""

    def names(self) -> set[str]:
        """The architectures that config.json may name."""
        return {family + name for family in self.families for name in (self.architecture, self.extension) if name}


DRAFTERS: dict[str, DrafterKind] = {
    "dflash": DrafterKind("DSparkModel", DFlash, "blocks", extension="DSparkExtendedModel"),
    "dspark": DrafterKind("DSparkModel", DSpark, "blocks", trees=True, extension="DSparkExtendedModel"),
    "eagle3": DrafterKind("Eagle3Model", Eagle3, "rollout"),
    "mtp": DrafterKind("MTPModel", MTP, "blocks"),
}

# Each for one family of targets, from whose own blocks they are built; they lie in the target's files.
OWN_DRAFTERS: dict[str, DrafterKind] = {
    "deepseek_v4_dspark": DrafterKind("DSparkModel", V4DSpark, "blocks", ("DeepseekV4",)),
    "deepseek_v4_mtp": DrafterKind("MTPModel", V4MTP, "blocks", ("DeepseekV4",)),
}


def _kinds() -> dict[str, DrafterKind]:
    """All kinds, in the order of matching: DFlash before DSpark, whose `describes` takes what is left."""
    return {**DRAFTERS, **OWN_DRAFTERS}


def drafter_kind(name: str) -> DrafterKind:
    """The kind of a name in DRAFTERS; UserError listing the names otherwise."""
    if name not in DRAFTERS:
        raise UserError(f"There is no drafter kind {name!r}; expected one of {', '.join(sorted(DRAFTERS))}.")
    return DRAFTERS[name]


def kind_name(hf_config: Mapping[str, Any]) -> str:
    """The name of the kind that a drafter's config.json describes; UserError if no kind here matches."""
    named = hf_config.get("architectures") or []
    for name, kind in _kinds().items():
        # The architecture alone does not decide: DSpark and DFlash share one (docs/algorithm.md, rule 27).
        if kind.names() & set(named) and kind.module.config_type.describes(hf_config):
            return name

    kinds = ", ".join(
        dict.fromkeys(family + kind.architecture for kind in _kinds().values() for family in kind.families)
    )
    raise UserError(f"The drafter's config.json names architectures {named}; expected one of {kinds}.")


def kind_of(hf_config: Mapping[str, Any]) -> DrafterKind:
    """The kind that a config.json describes; UserError if no kind here matches."""
    return _kinds()[kind_name(hf_config)]


def read_config(hf_config: Mapping[str, Any]) -> DrafterConfig:
    """The config of the kind that a config.json describes; UserError if its fields make no drafter."""
    return kind_of(hf_config).module.config_type.from_hf_dict(hf_config)


SETTING_DEFAULTS: dict[str, Any] = {
    field.name: field.default
    for field in fields(DrafterSettings)
    # A configuration names a pruned vocabulary by a file; here it is given as the object.
    if field.default is not MISSING and field.name != "draft_vocabulary"
}
"""Defaults of the kinds' own settings; the schema is the one place that states them."""


def drafter_hf_config(
    target_hf_config: Mapping[str, Any],
    *,
    kind: str = "dspark",
    num_layers: int,
    target_layer_ids: Sequence[int],
    dtype: str = "bfloat16",
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The config.json of a new drafter: a deep copy of the target's text config, common fields, the kind's own.

    A family with its own drafter of this kind gets that one, whose blocks have the target's sizes.

    Args:
        target_hf_config: the target's config.json.
        kind: a name in DRAFTERS.
        num_layers: draft layers.
        target_layer_ids: tapped target layers, 0-based and increasing (docs/algorithm.md, rule 14).
        dtype: of the stored weights.
        intermediate_size, num_attention_heads, num_key_value_heads, head_dim: sizes of the draft layers; None keeps the
            target's.
        settings: go to the kind's `hf_fields`; absent ones have the defaults of `DrafterSettings`.

    Raises:
        UserError: the result is no valid drafter of that target.
    """
    # Checks the target first: a fault in its file must not be reported as the drafter's.
    target = read_target_config(target_hf_config)
    settings = SETTING_DEFAULTS | settings

    if (own := OWN_DRAFTERS.get(f"{target.model_type}_{kind}")) is not None:
        shape = {"num_layers": num_layers, "target_layer_ids": target_layer_ids, "dtype": dtype}
        config_type = own.module.config_type
        config = config_type.native(target_hf_config, **settings | shape)
    else:
        described = drafter_kind(kind)
        config_type = described.module.config_type
        given = {"intermediate_size": intermediate_size, "num_attention_heads": num_attention_heads}
        given |= {"num_key_value_heads": num_key_value_heads, "head_dim": head_dim}
        # Given sizes have the generic names; Gemma's global layers use names of their own.
        copied, sizes = family_fields(target_hf_config, {name: n for name, n in given.items() if n is not None})

        config = _common_fields(copied, described, target.num_layers, num_layers)
        config |= {"target_layer_ids": list(target_layer_ids), "dtype": dtype}
        config[TARGET_SHA_FIELD] = config_sha256(target_hf_config)
        # Sizes last, so that given ones win over both the target's and the kind's.
        config |= config_type.hf_fields(num_layers=num_layers, **settings) | sizes
        if extended(config):
            config["architectures"] = [drafter_family(copied) + described.extension]

    # The file is read back at once: a contradiction is found before anything is trained.
    config_type.from_hf_dict(config).check_target(target)
    return config


def _common_fields(copied: Mapping[str, Any], kind: DrafterKind, target_layers: int, num_layers: int) -> dict[str, Any]:
    """The target's fields `copied`, with those on top that all kinds of drafters share."""
    # Facts about the target's files, not about the drafter's.
    left_out = ("torch_dtype", "_name_or_path", "quantization_config")

    return {name: value for name, value in copied.items() if name not in left_out} | {
        "architectures": [drafter_family(copied) + kind.architecture],
        "num_target_layers": target_layers,
        "num_hidden_layers": num_layers,
        # The frozen copies are stored apart even where the target ties them (docs/algorithm.md, rule 18).
        "tie_word_embeddings": False,
        # Draft layers see all of their context, whatever windows the target has (docs/algorithm.md, rule 25).
        "layer_types": ["full_attention"] * num_layers,
    }


@dataclass(frozen=True)
class Drafter:
    """Static structure beside `params`, a nested dict of arrays passed to jit separately (as in `Target`).

    `name` is the path it was loaded from; `hf_config` its config.json, which saving writes back unchanged.
    """

    name: str
    config: DrafterConfig
    graphdef: nnx.GraphDef = field(repr=False)
    params: dict = field(repr=False)
    hf_config: Mapping[str, Any] = field(repr=False)

    @property
    def target_sha256(self) -> str | None:
        """`config_sha256` of the target it was trained for; None where the file doesn't record it."""
        return self.config.target_sha256

    @cached_property
    def for_rounds(self) -> "Drafter":
        """The same drafter with its matrices as this device's products read them fastest (as in `Target`)."""
        graphdef, params = in_panels(self.graphdef, self.params, self.hf_config)
        return replace(self, graphdef=graphdef, params=params)

    def model(self, params: dict) -> Any:
        """The module (a `protocol.DrafterModel`) over `params`; call it inside the jitted function."""
        return nnx.merge(self.graphdef, params)


def skeleton(hf_config: Mapping[str, Any], config: DrafterConfig | None = None) -> nnx.Module:
    """The module with shapes instead of arrays: for shardings, checkpoints and lowering. Shared by equal
    configurations, so it is only read. `config`: in place of the one that `hf_config` describes."""
    return _skeleton(kind_of(hf_config).module, config or read_config(hf_config))


@lru_cache(maxsize=16)
def _skeleton(module: Any, config: DrafterConfig) -> nnx.Module:
    # A run asks for its drafter's five times and more, and each trace builds the whole module.
    return nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0)))


def new_params(hf_config: Mapping[str, Any], key: jax.Array) -> dict:
    """Fresh float32 parameters: weights N(0, initializer_range), biases 0, norms 1. Traceable."""
    config, kind = read_config(hf_config), kind_of(hf_config)
    return split(kind.module(config, rngs=nnx.Rngs(params=key)))[1]


def new_drafter(name: str, hf_config: Mapping[str, Any], key: jax.Array) -> Drafter:
    """An untrained drafter, on the default device."""
    # The structure comes from shapes alone, the arrays from `new_params`: no second set of random numbers is drawn.
    graphdef, _ = split(skeleton(hf_config))
    # Not jitted: random bits compile slowly on a CPU, and run one by one each shape compiles only once.
    return Drafter(name, read_config(hf_config), graphdef, new_params(hf_config, key), hf_config)


def with_draft_head(hf_config: Mapping[str, Any], params: dict, head: Float[Array, "v d"]) -> dict:
    """`params` with the target's rows in the head of a pruned vocabulary; unchanged where there is none."""
    vocabulary = getattr(read_config(hf_config), "draft_vocabulary", None)
    if vocabulary is None:
        return params
    return {**params, "draft_head_pd": jnp.take(head, vocabulary.ids, axis=0).astype(jnp.float32)}


def with_head_norms(layer: dict, rows: Float[Array, "n d"], head_dim: int, eps: float) -> dict:
    """A target layer without norms of q and k, turned into a draft layer that has them.

    A head norm divides by each row's own root mean square; its weight is set to the root mean square that the layer's
    queries and keys have on `rows` (the layer's inputs, before its input norm), so that scores keep their scale.
    """
    # Measured in float32: a mean of squares loses its small terms in bfloat16.
    wide = rows.astype(jnp.float32)

    # The layer's own input norm, written out, because a target layer's parameters come without their module.
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    normed = normed * layer["input_norm"]["weight"]

    attention = dict(layer["attention"])
    # Values have no norm in a draft layer either, so they need none here.
    for name, weight in (("q_norm", "q_weight_dp"), ("k_norm", "k_weight_dc")):
        # [N, D] -> [N, heads, H]; one scale for all heads, because a head norm's weight [H] is shared by them.
        heads = (normed @ attention[weight]).reshape(len(normed), -1, head_dim)
        scale = jnp.mean(jnp.sqrt(jnp.mean(heads * heads, axis=-1)))
        attention[name] = {"weight": jnp.full(heads.shape[-1:], scale, jnp.float32)}

    return {**layer, "attention": attention}


def graft_target_layers(hf_config: Mapping[str, Any], params: dict, layers: Sequence[dict], final_norm: dict) -> dict:
    """`params` with the draft layers and norms started from the target's: layers[i] becomes draft layer i, by the
    kind's `graft`; every matrix of a layer is by itself. Layers without head norms go through `with_head_norms` first.
    Raises UserError for a kind without `graft`, and if the drafter's sizes are not the target's."""
    # A kind names its own way of copying, since a layer's inputs differ: Eagle3's has an embedding half besides.
    kind = kind_of(hf_config)
    if not hasattr(kind.module, "graft"):
        raise UserError(
            f"A {kind_name(hf_config)} drafter's layers can't start as copies of the target's; leave out "
            "drafter.init_target_layers."
        )

    # Shapes are compared as a whole, after the graft: sizes may differ in heads, width or MLP.
    own, backbone = params, read_config(hf_config).backbone
    params = apart(own, backbone)
    grafted = kind.module.graft(params, layers, final_norm)
    if jax.tree.map(jnp.shape, grafted) != jax.tree.map(jnp.shape, params):
        raise UserError(
            "The draft layers differ from the target's in shape, so they can't start as copies of them; leave out "
            "drafter.init_target_layers, or the overrides of heads and MLP width."
        )

    return together(grafted, backbone, own)
