"""Plans of DeepSeek-V4's published pairs: what a chip holds, and the depths that are compiled."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dspark_jax.checkpoints.deepseek_v4_published import published_tensors
from dspark_jax.errors import UserError
from dspark_jax.planning import v4_plans as planning
from dspark_jax.planning.decoding import bytes_of
from dspark_jax.planning.published_targets import PUBLISHED
from dspark_jax.planning.v4_plans import (
    DEPTHS,
    MACHINES,
    Machine,
    carried_on,
    compiled_figures,
    counted,
    plan_of,
    shallow,
    step_arguments,
    widened_experts,
)
from dspark_jax.sharding import make_mesh
from dspark_jax.targets.deepseek_v4.config import v4_config
from infer.studies import v4_plans
from tests.v4_tiny import v4_hf_config

FLASH = PUBLISHED["deepseek-ai/DeepSeek-V4-Flash-DSpark"]
ONE = Machine("one", 1, 0, "data=1", "")


def test_one_chip_would_hold_the_published_bytes() -> None:
    """Codes and scales as in the files, tables of ids in half their bytes; main_proj alone is widened."""
    found = counted("Flash-DSpark", ONE, 1, 4096)
    tensors = published_tensors(FLASH, "dspark")
    halved = sum(t.nbytes / 2 for name, t in tensors.items() if name.endswith("tid2eid"))
    stored = sum(t.nbytes for t in tensors.values()) - halved
    wider = tensors["mtp.0.main_proj.weight"].nbytes - tensors["mtp.0.main_proj.scale"].nbytes
    # The confidence head is float32 in memory.
    wider += tensors["mtp.2.confidence_head.proj.weight"].nbytes
    assert (found["target"] + found["drafter"]) * 2**30 == pytest.approx(stored + wider, abs=1)


def test_chips_share_the_weights_and_all_fit() -> None:
    whole = counted("Flash-DSpark", ONE, 8, 4096)
    for machine in MACHINES["Flash-DSpark"]:
        held = counted("Flash-DSpark", machine, 8, 4096)
        assert whole["target"] / machine.chips < held["target"] < 1.4 * whole["target"] / machine.chips + 1
        assert sum(held.values()) < machine.memory_gib, machine


@pytest.mark.parametrize("repository", list(DEPTHS))
def test_the_shallow_model_has_every_kind_of_layer(repository: str) -> None:
    """And all that choose by token id: what the two depths differ by must be what the missing layers are."""
    whole = v4_config(PUBLISHED[f"deepseek-ai/DeepSeek-V4-{repository}"])
    for depth in DEPTHS[repository]:
        cut = v4_config(shallow(PUBLISHED[f"deepseek-ai/DeepSeek-V4-{repository}"], depth))
        assert {layer.ratio for layer in cut.layers} == {layer.ratio for layer in whole.layers}
        assert [layer.hashed for layer in cut.layers].count(True) == [layer.hashed for layer in whole.layers].count(
            True
        )
        assert cut.drafter_blocks == whole.drafter_blocks == 3


def test_the_planned_loop_is_the_one_that_an_engine_dispatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slot verifies its whole block in the one bucket, codes are held as stored, and what is counted from shapes
    is what the loop is given; a compiler has figures for it."""
    quantised = {"quantization_config": {"quant_method": "fp8"}, "expert_dtype": "fp4"}
    tiny = v4_hf_config(hidden_size=64, moe_intermediate_size=64, dspark_markov_rank=64, **quantised)
    monkeypatch.setitem(PUBLISHED, "deepseek-ai/DeepSeek-V4-tiny", tiny)
    monkeypatch.setattr(planning, "topology_mesh", lambda topology, *sizes: make_mesh(*sizes))
    plan, held = plan_of(tiny, ONE, 2, 40), counted("tiny", ONE, 2, 40)

    assert (plan.loop.requests, plan.loop.block, plan.loop.buckets) == (2, 3, (8,)) and plan.drafter is not None
    given = {"target": plan.params.target, "drafter": plan.params.drafter, "state": plan.state.target_cache}
    assert held["target"] == bytes_of(given["target"]) / 2**30 and held["drafter"] == bytes_of(given["drafter"]) / 2**30
    # An engine rounds the positions of a slot up; what is counted has room for that.
    assert 0.5 * held["state"] < bytes_of(given["state"]) / 2**30 <= held["state"]
    for part in ("target", "drafter"):
        assert {"float8_e4m3fn", "int8"} <= {leaf.dtype.name for leaf in jax.tree.leaves(given[part])}

    found = compiled_figures("tiny", ONE, 2, 40, 2)
    assert found["temporary_gib"] > 0 and found["compile_cpu_seconds"] > 0 and found["collectives"] == {}


def test_the_whole_depth_goes_on_as_the_compiled_layers_do() -> None:
    """From 4 and 6 layers to Flash's 43: 19 pairs and a half more."""
    found = carried_on(MADE, 43)
    assert found["temporary_gib"] == pytest.approx(0.5 + 19.5 * 0.01)
    assert found["collectives"] == {"all-gather": [1, 0], "all-reduce": [10 + 39 * 2, round(5 + 19.5 * 0.5)]}
    assert found["copies"] == 2 and found["compile_cpu_seconds"] == 7 + 19.5 * 2

    # Measured beside others, the deeper one may have taken less: no line leads from there to the whole depth.
    less = {"4": MADE["4"] | {"compile_cpu_seconds": 9.5}, "6": MADE["6"]}
    assert carried_on(less, 43)["compile_cpu_seconds"] == 9.5


