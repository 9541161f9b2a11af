"""Seconds that a checkpoint holds the training loop up, with the state of a real run: drafter, moments, key.

    python -m train.studies.save_stall --config qwen3_4b_dspark --output runs/stall
    python -m train.studies.save_stall --config qwen3_4b_dspark --output s3://BUCKET/stall --layers 2 --preempt

Nothing is trained: the state has the shapes and dtypes of the configuration's on this machine's devices, and a step
changes every element of it, as an optimizer does. Steps alone and steps during a save alternate; medians are printed.
`--output` is an empty folder or place, `--saves` how many checkpoints are taken (3), `--layers` how many draft layers,
where all of them do not fit this machine's memory. With `--preempt` a process that steps so is sent SIGTERM, between
two saves and right after one has begun, and the seconds to its end are printed.
"""

import dataclasses
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.config.cli import divide_options, parse, parse_training, program
from dspark_jax.devices import announce
from dspark_jax.errors import UserError
from dspark_jax.planning.training import AbstractRun
from dspark_jax.report import gibibytes, listing
from dspark_jax.sharding import make_mesh
from dspark_jax.storage import objects
from dspark_jax.storage.places import place_of, shown
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.guards import Preemption
from dspark_jax.training.object_checkpoints import AnyCheckpoints, ObjectCheckpoints
from dspark_jax.training.step import TrainState

READY = "stepping"


@dataclass(frozen=True)
class StallOptions:
    """Options of the study."""

    output: str = ""
    """Folder or place of the checkpoints, which must be empty or missing."""
    saves: int = 3
    """Checkpoints that are taken."""
    layers: int = 0
    """Draft layers, where the configuration's do not fit this machine's memory; 0: all."""
    preempt: bool = False
    """Measure the seconds from SIGTERM to the end of a process that saves, in place of the stall."""
    until_told: int = -1
    """What `--preempt` starts: takes so many checkpoints, the last without waiting for it, then steps until SIGTERM."""


@program
def main(argv: list[str]) -> None:
    mine, rest = divide_options(argv, StallOptions)
    options = parse(StallOptions, mine)
    # The configuration's own options too: a mesh, another block, another optimizer.
    config = parse_training(rest, "train.studies.save_stall", __doc__)
    if not options.output or options.saves < 1:
        raise UserError("Give --output, an empty folder for the checkpoints, and at least 1 of --saves.")
    if options.layers:
        drafter = dataclasses.replace(config.drafter, num_layers=options.layers, init_target_layers=())
        config = dataclasses.replace(config, drafter=drafter)

    if options.preempt:
        print(listing({"output": shown(options.output), **preempted(argv, options)}))
        return

    announce(config.compute_dtype)
    # From shapes alone: no target, no data and no first step are needed for what a save costs.
    mesh = make_mesh(*config.mesh.sizes)
    state = state_like(AbstractRun.of(config, mesh).spec.abstract)
    size = sum(x.nbytes for x in jax.tree.leaves((state.opt_state, state.params)))
    with opened(options.output) as checkpoints:
        # A run's first save comes when its memory has long been taken.
        if (touching := checkpoints.prepare(state)) is not None:
            touching.join()
        if options.until_told >= 0:
            step_until_told(checkpoints, state, options.until_told)
            return
        figures = measure(checkpoints, state, options.saves)

    if place_of(options.output) is None:
        figures["the same bytes, plainly written"] = written_plainly(Path(options.output), size)
    print(listing({"output": shown(options.output), "state": gibibytes(size), **figures}))


# -- The stall -------------------------------------------------------------------------------------------------------


def opened(output: str) -> AnyCheckpoints:
    """Checkpoints in a folder or at a place, of which one is kept."""
    # Steps that are there already would be counted as the run's, and removed.
    place, folder = place_of(output), Path(output)
    if objects.listing(place) if place is not None else folder.exists() and any(folder.iterdir()):
        raise UserError(f"{output} is not empty; give a new folder.")
    return Checkpoints(folder, 1) if place is None else ObjectCheckpoints(place, 1)


