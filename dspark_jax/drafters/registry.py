"""Kinds of drafters by name, and what a drafter on disk or in memory is: `LoadedDrafter`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

from dspark_jax.drafters.config import DrafterConfig
from dspark_jax.drafters.dspark import DSpark
from dspark_jax.errors import UserError
from dspark_jax.sharding import split


@dataclass(frozen=True)
class DrafterKind:
    """`architecture` is the name in config.json; `module(config, rngs=...)` implements `protocol.Drafter`."""

    architecture: str
    module: type


DRAFTERS: dict[str, DrafterKind] = {"dspark": DrafterKind("Qwen3DSparkModel", DSpark)}


def drafter_kind(name: str) -> DrafterKind:
    if name not in DRAFTERS:
        raise UserError(f"There is no drafter kind {name!r}; expected one of {', '.join(sorted(DRAFTERS))}.")
    return DRAFTERS[name]


def kind_of(hf_config: Mapping[str, Any]) -> DrafterKind:
    """The kind whose architecture a drafter's config.json names."""
    named = hf_config.get("architectures") or []
    for kind in DRAFTERS.values():
        if kind.architecture in named:
            return kind
    known = ", ".join(kind.architecture for kind in DRAFTERS.values())
    raise UserError(f"The drafter's config.json names architectures {named}; expected one of {known}.")


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
