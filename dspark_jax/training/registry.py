"""Objectives by name: `drafters.registry` says which one trains a kind of drafter."""

from collections.abc import Callable, Mapping
from typing import Any

from dspark_jax.drafters.registry import kind_of, read_config, skeleton
from dspark_jax.sharding import split
from dspark_jax.training.objective import BlockObjective, Objective
from dspark_jax.training.rollout import RolloutObjective
from dspark_jax.training.terms import LossOptions

# (graphdef, the drafter's config, LossOptions, compute dtype) -> Objective
OBJECTIVES: dict[str, Callable[..., Objective]] = {"blocks": BlockObjective, "rollout": RolloutObjective}


def make_objective(hf_config: Mapping[str, Any], options: LossOptions, compute_dtype: Any) -> Objective:
    """The objective that trains the drafter of a config.json; UserError for an unknown kind."""
    graphdef, _ = split(skeleton(hf_config))
    return OBJECTIVES[kind_of(hf_config).objective](graphdef, read_config(hf_config), options, compute_dtype)
