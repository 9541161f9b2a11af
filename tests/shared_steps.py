"""Runs of equal steps in one process share the step: what a second run of it would trace and compile again.

Files with runs of `train.fit` in this process ask for it by `pytest.mark.usefixtures("shared_steps")`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import pytest

from dspark_jax import native
from dspark_jax.config.cli import to_json
from dspark_jax.config.schema import TrainConfig
from dspark_jax.sharding import AnyMesh
from dspark_jax.targets.target import Target
from dspark_jax.training.spec import StepSpec, micro_batches
from dspark_jax.training.states import TargetStates
from dspark_jax.training.step import TrainStep

OF_THE_STEP = ("drafter", "loss", "optimizer", "compute_dtype", "anchor_chunk", "vocabulary_chunk", "mesh")
_specs: dict[str, StepSpec] = {}
_steps: dict[tuple, TrainStep] = {}


def key_of(config: TrainConfig, target: Target, mesh: AnyMesh, total_steps: int) -> str | None:
    """Everything that a step is made of; None where that stands in a file, or of devices that are not here."""
    if config.drafter.draft_vocabulary or not isinstance(mesh, jax.sharding.Mesh):
        return None
    settings = to_json(config)
    settings["drafter"] = {n: x for n, x in settings["drafter"].items() if not n.startswith("init_")}  # the first state
    parts = [settings[name] for name in OF_THE_STEP], micro_batches(config.data, mesh), total_steps, native.ready()
    devices = dict(mesh.shape), [device.id for device in mesh.devices.flat]
    return json.dumps([parts, devices, target.hf_config, getattr(target.tokenizer, "mask_token_id", None)])


@contextmanager
def sharing() -> Iterator[None]:
    plain, make = StepSpec.of, StepSpec.step

    def of(cls: type, config: TrainConfig, target: Target, mesh: AnyMesh, total_steps: int) -> StepSpec:
        key = key_of(config, target, mesh, total_steps)
        if key is None:
            return plain(config, target, mesh, total_steps)
        if key not in _specs:
            _specs[key] = plain(config, target, mesh, total_steps)
        return _specs[key]

    def step(self: StepSpec, states: Any = None, record: bool = False, objective: Any = None) -> TrainStep:
        codec = (states.codec, states.layer_ids) if isinstance(states, TargetStates) else None
        if objective is not None or all(self is not one for one in _specs.values()):
            return make(self, states, record, objective)
        key = id(self), type(states), codec, record
        if key not in _steps:
            _steps[key] = make(self, states, record)
        return _steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepSpec, "of", classmethod(of))
        patch.setattr(StepSpec, "step", step)
        yield
