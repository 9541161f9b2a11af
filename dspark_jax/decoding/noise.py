"""Random numbers of a round: Threefry-2x32 (Salmon et al. 2011) with the bits of `jax.random`, as one fused kernel.

jax lowers Threefry for CPUs as a loop of small kernels. In a draft, which draws token after token, those loops took
longer than the backbone (docs/log.md); written out, the twenty rounds are arithmetic that fuses with what reads it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

# Constants of Threefry-2x32: rotation distances of even and odd groups of rounds, and the key schedule's parity word.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


@partial(jax.tree_util.register_dataclass, data_fields=("high", "low"), meta_fields=())
@dataclass(frozen=True)
class Key:
    """Threefry keys: two uint32 arrays of the same shape, the high and low words. Indexed as an array of keys is."""

    high: Array
    low: Array

    def __getitem__(self, index: Any) -> "Key":
        return Key(self.high[index], self.low[index])

    @classmethod
    def of(cls, keys: UInt32[Array, "*n 2"]) -> "Key":
        """From raw keys in the layout of `jax.random.key_data`."""
        return cls(keys[..., 0], keys[..., 1])

    def fold_in(self, number: Int[Array, "*n"]) -> "Key":
        """`jax.random.fold_in` of each key; the shapes of keys and numbers broadcast."""
        number = jnp.asarray(number).astype(jnp.uint32)
        return Key(*threefry(self, jnp.zeros_like(number), number))

    def uniform(self, count: int) -> Float[Array, "*n count"]:
        """`jax.random.uniform(key, (count,))` of each key: float32 in [0, 1), multiples of 2^-23."""

        # jax's partitionable layout: number i of a key comes from counter i alone, as the XOR of both output words.
        index = jnp.arange(count, dtype=jnp.uint32)
        high, low = threefry(self[..., None], jnp.zeros_like(index), index)

        # 23 random bits behind the exponent of 1.0 make a number in [1, 2).
        bits = ((high ^ low) >> 9) | jnp.uint32(0x3F800000)
        return jax.lax.bitcast_convert_type(bits, jnp.float32) - 1.0


# A function of its own while tracing; the compiler inlines its calls again, a hundred instructions each.
@jax.jit
def threefry(key: Key, high: UInt32[Array, "*n"], low: UInt32[Array, "*n"]) -> tuple[Array, Array]:
    """Both words of the counter (high, low) enciphered under each key; all shapes broadcast."""
    words = (key.high, key.low, key.high ^ key.low ^ jnp.uint32(_PARITY))

    high, low = high + words[0], low + words[1]

    for group in range(5):
        # Four mixing rounds, then the next words of the key schedule and the group's number are injected.
        for rotation in _ROTATIONS[group % 2]:
            high = high + low
            low = high ^ ((low << rotation) | (low >> (32 - rotation)))
        high = high + words[(group + 1) % 3]
        low = low + words[(group + 2) % 3] + jnp.uint32(group + 1)

    return high, low
