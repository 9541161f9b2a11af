"""Kinds of drafters by name, and what a drafter on disk or in memory is: `LoadedDrafter`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dspark_jax.drafters.config import FAMILIES, DrafterConfig
from dspark_jax.drafters.dspark import DSpark
from dspark_jax.errors import UserError
from dspark_jax.sharding import split


@dataclass(frozen=True)
class DrafterKind:
    """`architecture` is the name in config.json without the family's prefix (`Qwen3DSparkModel`);
    `module(config, rngs=...)` implements `protocol.Drafter`."""

    architecture: str
    module: type


DRAFTERS: dict[str, DrafterKind] = {"dspark": DrafterKind("DSparkModel", DSpark)}


def drafter_kind(name: str) -> DrafterKind:
    if name not in DRAFTERS:
        raise UserError(f"There is no drafter kind {name!r}; expected one of {', '.join(sorted(DRAFTERS))}.")
    return DRAFTERS[name]


def kind_of(hf_config: Mapping[str, Any]) -> DrafterKind:
    """The kind whose architecture a drafter's config.json names."""
    named = hf_config.get("architectures") or []
    known = {family + kind.architecture: kind for kind in DRAFTERS.values() for family in FAMILIES}
    for name in named:
        if name in known:
            return known[name]
    raise UserError(f"The drafter's config.json names architectures {named}; expected one of {', '.join(known)}.")


@dataclass(frozen=True)
class LoadedDrafter:
    """Static structure beside `params`, a nested dict of arrays that travels through jit apart (as `Target` is).

    `name` is the path it was loaded from; `hf_config` its config.json, written back unchanged when it is saved.
    """

    name: str
    config: DrafterConfig
    graphdef: nnx.GraphDef = field(repr=False)
    params: dict = field(repr=False)
    hf_config: Mapping[str, Any] = field(repr=False)

    @property
    def target_sha256(self) -> str | None:
        """`config_sha256` of the target it was trained for, None where the file doesn't record it."""
        return self.config.target_sha256

    def model(self, params: dict) -> Any:
        """The module (a `protocol.Drafter`) over `params`; call it inside the jitted function."""
        return nnx.merge(self.graphdef, params)


def skeleton(hf_config: Mapping[str, Any]) -> nnx.Module:
    """The module with shapes instead of arrays: for shardings, checkpoints and lowering."""
    config, kind = DrafterConfig.from_hf_dict(hf_config), kind_of(hf_config)
    return nnx.eval_shape(lambda: kind.module(config, rngs=nnx.Rngs(0)))


def new_params(hf_config: Mapping[str, Any], key: jax.Array) -> dict:
    """Fresh float32 parameters: weights N(0, initializer_range), biases 0, norms 1 (golden/NOTES 30). Traceable."""
    config, kind = DrafterConfig.from_hf_dict(hf_config), kind_of(hf_config)
    return split(kind.module(config, rngs=nnx.Rngs(params=key)))[1]


def new_drafter(name: str, hf_config: Mapping[str, Any], key: jax.Array) -> LoadedDrafter:
    """An untrained drafter, on the default device."""
    graphdef, _ = split(skeleton(hf_config))
    # Not jitted: random bits compile slowly on a CPU, and one by one each shape compiles once.
    return LoadedDrafter(name, DrafterConfig.from_hf_dict(hf_config), graphdef, new_params(hf_config, key), hf_config)


def graft_target_layers(params: dict, layers: Sequence[dict], final_norm: dict) -> dict:
    """`params` with its draft layers and norms replaced by the target's: layers[i] becomes draft layer i.

    W_c keeps half of its noise and passes the last tap through, so that the layers' K/V see what they were trained on.
    Raises UserError when the drafter's dimensions are not the target's.
    """
    backbone = dict(params["backbone"])
    fresh = backbone["layers"]
    for i, layer in enumerate(layers):
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (layer, fresh[i])]
        if shapes[0] != shapes[1]:
            raise UserError(
                "The draft layers differ from the target's in shape, so they can't start as copies of them; leave out "
                "drafter.init_target_layers, or the overrides of heads and MLP width."
            )
    weight = backbone["fc"]["weight_io"]
    size = weight.shape[1]
    backbone["layers"] = dict(enumerate(layers))
    backbone["norm"] = final_norm
    backbone["hidden_norm"] = layers[0]["input_norm"]
    backbone["fc"] = {"weight_io": (0.5 * weight).at[-size:].add(jnp.eye(size, dtype=weight.dtype))}
    return {**params, "backbone": backbone}
