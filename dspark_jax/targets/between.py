"""Norms, gates and rotations of a decode round's few rows, by a CPU's kernels where it has them (dspark_jax/native).

XLA's loops for it take as long together as a tenth of the products (docs/log.md). Everywhere else, and with more rows,
the forms here are the plain ones, whose derivatives are taken in either case.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dspark_jax import native

MOST = 1 << 17
"""Numbers of rows from which on XLA's loops, which run in many threads, are as fast."""


@dataclass(frozen=True)
class Gating:
    """How inputs [n, F] follow from a product [n, 2 F] by joined weights: activation(gate) * up.

    `width`: columns of a block, gate and up in turn.
    """

    width: int
    activation: Callable[[Array], Array]

    def __call__(self, made: Float[Array, "*n u"]) -> Float[Array, "*n f"]:
        blocks = made.reshape(*made.shape[:-1], -1, 2 * self.width)
        halves = blocks[..., : self.width], blocks[..., self.width :]
        gate, up = (x.reshape(*made.shape[:-1], -1) for x in halves)
        return self.activation(gate) * up


def normed(x: Float[Array, "*n d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "*n d"]:
    """x / rms(x) in float32, cast back to x's dtype, times the weight (docs/algorithm.md, rule 61)."""
    if not _taken(x, x.shape[-1]) or weight.dtype != jnp.float32:
        return _plain_norm(x, weight, eps)
    return _normed(x.reshape(-1, x.shape[-1]), weight, eps).reshape(x.shape)


def gated(made: Float[Array, "*n u"], gating: Gating) -> Float[Array, "*n f"]:
    """gating(made)."""
    if gating.activation is not jax.nn.silu or not _taken(made, gating.width):
        return gating(made)
    return _gated(made.reshape(-1, made.shape[-1]), gating).reshape(*made.shape[:-1], -1)


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
def _gated(made: Array, gating: Gating) -> Array:
    return jax.lax.platform_dependent(made, cpu=partial(native.gate_rows, width=gating.width), default=gating)


@_gated.defjvp
def _gated_jvp(gating: Gating, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return jax.jvp(gating, primals, tangents)
