"""Sampling laws and the random numbers that draw from them.

Axes: R request slots, V vocab; `*n` any leading axes that start with R.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

# Below this a temperature means greedy: the law is one-hot at the lowest-indexed argmax (golden/NOTES 38).
GREEDY_BELOW = 1e-5
PRNG = "threefry2x32"  # named, so that samples don't depend on the caller's jax_default_prng_impl

# Purposes of a random number, folded into its key beside position and offset.
DRAFT, ACCEPT, RESIDUAL = 0, 1, 2


class SamplingParams(NamedTuple):
    """Per-request settings [R]: temperature (0 = greedy), top_k (0 = off), top_p (1 = off), min_p (0 = off)."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array

    @property
    def stochastic(self) -> Bool[Array, " r"]:
        return self.temperature >= GREEDY_BELOW


def sampling_law(logits: Float[Array, "r *n v"], params: SamplingParams) -> Float[Array, "r *n v"]:
    """float32 probabilities after temperature, top-k, top-p and min-p, in that order; one-hot where greedy.

    Tokens tied with the last one kept by top-k or top-p are kept too, so the law does not depend on a sort's order.
    Greedy-only batches skip the softmax, and batches without top-k and top-p skip the sort.
    """
    expand = (slice(None),) + (None,) * (logits.ndim - 1)
    logits = logits.astype(jnp.float32)

    def greedy() -> Array:
        return jax.nn.one_hot(first_argmax(logits), logits.shape[-1], dtype=jnp.float32)

    def sampled() -> Array:
        scaled = logits / jnp.maximum(params.temperature, GREEDY_BELOW)[expand]
        truncated = jnp.any((params.top_k > 0) | (params.top_p < 1.0))
        scaled = jax.lax.cond(truncated, lambda z: _truncate(z, params, expand), lambda z: z, scaled)
        floor = jnp.max(scaled, axis=-1, keepdims=True) + jnp.log(params.min_p)[expand]
        law = jax.nn.softmax(jnp.where(scaled >= floor, scaled, -jnp.inf), axis=-1)
        return jnp.where(params.stochastic[expand], law, greedy())

    return jax.lax.cond(jnp.any(params.stochastic), sampled, greedy)


def _truncate(scaled: Array, params: SamplingParams, expand: tuple) -> Array:
    """-inf outside the top-k, then outside the smallest set of the rest whose mass reaches top_p."""
    vocab = scaled.shape[-1]
    ordered = -jnp.sort(-scaled, axis=-1)
    k = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocab), vocab)[expand]
    ordered = jnp.where(jnp.arange(vocab) < k, ordered, -jnp.inf)
    mass = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    # The first token always stays, even at top_p = 0; a token enters while the mass before it is short of top_p. Off
    # (top_p = 1) keeps every token, also those before which the mass has already been rounded up to 1.
    top_p = params.top_p[expand]
    kept = (before < top_p) | (top_p >= 1.0) | (jnp.arange(vocab) == 0)
    last = jnp.min(jnp.where(kept & (ordered > -jnp.inf), ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= last, scaled, -jnp.inf)


def fold_keys(
    keys: UInt32[Array, "r 2"], positions: Int[Array, " r"], offsets: Int[Array, " k"], purpose: int
) -> Array:
    """Typed keys [R, K] of a request's draws in one round.

    Folding the anchor's position makes the noise fresh in every round; nothing of slot or neighbours enters.
    """

    def one(key: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(key, position), purpose)
        return jax.vmap(lambda offset: jax.random.fold_in(key, offset))(offsets)

    return jax.vmap(one)(jax.random.wrap_key_data(keys, impl=PRNG), positions)


def uniforms(
    keys: UInt32[Array, "r 2"], positions: Int[Array, " r"], count: int, params: SamplingParams
) -> Float[Array, "r k"]:
    """Acceptance draws u_k in [0, 1); zeros, never looked at by a one-hot law, when nobody samples."""
    shape = (positions.shape[0], count)

    def draw() -> Array:
        return jax.vmap(jax.vmap(jax.random.uniform))(fold_keys(keys, positions, jnp.arange(count), ACCEPT))

    return jax.lax.cond(jnp.any(params.stochastic), draw, lambda: jnp.zeros(shape, jnp.float32))


def draw_token(
    law: Float[Array, "r v"],
    keys: UInt32[Array, "r 2"],
    positions: Int[Array, " r"],
    offset: int,
    purpose: int,
    params: SamplingParams,
) -> Int[Array, " r"]:
    """One token a request from its law, by Gumbel-max; the argmax, with no random number drawn, when nobody samples."""

    def gumbel() -> Array:
        folded = fold_keys(keys, positions, jnp.full((1,), offset), purpose)[:, 0]
        noise = jax.vmap(lambda key: jax.random.gumbel(key, law.shape[1:]))(folded)
        return first_argmax(jnp.log(law) + noise)

    return jax.lax.cond(jnp.any(params.stochastic), gumbel, lambda: first_argmax(law))


def draw(
    logits: Float[Array, "r v"],
    keys: UInt32[Array, "r 2"],
    positions: Int[Array, " r"],
    offset: int,
    purpose: int,
    params: SamplingParams,
) -> tuple[Int[Array, " r"], Float[Array, "r v"]]:
    """(a token of each request's `sampling_law`, that law): one branch and one argmax when nobody samples."""

    def sampled() -> tuple[Array, Array]:
        law = sampling_law(logits, params)
        return draw_token(law, keys, positions, offset, purpose, params), law

    def greedy() -> tuple[Array, Array]:
        token = first_argmax(logits)
        return token, jax.nn.one_hot(token, logits.shape[-1], dtype=jnp.float32)

    return jax.lax.cond(jnp.any(params.stochastic), sampled, greedy)


def first_argmax(x: Float[Array, "*n v"]) -> Int[Array, "*n"]:
    """int32 index of the largest entry, the lowest at a tie. Two plain reductions: XLA:CPU doesn't vectorise argmax's
    reduction over pairs, which at a draft's seven rows cost as much as the backbone."""
    size = x.shape[-1]
    hits = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), jnp.arange(size, dtype=jnp.int32), size - 1)
    return jnp.min(hits, axis=-1)
