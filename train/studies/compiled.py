"""Compiles the training step of an earlier checkout and of this one for devices that are not here, and reads the texts.

    git worktree add ../before COMMIT
    python -m train.studies.compiled --before ../before                                    one H200 (extra `aot-cuda`)
    python -m train.studies.compiled --topology v5p:2x2x1 --mesh fsdp=4 --name v5p4        four TPUs (extra `aot`)
    python -m train.studies.compiled --topology v5p:2x2x1 --mesh fsdp=4 --source online --name v5p4_online

One sequence a device, in one micro-batch. For a GPU the figures are those of the reading with a library's products,
which writes more; the one that fuses stands beside it where it compiles without a device to tune on. Written bytes are
those of the text (`planning/written.py`); the floor is what `train.bench --show floor` counts to be moved, reads and
writes together. Rows of other names stay in the results.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dspark_jax.compilation import checkout_environment
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import machine
from dspark_jax.errors import UserError
from dspark_jax.files import add_results, make_output, read_results
from dspark_jax.planning.compiled import collectives
from dspark_jax.planning.gpus import GPUS, READINGS
from dspark_jax.planning.rounds import LoopText
from dspark_jax.planning.written import together, writers
from dspark_jax.programs import earlier_checkout, module_name
from dspark_jax.report import table


@dataclass(frozen=True)
class CompiledSettings:
    """Reads the compiled training step of this checkout, and of an earlier one."""

    before: str = ""
    """Another checkout of this repository, compiled as well; empty: this one alone."""
    config: str = "qwen3_4b_dspark"
    """Training configuration; of a published target."""
    topology: str = "H200"
    """H100 or H200, or TPUs as in v5p:2x2x1."""
    mesh: str = ""
    """Devices along the mesh axes, as in fsdp=4; empty: all along the data axis."""
    source: Literal["offline", "online"] = "offline"
    """Where the target's states come from."""
    vocabulary_chunk: int = 0
    """Ids of a chunk of the loss, as the training configuration has it; 0: chunks of anchors."""
    name: str = "h200"
    """The row of the results."""
    largest: int = 12
    """Writers that are listed."""
    keep: str = ""
    """A folder for the compilers' texts; empty: they are dropped."""
    result: Path = Path("docs/results/compiled.json")
    """The figures; rows of other names stay in it."""


@program
def main(argv: list[str]) -> None:
    settings = parse(CompiledSettings, argv, description=__doc__)
    make_output(settings.result.parent)

    found = {"after": reading(settings, Path.cwd(), "after")}
    if settings.before:
        found["before"] = reading(settings, earlier_checkout(settings.before), "before")

    # One file for all programs and devices; a reading of before stays beside one of after.
    old = read_results(settings.result).get("train", {}).get(settings.name, {})
    before = found.get("before") or old.get("before")
    row = found["after"] | {"command": " ".join(["train.studies.compiled", *argv]), "machine": machine()}
    row |= {} if before is None else {"before": before}
    add_results(settings.result, {"train": {settings.name: row}}, levels=2)

    shown = {when: figures for when, figures in (("before", before), ("after", found["after"])) if figures}
    names = [name for name, value in found["after"].items() if isinstance(value, int | float)]
    body = [[name, *(f"{figures.get(name, 0):,.2f}" for figures in shown.values())] for name in names]
    print(table([settings.name, *shown], body))
    for writer in found["after"]["largest_writers"]:
        print(f"{writer['gb']:9.3f} GB  {writer['times']:4d} x {writer['shape']}  {writer['source']}")
    print(settings.result)


