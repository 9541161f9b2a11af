"""The configs of V4's drafters: the target's own config.json, which holds their fields (docs/algorithm.md, rule 93)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from dspark_jax.drafters.config import TARGET_SHA_FIELD, WHERE, BlockConfig, DSparkConfig
from dspark_jax.errors import UserError
from dspark_jax.readers import Schema, check_fields, integer, list_of
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.deepseek_v4.config import V4Config
from dspark_jax.targets.registry import read_target_config

ARCHITECTURES = {"dspark": "DeepseekV4DSparkModel", "mtp": "DeepseekV4MTPModel"}
# The fields of DSpark's module in the target's config.json.
_DSPARK_FIELDS: Schema = {
    "dspark_block_size": integer(1, 1 << 16),
    "dspark_markov_rank": integer(1, 1 << 20),
    "dspark_noise_token_id": integer(),
    "dspark_target_layer_ids": list_of(integer(-1, 1024), least=1),
}
# Fields about the storage of the published weights, which a new drafter's weights do not share.
_STORED_FORM = ("quantization_config", "expert_dtype", "dtype", "torch_dtype")
# Added by this project; a published config.json has none of them.
_OURS = ("architectures", "num_anchors", TARGET_SHA_FIELD)


def native_config(target_hf_config: Mapping[str, Any], kind: str, **fields: Any) -> dict[str, Any]:
    """The config of a drafter of this kind in the files of the target with this config.json."""
    # The hash is the target's, so it must not depend on the fields that are added here.
    described = {key: value for key, value in target_hf_config.items() if key not in _OURS}
    made = {"architectures": [ARCHITECTURES[kind]], "num_anchors": 512, **fields}
    return described | made | {TARGET_SHA_FIELD: config_sha256(described)}


def target_config_of(native: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that a published folder has for `native`, without the fields that this project adds."""
    return {key: value for key, value in native.items() if key not in _OURS}


def _trained(target_hf_config: Mapping[str, Any], kind: str, blocks: int, **fields: Any) -> dict[str, Any]:
    """The config of a drafter to be trained, with `blocks` blocks, for the target with this config.json."""
    target = cast(V4Config, read_target_config(target_hf_config))
    kept = {name: value for name, value in target_hf_config.items() if name not in _STORED_FORM}
    # Drafter blocks are counted by the 0s past the layers' ratios, so new ones are announced there.

    ratios = [*(layer.ratio for layer in target.layers), *[0] * blocks]
    native = native_config(kept | {"compress_ratios": ratios} | fields, kind, num_anchors=fields["num_anchors"])

    return native | {TARGET_SHA_FIELD: config_sha256(target_hf_config)}


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that both kinds take from the target's config."""
    backbone = read_target_config(config, WHERE)
    return {
        "backbone": backbone,
        "num_target_layers": backbone.num_layers,
        "target_sha256": config.get(TARGET_SHA_FIELD),
        "num_anchors": config["num_anchors"],
    }


@dataclass(frozen=True)
class V4DSparkConfig(DSparkConfig):
    """A DSpark module with as many stages as the config has blocks past its layers."""

    @property
    def dims(self) -> V4Config:
        """The target's config, with V4's fields."""
        return cast(V4Config, self.backbone)

    @classmethod
    def read_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        check_fields(config, _DSPARK_FIELDS, WHERE)
        return _common(config) | {
            "block_size": config["dspark_block_size"],
            "target_layer_ids": tuple(config["dspark_target_layer_ids"]),
            "mask_token_id": config["dspark_noise_token_id"],
            "markov_rank": config["dspark_markov_rank"],
            # Published modules have one form of heads, so the file names none of these choices.
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
            "sample_from_anchor": True,
            "draft_vocabulary": None,
        }

    @classmethod
    def native(
        cls, target_hf_config: Mapping[str, Any], *, num_layers: int, target_layer_ids: Sequence[int], dtype: str,
        block_size: int, markov_rank: int, mask_token_id: int | None, num_anchors: int, **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """The config of a new module of `num_layers` stages; settings that do not concern it are ignored."""
        # A target that shipped with a drafter names the token that one was trained with.
        noise = target_hf_config.get("dspark_noise_token_id") if mask_token_id is None else mask_token_id

        if noise is None:
            raise UserError("The drafter has no noise token; name an unused token with --drafter.mask-token-id.")

        return _trained(
            target_hf_config,
            "dspark",
            num_layers,
            dspark_block_size=block_size,
            dspark_noise_token_id=noise,
            dspark_target_layer_ids=list(target_layer_ids),
            dspark_markov_rank=markov_rank,
            num_anchors=num_anchors,
            torch_dtype=dtype,
        )

    @property
    def last_tap(self) -> int:
        """The target's last layer: taps are means over streams, to which no norm was applied (unlike rule 15's)."""
        return self.num_target_layers - 1

    def check_taps(self) -> None:
        # In any order, since features are concatenated in the file's.
        ids = self.target_layer_ids
        if not ids or len(set(ids)) < len(ids) or min(ids) < -1 or max(ids) > self.last_tap:
            raise UserError(
                f"config.json has dspark_target_layer_ids {list(ids)}; expected different 0-based layers from -1 "
                f"(embeddings) to {self.last_tap}; copy the file again."
            )

    def check(self) -> None:
        super().check()
        if self.dims.drafter_blocks < 1:
            raise UserError(
                f"config.json has compress_ratios for its {self.num_target_layers} layers alone; a DSpark module needs "
                "one 0 more for each of its stages; copy the file again."
            )

        # An index out of range is no error in a compiled gather, and would spoil the drafts without a word.
        if not 0 <= self.mask_token_id < self.backbone.vocab_size:
            raise UserError(
                f"config.json has dspark_noise_token_id {self.mask_token_id}; expected a token below "
                f"{self.backbone.vocab_size}; copy the file again."
            )


@dataclass(frozen=True)
class V4MTPConfig(BlockConfig):
    """One draft token from the target's streams, tapped under the ids past its last layer."""

    @property
    def dims(self) -> V4Config:
        """The target's config, with V4's fields."""
        return cast(V4Config, self.backbone)

    @classmethod
    def read_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        common = _common(config)
        backbone = common["backbone"]
        return common | {"block_size": 1, "target_layer_ids": tuple(range(backbone.num_layers, backbone.tap_limit))}

    @classmethod
    def native(
        cls, target_hf_config: Mapping[str, Any], *, num_layers: int, target_layer_ids: Sequence[int], dtype: str,
        num_anchors: int, **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """The config of a new block; `num_layers` and `target_layer_ids` are fixed for it and ignored."""
        return _trained(target_hf_config, "mtp", 1, num_anchors=num_anchors, torch_dtype=dtype)

    @property
    def last_tap(self) -> int:
        """The last stream's id."""
        return self.dims.tap_limit - 1
