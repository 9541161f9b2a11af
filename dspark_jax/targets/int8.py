"""Matrices of layers kept as int8 with a scale for each output channel: half the bytes that a pass reads in bfloat16.

Codes are widened where they are multiplied, exactly in bfloat16, and the scale is applied to the product. Made from
weights that are loaded already; embedding, head, norms, routers and experts stay as they are.

Axes: i inputs, o outputs of a matrix, n rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

from dspark_jax.errors import UserError
from dspark_jax.sharding import param, parameter_mesh, split
from dspark_jax.targets.layers import MLP, Attention

LARGEST = 127
"""Codes are symmetric: -128 is not used."""


@dataclass(frozen=True)
class Int8Matrix:
    """The right-hand side of a product: codes [i, o] and their scales [o]."""

    codes: Int8[Array, "i o"]
    scales: Float[Array, " o"]

    def __rmatmul__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        # Scaled after the product: the weight itself is never written in a wider form with its scales.
        out = jnp.matmul(x, self.codes.astype(x.dtype), preferred_element_type=jnp.float32)
        return (out * self.scales).astype(x.dtype)


class Int8Weight(nnx.Module):
    """A matrix parameter kept as codes; indexed with `...` it is what rows are multiplied by, as an `nnx.Param` is."""

    def __init__(self, weight: Float[Array, "i o"], axes: tuple[Any, Any]):
        # Of a plan there are shapes alone.
        shapes = isinstance(weight, jax.ShapeDtypeStruct)
        codes, scales = jax.eval_shape(quantised, weight) if shapes else quantised(weight)
        self.codes = param(codes, *axes)
        self.scales = param(scales, axes[1])

    def __getitem__(self, index: Any) -> Int8Matrix:
        return Int8Matrix(self.codes[index], self.scales[index])


@jax.jit
def quantised(weight: Float[Array, "i o"]) -> tuple[Int8[Array, "i o"], Float[Array, " o"]]:
    """(codes, float32 scales): the nearest multiples of a scale with which each output's largest weight is 127."""
    wide = weight.astype(jnp.float32)
    # An output without weights keeps a scale that can be divided by.
    largest = jnp.max(jnp.abs(wide), axis=0)
    scales = jnp.where(largest > 0, largest, 1.0) / LARGEST
    return jnp.round(wide / scales).astype(jnp.int8), scales


def in_int8(graphdef: nnx.GraphDef, params: Mapping[str, Any], name: str) -> tuple[nnx.GraphDef, dict]:
    """A model with the matrices of its attention and its dense MLPs in int8.

    Args:
        graphdef, params: of a target or a drafter, on one device, or their shapes. The given arrays are not changed;
            until they are dropped, both are held.
        name: of the model, for errors.
    Returns:
        The graph definition and the parameters.
    Raises:
        UserError: parameters over several devices, or a model without such matrices.
    """
    if parameter_mesh(dict(params)) is not None:
        raise UserError(f"{name} lies over several devices; int8 weights are kept on a single one.")

    module = nnx.merge(graphdef, params)
    found = list(_matrices(module))
    if not found:
        raise UserError(f"{name} has no matrices that are kept in int8; load it with its stored weights.")

    for part, field, value in found:
        setattr(part, field, Int8Weight(value.get_value(), value.get_metadata()["logical_axes"]))
    return split(module)


def rounded_shapes(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> set[jax.ShapeDtypeStruct]:
    """The different shapes of the matrices that `in_int8` turns into codes, each of which it rounds with a program."""
    found = (value.get_value() for _, _, value in _matrices(nnx.merge(graphdef, params)))
    return {jax.ShapeDtypeStruct(matrix.shape, matrix.dtype) for matrix in found}


def _matrices(module: nnx.Module) -> Iterator[tuple[nnx.Module, str, nnx.Param]]:
    """(part, its field, the parameter) of each matrix."""
    for _, part in nnx.iter_modules(module):
        for field, value in vars(part).items() if isinstance(part, Attention | MLP) else ():
            # Biases have one axis.
            if isinstance(value, nnx.Param) and value.get_value().ndim == 2:
                yield part, field, value


def refuse_int8(params: Mapping[str, Any], what: str) -> None:
    """UserError for parameters that `in_int8` made, which no layout of files has names for; `what`: whose they are."""
    if any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(dict(params))):
        raise UserError(f"{what} is held in int8, which is not saved; load it with weights='stored' and save that.")