def reading(settings: CompiledSettings, checkout: Path, when: str) -> dict[str, Any]:
    """The figures of one checkout's step, compiled by a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(settings.keep) / f"{settings.name}-{when}" if settings.keep else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        options = {name: READINGS[name] for name in ("library", "fused")} if settings.topology in GPUS else {"": {}}
        wanted = {
            "config": settings.config, "topology": settings.topology, "mesh": settings.mesh, "readings": options,
            "data": {"source": settings.source, "conversations": "conversations.jsonl"},
            # Named only where it is asked for: an earlier checkout may not have it.
            "others": {"vocabulary_chunk": settings.vocabulary_chunk} if settings.vocabulary_chunk else {},
            "folder": str(folder.resolve()), "bench": module_name("train.bench.__main__"),
        }  # fmt: skip

        environment = checkout_environment(checkout) | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        command = [sys.executable, "-c", COMPILES, json.dumps(wanted)]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"The step of {checkout} was not compiled: {done.stderr.strip().splitlines()[-1][:300]}")

        facts = json.loads((folder / "facts.json").read_text())
        texts = {one: (folder / f"{one or 'step'}.txt").read_text() for one in facts["programs"]}

    figures = {one: _figures(texts[one], facts["programs"][one], facts, settings.largest, one) for one in texts}
    # The figures of the first reading, and under their names those of the others.
    first, *others = options
    shared = {name: facts[name] for name in ("float32_products", "products", "floor_gb")}
    return {**shared, **figures[first], **{one: figures.get(one, "not compiled") for one in others}}


def _figures(text: str, program: dict[str, float], facts: dict[str, Any], largest: int, reading: str) -> dict[str, Any]:
    found = writers(LoopText.of(text, 0))
    written = together(found)
    return {
        "written_gb": written / 1e9,
        "written_over_floor": written / 1e9 / facts["floor_gb"],
        "temporaries_gib": program["temporary"] / 2**30,
        "arguments_gib": program["arguments"] / 2**30,
        "compile_seconds": program["seconds"],
        "compile_cpu_seconds": program["cpu_seconds"],
        **({"reading": reading} if reading else {}),
        **({"collectives": made} if (made := collectives(text)) else {}),
        "largest_writers": [
            {"gb": one.size / 1e9, "times": one.times, "shape": one.shape, "source": one.source}
            for one in found[:largest]
        ],
    }


# Runs in either checkout, so it names what both have alone.
COMPILES = """
import dataclasses, importlib, json, sys, time
from pathlib import Path
wanted = json.loads(sys.argv[1])
from dspark_jax import compilation
if hasattr(compilation, "share_equal_parts"):
    compilation.share_equal_parts()
from dspark_jax.config.cli import load_config, mesh_settings
from dspark_jax.planning.compiled import topology_mesh, wide_products
from dspark_jax.planning.training import AbstractRun
from dspark_jax.roofline.hardware import total
floor_terms = importlib.import_module(wanted["bench"]).floor_terms
config, folder = load_config(wanted["config"]), Path(wanted["folder"])
settings = mesh_settings(wanted["mesh"], config.mesh) if wanted["mesh"] else config.mesh
mesh = topology_mesh(wanted["topology"], *settings.sizes)
data = dataclasses.replace(config.data, global_batch=mesh.size, accumulation_steps=1, **wanted["data"])
run = AbstractRun.of(dataclasses.replace(config, data=data, mesh=settings, **wanted["others"]), mesh)
tpu = mesh.devices.flat[0].platform == "tpu"
lowered, programs = run.lower("tpu" if tpu else "cuda"), {}
for name, options in wanted["readings"].items():
    clock, cpu = time.perf_counter(), time.process_time()
    try:
        program = lowered.compile(options or None)
    except Exception as error:
        if not programs:
            raise
        print(name, str(error)[:300], file=sys.stderr)
        continue
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    memory = program.memory_analysis()
    programs[name] = {"temporary": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes,
                      "seconds": clock, "cpu_seconds": cpu}
    (folder / f"{name or 'step'}.txt").write_text(program.as_text())
wide, products = wide_products(lowered.as_text())
terms = floor_terms(run)
(folder / "facts.json").write_text(json.dumps({"programs": programs, "float32_products": wide, "products": products,
    "floor_gb": total(terms).bytes / 1e9}))
"""


if __name__ == "__main__":
    main()
