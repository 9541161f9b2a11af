"""Sums over chunks of rows whose gradient is made in the forward pass, so that no chunk is computed a second time.

What a chunk makes of its rows, logits above all, is dropped once its sums and their gradient are known.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Cast = Callable[[Any], Any]
Chunk = Callable[..., tuple[Array, Any]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(chunk: Chunk, cast: Cast, weights: Any, rows: Any, parts: Any, constants: Any) -> tuple[Array, Any, Any]:
    """Σ of a loss over chunks, differentiable by `weights` and `rows` alone.

    Args:
        chunk: (cast weights, rows, part, constants) -> (loss [] float32, (sums, made)), a pure function of them.
        cast: `weights` as a chunk uses them; their gradients add up in the dtype of `weights`.
        weights: a pytree of arrays.
        rows: a pytree of arrays with the chunks as their first axis.
        parts: what else a chunk takes, likewise with the chunks first; no gradient.
        constants: the same for all chunks; no gradient.
    Returns:
        (the loss, the other sums, what each chunk made, stacked); the last two without a gradient.
    """
    narrow = cast(weights)

    def one(rows: Any, part: Any) -> tuple[Any, Any]:
        loss, (sums, made) = chunk(narrow, rows, part, constants)
        return (loss, sums), made

    (loss, sums), made = _over(one, rows, parts)
    return loss, sums, made


def _forward(
    chunk: Chunk, cast: Cast, weights: Any, rows: Any, parts: Any, constants: Any
) -> tuple[tuple[Array, Any, Any], tuple[Any, Any]]:
    narrow = cast(weights)
    gradient = jax.value_and_grad(chunk, argnums=(0, 1), has_aux=True)

    def one(rows: Any, part: Any) -> tuple[Any, Any]:
        (loss, (sums, made)), (d_weights, d_rows) = gradient(narrow, rows, part, constants)
        # Widened before they are added up, as the derivative of the cast does.
        d_weights = jax.tree.map(lambda d, x: d.astype(x.dtype), d_weights, weights)
        return (loss, sums, d_weights), (made, d_rows)

    (loss, sums, d_weights), (made, d_rows) = _over(one, rows, parts)
    return (loss, sums, made), (d_weights, d_rows)


def _backward(chunk: Chunk, cast: Cast, kept: tuple[Any, Any], cotangents: tuple[Array, Any, Any]) -> tuple:
    # The gradient is linear in the loss's cotangent, a scalar; the other results have none.
    scaled = jax.tree.map(lambda d: (d * cotangents[0]).astype(d.dtype), kept)
    return *scaled, None, None


summed.defvjp(_forward, _backward)


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
