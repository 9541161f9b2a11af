"""Norms, gates and rotations of a decode round's few rows, by a CPU's kernels where it has them (dspark_jax/native).

XLA's loops for it take as long together as a tenth of the products (docs/log.md). Everywhere else, and with more rows,
the forms here are the plain ones, whose derivatives are taken in either case.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dspark_jax import native
from dspark_jax.targets.joined import Columns

MOST = 1 << 17
"""Numbers of rows from which on XLA's loops, which run in many threads, are as fast."""


def normed(x: Float[Array, "*n d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "*n d"]:
    """x / rms(x) in float32, cast back to x's dtype, times the weight (docs/algorithm.md, rule 61)."""
    if not _taken(x, x.shape[-1]) or weight.dtype != jnp.float32:
        return _plain_norm(x, weight, eps)
    return _normed(x.reshape(-1, x.shape[-1]), weight, eps).reshape(x.shape)


def gated(joined: Float[Array, "*n u"], columns: Columns) -> Float[Array, "*n f"]:
    """silu(gate) * up of rows that hold both."""
    if not _taken(joined, columns.widths[0]):
        return _plain_gate(joined, columns)
    made = _gated(joined.reshape(-1, joined.shape[-1]), columns)
    return made.reshape(*joined.shape[:-1], -1)


def rotations(
    positions: Int[Array, "*n"], frequencies: Float[Array, " h"]
) -> tuple[Float[Array, "*n h"], Float[Array, "*n h"]]:
    """float32 cosines and sines of positions times frequencies."""
    if positions.size * frequencies.size > MOST or not native.ready():
        return _plain_rotations(positions, frequencies)
    # XLA would compute them again in each layer, for each head.
    flat = positions.reshape(-1).astype(jnp.int32)
    made = jax.lax.platform_dependent(flat, frequencies, cpu=native.rotations, default=_plain_rotations)
    cosines, sines = (x.reshape(*positions.shape, -1) for x in made)
    return cosines, sines


def _taken(x: Array, run: int) -> bool:
    return x.dtype == jnp.float32 and math.prod(x.shape) <= MOST and run % native.LANES == 0 and native.ready()


def _plain_norm(x: Array, weight: Array, eps: float) -> Array:
    # The statistic is float32; the weight is applied after the cast back, as in Qwen's reference code.
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight


def _plain_gate(joined: Array, columns: Columns) -> Array:
    gate, up = columns.split(joined)
    return jax.nn.silu(gate) * up


def _plain_rotations(positions: Array, frequencies: Array) -> tuple[Array, Array]:
    # float32 even in a bfloat16 model: a bfloat16 position is exact to 256 only.
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _normed(x: Array, weight: Array, eps: float) -> Array:
    kernel, plain = partial(native.norm_rows, eps=eps), partial(_plain_norm, eps=eps)
    return jax.lax.platform_dependent(x, weight, cpu=kernel, default=plain)


@_normed.defjvp
def _normed_jvp(eps: float, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return jax.jvp(partial(_plain_norm, eps=eps), primals, tangents)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _gated(joined: Array, columns: Columns) -> Array:
    kernel, plain = partial(native.gate_rows, width=columns.widths[0]), partial(_plain_gate, columns=columns)
    return jax.lax.platform_dependent(joined, cpu=kernel, default=plain)


@_gated.defjvp
def _gated_jvp(columns: Columns, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return jax.jvp(partial(_plain_gate, columns=columns), primals, tangents)
