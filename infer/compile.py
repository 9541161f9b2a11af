"""Compiles every program that an engine or a server meets, without weights and without a run, for starts to read.

    python -m infer.compile --target Qwen/Qwen3-4B --drafter runs/x/fit/drafter --slots 16 --longest 4096
    python -m infer.compile --target DIR --drafter DIR --topology v5e:1x1 --compilation-cache /image/compiled

Takes the settings of infer.serve that name pair, weights and engine, and keeps the programs where --compilation-cache
says. Run it on the kind of device that serves, when a container image is built or once for a folder that a pod shares.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from dspark_jax.checkpoints.huggingface import Weights
from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.compilation import Compilations, drop_torn, kept_programs, place_of_programs
from dspark_jax.config.cli import FLAT, parse, program
from dspark_jax.devices import announce
from dspark_jax.errors import UserError
from dspark_jax.planning.ahead import EnginePrograms, Traced
from dspark_jax.planning.compiled import compiled
from dspark_jax.planning.decoding import PlanOptions
from dspark_jax.programs import EMBEDDED
from dspark_jax.report import table
from dspark_jax.serving.api.service import longest_of
from dspark_jax.serving.sampling import Mode
from dspark_jax.serving.settings import EngineConfig

from .serve import ENGINE


@dataclass(frozen=True)
class CompileSettings:
    """Compiles the programs of an engine ahead."""

    target: str = ""
    """Folder or hub id of the target, or `embedded`; empty: the pair that comes with this package."""
    drafter: str = ""
    """Folder or hub id of the drafter; empty: plain decoding."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of weights and activations; None: float32 on a CPU, else the target's own."""
    weights: Weights = "stored"
    """int8, fp8: the layers' matrices of both models so, with a scale for each output."""
    mode: Mode = "rejection"
    """How drafts are verified above temperature 0."""
    topology: str = ""
    """TPUs to compile for, as in v5e:1x1. Empty: the devices here."""
    mesh: str = ""
    """Devices along the mesh axes, as in tensor=4; empty: one device, or with a topology all along tensor."""
    engine: Annotated[EngineConfig, FLAT] = ENGINE


@dataclass(frozen=True)
class Compiled:
    """One program: what it is, whether it was kept already, seconds, and bytes that it added to the folder."""

    name: str
    was_kept: bool
    seconds: float
    bytes: int


@program
def main(argv: list[str]) -> None:
    settings = parse(CompileSettings, argv, description=__doc__)
    if not settings.target:
        settings = replace(settings, target=EMBEDDED, drafter=settings.drafter or EMBEDDED)
    folder = kept_folder()
    torn = drop_torn(folder)
    if torn:
        print(f"{len(torn)} programs in {folder} were stored in part and are compiled anew.", file=sys.stderr)

    # Parsed before any program is traced: a wrong setting shows at once.
    found = programs_of(settings)
    done = []
    for made in compile_all(found.all(), found.platform(), folder):
        print(
            f"{made.name}: {made.seconds:.1f} s{', kept already' if made.was_kept else ''}", file=sys.stderr, flush=True
        )
        done.append(made)

    rows = [[one.name, f"{one.seconds:.1f}", f"{one.bytes / 2**20:.2f}", "yes" if one.was_kept else ""] for one in done]
    together = [sum(one.seconds for one in done), sum(one.bytes for one in done) / 2**20]
    rows.append(["together", f"{together[0]:.1f}", f"{together[1]:.2f}", ""])
    print(table(["program", "s", "new MiB kept", "kept already"], rows))
    print(f"kept in {folder}")


def kept_folder() -> Path:
    """The folder of kept programs; UserError where none is kept, or no folder of this machine."""
    folder = place_of_programs()
    if not folder or "://" in folder:
        raise UserError(
            "There is nowhere to keep the programs: give --compilation-cache DIR, a folder of this machine."
        )
    return Path(folder)


def programs_of(settings: CompileSettings) -> EnginePrograms:
    """The programs of an engine with these settings, as infer.serve and infer.generate would make it."""
    described = describe_target(settings.target, tokenizer=False)
    # A topology's chips are no devices of this process, so only its absence names a device.
    dtype = (settings.dtype if settings.topology else announce(settings.dtype)) or described.config.dtype
    options = PlanOptions(
        target=settings.target, drafter=settings.drafter, dtype=dtype,  # type: ignore[arg-type]
        mesh=settings.mesh, topology=settings.topology,
    )  # fmt: skip
    longest = longest_of(settings.engine, described.config.max_positions)
    return EnginePrograms.of(options, replace(settings.engine, longest=longest), settings.mode, settings.weights)


def compile_all(found: Iterator[tuple[str, Traced]], platform: str, folder: Path) -> Iterator[Compiled]:
    """Compiles each program for a platform, and says what it cost."""
    for name, trace in found:
        before, started = kept_programs(folder), time.perf_counter()
        with Compilations() as seen:
            lowered: Any = trace().lower(lowering_platforms=(platform,))
            compiled(lowered, name)
        new = kept_programs(folder).items() - before.items()
        yield Compiled(name, seen.read > 0, time.perf_counter() - started, sum(size for _, size in new))


if __name__ == "__main__":
    main()
