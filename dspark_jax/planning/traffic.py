"""Collectives of a training step by name, counted from shapes and shardings alone.

What the step asks for (training/step.py, targets/scanned.py): a gather of parameters and tables once, of each of the
target's layers once a micro-batch, and a sum of gradients once a step, or once a micro-batch where a tensor or expert
axis splits products (training/accumulation.py). Small ones are left out: norms, losses, sums of a split vocabulary. A
compiler may do more, which its text shows (`train.studies.compiled`).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from dspark_jax.checkpoints.huggingface import DTYPES
from dspark_jax.planning.estimate import in_compute_dtype, shard_bytes
from dspark_jax.planning.training import AbstractRun
from dspark_jax.roofline.hardware import Device
from dspark_jax.sharding import gathered, is_gathered
from dspark_jax.training.accumulation import summed_once


class Collective(NamedTuple):
    """One kind of exchange in a step.

    Attributes:
        name: what is exchanged.
        kind: as in `compiled.COLLECTIVES`.
        devices: how many take part.
        span: devices from the first to the last of them, in the mesh's order.
        times: how often in a step.
        size: bytes of one, on one device: a gather's result, a sum's operand.
    """

    name: str
    kind: str
    devices: int
    span: int
    times: int
    size: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, by rings: a share of everybody's part for each of the others."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.times * self.size * (self.devices - 1) / self.devices

    def seconds(self, device: Device, machine: int) -> float:
        """The least seconds of a step's exchanges, by the slowest of their links; `machine` devices lie together."""
        return self.sent / (device.links if self.span <= machine else device.network)


def collectives_of(run: AbstractRun) -> list[Collective]:
    """The step's collectives, those of one device; none on a mesh of one."""
    made = (*_parameters(run), *_gradients(run), *_target(run), *_rows(run))
    return [one for one in made if one.size and one.devices > 1]


def _parameters(run: AbstractRun) -> Iterator[Collective]:
    # They travel in the dtype that computing casts them to.
    sizes = [_gathered_bytes(run, x) for x in jax.tree.leaves(in_compute_dtype(run))]
    yield _over(run, "drafter's parameters", "all-gather", ("fsdp",), 1, sum(sizes))

    # A tied table travels once.
    size = sum(_gathered_bytes(run, x) for x in jax.tree.leaves(run.shared)) // (2 if run.shared.tied else 1)
    yield _over(run, "embedding and head", "all-gather", ("fsdp",), 1, size)


def _gradients(run: AbstractRun) -> Iterator[Collective]:
    mesh, split, whole = run.placement.mesh, 0, 0
    once = summed_once(mesh, run.placement.rules, run.micro_batches)
    # What a device has added up is float32; of one micro-batch, rounded to the compute dtype as products give it.
    for x in jax.tree.leaves(run.state.params if once else in_compute_dtype(run)):
        full = shard_bytes(x, gathered(x.sharding, run.placement.rules))
        if is_gathered(x.shape, x.sharding, run.placement.rules):
            split += full
        else:
            whole += full

    times = 1 if once else run.micro_batches
    yield _over(run, "gradients, to where they are stored", "reduce-scatter", ("fsdp",), times, split)
    yield _over(run, "their parts", "all-reduce", ("data",), times, split // mesh.shape["fsdp"])
    # Small: norms, and Markov tables where they are replicated.
    yield _over(run, "gradients of what is whole", "all-reduce", ("data", "fsdp"), times, whole)


def _target(run: AbstractRun) -> Iterator[Collective]:
    if run.target_params is None:
        return
    layers = run.target_params["layers"]
    stacks = run.target.config.num_layers // len(layers)
    size = 0
    for x in jax.tree.leaves(layers):
        # A stack has its layers first, which no axis splits.
        size += _gathered_bytes(run, x)
    number = run.target.config.num_layers
    name = "target's layers, one by one" if stacks > 1 else "target's layers"
    yield _over(run, name, "all-gather", ("fsdp",), number * run.micro_batches, size // number)


def _rows(run: AbstractRun) -> Iterator[Collective]:
    itemsize = DTYPES[run.spec.dtype].dtype.itemsize
    rows, length = run.rows_a_device, run.batch["input_ids"].shape[1]
    config, width = run.spec.drafter, run.target.config.hidden_size
    own = getattr(config, "num_anchors", length) * config.block_size

    # After attention and after the MLP, forward, and before both, backward.
    size = rows * own * width * itemsize
    times = 4 * config.backbone.num_layers * run.micro_batches
    yield _over(run, "rows of the draft layers", "all-reduce", ("tensor",), times, size)
    if run.target_params is not None:
        times = 2 * run.target.config.num_layers * run.micro_batches
        size = rows * length * width * itemsize
        yield _over(run, "rows of the target's layers", "all-reduce", ("tensor",), times, size)


def _over(run: AbstractRun, name: str, kind: str, axes: tuple[str, ...], times: int, size: int) -> Collective:
    """A collective over all devices along these neighbouring mesh axes."""
    sizes = run.placement.mesh.shape
    devices = math.prod(sizes[axis] for axis in axes)
    # Later axes lie closer together.
    inner = list(sizes)[list(sizes).index(axes[-1]) + 1 :]
    return Collective(name, kind, devices, devices * math.prod(sizes[axis] for axis in inner), times, size)


def _gathered_bytes(run: AbstractRun, x: Any) -> int:
    """Bytes of a stored array in use, 0 where it is used as it lies."""
    rules = run.placement.rules
    return shard_bytes(x, gathered(x.sharding, rules)) if is_gathered(x.shape, x.sharding, rules) else 0
