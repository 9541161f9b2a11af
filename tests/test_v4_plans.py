"""Plans of DeepSeek-V4's published pairs: what a chip holds, and the depths that are compiled."""

import json
from pathlib import Path

import pytest

from dspark_jax.checkpoints.deepseek_v4_published import published_tensors
from dspark_jax.errors import UserError
from dspark_jax.planning.published_targets import PUBLISHED
from dspark_jax.planning.v4_plans import DEPTHS, MACHINES, Machine, counted, shallow
from dspark_jax.targets.deepseek_v4.config import v4_config
from infer.studies import v4_plans

FLASH = PUBLISHED["deepseek-ai/DeepSeek-V4-Flash-DSpark"]


def test_one_chip_would_hold_the_published_bytes() -> None:
    """Codes and scales as in the files, tables of ids in half their bytes; main_proj alone is widened."""
    found = counted("Flash-DSpark", Machine("one", 1, 0, "data=1"), 1, 4096)
    tensors = published_tensors(FLASH, "dspark")
    halved = sum(t.nbytes / 2 for name, t in tensors.items() if name.endswith("tid2eid"))
    stored = sum(t.nbytes for t in tensors.values()) - halved
    wider = tensors["mtp.0.main_proj.weight"].nbytes - tensors["mtp.0.main_proj.scale"].nbytes
    # The confidence head is float32 in memory.
    wider += tensors["mtp.2.confidence_head.proj.weight"].nbytes
    assert (found["target"] + found["drafter"]) * 2**30 == pytest.approx(stored + wider, abs=1)


def test_chips_share_the_weights_and_all_fit() -> None:
    whole = counted("Flash-DSpark", Machine("one", 1, 0, "data=1"), 8, 4096)
    for machine in MACHINES["Flash-DSpark"]:
        # Topologies need the TPU compiler; the same mesh of abstract devices lays arrays alike.
        held = counted("Flash-DSpark", Machine(machine.name, machine.chips, machine.memory_gib, machine.mesh), 8, 4096)
        assert whole["target"] / machine.chips < held["target"] < 1.4 * whole["target"] / machine.chips + 1
        assert sum(held.values()) < machine.memory_gib, machine


@pytest.mark.parametrize("repository", list(DEPTHS))
def test_the_shallow_model_has_every_kind_of_layer(repository: str) -> None:
    whole = v4_config(PUBLISHED[f"deepseek-ai/DeepSeek-V4-{repository}"])
    cut = v4_config(shallow(PUBLISHED[f"deepseek-ai/DeepSeek-V4-{repository}"], DEPTHS[repository]))
    assert {layer.ratio for layer in cut.layers} == {layer.ratio for layer in whole.layers}
    assert {layer.hashed for layer in cut.layers} == {True, False}
    assert cut.drafter_blocks == whole.drafter_blocks == 3


def test_the_study_keeps_earlier_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plans.json"
    file.write_text(json.dumps({"earlier": json.loads(_PLAN)}))
    words = ["--results", str(file), "--repository", "Flash-DSpark", "--machines", "8 x H200", "--slots", "8"]
    v4_plans.main(words)
    assert list(json.loads(file.read_text())) == ["earlier", "Flash-DSpark on 8 x H200, R = 8"]
    assert "of 141" in capsys.readouterr().out


_PLAN = """{"memory_gib": 95, "mesh": "tensor=4", "counted_gib": {"target": 1, "drafter": 1, "state": 1},
"by_layers": {"4": {"copies": 0}}, "whole_depth": {"temporary": 1, "collectives": 9, "collective_mib": 2,
"compile_cpu_seconds": 7}}"""


def test_unknown_machines_get_a_sentence() -> None:
    with pytest.raises(UserError, match="plans are made for 8 x H200, v5e:8x8"):
        v4_plans.checked(("9 x H200",))
