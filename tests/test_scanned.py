"""The loop over a target's stacked layers, on meshes that store its parameters in parts."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dspark_jax.checkpoints.huggingface import abstract_target
from dspark_jax.sharding import ShardingRules, abstract_mesh
from dspark_jax.targets.registry import read_target_config
from dspark_jax.targets.scanned import LayerLoop, period_of
from tests.drafters_tiny import target_hf_config
from tests.families_tiny import GEMMA, MOE


def test_layers_repeat_after_their_period() -> None:
    qwen, gemma = read_target_config(target_hf_config(num_hidden_layers=5)), read_target_config(GEMMA)
    assert (period_of(qwen), period_of(gemma)) == (1, 2)
    # Another last layer leaves nothing to repeat.
    assert period_of(replace(gemma, layers=(*gemma.layers[:3], gemma.layers[0]))) == 4


def test_a_loop_only_where_layers_are_gathered() -> None:
    def loop(hf_config: dict, fsdp: int) -> LayerLoop | None:
        config = read_target_config(hf_config)
        return LayerLoop.of(config, abstract_target(config, "float32", abstract_mesh(4, -1, fsdp))[1], ShardingRules())

    qwen = target_hf_config(num_hidden_layers=4)
    assert loop(qwen, 4) is not None and loop(qwen, 1) is None
    assert loop(MOE, 4) is None


@pytest.mark.subprocesses
def test_states_on_four_devices_are_those_of_one() -> None:
    """Of both families, in a process of its own; gathers are of single layers."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharded_target"], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
