"""Compiles the decode loop of an earlier checkout and of this one, for devices that are not here, and reads both texts.

    git worktree add ../before COMMIT
    python -m infer.studies.compiled --before ../before --layers 1
    python -m infer.studies.compiled --layers 0
    python -m infer.studies.compiled --topology H200 --slots 1 --plain --layers 0 --name h200_r1_plain

Needs the TPU compiler (extra `aot`) or, for a GPU, the CUDA compiler (extra `aot-cuda`, Python 3.12). What lies beside
the layers, such as sampling, is whole at any depth; sizes and seconds are those of the depth that was compiled, 0 for
all layers. Of a GPU's two readings (`planning/gpus`) the larger figure is the row's. Several runs share one file.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark_jax.compilation import checkout_environment
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import machine
from dspark_jax.errors import UserError
from dspark_jax.files import add_results, make_output, read_results
from dspark_jax.planning.compiled import copies
from dspark_jax.planning.gpus import GPUS
from dspark_jax.planning.kernels import captured, round_kernels
from dspark_jax.planning.rounds import LoopText
from dspark_jax.programs import earlier_checkout
from dspark_jax.report import table

MIB = 2**20
THUNKS = "*run_rounds*.thunk_sequence_after_thunk_passes.txt"


@dataclass(frozen=True)
class CompiledSettings:
    """Reads the compiled decode loop of this checkout, and of an earlier one."""

    before: str = ""
    """Another checkout of this repository, compiled as well; empty: this one alone."""
    config: str = "qwen3_4b_dspark"
    """Training configuration whose target and drafter are compiled; of a published target."""
    plain: bool = False
    """Without the drafter."""
    topology: str = "v5e:2x2"
    """TPUs to compile for, all along the tensor axis, or a GPU, H100 or H200."""
    slots: int = 8
    """Requests decoded at once."""
    longest: int = 2048
    """Positions that a request may take."""
    cache_pages: int = 0
    """Pages of 64 positions that all requests share; 0: every slot holds the longest."""
    layers: int = 1
    """Decoder layers of the target, and the most of the drafter; 0: all."""
    name: str = "v5e4_r8_drafts"
    """The row of the results."""
    result: Path = Path("docs/results/compiled.json")
    """The figures; rows of other names stay in it."""


@program
def main(argv: list[str]) -> None:
    settings = parse(CompiledSettings, argv, description=__doc__)
    make_output(settings.result.parent)

    # With the reading: another depth of the row may come from another command.
    found = {"after": reading(settings, Path.cwd()) | {"command": " ".join(["infer.studies.compiled", *argv])}}
    if settings.before:
        found["before"] = reading(settings, earlier_checkout(settings.before))

    # One file for all programs, devices and depths: what others have measured stays.
    old = read_results(settings.result).get("decode", {}).get(settings.name, {})
    row = {settings.name: merged(old, found)}
    add_results(settings.result, {"decode": row, "machine": machine()}, levels=2)

    names = [name for name, value in found["after"].items() if isinstance(value, int | float)]
    body = [[name, *(f"{found[when][name]:,.2f}" for when in found)] for name in names]
    print(f"{table([settings.name, *found], body)}\n{settings.result}")


def merged(old: dict[str, Any], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The row of a result: the deepest reading of this checkout, and both readings at each depth under `depths`."""
    depths = old.get("depths", {})
    depth = str(found["after"]["layers"])
    depths[depth] = depths.get(depth, {}) | found

    deepest = depths[max(depths, key=int)]["after"]
    # A reading that was kept without its command has the row's.
    return {name: old[name] for name in ("command",) if name in old} | deepest | {"depths": depths}


