"""Rotation of the last P channels of a head in neighbouring pairs (2i, 2i + 1), and its inverse."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dspark_jax.targets.config import RopeConfig
from dspark_jax.targets.layers import Rope


def rope_at(config: RopeConfig, size: int, positions: Int[Array, "*n"]) -> Rope:
    """cos and sin of `size` rotated channels at absolute positions."""
    return Rope.at(config, size, positions)


def rotate_tail(x: Float[Array, "*n h"], rope: Rope, inverse: bool = False) -> Float[Array, "*n h"]:
    """Rotates the last channels of every row, in float32; `rope` [*n, P/2] must broadcast against x's leading axes."""
    size = 2 * rope.cos.shape[-1]
    still, turned = x[..., :-size], x[..., -size:].astype(jnp.float32)

    # Neighbouring pairs, unlike the halves of `Rope.rotate`; interleaving them again restores the order of channels.
    even, odd = turned[..., 0::2], turned[..., 1::2]
    sin = -rope.sin if inverse else rope.sin
    pairs = jnp.stack([even * rope.cos - odd * sin, odd * rope.cos + even * sin], axis=-1)

    return jnp.concatenate([still, pairs.reshape(turned.shape).astype(x.dtype)], axis=-1)


def rotate_heads(x: Float[Array, "*n q h"], rope: Rope, inverse: bool = False) -> Float[Array, "*n q h"]:
    """`rotate_tail` of every head with the same rope."""
    return rotate_tail(x, Rope(rope.cos[..., None, :], rope.sin[..., None, :]), inverse)
