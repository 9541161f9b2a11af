"""infer.plan: the decode loop compiled from shapes alone, and that it is the loop which an engine runs."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dspark_jax import native
from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.drafters import heads, turns
from dspark_jax.drafters.registry import drafter_hf_config, new_drafter
from dspark_jax.errors import UserError
from dspark_jax.planning.ahead import EnginePrograms
from dspark_jax.planning.decoding import DecodePlan, PlanOptions
from dspark_jax.planning.gpus import GPUS
from dspark_jax.planning.kernels import RoundKernels, captured, round_kernels
from dspark_jax.planning.rounds import Exchanged, LoopText
from dspark_jax.roofline.hardware import known_device
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.settings import EngineConfig, policy_named
from infer import plan as program
from infer.studies.compiled import merged
from tests.tiny import write_tiny_target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A target and a drafter; the plans below find no weights, only the configs."""
    folder: Path = tmp_path_factory.mktemp("plan")
    target = load_target(write_tiny_target(folder / "target"))
    config = drafter_hf_config(
        target.hf_config, num_layers=1, target_layer_ids=(-1, 0), mask_token_id=3, markov_rank=8, block_size=3
    )  # fmt: skip
    save_drafter(folder / "drafter", new_drafter("new", config, jax.random.key(0)), target)
    return str(folder / "target"), str(folder / "drafter")


def options(folders: tuple[str, str], **given: object) -> PlanOptions:
    made = {"target": folders[0], "drafter": folders[1], "slots": 3, "longest": 100, "dtype": "float32"}
    return PlanOptions(**made | given)


@pytest.mark.parametrize("policy", ["fixed", "look-ahead"])
def test_the_plan_is_of_the_engines_loop(folders: tuple[str, str], policy: str) -> None:
    plan = DecodePlan.of(options(folders, policy=policy))
    target = load_target(folders[0], dtype="float32")
    drafter = load_drafter(folders[1], target, dtype="float32")
    config = EngineConfig(3, 100, stop_slots=len(target.stop_tokens))
    engine = Engine(target, drafter, config, strategy=policy_named(policy), tables=tables_for(plan))
    assert plan.loop == engine.loop

    def shapes(tree: object) -> list[tuple]:
        return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]

    assert shapes(plan.params) == shapes(engine.params) and shapes(plan.state) == shapes(engine.state)
    assert plan.loop.buckets[-1] == 12


def test_programs_compiled_ahead_are_those_of_a_pair_in_eight_bits(folders: tuple[str, str]) -> None:
    given = PlanOptions(target=folders[0], drafter=folders[1], dtype="float32")
    found = EnginePrograms.of(given, EngineConfig(3, 100, "fixed"), "rejection", "fp8")
    target = load_target(folders[0], dtype="float32", weights="fp8")
    drafter = load_drafter(folders[1], target, dtype="float32", weights="fp8")
    for planned, loaded in ((found.target, target), (found.drafter, drafter)):
        assert planned is not None and planned.graphdef == loaded.graphdef
        assert jax.tree.map(lambda x: (x.shape, x.dtype), planned.params) == jax.tree.map(
            lambda x: (x.shape, x.dtype), loaded.params
        )
    # Loading rounds each matrix with a program of its shape.
    codes = (x for model in (target, drafter) for x in jax.tree.leaves(model.params) if x.dtype.itemsize == 1)
    shapes = {x.shape for x in codes}
    rounding = [name for name, _ in found.all() if name.endswith("in fp8")]
    assert rounding == [f"loading: {shape} in fp8" for shape in sorted(shapes)]


def test_programs_compiled_ahead_read_the_head_of_a_target_in_eight_bits_as_rounds_do(tmp_path: Path) -> None:
    """In panels, where a CPU has kernels for them: a head of this size, and not of the one above, is laid out so."""
    folder = str(write_tiny_target(tmp_path, vocab_size=600, num_hidden_layers=1))
    given = PlanOptions(target=folder, dtype="float32")
    planned = EnginePrograms.of(given, EngineConfig(3, 100, "fixed"), "rejection", "int8").target
    target = load_target(folder, dtype="float32", weights="int8", tokenizer=False)
    assert native.ready() == ("head_weight_vd" in target.for_rounds.params)
    assert planned.graphdef == target.for_rounds.graphdef
    shapes = [
        jax.tree.map(lambda x: (x.shape, x.dtype), params) for params in (planned.params, target.for_rounds.params)
    ]
    assert shapes[0] == shapes[1]


