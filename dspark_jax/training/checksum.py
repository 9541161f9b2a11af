"""Checksums of a training state, taken on its devices: what a checkpoint must give back, bit for bit.

A checksum is a sum over elements modulo 2^32, so it does not depend on how an array is split over devices, and a job
may continue on another mesh. A change of any one element always changes it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def checksums(tree: Any) -> list[int]:
    """One 32-bit checksum a leaf, in the order of `jax.tree.leaves`; waits for the arrays.

    Leaf by leaf: a CPU's program holds the mixed bits of all that it is given.
    """
    return [fetch_checksums(begin_checksums(leaf))[0] for leaf in jax.tree.leaves(tree)]


def begin_early(tree: Any) -> list[Array] | None:
    """`begin_checksums` where the loop has to call it, None where a thread may call `checksums` while steps run.

    Programs with collectives come from one thread: devices, of this process or of several, that had those of two in
    different orders would wait for each other.
    """
    return begin_checksums(tree) if jax.device_count() > 1 else None


def finish_checksums(begun: list[Array] | None, tree: Any) -> list[int]:
    """The numbers of what was begun of this tree, or of the tree where nothing was."""
    return checksums(tree) if begun is None else fetch_checksums(begun)


def fetch_checksums(begun: list[Array]) -> list[int]:
    """The numbers of `begin_checksums`, once the devices have them."""
    with jax.transfer_guard("allow"):
        return [int(value) for value in jax.device_get(begun)]


@jax.jit
def begin_checksums(tree: Any) -> list[Array]:
    """`checksums` on the devices, without waiting for them; the tree may be donated afterwards."""
    return [_checksum(leaf) for leaf in jax.tree.leaves(tree)]


def _checksum(x: Array) -> Array:
    """[] uint32: the sum of every element's bits, mixed with its place (the finaliser of MurmurHash3, a bijection)."""
    # The row-major index of every element, mod 2^32. From iotas, so that it is split over devices as `x` is.
    words = _bits(x)
    place = jnp.zeros(words.shape, jnp.uint32)

    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)

    # For a given place each step is a bijection of the 32-bit word, so a changed element always changes its term of
    # the sum, and equal elements that change places do too.
    mixed = words ^ (place * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)

    mixed ^= mixed >> 16
    return jnp.sum(mixed, dtype=jnp.uint32)


def _bits(x: Array) -> Array:
    """The element's bits as uint32; wider elements become several along a last axis."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)

    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)

    # Casting bits to a narrower type adds a last axis; 8-byte elements become two words.
    width = min(x.dtype.itemsize, 4)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
