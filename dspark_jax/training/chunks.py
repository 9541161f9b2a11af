"""Sums over chunks of rows whose gradient is made in the forward pass, so that no chunk is computed a second time.

What a chunk makes of its rows, logits above all, is dropped once its sums and their gradient are known. On a mesh each
device sums its own rows over all chunks, and devices meet once, behind the last.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from dspark_jax.sharding import ShardingRules, traced_mesh

Cast = Callable[[Any], Any]
Chunk = Callable[..., tuple[Array, Any]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(chunk: Chunk, cast: Cast, weights: Any, rows: Any, parts: Any, constants: Any) -> tuple[Array, Any, Any]:
    """Σ of a loss over chunks, differentiable by `weights` and `rows` alone.

    Args:
        chunk: (cast weights, rows, part, constants) -> (loss [] float32, (sums, made)), a pure function of them, and
            additive over the rows of the batch.
        cast: `weights` as a chunk uses them; their gradients add up in the dtype of `weights`.
        weights: a pytree of arrays.
        rows: a pytree of arrays [chunks, B, ...].
        parts: what else a chunk takes, [chunks, B, ...], or [chunks] for all rows; no gradient.
        constants: (what all rows share, a pytree of arrays [B, ...]), the same for all chunks; no gradient.
    Returns:
        (the loss, the other sums, what each chunk made, [chunks, B, ...]); the last two without a gradient.
    """

    def sums_of(narrow: Any, rows: Any, parts: Any, constants: Any) -> tuple[Any, Any]:
        def one(rows: Any, part: Any) -> tuple[Any, Any]:
            loss, (sums, made) = chunk(narrow, rows, part, constants)
            return (loss, sums), made

        return _over(one, rows, parts)

    (loss, sums), made = _on_own_rows(sums_of, cast(weights), rows, parts, constants)
    return loss, sums, made


def _forward(
    chunk: Chunk, cast: Cast, weights: Any, rows: Any, parts: Any, constants: Any
) -> tuple[tuple[Array, Any, Any], tuple[Any, Any]]:
    gradient = jax.value_and_grad(chunk, argnums=(0, 1), has_aux=True)
    dtypes = jax.tree.map(lambda x: x.dtype, weights)

    def sums_of(narrow: Any, rows: Any, parts: Any, constants: Any) -> tuple[Any, Any]:
        def one(rows: Any, part: Any) -> tuple[Any, Any]:
            (loss, (sums, made)), (d_weights, d_rows) = gradient(narrow, rows, part, constants)
            # Widened before they are added up, as the derivative of the cast does.
            d_weights = jax.tree.map(lambda d, dtype: d.astype(dtype), d_weights, dtypes)
            return (loss, sums, d_weights), (made, d_rows)

        return _over(one, rows, parts)

    (loss, sums, d_weights), (made, d_rows) = _on_own_rows(sums_of, cast(weights), rows, parts, constants)
    return (loss, sums, made), (d_weights, d_rows)


def _backward(chunk: Chunk, cast: Cast, kept: tuple[Any, Any], cotangents: tuple[Array, Any, Any]) -> tuple:
    # The gradient is linear in the loss's cotangent, a scalar; the other results have none.
    scaled = jax.tree.map(lambda d: (d * cotangents[0]).astype(d.dtype), kept)
    return *scaled, None, None


summed.defvjp(_forward, _backward)


def _on_own_rows(sums_of: Callable[..., tuple[Any, Any]], narrow: Any, rows: Any, parts: Any, constants: Any) -> Any:
    """`sums_of` on each device's rows, its first results summed over devices.

    The partitioner alone would sum the weights' gradient over devices in every chunk.
    """
    mesh, rules = traced_mesh(), ShardingRules()
    count = jax.tree.leaves(rows)[0].shape[1]
    # An axis that splits the vocabulary is the partitioner's.
    if mesh is None or mesh.shape["tensor"] * mesh.shape["expert"] > 1 or count % rules.row_groups(mesh):
        return sums_of(narrow, rows, parts, constants)

    whole, by_row, in_chunks = PartitionSpec(), rules.spec(["batch"]), rules.spec([None, "batch"])

    def local(*operands: Any) -> tuple[Any, Any]:
        total, made = sums_of(*operands)
        return jax.lax.psum(total, rules.batch), made

    of_parts = jax.tree.map(lambda x: in_chunks if x.ndim > 1 else whole, parts)
    specs = (whole, in_chunks, of_parts, (whole, by_row))
    split = jax.shard_map(local, in_specs=specs, out_specs=(whole, in_chunks), check_vma=False)
    return split(narrow, rows, parts, constants)


def _over(one: Callable[[Any, Any], tuple[Any, Any]], rows: Any, parts: Any) -> tuple[Any, Any]:
    """(Σ of the first results of `one`, the second ones stacked) over the chunks."""
    first = jax.tree.map(lambda x: x[0], (rows, parts))
    # A single chunk needs no loop.
    if len(jax.tree.leaves(rows)[0]) == 1:
        total, made = one(*first)
        return total, jax.tree.map(lambda x: x[None], made)

    # The shapes come from the function that the scan runs, so that it is traced once for both.
    one = jax.jit(one)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, *first)[0])

    def step(total: Any, given: tuple[Any, Any]) -> tuple[Any, Any]:
        more, made = one(*given)
        return jax.tree.map(jnp.add, total, more), made

    return jax.lax.scan(step, zeros, (rows, parts))
