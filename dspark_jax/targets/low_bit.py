"""Weights kept in memory as they are stored: fp8 with a scale for each block, fp4 with a scale for 32 columns.

Codes are widened where they are used: a dense matrix as a whole, a routed expert one at a time. Values are exact in
bfloat16, whose exponent is the scales'.

Axes: o rows of a stored matrix, i its columns, E experts, n token rows.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dspark_jax.sharding import param

BLOCK = 128
"""Rows and columns that share an fp8 scale."""
GROUP = 32
"""Columns that share an fp4 scale."""
CODES, SCALES = "codes", "scales"
"""Last names of the parameters that hold stored codes; they are never cast."""


def powers_of_two(codes: Array) -> Array:
    """bfloat16 2^(byte - 127) of e8m0 bytes; the byte for NaN gives infinity."""
    # bfloat16 has the same biased exponent, above seven bits of mantissa. Byte 0, where the exponent field would mean
    # zero, is the subnormal with the highest bit of mantissa.
    wide = codes.astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(jnp.where(wide == 0, jnp.uint16(0x40), wide << 7), jnp.bfloat16)


def widen_fp8(codes: Array, scales: Array) -> Array:
    """bfloat16 [o, i] of e4m3 codes [o, i] with e8m0 bytes [ceil(o / 128), ceil(i / 128)]."""
    rows, columns = codes.shape
    scale = jnp.repeat(jnp.repeat(powers_of_two(scales), BLOCK, axis=0)[:rows], BLOCK, axis=1)[:, :columns]
    return codes.astype(jnp.bfloat16) * scale


def widen_nibbles(nibbles: Array) -> Array:
    """bfloat16 values of e2m1 codes 0 to 15, without their scales."""
    # 0 and 1 are 0 and 0.5; from 2 on a code is two bits of exponent and one of mantissa. Arithmetic, since a table
    # would be a gather for each element.
    size = nibbles.astype(jnp.uint16) & 7
    bits = jnp.where(size < 2, size * (126 << 7), ((126 + (size >> 1)) << 7) | ((size & 1) << 6))
    sign = (nibbles.astype(jnp.uint16) & 8) << 12

    return jax.lax.bitcast_convert_type((bits | sign).astype(jnp.uint16), jnp.bfloat16)


class PackedMatrix(NamedTuple):
    """fp4 matrices: `codes` int8 [..., i / 2, o] with input 2 c in the low half of row c, `scales` uint8
    [..., i / 32, o].

    Input-first, unlike the files: a TPU's compiler lays products out so, and would turn the whole stack round in every
    dispatch.
    """

    codes: Any
    scales: Any

    def at(self, index: Any) -> "PackedMatrix":
        """The matrix `index` of a stack."""
        return PackedMatrix(*(jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in self))

    def product(self, x: Float[Array, "n i"]) -> Float[Array, "n o"]:
        """x Wᵀ, in x's dtype.

        Even and odd inputs are two products, so that the halves of a byte never have to be laid next to each other.
        """
        scale = jnp.repeat(powers_of_two(self.scales), GROUP // 2, axis=0)
        pairs = x.reshape(len(x), -1, 2)

        out = jnp.zeros((len(x), self.codes.shape[-1]), jnp.float32)
        # The codes stay int8: a change of type before the choice of an expert would be one of the whole stack.
        for column, nibbles in enumerate((self.codes & 15, (self.codes >> 4) & 15)):
            weight = (widen_nibbles(nibbles) * scale).astype(x.dtype)
            out += jnp.einsum("ni,io->no", pairs[..., column], weight, preferred_element_type=jnp.float32)

        return out.astype(x.dtype)


class Fp8Weight(nnx.Module):
    """A dense parameter kept as e4m3 codes; indexed with `...` it is its values, as an `nnx.Param` is."""

    def __init__(
        self, shape: tuple[int, ...], order: tuple[int, ...], rows: int, turned: bool, axes: tuple[str | None, ...]
    ):
        """Codes for a parameter of `shape` with these logical axes.

        The stored matrix, its rows and columns unfolded, has its first `rows` axes in the rows; `order` permutes the
        unfolded axes to the parameter's. Codes that are `turned` are kept as columns by rows.
        """
        unfolded = [order.index(axis) for axis in range(len(shape))]
        self.unfolded, self.order = tuple(shape[axis] for axis in unfolded), order

        # Merged axes can be split by the first of them alone.
        out, size = math.prod(self.unfolded[:rows]), math.prod(self.unfolded[rows:])
        names = axes[unfolded[0]], axes[unfolded[rows]]
        kept, names = ((size, out), names[::-1]) if turned else ((out, size), names)
        self.codes, self.turned = param(jnp.zeros(kept, jnp.float8_e4m3fn), *names), turned

        # A few bytes for each matrix: whole on every device.
        self.scales = param(jnp.zeros((-(-out // BLOCK), -(-size // BLOCK)), jnp.uint8), None, None)

    def __getitem__(self, index: Any) -> Array:
        codes = self.codes[...].T if self.turned else self.codes[...]
        return widen_fp8(codes, self.scales[...]).reshape(self.unfolded).transpose(self.order)[index]


class Fp4Experts(nnx.Module):
    """A stack of matrices [E, i, o], one for each routed expert, kept as e2m1 codes."""

    def __init__(self, shape: tuple[int, int, int], axes: tuple[str | None, ...]):
        experts, size, out = shape
        self.codes = param(jnp.zeros((experts, size // 2, out), jnp.int8), *axes)
        self.scales = param(jnp.zeros((experts, size // GROUP, out), jnp.uint8), *axes)

    @property
    def matrices(self) -> PackedMatrix:
        """The codes and scales as arrays."""
        return PackedMatrix(self.codes[...], self.scales[...])
