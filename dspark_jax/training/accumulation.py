"""Gradients and sums over micro-batches, and how devices add theirs up.

Where the mesh splits rows alone, each device sums the gradient of its own rows over all micro-batches, and devices meet
once a step, behind the last. Where an axis splits products too, the partitioner plans, and devices meet in each.

Axes: B row of the batch, A micro-batch, N device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from dspark_jax.errors import UserError
from dspark_jax.sharding import AnyMesh, ShardingRules
from dspark_jax.training.losses import Sums
from dspark_jax.training.objective import Batch
from dspark_jax.training.placement import Placement

Differentiated = Callable[[Any, Any], tuple[dict, Sums]]
"""(constants, a pytree of arrays [B, ...]) -> (gradients, sums), additive over rows."""


class Adding(Protocol):
    """How the gradients of a micro-batch become a step's."""

    def part(self, differentiated: Differentiated, constants: Any, rows: Any) -> Any:
        """What a micro-batch adds to the total; parts are added up leaf by leaf."""
        ...

    def placed(self, total: Any) -> Any:
        """The total, where it lies during the loop."""
        ...

    def whole(self, total: Any) -> tuple[dict, Sums]:
        """Gradients and sums of all rows, from the total over micro-batches; gradients lie where parameters do."""
        ...


def summed_once(mesh: AnyMesh, rules: ShardingRules, micro_batches: int) -> bool:
    """Whether devices add up their gradients once a step, in float32, and not once a micro-batch."""
    # One micro-batch is left to the partitioner, which adds up in the compute dtype: half the bytes.
    return micro_batches > 1 and 1 < rules.row_groups(mesh) == mesh.size


def adding(placement: Placement | None, stored: dict | None, micro_batches: int) -> Adding:
    """How a step on this placement adds up; `stored`: of parameters, shapes with their shardings."""
    if placement is None or stored is None:
        return Alone()
    if summed_once(placement.mesh, placement.rules, micro_batches):
        return OnceAStep(placement, stored)
    return OnceAMicroBatch(stored)


class Alone:
    """On one device."""

    def part(self, differentiated: Differentiated, constants: Any, rows: Any) -> Any:
        return differentiated(constants, rows)

    def placed(self, total: Any) -> Any:
        return total

    def whole(self, total: Any) -> tuple[dict, Sums]:
        return total


class OnceAMicroBatch(NamedTuple):
    """By the partitioner: sums over devices are scattered in each micro-batch, and no device holds a gradient whole."""

    stored: dict

    def part(self, differentiated: Differentiated, constants: Any, rows: Any) -> Any:
        return self.placed(differentiated(constants, rows))

    def placed(self, total: Any) -> Any:
        grads, sums = total
        place = jax.lax.with_sharding_constraint
        return jax.tree.map(lambda x, like: place(x, like.sharding), grads, self.stored), sums

    def whole(self, total: Any) -> tuple[dict, Sums]:
        return total


class OnceAStep(NamedTuple):
    """By each device on its own rows. A part is [N, ...], of which each device holds its own, so that adding parts up
    exchanges nothing."""

    placement: Placement
    stored: dict

    def part(self, differentiated: Differentiated, constants: Any, rows: Any) -> Any:
        def own(constants: Any, rows: Any) -> Any:
            return jax.tree.map(lambda x: x[None], differentiated(constants, rows))

        by_row = self.placement.rules.spec(["batch"])
        # Without the check of replication, which kernels do not take part in.
        split = jax.shard_map(own, in_specs=(PartitionSpec(), by_row), out_specs=by_row, check_vma=False)
        return split(constants, rows)

    def placed(self, total: Any) -> Any:
        return self.placement.rows(total)

    def whole(self, total: Any) -> tuple[dict, Sums]:
        batch = self.placement.rules.batch or ()
        specs = jax.tree.map(lambda like: like.sharding.spec, self.stored)

        def meet(own: Any) -> tuple[dict, Sums]:
            grads, sums = jax.tree.map(lambda x: x[0], own)
            return jax.tree.map(lambda x, spec: _met(x, spec, batch), grads, specs), jax.lax.psum(sums, batch)

        by_row = self.placement.rules.spec(["batch"])
        out = (specs, PartitionSpec())
        return jax.shard_map(meet, in_specs=by_row, out_specs=out, check_vma=False)(total)


def _met(x: Array, spec: PartitionSpec, batch: tuple[str, ...]) -> Array:
    """The sum over devices of an array that each holds whole: of the result each keeps the part that it stores."""
    split = {axis: dimension for dimension, axis in enumerate(spec) if axis in batch}
    # Scattered first, over links within a machine; machines exchange parts of what is left.
    for axis, dimension in split.items():
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(x, tuple(axis for axis in batch if axis not in split))


@dataclass(frozen=True)
class MicroBatches:
    """A batch in `steps` equal parts, one after the other."""

    steps: int
    placement: Placement | None

    def total(
        self,
        gradient: Callable[[Batch, Any], tuple[Any, dict[str, Array]]],
        placed: Callable[[Any], Any],
        batch: Batch,
        rows: Any,
    ) -> tuple[Any, dict[str, Array]]:
        """(Σ of the first results of `gradient`, its stored rows in the batch's order).

        Args:
            gradient: of a micro-batch and the blocks drawn from it.
            placed: puts the running sum where it lies.
            batch, rows: of the whole batch.
        Raises:
            UserError: the rows do not divide over micro-batches and devices.
        """
        # Shapes are static, so a bad batch is refused while the step is traced.
        self._check(batch["input_ids"].shape[0])
        if self.steps == 1:
            return gradient(batch, rows)

        # [B, ...] -> [A, B / A, ...] for the batch and for the blocks drawn from it, which belong together row by row.
        micro = jax.tree.map(self._split, (dict(batch), rows))
        if self.placement is not None:
            micro = self.placement.rows(micro, leading=1)

        def add(total: Any, part: Any) -> tuple[Any, dict[str, Array]]:
            made, stored = gradient(*part)
            return jax.tree.map(jnp.add, total, made), stored

        gradient = jax.jit(gradient)  # traced once for its shapes and for the loop
        shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], micro))[0]
        zeros = placed(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
        # One micro-batch after the other, so that the activations of one alone are in memory.
        total, stored = jax.lax.scan(add, zeros, micro)

        return total, jax.tree.map(_joined, stored)

    def _split(self, x: Array) -> Array:
        """[B, ...] -> [A, B / A, ...], every A-th row to a micro-batch: contiguous device shards stay where they
        are."""
        # Row r goes to micro-batch r mod A.
        return jnp.moveaxis(x.reshape(-1, self.steps, *x.shape[1:]), 1, 0)

    def _check(self, rows: int) -> None:
        # Each group of devices takes the same number of rows of every micro-batch.
        groups = 1 if self.placement is None else self.placement.rules.row_groups(self.placement.mesh)
        if rows % (self.steps * groups):
            raise UserError(
                f"A batch of {rows} rows does not divide into {self.steps} micro-batches over {groups} devices; make "
                f"the global batch a multiple of {self.steps * groups}."
            )


def _joined(x: Array) -> Array:
    """[A, B / A, ...] -> [B, ...], the inverse of `_split`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