def tables_for(plan: DecodePlan) -> object:
    """Tables of ones in the plan's shapes."""
    return jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), plan.params.tables)


def test_the_program_compiles_the_loop_and_finds_no_copied_cache(folders: tuple[str, str], tmp_path, capsys) -> None:
    words = ["--target", folders[0], "--drafter", folders[1], "--slots", "3", "--longest", "1000"]
    program.main([*words, "--device", "NVIDIA H200"])
    printed = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in printed.splitlines() if "  " in line)
    found = {name: value.strip() for name, value in rows.items()}
    assert found["whole-cache copies"] == "0" and found["requests x positions"] == "3 x 1024"
    assert found["verify buckets"].split()[-1] == "12"
    # 2 layers, 2 heads of 16, keys and values, bfloat16
    assert found["target's cache a device"] == f"{3 * 1024 * 2 * 2 * 16 * 2 * 2 / 2**20:,.1f} MiB"
    assert float(found["arguments a device"].removesuffix(" MiB")) > float(
        found["target's cache a device"].removesuffix(" MiB")
    )
    assert "verify: attention over the cache" in printed and "bound by" in printed


def test_pages_are_planned_too(folders: tuple[str, str], capsys) -> None:
    words = ["--target", folders[0], "--drafter", folders[1], "--slots", "3", "--longest", "1000"]
    program.main([*words, "--cache-pages", "20", "--page", "32", "--dtype", "float32"])
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    found = {name: value.strip() for name, value in rows.items()}
    assert found["whole-cache copies"] == "0"
    # 2 layers, 2 heads of 16, keys and values, float32; and tables of 3 requests for 1,024 positions
    pools, tables = 20 * 32 * 2 * 2 * 16 * 2 * 4, 3 * 32 * 4
    assert found["target's cache a device"] == f"{(pools + tables) / 2**20:,.1f} MiB"
    shapes = DecodePlan.of(options(folders, cache_pages=20, page=32)).cache_shapes()
    assert shapes == {(20, 32, 32)}


def test_what_a_plan_refuses(folders: tuple[str, str], capsys) -> None:
    for words, said in (
        ("", "There is nothing to plan: give --config NAME"),
        (f"--target {folders[0]} --slots 0", "A plan needs --slots of 1 or more"),
        (f"--target {folders[0]} --cache-pages 3 --page 24", "The engine has page = 24"),
        (f"--target {folders[0]} --topology v9:2x2", "--topology is 'v9:2x2'; a kind of TPU"),
        (f"--target {folders[0]} --topology H300", "--topology is 'H300'; a kind of TPU"),
        (f"--target {folders[0]} --mesh rows=2", "--mesh is 'rows=2'"),
        (f"--target {folders[0]} --slot 3", "Unknown option --slot"),
    ):
        with pytest.raises(SystemExit) as stop:
            program.main(words.split())
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_plan_reads_no_weights(folders: tuple[str, str], tmp_path, capsys) -> None:
    """A published target needs nothing at all; the floor of a round with it is that of its weights."""
    program.main(["--config", "qwen3_4b_dspark", "--no-compile", "--device", "NVIDIA H200", "--slots", "1"])
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("verify: projections and MLP"))
    device = known_device("NVIDIA H200")
    assert device is not None and line.endswith("memory")
    weights = 36 * (2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728) * 2
    assert f"{1e3 * weights / device.bandwidth:,.3f}" in line and "whole-cache" not in printed
    config = Path(folders[0]) / "config.json"
    copy = tmp_path / "target"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(json.loads(config.read_text())))
    assert DecodePlan.of(PlanOptions(target=str(copy))).drafter is None


