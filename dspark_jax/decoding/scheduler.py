"""Verify lengths: how many of a block's drafts each request has verified this round (SPEC section 1, step 2).

A policy may let x_k in by what x_<k, other requests and the past say, never by x_k itself: that keeps it lossless
(SPEC section 5). Confidence c_k is computed from x_<k, so prefixes cut by c are such rules.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dspark_jax.errors import UserError


class VerifyPolicy(Protocol):
    def __call__(self, confidence: Float[Array, "r k"] | None, caps: Int[Array, " r"]) -> Int[Array, " r"]:
        """Verify lengths 0..caps from confidence logits (None: the drafter has no confidence head)."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Verify as many drafts as each request's cap says: the full block, a fixed length, or 0 (plain decoding)."""

    def __call__(self, confidence: Float[Array, "r k"] | None, caps: Int[Array, " r"]) -> Int[Array, " r"]:
        return caps


@dataclass(frozen=True)
class Threshold:
    """Verify the prefix before the first draft whose confidence is below `threshold` (golden/NOTES 35)."""

    threshold: float

    def __call__(self, confidence: Float[Array, "r k"] | None, caps: Int[Array, " r"]) -> Int[Array, " r"]:
        if self.threshold <= 0:
            return caps
        if confidence is None:
            raise UserError(
                "The threshold policy needs a drafter with a confidence head; use the fixed policy instead."
            )
        sure = (jax.nn.sigmoid(confidence) >= self.threshold).astype(jnp.int32)
        return jnp.minimum(caps, jnp.sum(jnp.cumprod(sure, axis=1), axis=1))


def bucket_ladder(requests: int, width: int, rungs: int = 3) -> tuple[int, ...]:
    """Token counts that the verify pass is compiled for: from one row a request to the full block, evenly spaced."""
    steps = min(rungs, width)
    widths = {1 + round((width - 1) * i / max(steps - 1, 1)) for i in range(steps)} | {width}
    return tuple(requests * w for w in sorted(widths))
