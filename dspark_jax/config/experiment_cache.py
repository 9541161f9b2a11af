"""The target cache that an experiment trains on, read off its configuration. Importing this loads no jax."""

import dataclasses
from typing import Literal

from dspark_jax.config.schema import TrainConfig


@dataclasses.dataclass(frozen=True)
class ExperimentCache:
    """The target cache that an experiment trains on, as far as its configuration says."""

    target: str
    """Folder or hub id of the target."""
    layer_ids: tuple[int, ...]
    """Target layers to tap, ascending, counted from 0; -1 is the embedding output."""
    max_length: int
    """Tokens that a conversation is cut to."""
    min_loss_tokens: int
    """Conversations with fewer supervised tokens after the cut are dropped."""
    codec: Literal["bfloat16", "float32", "float8_e4m3", "int8"]
    """How hidden states are stored."""
    folder: str
    """The cache's folder; empty where the configuration names none."""
    conversations: str
    """File of conversations; empty where the configuration names none."""


def cache_spec_of(config: TrainConfig) -> ExperimentCache:
    """The cache of an experiment, so that `train.build_cache --config NAME` needs none of it typed again."""
    data = config.data
    return ExperimentCache(
        target=config.target,
        layer_ids=config.drafter.target_layer_ids,
        max_length=data.max_length,
        min_loss_tokens=data.min_loss_tokens,
        codec=data.codec,
        folder=data.cache,
        conversations=data.conversations,
    )