MADE = {
    "4": {"temporary_gib": 0.5, "collectives": {"all-reduce": [10, 5.0], "all-gather": [1, 0.1]}, "copies": 0,
          "compile_cpu_seconds": 7.0},
    "6": {"temporary_gib": 0.51, "collectives": {"all-reduce": [14, 5.5], "all-gather": [1, 0.1]}, "copies": 2,
          "compile_cpu_seconds": 9.0},
}  # fmt: skip


def test_the_study_goes_on_where_it_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A depth that the file has is not compiled again, one that is no longer taken is dropped; a program that does not
    compile leaves the counted row."""
    file, asked = tmp_path / "plans.json", []

    def compiled(repository: str, machine: Machine, slots: int, longest: int, layers: int) -> dict:
        asked.append((machine.name, slots, layers))
        if machine.name != "v5p:2x2x1":
            raise UserError("No compiler.")
        return MADE[str(layers)]

    monkeypatch.setattr(v4_plans, "compiled_figures", compiled)
    key = "Flash-DSpark on v5p:2x2x1, R = 8"
    # Three layers were compiled when other depths were taken.
    file.write_text(
        json.dumps({key: {"made": {"3": MADE["4"], "4": MADE["4"]}, "whole_depth": {"temporary_gib": 9.0}}})
    )
    words = ["--results", str(file), "--repository", "Flash-DSpark", "--machines", "v5p:2x2x1", "8 x H200"]
    v4_plans.main([*words, "--slots", "8", "--parts", "loop"])
    assert asked == [("v5p:2x2x1", 8, 6), ("8 x H200", 8, 4)]
    found = json.loads(file.read_text())
    assert found[key]["whole_depth"]["collectives"]["all-reduce"][0] == 88
    assert "whole_depth" not in found["Flash-DSpark on 8 x H200, R = 8"]
    printed = capsys.readouterr().out
    assert "8 x H200, R = 8: No compiler." in printed and "all-reduce 88 (15 MiB)" in printed
    assert "of 141" in printed

    v4_plans.main([*words[:4], "--machines", "v5p:2x2x1", "--slots", "8", "--parts", "loop", "--longest", "2048"])
    assert asked[2:] == [("v5p:2x2x1", 8, 4), ("v5p:2x2x1", 8, 6)], "programs of another length"

    laid_anew = replace(MACHINES["Flash-DSpark"][0], mesh="expert=4")
    monkeypatch.setitem(MACHINES, "Flash-DSpark", (laid_anew,))
    v4_plans.main([*words[:4], "--slots", "8", "--parts", "loop", "--longest", "2048"])
    assert asked[4:] == asked[2:4], "programs of another mesh"
    assert json.loads(file.read_text())[key]["mesh"] == "expert=4"


def test_plans_are_listed_by_machine_and_those_that_do_not_fit_named() -> None:
    held = {"target": 10.0, "drafter": 1.0, "state": 0.5}
    fits = {"made": {}, "memory_gib": 16, "counted_gib": held}
    step = {"made": {}, "memory_gib": 95, "whole_depth": {"arguments_gib": 90.0, "temporary_gib": 6.04}}
    plans = {
        "Pro-DSpark on v5p:4x4x2, step": step,
        "Flash-DSpark on v5e:8x8, R = 64": fits | {"whole_depth": {"temporary_gib": 5.0}},
        "Flash-DSpark on v5e:8x8, R = 8": fits,
        "Flash-DSpark on v5p:2x2x1, step": {"made": {}, "memory_gib": 95, "refused": "The step does not fit: Used 1."},
        "Flash-DSpark on v6e:4x4, step": {"made": {}, "memory_gib": 32, "arguments_gib": 50.0},
    }
    ordered = v4_plans.in_order(plans)
    assert list(ordered) == [list(plans)[i] for i in (3, 4, 2, 1, 0)]
    assert v4_plans.too_large(ordered) == [
        "Flash-DSpark on v5p:2x2x1, step: The step does not fit: Used 1.",
        "Flash-DSpark on v6e:4x4, step: does not fit, as state and batch alone take 50.0 GiB of a chip of 32.",
        "Flash-DSpark on v5e:8x8, R = 64: does not fit, as a chip of 16 GiB would have to hold 16.5.",
        "Pro-DSpark on v5p:4x4x2, step: does not fit, as a chip of 95 GiB would have to hold 96.0.",
    ]


def test_a_step_that_a_chip_could_not_even_be_given_is_not_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """State and batch are counted as the compiler counts them: 98.8 GiB of each of 8 devices for Flash's module, of
    which the batch, whole on every device, takes 64."""
    given = step_arguments(v4_plans.step_config("Flash-DSpark"), MACHINES["Flash-DSpark"][3])
    assert given == pytest.approx(98.78, abs=0.05)
    monkeypatch.setattr(v4_plans, "step_figures", lambda *sizes: pytest.fail("compiled"))
    monkeypatch.setattr(v4_plans, "step_arguments", lambda config, machine: 100.0)
    v4_plans.main(
        [
            "--results",
            str(tmp_path / "plans.json"),
            "--repository",
            "Flash-DSpark",
            "--machines",
            "v6e:4x4",
            "--parts",
            "step",
        ]
    )
    assert (
        "v6e:4x4, step: does not fit, as state and batch alone take 100.0 GiB of a chip of 32."
        in capsys.readouterr().out
    )


def test_a_layer_of_widened_experts() -> None:
    assert widened_experts("Flash-DSpark", ONE) == 256 * 3 * 4096 * 2048 * 2 / 2**30
    assert widened_experts("Flash-DSpark", MACHINES["Flash-DSpark"][1]) == 12 / 16


def test_unknown_machines_get_a_sentence() -> None:
    with pytest.raises(UserError, match="plans are made for 8 x H200, v5e:8x8"):
        v4_plans.checked(("9 x H200",))
