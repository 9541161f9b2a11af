"""Broken numbers: rows that give no law, and values that must not reach a cache or a policy (docs/algorithm.md, rules
104 and 105).

Axes: R request slots, W rows of a block, V vocab.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sound_rows(logits: Float[Array, "r w v"]) -> Int[Array, " r"]:
    """Rows before the first whose logits give no law: those with a NaN or +inf, or with -inf alone (docs/algorithm.md,
    rule 105)."""
    # One reduction finds all cases: max is NaN with a NaN, +inf with a +inf, and -inf only where every entry is.
    sound = jnp.isfinite(jnp.max(logits, axis=-1))
    return jnp.sum(jnp.cumprod(sound.astype(jnp.int32), axis=1), axis=1)


def finite_logits(confidence: Array) -> Array:
    """Confidence logits clipped to +-30, with NaN at the lowest, so that no policy's statistics become NaN."""
    # sigmoid(30) rounds to 1 in float32: the bounds change no confidence that a policy could tell apart.
    return jnp.clip(jnp.where(jnp.isnan(confidence), -30.0, confidence), -30.0, 30.0)
