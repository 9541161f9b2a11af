"""Experts over a mesh: each device computes its own experts' share of its rows, and the shares are added.

Nothing is dropped and no row is sent anywhere: rows are on every device of the expert axis already, as they are on
those of the tensor axis, and one sum over both axes joins the shares. The partitioner alone would gather the stack of
experts on every device, since which of them a row needs is known only when the program runs.

Axes: N token rows, K experts of a row, D hidden, F expert width, E experts.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dspark_jax.sharding import traced_mesh

Stack = TypeVar("Stack")
Product = Callable[[Array, Array, Array, Stack], Array]
"""(rows [N, D], weights [N, K], ids [N, K], stack) -> the sum of the chosen experts that are in the stack."""


def over_experts(
    product: Product[Stack],
    rows: Float[Array, "n d"],
    weights: Float[Array, "n k"],
    chosen: Int[Array, "n k"],
    stack: Stack,
    widths: Stack,
) -> Float[Array, "n d"]:
    """`product` over the experts of all devices of the traced mesh's expert axis; without one, `product` itself.

    Args:
        product: ids outside its stack must add nothing.
        rows, weights, chosen: of all rows.
        stack: a pytree of arrays [E, ...].
        widths: for each of its arrays the axis that holds F, which the tensor axis splits.
    """
    mesh, leaves = traced_mesh(), jax.tree.leaves(stack)
    experts = leaves[0].shape[0]
    # Where neither experts nor their width are split, the partitioner alone plans.
    if mesh is None or experts % mesh.shape["expert"] or mesh.shape["expert"] * mesh.shape["tensor"] == 1:
        return product(rows, weights, chosen, stack)

    # A packed array may have too few columns for the axis; all arrays of an expert are split, or none.
    axes, spread = jax.tree.leaves(widths), mesh.shape["tensor"]
    tensor = "tensor" if all(x.shape[axis] % spread == 0 for x, axis in zip(leaves, axes, strict=True)) else None
    batch = _batch_axes(mesh, len(rows))

    def share(rows: Array, weights: Array, chosen: Array, stack: Stack) -> Array:
        # Ids relative to the first expert that this device has.
        first = jax.lax.axis_index("expert") * (experts // mesh.shape["expert"])
        out = product(rows, weights, chosen - first, stack).astype(jnp.float32)
        return jax.lax.psum(out, ("expert", "tensor") if tensor else "expert").astype(rows.dtype)

    splits = jax.tree.map(
        lambda x, axis: P("expert", *(tensor if i == axis else None for i in range(1, x.ndim))), stack, widths
    )
    row = P(batch, None)
    # Without the check of replication: branches over experts without rows would have to agree in it.
    split = jax.shard_map(share, in_specs=(row, row, row, splits), out_specs=row, check_vma=False)

    return split(rows, weights, chosen, stack)


def _batch_axes(mesh: AbstractMesh, rows: int) -> tuple[str, ...] | None:
    """The axes that rows of a batch lie over, if they can share this many rows evenly."""
    axes = ("data", "fsdp")
    return axes if rows % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
