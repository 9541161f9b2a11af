"""Sampling laws and the random numbers that draw from them.

Axes: R request slots, V vocab; `*n` any leading axes that start with R.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from dspark_jax.decoding.noise import Key

# Below this a temperature means greedy: the law is one-hot at the lowest-indexed argmax (docs/algorithm.md, rule 6).
GREEDY_BELOW = 1e-5

# Purposes of a random number, folded into its key beside position and offset.
DRAFT, ACCEPT, RESIDUAL = 0, 1, 2


class SamplingArrays(NamedTuple):
    """Per-request settings [R]: temperature (0 = greedy), top_k (0 = off), top_p (1 = off), min_p (0 = off)."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array

    @property
    def stochastic(self) -> Bool[Array, " r"]:
        return self.temperature >= GREEDY_BELOW


def sampling_law(logits: Float[Array, "r *n v"], params: SamplingArrays) -> Float[Array, "r *n v"]:
    """float32 probabilities after temperature, top-k, top-p and min-p, in that order; one-hot where greedy.

    Tokens tied with the last one kept by top-k or top-p are kept too, so the law does not depend on a sort's order.
    Greedy-only batches skip the softmax, and batches without top-k and top-p skip the sort.
    """
    return _by_need(params, _greedy_law, _plain_law, _truncated_law, logits)


def _by_need(params: SamplingArrays, greedy: Callable, plain: Callable, truncated: Callable, *operands: Any) -> Any:
    """One of three ways to the same laws: the first where no request samples, the second where none uses top-k or
    top-p. One flat branch: XLA:CPU takes as long to enter a nested one as to make a small law."""
    stochastic = jnp.any(params.stochastic)
    sorts = stochastic & jnp.any((params.top_k > 0) | (params.top_p < 1.0))
    need = stochastic.astype(jnp.int32) + sorts
    return jax.lax.switch(need, (greedy, partial(plain, params), partial(truncated, params)), *operands)


def _greedy_law(logits: Array) -> Array:
    return jax.nn.one_hot(first_argmax(logits), logits.shape[-1], dtype=jnp.float32)


def _plain_law(params: SamplingArrays, logits: Array) -> Array:
    return _law(params, logits, _scaled(params, logits))


def _truncated_law(params: SamplingArrays, logits: Array) -> Array:
    return _law(params, logits, _truncate(_scaled(params, logits), params))


def _law(params: SamplingArrays, logits: Array, scaled: Array) -> Array:
    floor = _per_request(jnp.log(params.min_p), logits)  # relative to the largest, which is 0
    law = jax.nn.softmax(jnp.where(scaled >= floor, scaled, -jnp.inf), axis=-1)
    return jnp.where(_per_request(params.stochastic, logits), law, _greedy_law(logits))


def _scaled(params: SamplingArrays, logits: Array) -> Array:
    """Logits below their largest, over the temperature: in this order huge finite logits do not overflow."""
    wide = logits.astype(jnp.float32)
    temperature = jnp.maximum(params.temperature, GREEDY_BELOW)
    return (wide - jnp.max(wide, axis=-1, keepdims=True)) / _per_request(temperature, logits)


def _per_request(value: Float[Array, " r"], like: Float[Array, "r *n v"]) -> Array:
    return value.reshape(-1, *(1,) * (like.ndim - 1))


def _truncate(scaled: Array, params: SamplingArrays) -> Array:
    """-inf outside the top-k, then outside the smallest set of the rest whose mass reaches top_p."""
    vocab = scaled.shape[-1]
    ordered = -jnp.sort(-scaled, axis=-1)
    k = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocab), vocab)
    ordered = jnp.where(jnp.arange(vocab) < _per_request(k, scaled), ordered, -jnp.inf)
    mass = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    # The first token always stays, even at top_p = 0; a token enters while the mass before it is short of top_p. Off
    # (top_p = 1) keeps every token, also those before which the mass has already been rounded up to 1.
    top_p = _per_request(params.top_p, scaled)
    kept = (before < top_p) | (top_p >= 1.0) | (jnp.arange(vocab) == 0)
    last = jnp.min(jnp.where(kept & (ordered > -jnp.inf), ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= last, scaled, -jnp.inf)


def round_keys(keys: UInt32[Array, "r 2"], positions: Int[Array, " r"], offsets: Int[Array, " k"], purpose: int) -> Key:
    """Keys [R, K] of a request's draws in one round.

    Folding the anchor's position makes the noise fresh in every round; nothing of slot or neighbours enters.
    """
    request = Key.of(keys).fold_in(positions).fold_in(jnp.full_like(positions, purpose))
    return Key(request.high[:, None], request.low[:, None]).fold_in(offsets[None])


def uniforms(
    keys: UInt32[Array, "r 2"], positions: Int[Array, " r"], count: int, params: SamplingArrays
) -> Float[Array, "r k"]:
    """Acceptance draws u_k in [0, 1); zeros, which one-hot laws ignore, where no request samples."""

    def draw() -> Array:
        return round_keys(keys, positions, jnp.arange(count), ACCEPT).uniform(1)[..., 0]

    shape = (positions.shape[0], count)
    return jax.lax.cond(jnp.any(params.stochastic), draw, lambda: jnp.zeros(shape, jnp.float32))


def draw_token(
    law: Float[Array, "r v"],
    keys: UInt32[Array, "r 2"],
    positions: Int[Array, " r"],
    offset: int,
    purpose: int,
    params: SamplingArrays,
) -> Int[Array, " r"]:
    """One token a request from its law; the argmax, with no random number drawn, where no request samples."""

    def race() -> Array:
        return _race(law, round_keys(keys, positions, jnp.full((1,), offset), purpose))

    return jax.lax.cond(jnp.any(params.stochastic), race, lambda: first_argmax(law))


def draw(
    logits: Float[Array, "r v"],
    keys: UInt32[Array, "r 2"],
    positions: Int[Array, " r"],
    offset: int,
    purpose: int,
    params: SamplingArrays,
) -> tuple[Int[Array, " r"], Float[Array, "r v"]]:
    """(a token of each request's `sampling_law`, that law), in one branch."""

    def greedy(logits: Array) -> tuple[Array, Array]:
        token = first_argmax(logits)
        return token, jax.nn.one_hot(token, logits.shape[-1], dtype=jnp.float32)

    def sampled(law_of: Callable, params: SamplingArrays, logits: Array) -> tuple[Array, Array]:
        law = law_of(params, logits)
        return _race(law, round_keys(keys, positions, jnp.full((1,), offset), purpose)), law

    return _by_need(params, greedy, partial(sampled, _plain_law), partial(sampled, _truncated_law), logits)


def _race(law: Float[Array, "r v"], key: Key) -> Int[Array, " r"]:
    """A token of each law, `key` [R, 1]: the first of V exponential clocks of rates `law`, which is Gumbel-max with one
    logarithm less."""
    tiny = jnp.finfo(jnp.float32).tiny
    waits = -jnp.log(jnp.maximum(key.uniform(law.shape[-1])[:, 0], tiny))
    return first_argmax(law / waits)


def first_argmax(x: Float[Array, "*n v"]) -> Int[Array, "*n"]:
    """int32 index of the largest entry, the lowest at a tie. Two plain reductions: XLA:CPU doesn't vectorise argmax's
    reduction over pairs, which at a draft's seven rows cost as much as the backbone."""
    size = x.shape[-1]
    hits = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), jnp.arange(size, dtype=jnp.int32), size - 1)
    return jnp.min(hits, axis=-1)
