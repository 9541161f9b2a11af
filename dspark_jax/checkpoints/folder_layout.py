"""The interface of a layout of drafter folders: its config.json and tensor names, translated to DeepSpec's and back.

DeepSpec's own layout is the common form: `DrafterConfig` reads its config, parameters map to its tensors.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from dspark_jax.drafters.config import drafter_family
from dspark_jax.drafters.registry import kind_name
from dspark_jax.errors import UserError
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.target import Target

Config = Mapping[str, Any]
CONFIG_FILE = "config.json"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
DRAFT_HEAD = "draft_head.weight"  # of a pruned draft vocabulary: the target's rows for it
ANCHORS = 512  # what DeepSpec trains with; other layouts needn't say


class FolderLayout(Protocol):
    """`to_native(from_native(config))` is `config` again, for every drafter that the layout can hold."""

    @property
    def name(self) -> str: ...

    @property
    def layer_id_base(self) -> int:
        """Added to a 0-based layer id where it is stored."""
        ...

    @property
    def vocabulary_maps(self) -> bool:
        """Its readers know `d2t` and `t2d`, tables between draft and target ids."""
        ...

    def detects(self, stored: Config) -> bool:
        """True when this config.json is of this layout."""
        ...

    def to_native(self, stored: Config, target: TargetConfig) -> dict[str, Any]:
        """DeepSpec's config.json; UserError for what no drafter here can be. `target` fills in what isn't stored."""
        ...

    def from_native(self, native: Config, target: Target) -> dict[str, Any]:
        """This layout's config.json; UserError for a drafter that its readers would misread."""
        ...

    def tensor(self, name: str, native: Config) -> str:
        """The stored name of DeepSpec's tensor `name`."""
        ...

    def frozen(self, native: Config) -> tuple[str, ...]:
        """Which copies of the target's tables its readers expect."""
        ...


def require_kind(native: Config, layout: str) -> str:
    """The kind, if the layout has a place for it."""
    kind = kind_name(native)
    if kind not in ("dspark", "dflash", "eagle3"):
        raise UserError(
            f"The {layout} layout has no place for a drafter of kind {kind}; it holds DSpark, DFlash and Eagle3. "
            "Write it in the deepspec layout."
        )
    return kind


def native_architecture(fields: Config, kind: str) -> str:
    """DeepSpec's name of a kind over draft layers with this model_type; UserError for layers it has none for."""
    model_type = str(fields.get("model_type"))
    if model_type != "qwen3" and not model_type.startswith("gemma4"):
        raise UserError(
            f"The drafter's layers are of model_type {model_type!r}; drafters here are made of 'qwen3' or Gemma 4 "
            "layers. Give a drafter that was trained with those."
        )
    return drafter_family(fields) + ("Eagle3Model" if kind == "eagle3" else "DSparkModel")


def refuse_fields(fields: Config, refused: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """UserError where a field that is there has a value other than the named ones, which change nothing."""
    for name, harmless in refused.items():
        if name in fields and fields[name] not in harmless:
            raise UserError(
                f"The drafter's {where} has {name} = {fields[name]!r}, which drafters here do not compute (only "
                f"{' or '.join(repr(value) for value in harmless)}); give a drafter without it."
            )
