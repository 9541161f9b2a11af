"""Matrices of layers kept in 8 bits with a scale for each output channel: half the bytes that a pass reads in bfloat16.

Codes are int8, evenly spaced, or fp8 (e4m3), spaced by magnitude. They are widened where they are multiplied, exactly
in bfloat16, and the scale is applied to the product. Made from weights that are loaded already; embedding, head, norms,
routers and experts stay as they are.

Axes: i inputs, o outputs of a matrix, n rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Shaped

from dspark_jax.errors import UserError
from dspark_jax.sharding import param, parameter_mesh, split
from dspark_jax.targets.layers import MLP, Attention

Bits = Literal["int8", "fp8"]
EIGHT_BITS: dict[str, tuple[Any, int]] = {"int8": (jnp.int8, 127), "fp8": (jnp.float8_e4m3fn, 448)}
"""Dtype of the codes and their largest value. int8's are symmetric: -128 is not used."""


@dataclass(frozen=True)
class CodedMatrix:
    """The right-hand side of a product: codes [i, o] and their scales [o]."""

    codes: Shaped[Array, "i o"]
    scales: Float[Array, " o"]

    def __rmatmul__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        # Scaled after the product: the weight itself is never written in a wider form with its scales.
        out = jnp.matmul(x, self.codes.astype(x.dtype), preferred_element_type=jnp.float32)
        return (out * self.scales).astype(x.dtype)


class CodedWeight(nnx.Module):
    """A matrix parameter kept as codes; indexed with `...` it is what rows are multiplied by, as an `nnx.Param` is."""

    def __init__(self, weight: Float[Array, "i o"], axes: tuple[Any, Any], bits: Bits):
        # Of a plan there are shapes alone.
        make = partial(coded, bits=bits)
        codes, scales = jax.eval_shape(make, weight) if isinstance(weight, jax.ShapeDtypeStruct) else make(weight)
        self.codes = param(codes, *axes)
        self.scales = param(scales, axes[1])

    def __getitem__(self, index: Any) -> CodedMatrix:
        return CodedMatrix(self.codes[index], self.scales[index])


@partial(jax.jit, static_argnames="bits")
def coded(weight: Float[Array, "i o"], bits: Bits) -> tuple[Shaped[Array, "i o"], Float[Array, " o"]]:
    """(codes, float32 scales): the nearest codes under a scale with which each output's largest weight is the largest
    of them."""
    kind, most = EIGHT_BITS[bits]
    wide = weight.astype(jnp.float32)
    # An output without weights keeps a scale that can be divided by.
    largest = jnp.max(jnp.abs(wide), axis=0)
    scales = jnp.where(largest > 0, largest, 1.0) / most
    # A conversion to whole numbers cuts, one to a smaller floating-point format rounds to the nearest.
    codes = wide / scales if jnp.issubdtype(kind, jnp.floating) else jnp.round(wide / scales)
    return codes.astype(kind), scales


def in_eight_bits(
    graphdef: nnx.GraphDef, params: Mapping[str, Any], name: str, bits: Bits
) -> tuple[nnx.GraphDef, dict]:
    """A model with the matrices of its attention and its dense MLPs in 8 bits.

    Args:
        graphdef, params: of a target or a drafter, on one device, or their shapes. The given arrays are not changed;
            until they are dropped, both are held.
        name: of the model, for errors.
        bits: the codes.
    Returns:
        The graph definition and the parameters.
    Raises:
        UserError: parameters over several devices, or a model without such matrices.
    """
    if parameter_mesh(dict(params)) is not None:
        raise UserError(f"{name} lies over several devices; {bits} weights are kept on a single one.")

    module = nnx.merge(graphdef, params)
    found = list(matrices(module))
    if not found:
        raise UserError(f"{name} has no matrices that are kept in {bits}; load it with its stored weights.")

    for part, field, value in found:
        setattr(part, field, CodedWeight(value.get_value(), value.get_metadata()["logical_axes"], bits))
    return split(module)


def coded_shapes(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> set[jax.ShapeDtypeStruct]:
    """The different shapes of the matrices that `in_eight_bits` turns into codes, each of which takes a program."""
    found = (value.get_value() for _, _, value in matrices(nnx.merge(graphdef, params)))
    return {jax.ShapeDtypeStruct(matrix.shape, matrix.dtype) for matrix in found}


def matrices(module: nnx.Module) -> Iterator[tuple[nnx.Module, str, nnx.Param]]:
    """(part, its field, the parameter) of each matrix."""
    for _, part in nnx.iter_modules(module):
        for field, value in vars(part).items() if isinstance(part, Attention | MLP) else ():
            # Biases have one axis.
            if isinstance(value, nnx.Param) and value.get_value().ndim == 2:
                yield part, field, value


def refuse_eight_bits(params: Mapping[str, Any], what: str) -> None:
    """UserError for parameters that `in_eight_bits` made, which no layout of files has names for; `what`: whose they
    are."""
    flat = flatten_dict(dict(params))
    for path, leaf in flat.items():
        # Stored codes of DeepSeek-V4 have scales for blocks, in bytes.
        if path[-1] == "scales" and leaf.ndim == 1:
            kind = flat[*path[:-1], "codes"].dtype
            bits = next(name for name, (dtype, _) in EIGHT_BITS.items() if kind == dtype)
            raise UserError(
                f"{what} is held in {bits}, which is not saved; load it with weights='stored' and save that."
            )