def state_like(abstract: TrainState) -> TrainState:
    """A state of these shapes, whose bits do not compress."""

    def filled(like: Any) -> jax.Array:
        if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        # Cheap noise: real random numbers of gigabytes would take minutes on a CPU.
        words = jax.lax.iota(jnp.uint32, max(like.size, 1)) * jnp.uint32(0x9E3779B1)
        # One round of mixing, so that neighbours do not compress.
        words = (words ^ (words >> 15)) * jnp.uint32(0x85EBCA6B)
        return (words.astype(jnp.float32) / 2.0**32).reshape(like.shape or ()).astype(like.dtype)

    def make() -> Any:
        return jax.tree.map(filled, abstract)

    return jax.jit(make, out_shardings=jax.tree.map(lambda like: like.sharding, abstract))()


@partial(jax.jit, donate_argnums=0)
def step(state: TrainState) -> TrainState:
    """Reads and writes every element, as an optimizer does."""

    def changed(x: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return x * jnp.asarray(0.999, x.dtype) + jnp.asarray(1e-3, x.dtype) if floating else x

    return jax.tree.map(changed, state)


def measure(checkpoints: AnyCheckpoints, state: TrainState, saves: int) -> dict[str, str]:
    """Takes `saves` checkpoints among steps; figures by name, medians with their spread where there are several."""
    alone, calls, beside, durable = list[float](), list[float](), list[float](), list[float]()
    # Compiled before anything is timed.
    state = jax.block_until_ready(step(state))

    for number in range(saves):
        for _ in range(3):
            state, seconds = timed(state)
            alone.append(seconds)

        # What the loop waits for, and then what it does not.
        began = time.perf_counter()
        checkpoints.save(number + 1, state, {})
        calls.append(time.perf_counter() - began)
        # The loop goes on while threads write; the device and they share this machine.
        for _ in range(3):
            state, seconds = timed(state)
            beside.append(seconds)
        checkpoints.wait()
        durable.append(time.perf_counter() - began)

    return {
        "step": spread(alone),
        "stall: the call of save": spread(calls),
        "step while it is written": spread(beside),
        "until it is durable": spread(durable),
    }


def timed(state: TrainState) -> tuple[TrainState, float]:
    """The state after a step, and the step's seconds."""
    began = time.perf_counter()
    state = jax.block_until_ready(step(state))
    return state, time.perf_counter() - began


def written_plainly(folder: Path, size: int) -> str:
    """How long this disk takes for a file of so many bytes, to the last of them."""
    piece, path = os.urandom(2**24), folder / "plain"
    began = time.perf_counter()
    with path.open("wb") as file:
        for at in range(0, size, len(piece)):
            file.write(piece[: size - at])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return f"{seconds:.1f} s ({size / seconds / 1e6:,.0f} MB/s)"


def spread(seconds: list[float]) -> str:
    """The median of several times, the least and the most."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


# -- Preemption ------------------------------------------------------------------------------------------------------


def step_until_told(checkpoints: AnyCheckpoints, state: TrainState, saves: int) -> None:
    """Steps as a run's loop does; after SIGTERM it saves, waits for it and ends with 143."""
    with Preemption() as preemption:
        done = 1
        state = jax.block_until_ready(step(state))
        for _ in range(saves):
            checkpoints.wait()
            checkpoints.save(done, state, {})
            done, state = done + 1, step(state)

        jax.block_until_ready(state)
        print(READY, flush=True)
        while not preemption.requested(done):
            done, state = done + 1, jax.block_until_ready(step(state))

        checkpoints.save(done, state, {})
        checkpoints.wait()
    raise SystemExit(128 + signal.SIGTERM)


def preempted(argv: list[str], options: StallOptions) -> dict[str, str]:
    """Seconds from SIGTERM to the end of the process, by what it was doing; all that it had is durable by then."""
    figures = {}
    # The first save takes the memory that later ones find.
    for saves, doing in ((0, "stepping"), (1, "saving already")):
        output = f"{options.output}/{saves}"
        # The last of an option counts; a state of this process's own would take the memory of another.
        words = [*(word for word in argv if word != "--preempt"), "--output", output, "--until-told", str(saves)]
        command = [sys.executable, "-m", "train.studies.save_stall", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            if not any(line.strip() == READY for line in child.stdout):
                raise UserError(f"The process that steps ended with {child.wait()}; its own sentence says why.")
            began = time.perf_counter()
            child.send_signal(signal.SIGTERM)
            child.stdout.read()
            code = child.wait()
        figures[f"SIGTERM while {doing}"] = f"{time.perf_counter() - began:.1f} s to the end, exit code {code}"
        if place_of(output) is None:
            shutil.rmtree(output)
    return figures


if __name__ == "__main__":
    main()
