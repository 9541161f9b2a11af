"""The rounding under which served V4 weights were trained, in float: fp8 keys and entries, fp4 index rows.

Off unless config.json sets `quantised_caches`; the reference numbers are made without it.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

FP8_BLOCK, FP4_GROUP = 64, 32


@dataclass(frozen=True)
class KeyRounding:
    """`round_keys` with `rotated` channels kept; a value, so that equal modules compare equal."""

    rotated: int

    def __call__(self, x: Float[Array, "*n h"]) -> Float[Array, "*n h"]:
        return round_keys(x, self.rotated)


def round_keys(x: Float[Array, "*n h"], rotated: int) -> Float[Array, "*n h"]:
    """All channels except the last `rotated` ones rounded to e4m3, with one power-of-two scale for each 64 of them."""
    still, turned = x[..., : x.shape[-1] - rotated], x[..., x.shape[-1] - rotated :]
    blocks = _groups(still.astype(jnp.float32), FP8_BLOCK)

    # The floor keeps the scale of an all-zero block away from 0.
    largest = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1, keepdims=True), 1e-4)
    scale = _power_of_two(largest / 448.0)  # 448 is the largest e4m3 value
    # There and back: the values are those that the served kernels see, the dtype is the caller's.
    rounded = (blocks / scale).astype(jnp.float8_e4m3fn).astype(jnp.float32) * scale

    return jnp.concatenate([rounded.reshape(still.shape).astype(x.dtype), turned], axis=-1)


def round_index_rows(x: Float[Array, "*n h"]) -> Float[Array, "*n h"]:
    """Rows rotated by the normalised Hadamard matrix, then rounded to e2m1 in groups of 32."""
    # The rotation spreads outliers over all channels, which a scale for 32 of them could not absorb.
    groups = _groups(rotate_by_hadamard(x), FP4_GROUP)
    largest = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, _power_of_two(largest / 6.0), 1.0)  # 6 is the largest e2m1 value
    rounded = _nearest_e2m1(groups / scale) * scale

    return rounded.reshape(x.shape).astype(x.dtype)


def rotate_by_hadamard(x: Float[Array, "*n h"]) -> Float[Array, "*n h"]:
    """float32 x H / sqrt(size), H in Sylvester's order; the size is a power of two."""
    size = x.shape[-1]
    # Built by numpy at trace time: a constant of the program.
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])

    return jnp.einsum("...h,hk->...k", x.astype(jnp.float32), jnp.asarray(matrix), precision="highest") * size**-0.5


def _groups(x: Array, size: int) -> Array:
    """[..., C] -> [..., C / size, size], one group of all channels where there are fewer."""
    return x.reshape(*x.shape[:-1], -1, min(size, x.shape[-1]))


def _power_of_two(x: Array) -> Array:
    """The least power of two that is not below x."""
    # frexp gives a mantissa in [0.5, 1), so an exact power of two comes out one exponent too high.
    mantissa, exponent = jnp.frexp(x)
    return jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5))


def _nearest_e2m1(x: Array) -> Array:
    """Values of magnitude up to 6 on the grid 0, .5, 1, 1.5, 2, 3, 4, 6; ties go to the even code."""
    # Steps of .5 below 2, of 1 below 4, of 2 above; jnp.round sends ties to even multiples, which are even codes.
    size = jnp.abs(x)
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))
    return jnp.sign(x) * jnp.minimum(jnp.round(size / step) * step, 6.0)