def reading(settings: CompiledSettings, checkout: Path) -> dict[str, Any]:
    """The figures of one checkout's loop, compiled by a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        wanted = {
            "config": settings.config, "plain": settings.plain, "topology": settings.topology,
            "slots": settings.slots, "longest": settings.longest, "layers": settings.layers, "folder": name,
            "pages": settings.cache_pages,
        }  # fmt: skip
        environment = checkout_environment(checkout) | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        if settings.topology in GPUS:
            # The sequence of launches is in no text of a program, only in what the compiler writes beside it.
            dump = f"--xla_dump_to={name} --xla_dump_hlo_module_re=run_rounds --xla_dump_hlo_as_text"
            environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}"
        command = [sys.executable, "-c", COMPILES, json.dumps(wanted)]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"The loop of {checkout} was not compiled: {done.stderr.strip().splitlines()[-1][:300]}")

        facts = json.loads((Path(name) / "facts.json").read_text())
        texts = {one: (Path(name) / f"{one}.txt").read_text() for one in facts["readings"]}
        launches = [captured(file.read_text()) for file in sorted(Path(name).glob(THUNKS))]

    loops = {one: LoopText.of(text, facts["hidden"]) for one, text in texts.items()}
    caches = {tuple(shape) for shape in facts["caches"]}
    common = {
        "temporaries_mib": max(one["temporary"] for one in facts["readings"].values()) / MIB,
        "arguments_mib": facts["arguments"] / MIB,
        "compile_seconds": max(one["seconds"] for one in facts["readings"].values()),
        "compile_cpu_seconds": max(one["cpu_seconds"] for one in facts["readings"].values()),
        "entry_copies_mib": max(loop.entry_copies() for loop in loops.values()) / MIB,
        "whole_cache_copies": sum(len(copies(text, caches)) for text in texts.values()),
        "layers": facts["layers"],
        "draft_layers": facts["draft_layers"],
    }
    if settings.topology in GPUS:
        shown = dict(zip(facts["readings"], launches, strict=False))
        return kernel_figures(loops, facts) | {"in_command_buffers": shown} | common

    (text,), (loop,) = texts.values(), loops.values()
    greedy, sampled = loop.round(greedy=True), loop.round(greedy=False)
    return common | {
        "collective_mib_greedy": greedy.others / MIB,
        "collective_mib_sampled": sampled.others / MIB,
        "collective_mib_rows_of_layers": greedy.rows / MIB,
        "program_mib": facts["program"] / MIB,
        "sorts": text.count(" sort("),
    }


def kernel_figures(loops: dict[str, LoopText], facts: dict[str, Any]) -> dict[str, Any]:
    """Kernels of a greedy and of a sampled round, bytes of weights that it writes again: the larger of the readings,
    and those of each."""
    weights = [tuple(shape) for shape in facts["weights"]]
    found = {one: round_kernels(loop, weights, greedy=False) for one, loop in loops.items()}
    greedy = {one: round_kernels(loop, weights, greedy=True).kernels for one, loop in loops.items()}
    rewritten = {one: read.joined + read.widened + read.laid_out for one, read in found.items()}
    return {
        "kernels": max(greedy.values()),
        "kernels_sampled": max(read.kernels for read in found.values()),
        "weight_bytes_rewritten": max(rewritten.values()),
        "readings": {
            one: asdict(read) | {"kernels": greedy[one], "kernels_sampled": read.kernels} | facts["readings"][one]
            for one, read in found.items()
        },
    }


# Runs in either checkout, so it names what both have alone. The scopes, by which a round's branches are told apart,
# change nothing in a program but its notes; an earlier checkout lacks them.
COMPILES = """
import dataclasses, json, sys, time
from pathlib import Path
import jax
wanted = json.loads(sys.argv[1])
from dspark_jax import compilation
from dspark_jax.decoding import logprobs, sampling
if hasattr(compilation, "share_equal_parts"):
    compilation.share_equal_parts()
if not hasattr(sampling, "SCOPE"):
    for name in ("_by_need", "uniforms", "draw_token", "coupled_waits"):
        setattr(sampling, name, jax.named_scope("sampling")(getattr(sampling, name)))
    logprobs.Logprobs.noted = jax.named_scope("logprobs")(logprobs.Logprobs.noted)
from dspark_jax.config.cli import load_config
from dspark_jax.planning import decoding, published_targets
config, layers = load_config(wanted["config"]), wanted["layers"]
published = published_targets.PUBLISHED[config.target]
if layers:
    published["num_hidden_layers"] = layers = min(layers, published["num_hidden_layers"])
    taps, made = tuple(range(layers - 1)) or (-1,), decoding.drafter_config
    def shallow(settings, *rest):
        kept = taps[-len(settings.target_layer_ids):]
        count = min(settings.num_layers, layers)
        return made(dataclasses.replace(settings, num_layers=count, target_layer_ids=kept), *rest)
    decoding.drafter_config = shallow
named = {"target": config.target} if wanted["plain"] else {"config": wanted["config"]}
if wanted["pages"]:  # which an earlier checkout may not know
    named["cache_pages"] = wanted["pages"]
plan = decoding.DecodePlan.of(decoding.PlanOptions(
    **named, topology=wanted["topology"], slots=wanted["slots"], longest=wanted["longest"]))
platform = getattr(plan, "platform", "tpu")
lowered, readings, facts, folder = plan.lower(platform), {"tpu": None}, {}, Path(wanted["folder"])
if platform == "cuda":
    from dspark_jax.planning.gpus import READINGS as readings
for name, options in readings.items():
    clock, cpu = time.perf_counter(), time.process_time()
    program = lowered.compile(options)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    memory = program.memory_analysis()
    (folder / f"{name}.txt").write_text(program.as_text())
    facts[name] = {"seconds": clock, "cpu_seconds": cpu, "temporary": memory.temp_size_in_bytes}
leaves = jax.tree.leaves((plan.params.target, plan.params.drafter))
(folder / "facts.json").write_text(json.dumps({
    "readings": facts, "hidden": plan.target.config.hidden_size, "layers": plan.target.config.num_layers,
    "draft_layers": 0 if plan.drafter is None else plan.drafter.config.backbone.num_layers,
    "arguments": memory.argument_size_in_bytes, "program": memory.generated_code_size_in_bytes,
    "weights": [list(x.shape) for x in leaves], "caches": sorted(plan.cache_shapes())}))
"""


if __name__ == "__main__":
    main()
