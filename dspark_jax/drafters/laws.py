"""The law p^d that a drafter drew its tokens from, in the forms that it may be handed over in.

Verifiers that compare p^d with the target's law read it through `DraftLaw` alone, so a drafter with few candidates
never builds rows over the whole vocabulary (docs/algorithm.md, rule 109).

Axes: R request slots, K block position, V vocab, C candidates of a position.
"""

from typing import NamedTuple, Protocol, Self

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASS_TOLERANCE = 1e-2  # of a law in float32, summed over the largest vocabularies


class DraftLaw(Protocol):
    """p^d_1..p^d_K of each request, given the tokens drawn before."""

    def of(self, tokens: Int[Array, "r k"]) -> Float[Array, "r k"]:
        """p^d_k(x_k) of the drawn tokens."""
        ...

    def lawful(self) -> Bool[Array, "r k"]:
        """Whether each position's row is a probability law (docs/algorithm.md, rule 104)."""
        ...

    def excess(self, rows: Float[Array, "r k v"]) -> Float[Array, "r k"]:
        """Σ_x max(0, rows_k(x) - p^d_k(x)), rows not negative."""
        ...

    def residual(self, row: Float[Array, "r v"], at: Int[Array, " r"]) -> Float[Array, "r v"]:
        """max(0, row - p^d_at), not normalised, for one position of each request."""
        ...


class Dense(NamedTuple):
    """probs [R, K, V] float32."""

    probs: Array

    def of(self, tokens: Int[Array, "r k"]) -> Float[Array, "r k"]:
        return jnp.take_along_axis(self.probs, tokens[..., None], axis=-1)[..., 0]

    def lawful(self) -> Bool[Array, "r k"]:
        return is_law(self.probs)

    def excess(self, rows: Float[Array, "r k v"]) -> Float[Array, "r k"]:
        return jnp.sum(jnp.maximum(rows - self.probs, 0.0), axis=-1)

    def residual(self, row: Float[Array, "r v"], at: Int[Array, " r"]) -> Float[Array, "r v"]:
        return jnp.maximum(row - jnp.take_along_axis(self.probs, at[:, None, None], axis=1)[:, 0], 0.0)


class Sparse(NamedTuple):
    """probs [R, K, C] float32 of the candidates `ids` [R, K, C] int32, which differ within a position; 0 elsewhere."""

    ids: Array
    probs: Array

    @classmethod
    def one_hot(cls, tokens: Int[Array, "r k"]) -> Self:
        """The law of tokens that were not drawn but chosen, such as those found in the prompt: all mass on x_k."""
        return cls(tokens[..., None], jnp.ones((*tokens.shape, 1), jnp.float32))

    def of(self, tokens: Int[Array, "r k"]) -> Float[Array, "r k"]:
        # At most one candidate matches, so the sum is a look-up; a token that is no candidate has mass 0.
        return jnp.sum(jnp.where(self.ids == tokens[..., None], self.probs, 0.0), axis=-1)

    def lawful(self) -> Bool[Array, "r k"]:
        return is_law(self.probs)

    def excess(self, rows: Float[Array, "r k v"]) -> Float[Array, "r k"]:
        # max(0, a - b) = a - min(a, b), and the minimum is 0 outside the candidates: C gathers in place of V terms.
        shared = jnp.minimum(jnp.take_along_axis(rows, self.ids, axis=-1), self.probs)
        return jnp.maximum(jnp.sum(rows, axis=-1) - jnp.sum(shared, axis=-1), 0.0)

    def residual(self, row: Float[Array, "r v"], at: Int[Array, " r"]) -> Float[Array, "r v"]:
        # Scattered into the target's row, [R, C] into [R, V]: no row of p^d over the vocabulary is built.
        ids, probs = (jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0] for x in self)
        return jnp.maximum(row.at[jnp.arange(len(row))[:, None], ids].add(-probs), 0.0)


def is_law(probs: Float[Array, "*n v"]) -> Bool[Array, "*n"]:
    """Whether each row is a probability law: nothing negative, nothing infinite or NaN, and mass 1."""
    # A comparison with NaN is false, so NaN and negative entries both make the mass NaN.
    mass = jnp.sum(jnp.where(probs >= 0, probs, jnp.nan), axis=-1)
    return jnp.abs(mass - 1.0) < MASS_TOLERANCE