def test_a_round_is_read_branch_by_branch() -> None:
    """Greedy rounds take a sampling branch's first, buckets the largest; log-probabilities are not counted."""
    text = """
%greedy (p: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} all-reduce(%p)
}
%sampled (p: f32[8]) -> f32[8] {
  %b = (f32[8]{0}, f32[64]{0}) all-gather-start(%p)
  ROOT %w = f32[8]{0} while(%b), condition=%c, body=%greedy, metadata={op_name="jit/while/body/sampling/cond/while"}
}
%body (p: f32[8]) -> f32[8] {
  %x = bf16[8,2560]{1,0} all-reduce(%p), to_apply=%add
  %y = f32[8]{0} conditional(%i), branch_computations={%greedy, %sampled}, metadata={op_name="jit/sampling/cond"}
  %z = f32[8]{0} conditional(%i), true_computation=%greedy, false_computation=%none
  ROOT %n = f32[8]{0} while(%y), condition=%c, body=%sampled, metadata={op_name="jit/while/body/logprobs/while"}
}
%none (p: f32[8]) -> f32[8] {
  ROOT %k = f32[8]{0} copy(%p)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %c = f32[16]{0} copy(%p)
  %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%none
  ROOT %l = f32[8]{0} while(%c), condition=%c, body=%body
}"""
    found = LoopText.of(text, 2560)
    rows = 8 * 2560 * 2
    assert found.round(greedy=True) == Exchanged(rows, 2 * 32)
    assert found.round(greedy=False) == Exchanged(rows, 32 + 256 + 8 * 32)
    assert found.entry_copies() == 64 + 32
    for other in ("", "module @jit_run_rounds {"):
        with pytest.raises(UserError, match=f"No ENTRY in the text '{other}'; the optimised text of"):
            LoopText.of(other, 2560)


@pytest.mark.lowering
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_loop_lowers_for_hardware_that_is_not_here(folders: tuple[str, str], platform: str) -> None:
    assert "stablehlo.while" in DecodePlan.of(options(folders)).lower(platform).as_text()


