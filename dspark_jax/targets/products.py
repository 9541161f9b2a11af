"""Products with a float32 result at the rate of their operands' dtype, and products of a decode round's few rows."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dspark_jax import native
from dspark_jax.sharding import traced_platform

FEW_ROWS, FEW_TABLE_ROWS = range(1, 33), range(1, 13)
"""Rows of a product by a weight, and by a table, that the native kernel of a CPU computes: of more, the products of
XLA's library are as fast (docs/log.md)."""
LARGE_WEIGHT = 1 << 16
"""Numbers of a weight from which the kernel pays: smaller ones stay in a cache, packed or not."""


def product(equation: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """einsum of two arrays with a float32 result.

    With bfloat16 operands the cotangent is rounded to bfloat16 before the backward products, which accumulate in
    float32 (docs/algorithm.md, rule 42). Float32 operands have the derivative of the plain einsum; the forward pass is
    that einsum in either case.

    Args:
        equation: explicit, as in "...d,vd->...v". No axis of an operand is repeated in it, none is summed alone, and
            axes under an ellipsis have equal sizes, so that exchanging an operand and the result transposes it.
        a, b: the operands.
    """
    # Autodiff would multiply the float32 cotangent by the other operand widened to float32: half the rate or less.
    narrow = a.dtype == b.dtype == jnp.bfloat16
    return _narrow(equation, a, b) if narrow else _wide(equation, a, b)


def by_table(rows: Float[Array, "*n d"], table: Any) -> Float[Array, "*n v"]:
    """float32 [*n, V]: the products of rows with every row of a table [V, D], an output head or a Markov table."""
    # What stands in for a table, its columns in panels, multiplies by itself.
    if not isinstance(table, jax.Array):
        return rows @ table
    # A single row is no matrix to XLA, which then multiplies and sums elements in float32: on a GPU the whole table is
    # first written so. With a row of zeros beside it, it stays a product of the operands as they lie.
    alone = math.prod(rows.shape[:-1]) == 1 and rows.dtype == jnp.bfloat16
    if not alone:
        return product("...d,vd->...v", rows, table)
    pair = jnp.pad(rows.reshape(1, -1), ((0, 1), (0, 0)))
    return product("nd,vd->nv", pair, table)[0].reshape(*rows.shape[:-1], -1)


def _wide(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow(equation: str, a: Array, b: Array) -> Array:
    return _wide(equation, a, b)


def _forward(equation: str, a: Any, b: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
    # An operand without a gradient, a frozen head, needs neither its product nor the other operand kept for it.
    kept = a.value if b.perturbed else None, b.value if a.perturbed else None
    return _wide(equation, a.value, b.value), kept


def _backward(equation: str, kept: tuple[Array | None, Array | None], cotangent: Any) -> tuple[Array | None, ...]:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None

    (left, right), result = equation.split("->")[0].split(","), equation.split("->")[1]
    a, b = kept
    narrow = cotangent.astype(jnp.bfloat16)

    # Summed in float32, over devices too, and rounded once.
    return (
        None if b is None else _wide(f"{result},{right}->{left}", narrow, b).astype(b.dtype),
        None if a is None else _wide(f"{left},{result}->{right}", a, narrow).astype(a.dtype),
    )


_narrow.defvjp(_forward, _backward, symbolic_zeros=True)


def rows_times(x: Float[Array, "*n i"], weight: Any) -> Float[Array, "*n o"]:
    """x W of rows by a weight [i, o] that is stored input-first, in the dtype of both."""
    rows = math.prod(x.shape[:-1])
    # What stands in for a weight, such as int8 codes, multiplies by itself.
    taken = rows in FEW_ROWS and isinstance(weight, jax.Array) and _taken(x, weight)
    if not taken or weight.shape[1] % native.LANES:
        return x @ weight
    return _few_rows(False, x.reshape(rows, -1), weight).reshape(*x.shape[:-1], -1)


def rows_to_cut(x: Float[Array, "*n i"], weight: Any) -> Float[Array, "*n o"]:
    """`rows_times` of which the result is cut into heads or blocks next."""
    made = rows_times(x, weight)
    # A TPU's compiler would take the cut into the product and lay the weight out anew for it: held twice, and written
    # once a dispatch.
    return jax.lax.optimization_barrier(made) if traced_platform() == "tpu" else made


def rows_times_table(x: Float[Array, "n i"], table: Float[Array, "o i"]) -> Float[Array, "n o"] | None:
    """x W^T of rows by a table that is stored output-first, float32; None where no kernel computes it."""
    if len(x) not in FEW_TABLE_ROWS or not _taken(x, table) or x.shape[1] % native.LANES:
        return None
    return _few_rows(True, x, table)


def _taken(x: Array, weight: Array) -> bool:
    """Whether the kernel computes products of few rows by this weight."""
    large = weight.ndim == 2 and weight.size >= LARGE_WEIGHT
    return large and x.dtype == weight.dtype == jnp.float32 and native.ready()


# With a derivative, which a kernel has not by itself: layers of a few rows may be trained.
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _few_rows(transposed: bool, x: Float[Array, "n i"], weight: Array) -> Float[Array, "n o"]:
    kernel = native.times_table if transposed else native.times
    # Chosen at lowering, so that a program exported from a CPU for an accelerator gets the accelerator's product.
    return jax.lax.platform_dependent(x, weight, cpu=kernel, default=partial(_plain, transposed))


def _plain(transposed: bool, x: Array, weight: Array) -> Array:
    return x @ (weight.T if transposed else weight)


@_few_rows.defjvp
def _few_rows_jvp(transposed: bool, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, weight), (dx, dweight) = primals, tangents
    return _few_rows(transposed, x, weight), _plain(transposed, dx, weight) + _plain(transposed, x, dweight)
