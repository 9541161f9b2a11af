"""`Target`: a frozen model with all that a drafter, a cache or a decode loop needs to know about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flax import nnx

from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.decoder import TargetModel
from dspark_jax.targets.panels import in_panels


@dataclass(frozen=True)
class Target:
    """Static structure (`graphdef`, config) beside `params`, a nested dict of arrays passed to jit separately.

    `name` is the path or hub id it was loaded from, `config_sha256` the identity that caches and drafters record.
    `known_tokens`: ids below it are the tokenizer's, ids from it on pad the vocabulary (docs/algorithm.md, rule 106);
    None without a tokenizer. `folder`: where its files are, None for a target made in memory.
    """

    name: str
    config: TargetConfig
    graphdef: nnx.GraphDef = field(repr=False)
    params: dict = field(repr=False)
    hf_config: Mapping[str, Any] = field(repr=False)
    config_sha256: str
    stop_tokens: tuple[int, ...] = ()
    tokenizer: Any = field(default=None, repr=False)
    known_tokens: int | None = None
    folder: Path | None = None

    @cached_property
    def for_rounds(self) -> "Target":
        """The same model with its matrices as this device's products read them fastest; kept for every engine."""
        graphdef, params = in_panels(self.graphdef, self.params, self.hf_config)
        return replace(self, graphdef=graphdef, params=params)

    def model(self, params: dict) -> TargetModel:
        """The module over `params`; call it inside the jitted function, so that weights are not constants."""
        return nnx.merge(self.graphdef, params)
