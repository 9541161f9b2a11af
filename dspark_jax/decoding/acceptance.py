"""Speculative rejection sampling (Leviathan et al. 2023; docs/algorithm.md, rules 3 to 6).

Axes: R request slots, K draft position, W = K + 1 verified rows, V vocab.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

TINY_DRAFT_PROB = 1e-8
TINY_RESIDUAL_MASS = 1e-8
MASS_TOLERANCE = 1e-2  # of a law in float32, summed over the largest vocabularies


class Acceptance(NamedTuple):
    """Outcome of a round's acceptance test.

    Attributes:
        accepted: [R] int32, drafts accepted, 0 to the verify length.
        next_law: [R, V] float32, the law of the token after the accepted prefix.
    """

    accepted: Array
    next_law: Array


class AcceptanceRule(Protocol):
    """Decides how many drafts are accepted. Frozen and hashable: it is a jit-static field of the loop."""

    def __call__(
        self,
        draft_tokens: Int[Array, "r k"],
        draft_law: Float[Array, "r k v"],
        target_law: Float[Array, "r w v"],
        uniforms: Float[Array, "r k"],
        verify_lengths: Int[Array, " r"],
    ) -> Acceptance: ...


@dataclass(frozen=True)
class RejectionSampling:
    """Accept x_k while u_k < min(1, p^t(x_k) / p^d(x_k)), then draw the next token from the normalised residual; from
    the target's law if all verified drafts were accepted.

    The committed tokens follow the target's law exactly, whatever the drafter returns. A row of `draft_law` that is not
    a probability law (NaN, infinite or negative entries, a mass other than 1) does not say how its token was drawn:
    that token is rejected and replaced by a draw from the target's own law (docs/algorithm.md, rule 104).
    """

    def __call__(
        self,
        draft_tokens: Int[Array, "r k"],
        draft_law: Float[Array, "r k v"],
        target_law: Float[Array, "r w v"],
        uniforms: Float[Array, "r k"],
        verify_lengths: Int[Array, " r"],
    ) -> Acceptance:
        block = draft_tokens.shape[1]
        chosen = draft_tokens[..., None]
        p_target = jnp.take_along_axis(target_law[:, :block], chosen, axis=-1)[..., 0]
        p_draft = jnp.take_along_axis(draft_law, chosen, axis=-1)[..., 0]

        # Strictly below, from left to right (docs/algorithm.md, rule 3). A NaN in either law makes the comparison
        # false.
        lawful = is_law(draft_law)
        passed = uniforms < jnp.minimum(1.0, p_target / jnp.maximum(p_draft, TINY_DRAFT_PROB))
        passed &= lawful & (jnp.arange(block) < verify_lengths[:, None])

        # A cumulative product stays 0 after the first failure, so its sum is the accepted prefix.
        count = jnp.sum(jnp.cumprod(passed.astype(jnp.int32), axis=1), axis=1)

        # Row `count` of the target judges the token after the accepted prefix, rejected or never drafted.
        target_row = jnp.take_along_axis(target_law, count[:, None, None], axis=1)[:, 0]

        # If every draft was accepted, row `count` of the drafter does not exist; the clamped row is then not used.
        last = jnp.minimum(count, block - 1)[:, None]
        draft_row = jnp.take_along_axis(draft_law, last[..., None], axis=1)[:, 0]
        rejected = (count < verify_lengths) & jnp.take_along_axis(lawful, last, axis=1)[:, 0]

        # A rejection at a row without a law tells nothing about p^d, so no residual is taken there.
        return Acceptance(count, jnp.where(rejected[:, None], residual_law(target_row, draft_row), target_row))


def is_law(probs: Float[Array, "*n v"]) -> Bool[Array, "*n"]:
    """Whether each row is a probability law: nothing negative, nothing infinite or NaN, and mass 1."""
    # A comparison with NaN is false, so NaN and negative entries both make the mass NaN.
    mass = jnp.sum(jnp.where(probs >= 0, probs, jnp.nan), axis=-1)
    return jnp.abs(mass - 1.0) < MASS_TOLERANCE


def residual_law(target: Float[Array, "*n v"], draft: Float[Array, "*n v"]) -> Float[Array, "*n v"]:
    """norm(max(0, p^t - p^d)); p^t itself where the two laws agree so closely that no mass is left."""
    residual = jnp.maximum(target - draft, 0.0)
    # In exact arithmetic the mass is 0 only if the laws are equal, and then nothing is rejected.
    mass = jnp.sum(residual, axis=-1, keepdims=True)
    # Compared this way round, a NaN mass leaves the target's law as well.
    return jnp.where(mass > TINY_RESIDUAL_MASS, residual / jnp.maximum(mass, TINY_RESIDUAL_MASS), target)


def first_stop(
    tokens: Int[Array, "r w"], stop_tokens: Int[Array, "r e"], counts: Int[Array, " r"]
) -> tuple[Int[Array, " r"], Bool[Array, " r"]]:
    """Cut tokens after the first stop token (docs/algorithm.md, rule 10).

    Args:
        tokens: candidates for commitment.
        stop_tokens: of each request, padded with -1.
        counts: how many leading `tokens` are candidates; the rest are ignored.
    Returns:
        (how many tokens are kept, a stop token included; whether a stop token is among them).
    """
    width = tokens.shape[1]

    # [R, W, E] -> [R, W]. Token ids are never negative, so the padding of -1 matches none.
    is_stop = jnp.any(tokens[:, :, None] == stop_tokens[:, None, :], axis=-1)
    is_stop &= jnp.arange(width) < counts[:, None]

    # argmax gives the first True, but also 0 for a row without one, hence the guard.
    index = jnp.where(jnp.any(is_stop, axis=1), jnp.argmax(is_stop, axis=1), width)
    return jnp.minimum(counts, index + 1), index < width
