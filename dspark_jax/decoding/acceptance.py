"""Acceptance by comparing laws: rejection sampling draft by draft, and block verification (docs/algorithm.md, rules 3
to 6 and 112).

Axes: R request slots, K draft position, W = K + 1 verified rows, V vocab.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.drafters.laws import DraftLaw

TINY_DRAFT_PROB = 1e-8
TINY_RESIDUAL_MASS = 1e-8


class Acceptance(NamedTuple):
    """Outcome of a round's acceptance test.

    Attributes:
        accepted: [R] int32, drafts accepted, 0 to the verify length.
        next_law: [R, V] float32, the law of the token after the accepted prefix.
    """

    accepted: Array
    next_law: Array


class AcceptanceRule(Protocol):
    """Decides how many drafts are accepted. Frozen and hashable: it is a jit-static field of the loop.

    Whether x_k is verified may depend on x_<k alone; the rule is exact under no other schedule (docs/algorithm.md,
    rule 76).
    """

    def __call__(
        self,
        draft_tokens: Int[Array, "r k"],
        draft_law: DraftLaw,
        target_law: Float[Array, "r w v"],
        uniforms: Float[Array, "r k"],
        verify_lengths: Int[Array, " r"],
    ) -> Acceptance: ...


@dataclass(frozen=True)
class RejectionSampling:
    """Accept x_k while u_k < min(1, p^t(x_k) / p^d(x_k)), then draw the next token from the normalised residual; from
    the target's law if all verified drafts were accepted (Leviathan et al. 2023).

    The committed tokens follow the target's law exactly, whatever the drafter returns. A row of `draft_law` that is not
    a probability law (NaN, infinite or negative entries, a mass other than 1) does not say how its token was drawn:
    that token is rejected and replaced by a draw from the target's own law (docs/algorithm.md, rule 104).
    """

    def __call__(
        self,
        draft_tokens: Int[Array, "r k"],
        draft_law: DraftLaw,
        target_law: Float[Array, "r w v"],
        uniforms: Float[Array, "r k"],
        verify_lengths: Int[Array, " r"],
    ) -> Acceptance:
        block = draft_tokens.shape[1]

        # Strictly below, from left to right (docs/algorithm.md, rule 3). A NaN in either law makes the comparison
        # false.
        lawful = draft_law.lawful()
        passed = uniforms < jnp.minimum(1.0, _ratios(draft_tokens, draft_law, target_law))
        passed &= lawful & (jnp.arange(block) < verify_lengths[:, None])

        # A cumulative product stays 0 after the first failure, so its sum is the accepted prefix.
        count = jnp.sum(jnp.cumprod(passed.astype(jnp.int32), axis=1), axis=1)
        target_row = _row_after(target_law, count)

        # If every draft was accepted, row `count` of the drafter does not exist; the clamped row is then not used.
        last = jnp.minimum(count, block - 1)
        rejected = (count < verify_lengths) & jnp.take_along_axis(lawful, last[:, None], axis=1)[:, 0]

        # A rejection at a row without a law says nothing about p^d, so no residual is taken there.
        residual = normalised(draft_law.residual(target_row, last), target_row)
        return Acceptance(count, jnp.where(rejected[:, None], residual, target_row))


@dataclass(frozen=True)
class BlockVerification:
    """Accept the longest prefix whose own test passes, whether or not the tests before it did (Sun et al., arXiv
    2403.10444): never fewer drafts in the mean than `RejectionSampling`, and the same law of the output.

    With p_i = min(1, p_{i-1} p^t(x_i) / p^d(x_i)), p_0 = 1, and Z_i = Σ_x max(0, p_i p^t_{i+1}(x) - p^d_{i+1}(x)), test
    i passes with probability Z_i / (Z_i + 1 - p_i), and with p_i at the last verified draft, where the block ends for a
    reason that x_<=i alone decide. Behind the accepted prefix x_1..x_n the next token follows
    norm(max(0, p_n p^t_{n+1} - p^d_{n+1})), or the target's law if n is the verify length.
    """

    def __call__(
        self,
        draft_tokens: Int[Array, "r k"],
        draft_law: DraftLaw,
        target_law: Float[Array, "r w v"],
        uniforms: Float[Array, "r k"],
        verify_lengths: Int[Array, " r"],
    ) -> Acceptance:
        block = draft_tokens.shape[1]

        # Whether a row is a law is settled before its token is drawn, so the block may end in front of one that is not
        # (docs/algorithm.md, rule 104).
        lawful = jnp.cumprod(draft_law.lawful().astype(jnp.int32), axis=1)
        lengths = jnp.minimum(verify_lengths, jnp.sum(lawful, axis=1))

        # [R, W]: p_0..p_K. A Python loop, since K is small and the steps fuse.
        ratios = _ratios(draft_tokens, draft_law, target_law)
        steps = [jnp.ones_like(ratios[:, 0])]
        for k in range(block):
            steps.append(jnp.minimum(1.0, steps[-1] * ratios[:, k]))
        kept = jnp.stack(steps, axis=1)
        reach = kept[:, 1:]

        # Z_1..Z_{K-1}; behind the last draft there is no row of the drafter.
        excess = draft_law.excess(kept[:, :-1, None] * target_law[:, :block])
        excess = jnp.pad(excess[:, 1:], ((0, 0), (0, 1)))

        # Where p_i = 1 and nothing is in excess, both laws agree and 0 / 0 stands for 1.
        whole = excess + 1.0 - reach
        chance = jnp.where(whole > 0, excess / jnp.where(whole > 0, whole, 1.0), 1.0)

        position = jnp.arange(1, block + 1)
        chance = jnp.where(position == lengths[:, None], reach, chance)
        passed = (uniforms < chance) & (position <= lengths[:, None])
        count = jnp.max(jnp.where(passed, position, 0), axis=1)

        # Without the factor p_n the residual would be that of a prefix which was certain to be accepted.
        target_row = _row_after(target_law, count)
        scale = jnp.take_along_axis(kept, count[:, None], axis=1)
        residual = draft_law.residual(scale * target_row, jnp.minimum(count, block - 1))
        cut = (count < lengths)[:, None]
        return Acceptance(count, jnp.where(cut, normalised(residual, target_row), target_row))


def normalised(residual: Float[Array, "*n v"], otherwise: Float[Array, "*n v"]) -> Float[Array, "*n v"]:
    """A residual as a law; `otherwise` where the two laws agree so closely that no mass is left."""
    # In exact arithmetic the mass is 0 only if the laws are equal, and then nothing is rejected.
    mass = jnp.sum(residual, axis=-1, keepdims=True)
    # Compared this way round, a NaN mass leaves the target's law as well.
    return jnp.where(mass > TINY_RESIDUAL_MASS, residual / jnp.maximum(mass, TINY_RESIDUAL_MASS), otherwise)


def _ratios(tokens: Int[Array, "r k"], draft_law: DraftLaw, target_law: Float[Array, "r w v"]) -> Float[Array, "r k"]:
    """p^t(x_k) / p^d(x_k) of the drafts."""
    p_target = jnp.take_along_axis(target_law[:, : tokens.shape[1]], tokens[..., None], axis=-1)[..., 0]
    return p_target / jnp.maximum(draft_law.of(tokens), TINY_DRAFT_PROB)


def _row_after(target_law: Float[Array, "r w v"], count: Int[Array, " r"]) -> Float[Array, "r v"]:
    """The target's row that judges the token after `count` accepted drafts, rejected or never drafted."""
    return jnp.take_along_axis(target_law, count[:, None, None], axis=1)[:, 0]


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