@pytest.mark.lowering
@pytest.mark.parametrize("looped", [True, False])
def test_a_walk_reads_w2_once_a_position(
    looped: bool, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three products in the program, or one in a loop of three turns, as on a TPU; W_1 has its rows looked up."""
    taken, by_table = [], heads.by_table
    monkeypatch.setattr(heads, "by_table", lambda rows, table: taken.append(table.shape) or by_table(rows, table))
    monkeypatch.setattr(turns, "LOOPED", ("cpu",) if looped else ())
    # Of its own slots, so that no other test has traced the program.
    plan = DecodePlan.of(options(folders, slots=5 + looped))
    vocab, rank = plan.params.drafter["markov_head"]["w2_vr"].shape
    takes = re.compile(rf"stablehlo\.(\w+).* : \([^)]*tensor<{vocab}x{rank}xf32>[^)]*\) ->")
    found = filter(None, map(takes.search, plan.lower("tpu").as_text().splitlines()))
    assert {line[1] for line in found} == {"dot_general", "gather"}
    assert taken.count((vocab, rank)) == (1 if looped else 3)


def test_the_kernels_of_a_round_and_the_weights_that_they_write_again() -> None:
    """What starts nothing counts nothing; a product that takes a join into itself writes no weight."""
    text = """
%moves (a: bf16[1024,512], b: bf16[1024,512]) -> bf16[1024,1024] {
  %a = bf16[1024,512]{1,0} parameter(0)
  %b = bf16[1024,512]{1,0} parameter(1)
  ROOT %c = bf16[1024,1024]{1,0} concatenate(%a, %b), dimensions={1}
}
%product (a: bf16[1024,512], b: bf16[1024,512], x: bf16[8,1024]) -> f32[8,1024] {
  %c = bf16[1024,1024]{1,0} concatenate(%a, %b), dimensions={1}
  ROOT %d = f32[8,1024]{1,0} dot(%x, %c)
}
%few (s: f32[8]) -> f32[8] {
  ROOT %e = f32[8]{0} exponential(%s)
}
%many (s: f32[8]) -> f32[8] {
  %e = f32[8]{0} exponential(%s)
  ROOT %f = f32[8]{0} negate(%e)
}
%step (p: (bf16[1024,512], bf16[1024,512], f32[8])) -> (bf16[1024,512], bf16[1024,512], f32[8]) {
  %p = (bf16[1024,512]{1,0}, bf16[1024,512]{1,0}, f32[8]{0}) parameter(0)
  %u = bf16[1024,512]{1,0} get-tuple-element(%p), index=0
  %v = bf16[1024,512]{1,0} get-tuple-element(%p), index=1
  %s = f32[8]{0} get-tuple-element(%p), index=2
  %joined = bf16[1024,1024]{1,0} fusion(%u, %v), kind=kLoop, calls=%moves
  %wide = f32[1024,512]{1,0} convert(%u)
  %small = f32[8]{0} copy(%s)
  %out = f32[8,1024]{1,0} fusion(%u, %v, %s), kind=kCustom, calls=%product
  %choice = f32[8]{0} conditional(%k, %s, %s), branch_computations={%few, %many}, metadata={op_name="/sampling/cond"}
  ROOT %r = (bf16[1024,512]{1,0}, bf16[1024,512]{1,0}, f32[8]{0}) tuple(%u, %v, %choice)
}
%goes_on (p: f32[8]) -> pred[] {
  ROOT %t = pred[] constant(true)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  ROOT %loop = f32[8]{0} while(%p), condition=%goes_on, body=%step
}
"""
    read = [round_kernels(LoopText.of(text, 512), [(1024, 512), (8,)], greedy) for greedy in (False, True)]
    assert read[0] == RoundKernels(kernels=6, joined=2 * 1024 * 1024, widened=4 * 1024 * 512)
    # Sampling's first branch is a greedy round's.
    assert read[1] == replace(read[0], kernels=5)


def test_what_is_launched_as_a_graph() -> None:
    """Commands indented below a command buffer; those beside it are launched one by one."""
    thunks = """
000: kCommandBuffer [source       | next=003 (1)]
    001: kCopy         [source       | sink        ] kCopy
    002: kCustomKernel [source       | sink        ] loop_minimum_fusion grid: [1, 1, 1]
003: kWhile         [prev=000 (1) | sink        ]
condition:
    004: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | next=006 (1)]
        005: kCustomKernel [source       | sink        ] held_attention grid: [1, 8, 16]
    006: kConditional   [prev=000 (1) | next=009 (1)]
      false_branch:
        007: kCustomKernel [source       | next=008 (1)] loop_add_fusion grid: [1, 1, 1]
    008: kGemm          [prev=006 (1) | sink        ] gemm
"""
    assert captured(thunks) == (3, 6)


@pytest.mark.lowering
@pytest.mark.parametrize("kind", GPUS)
def test_a_gpu_that_is_not_here(kind: str, folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled where the CUDA compiler is installed; elsewhere a sentence names its packages and the counted floor."""
    words = ["--target", folders[0], "--drafter", folders[1], "--slots", "1", "--longest", "100", "--topology", kind]
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        with pytest.raises(SystemExit):
            program.main(words)
        assert "dspark-jax[aot-cuda]" in capsys.readouterr().err
        return
    program.main(words)
    printed = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in printed.splitlines() if "  " in line)
    assert rows["devices"].strip() == f"1 x NVIDIA {kind}" and int(rows["fused: kernels a greedy round"]) > 20
    assert rows["library: whole-cache copies"].strip() == "0"


def test_a_row_of_compiled_figures_has_the_command_of_its_reading() -> None:
    """Another depth compiled later leaves the deepest reading with the command that made it."""
    whole = merged({}, {"after": {"layers": 36, "kernels": 857, "command": "--layers 0"}})
    again = merged(whole, {"after": {"layers": 1, "kernels": 53, "command": "--layers 1"}})
    assert (again["command"], again["kernels"]) == ("--layers 0", 857) and set(again["depths"]) == {"1", "36"}

    # As rows were written before readings held their own.
    old = {"layers": 36, "command": "--layers 0", "depths": {"36": {"after": {"layers": 36}}}}
    assert merged(old, {"after": {"layers": 1, "command": "--layers 1"}})["command"] == "--layers 0"
