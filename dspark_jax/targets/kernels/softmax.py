"""The running softmax that all kernels keep, block of keys by block of keys.

Axes: M rows that share a kv head, T keys of a block, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# As in targets/attention.py: finite, so that a row without keys gives zeros and never NaN.
MASKED = -1e30
FLOOR = MASKED / 2


class Sums(NamedTuple):
    """Of the keys seen so far: the largest score [M, 1] (at least `FLOOR`), the sum of weights against it [M, 1], and
    the weighted sum of values [M, H]; float32."""

    top: Array
    total: Array
    out: Array

    @classmethod
    def empty(cls, rows: int, size: int) -> "Sums":
        """Of no keys."""
        one = jnp.zeros((rows, 1), jnp.float32)
        return cls(one + FLOOR, one, jnp.zeros((rows, size), jnp.float32))

    def with_keys(self, scores: Float[Array, "m t"], values: Float[Array, "t h"]) -> "Sums":
        """The sums with a block of keys more, whose masked scores are `MASKED`."""
        top = jnp.maximum(self.top, jnp.max(scores, axis=-1, keepdims=True))
        # 1 exactly where the maximum stays; exp(MASKED - FLOOR) is 0.
        less, weights = jnp.exp(self.top - top), jnp.exp(scores - top)
        total = less * self.total + jnp.sum(weights, axis=-1, keepdims=True)
        # Weights are cast to the values' dtype; their sum stays float32.
        return Sums(top, total, less * self.out + dot(weights.astype(values.dtype), values))

    def normalised(self) -> Float[Array, "m h"]:
        """The attention's result; zeros for rows without keys."""
        return self.out / jnp.where(self.total > 0, self.total, 1.0)

    def log_sum(self) -> Float[Array, "m 1"]:
        """The logarithm of the sum of exp(score), `FLOOR` for rows without keys."""
        return self.top + jnp.log(jnp.where(self.total > 0, self.total, 1.0))


def dot(a: Array, b: Array, over: tuple[int, int] = (1, 0)) -> Array:
    """The product of two matrices, summed over those of their axes, with a float32 result."""
    if len(b) == 1:
        # A single key, as of a plain round: the TPU's compiler refuses products of such a matrix.
        wide = a.astype(jnp.float32) * b.astype(jnp.float32)
        return wide if over == (1, 0) else jnp.sum(wide, axis=-1, keepdims=True)
    # Float32 operands are multiplied as such; bfloat16 ones at their own rate.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
