"""Products of two arrays with a float32 result, forward and backward at the rate of their operands' dtype."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
