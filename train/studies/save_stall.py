"""Seconds that a checkpoint holds the training loop up, with the state of a real run: drafter, moments, key.

    python -m train.studies.save_stall --config qwen3_4b_dspark --output runs/stall
    python -m train.studies.save_stall --config qwen3_4b_dspark --output s3://BUCKET/stall --layers 2

Nothing is trained: the state has the shapes and dtypes of the configuration's on this machine's devices, and a step
changes every element of it, as an optimizer does. Steps alone and steps during a save alternate; medians are printed.
"""

import dataclasses
import statistics
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
from dspark_jax.report import listing
from dspark_jax.sharding import make_mesh
from dspark_jax.storage import objects
from dspark_jax.storage.places import place_of, shown
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.object_checkpoints import AnyCheckpoints, ObjectCheckpoints
from dspark_jax.training.step import TrainState


@dataclass(frozen=True)
class StallOptions:
    """Options of the study."""

    output: str = ""
    """Folder or place of the checkpoints, which must be empty or missing."""
    saves: int = 3
    """Checkpoints that are taken."""
    layers: int = 0
    """Draft layers, where the configuration's do not fit this machine's memory; 0: all."""


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

    announce(config.compute_dtype)
    # From shapes alone: no target, no data and no first step are needed for what a save costs.
    mesh = make_mesh(*config.mesh.sizes)
    state = state_like(AbstractRun.of(config, mesh).spec.abstract)
    size = sum(x.nbytes for x in jax.tree.leaves(state.opt_state)) + sum(
        x.nbytes for x in jax.tree.leaves(state.params)
    )
    with opened(options.output) as checkpoints:
        figures = measure(checkpoints, state, options.saves)

    print(listing({"output": shown(options.output), "state": f"{size / 2**30:.3f} GiB", **figures}))


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


def spread(seconds: list[float]) -> str:
    """The median of several times, the least and the most."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


if __name__ == "__main__":
    main()
