"""Compiles the decode loop of an earlier checkout and of this one, for TPUs that are not here, and reads both texts.

    git worktree add ../before COMMIT
    python -m infer.studies.compiled --before ../before --layers 1
    python -m infer.studies.compiled --layers 0

Needs the TPU compiler (extra `aot`). What lies beside the layers, such as sampling, is whole at any depth; sizes and
seconds are those of the depth that was compiled, 0 for all layers. Several runs share one file of results.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_jax.config.cli import parse, program
from dspark_jax.devices import machine
from dspark_jax.errors import UserError
from dspark_jax.files import add_results, make_output, read_results
from dspark_jax.planning.compiled import copies
from dspark_jax.planning.rounds import LoopText
from dspark_jax.report import table


@dataclass(frozen=True)
class CompiledSettings:
    """Reads the compiled decode loop of this checkout, and of an earlier one."""

    before: str = ""
    """Another checkout of this repository, compiled as well; empty: this one alone."""
    config: str = "qwen3_4b_dspark"
    """Training configuration whose target and drafter are compiled; of a published target."""
    topology: str = "v5e:2x2"
    """TPUs to compile for, all along the tensor axis."""
    slots: int = 8
    """Requests decoded at once."""
    longest: int = 2048
    """Positions that a request may take."""
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

    found = {"after": reading(settings, Path.cwd())}
    if settings.before:
        if not (Path(settings.before) / "dspark_jax").is_dir():
            raise UserError(f"--before is {settings.before}; a checkout of this repository was expected.")
        found["before"] = reading(settings, Path(settings.before))

    # One file for all programs, devices and depths: what others have measured stays.
    old = read_results(settings.result).get("decode", {}).get(settings.name, {})
    row = merged(old, found) | {"command": " ".join(["infer.studies.compiled", *argv])}
    add_results(settings.result, {"decode": {settings.name: row}, "machine": machine()}, levels=2)

    names = [name for name, value in found["after"].items() if isinstance(value, int | float)]
    body = [[name, *(f"{found[when][name]:,.2f}" for when in found)] for name in names]
    print(f"{table([settings.name, *found], body)}\n{settings.result}")


def merged(old: dict[str, Any], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The row of a result: the deepest reading of this checkout, and both readings at each depth under `depths`."""
    depths = old.get("depths", {})
    depth = str(found["after"]["layers"])
    depths[depth] = depths.get(depth, {}) | found

    deepest = depths[max(depths, key=int)]["after"]
    return deepest | {"depths": depths}


def reading(settings: CompiledSettings, checkout: Path) -> dict[str, Any]:
    """The figures of one checkout's loop, compiled by a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        wanted = {
            "config": settings.config, "topology": settings.topology, "slots": settings.slots,
            "longest": settings.longest, "layers": settings.layers, "folder": name,
        }  # fmt: skip
        # Its own folder first, before this checkout's.
        paths = os.pathsep.join([str(checkout.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": paths,
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        command = [sys.executable, "-c", COMPILES, json.dumps(wanted)]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"The loop of {checkout} was not compiled: {done.stderr.strip().splitlines()[-1][:300]}")

        text = (Path(name) / "loop.txt").read_text()
        facts = json.loads((Path(name) / "facts.json").read_text())

    loop = LoopText.of(text, facts["hidden"])
    greedy, sampled = loop.round(greedy=True), loop.round(greedy=False)
    mib = 2**20
    return {
        "collective_mib_greedy": greedy.others / mib,
        "collective_mib_sampled": sampled.others / mib,
        "collective_mib_rows_of_layers": greedy.rows / mib,
        "entry_copies_mib": loop.entry_copies() / mib,
        "temporaries_mib": facts["temporary"] / mib,
        "arguments_mib": facts["arguments"] / mib,
        "program_mib": facts["program"] / mib,
        "compile_seconds": facts["seconds"],
        "compile_cpu_seconds": facts["cpu_seconds"],
        "whole_cache_copies": len(copies(text, {tuple(shape) for shape in facts["caches"]})),
        "sorts": text.count(" sort("),
        "layers": facts["layers"],
        "draft_layers": facts["draft_layers"],
    }


# Runs in either checkout, so it names what both have alone. The scopes, by which a round's branches are told apart,
# change nothing in a program but its notes; an earlier checkout lacks them.
COMPILES = """
import dataclasses, json, sys, time
from pathlib import Path
import jax
wanted = json.loads(sys.argv[1])
from dspark_jax.decoding import logprobs, sampling
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
plan = decoding.DecodePlan.of(decoding.PlanOptions(
    config=wanted["config"], topology=wanted["topology"], slots=wanted["slots"], longest=wanted["longest"]))
lowered, clock, cpu = plan.lower("tpu"), time.perf_counter(), time.process_time()
program = lowered.compile()
clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
memory, folder = program.memory_analysis(), Path(wanted["folder"])
(folder / "loop.txt").write_text(program.as_text())
(folder / "facts.json").write_text(json.dumps({
    "hidden": plan.target.config.hidden_size, "layers": plan.target.config.num_layers,
    "draft_layers": plan.drafter.config.backbone.num_layers, "seconds": clock, "cpu_seconds": cpu,
    "temporary": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes,
    "program": memory.generated_code_size_in_bytes, "caches": sorted(plan.cache_shapes())}))
"""


if __name__ == "__main__":
    main()
