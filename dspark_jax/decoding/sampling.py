"""Sampling laws, and draws from them with counter-based random numbers.

Axes: R request slots, V vocab; `*n` any leading axes that start with R.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from dspark_jax import native
from dspark_jax.decoding.cuts import truncated
from dspark_jax.decoding.noise import Key
from dspark_jax.decoding.penalties import LogitEdits

# Below this a temperature means greedy: the law is one-hot at the lowest-indexed argmax (docs/algorithm.md, rule 6).
GREEDY_BELOW = 1e-5

# The purpose of a random number is folded into its key with position and offset: a draft, its acceptance test and the
# residual draw at one position must be independent. Coupled decoding has one number a token for all purposes.
DRAFT, ACCEPT, RESIDUAL, COUPLED = 0, 1, 2, 3

FEW = 1024
"""Vocabulary sizes up to which XLA's loops over a vocabulary are as fast as a CPU's kernel."""
SCOPE = "sampling"
"""The name in a program's text of branches whose first one is taken in greedy rounds."""


class SamplingArrays(NamedTuple):
    """Per-request settings [R]: temperature (0 = greedy), top_k (0 = off), top_p (1 = off), min_p (0 = off)."""

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array

    @property
    def stochastic(self) -> Bool[Array, " r"]:
        return self.temperature >= GREEDY_BELOW


def sampling_law(
    logits: Float[Array, "r *n v"], params: SamplingArrays, edits: LogitEdits | None = None
) -> Float[Array, "r *n v"]:
    """float32 probabilities of the (edited) logits after temperature, top-k, top-p and min-p, in that order; one-hot
    where greedy.

    Tokens tied with the last one kept by top-k or top-p are kept too, so the law does not depend on a sort's order.
    Greedy-only batches skip the softmax, and batches without top-k and top-p skip the search for their thresholds
    (docs/algorithm.md, rules 6 to 8).
    """
    return _by_need(params, edits, _greedy_law, _plain_law, _truncated_law, logits)


@jax.named_scope(SCOPE)
def _by_need(
    params: SamplingArrays,
    edits: LogitEdits | None,
    greedy: Callable,
    plain: Callable,
    truncated: Callable,
    logits: Array,
    *operands: Any,
) -> Any:
    """Run the cheapest of three computations of the same laws: `greedy` if no request samples, `plain` if none uses
    top-k or top-p. One flat branch: on XLA:CPU, entering a nested one takes as long as computing a small law."""
    stochastic = jnp.any(params.stochastic)
    cuts = stochastic & jnp.any((params.top_k > 0) | (params.top_p < 1.0))

    need = stochastic.astype(jnp.int32) + cuts
    branches: list[Callable] = [greedy, partial(plain, params), partial(truncated, params)]

    if edits is not None:
        # Where a request has edits, the computation that is right for all of them: edits before each of the three took
        # 7 % of a round's program (docs/log.md), and a greedy request with edits pays for a law that it does not need.
        need = jnp.where(edits.needed, len(branches), need)
        branches.append(lambda raw, *rest: truncated(params, edits(raw), *rest))
    return jax.lax.switch(need, branches, logits, *operands)


def _greedy_law(logits: Array) -> Array:
    # Rejection then accepts a draft with probability 0 or 1, which is greedy decoding (docs/algorithm.md, rule 6).
    return jax.nn.one_hot(first_argmax(logits), logits.shape[-1], dtype=jnp.float32)


def _plain_law(params: SamplingArrays, logits: Array) -> Array:
    return _law(params, logits, cut=False)


def _truncated_law(params: SamplingArrays, logits: Array) -> Array:
    return _law(params, logits, cut=True)


def _law(params: SamplingArrays, logits: Array, cut: bool) -> Array:
    if not _has_kernel(logits.shape[-1], logits.dtype):
        return _law_by_xla(params, logits, cut)

    def kernel(params: SamplingArrays, logits: Array) -> Array:
        each = params.temperature, jnp.log(params.min_p), params.stochastic
        if cut:
            # Cuts take numbers away and change no other: XLA divides by temperatures in another rounding than the
            # kernel, and a neighbour's cuts must not change a request's law in its last bit.
            out = (_cut(params, logits) == -jnp.inf) & _per_request(params.stochastic, logits)
            logits = jnp.where(out, -jnp.inf, logits)
        rows = logits.reshape(-1, logits.shape[-1])
        return native.laws(rows, *(jnp.repeat(x, len(rows) // len(x)) for x in each)).reshape(logits.shape)

    return jax.lax.platform_dependent(params, logits, cpu=kernel, default=partial(_law_by_xla, cut=cut))


def _law_by_xla(params: SamplingArrays, logits: Array, cut: bool) -> Array:
    # Normalised over V after min-p, so that laws of target and drafter have mass 1 whatever was cut.
    weights = _weights(params, (_cut if cut else _scaled)(params, logits))
    law = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.where(_per_request(params.stochastic, logits), law, _greedy_law(logits))


def _has_kernel(vocab: int, dtype: Any = jnp.float32) -> bool:
    return dtype == jnp.float32 and vocab > FEW and native.ready()


def _weights(params: SamplingArrays, scaled: Array) -> Array:
    """p / p_max after min-p, the last of the transforms: the law up to its mass."""
    # Logits are relative to their largest, so p / p_max = exp(scaled); log(0) = -inf keeps every token.
    floor = _per_request(jnp.log(params.min_p), scaled)
    return jnp.exp(jnp.where(scaled >= floor, scaled, -jnp.inf))


def _scaled(params: SamplingArrays, logits: Array) -> Array:
    """(logits - max) / temperature in float32. Subtracting first keeps huge finite logits from overflowing."""
    # Before subtraction and division, each of which would round in bfloat16 (docs/algorithm.md, rule 8).
    wide = logits.astype(jnp.float32)
    # Greedy rows are divided too, and replaced by one-hot rows afterwards: avoid dividing by 0.
    temperature = jnp.maximum(params.temperature, GREEDY_BELOW)

    return (wide - jnp.max(wide, axis=-1, keepdims=True)) / _per_request(temperature, logits)


def _cut(params: SamplingArrays, logits: Array) -> Array:
    return truncated(_scaled(params, logits), params.top_k, params.top_p)


def _per_request(value: Float[Array, " r"], like: Float[Array, "r *n v"]) -> Array:
    """[R] -> [R, 1, .., 1], to broadcast against `like`."""
    return value.reshape(-1, *(1,) * (like.ndim - 1))


@jax.named_scope(SCOPE)
def round_keys(
    keys: UInt32[Array, "r 2"], positions: Int[Array, " r"], purposes: Sequence[int], count: int, params: SamplingArrays
) -> Key:
    """Keys [R, P, K] of the draws of one round, one for each of P purposes and each offset below K = `count`; zeros if
    no request samples.

    Folding in the anchor's position gives each round fresh noise. Neither slot nor neighbours enter, so a request's
    output does not depend on the batch it runs in.
    """

    def derived() -> Key:
        # Position, then purpose, then offset: draws of one round never share a key.
        request = Key.of(keys).fold_in(positions)[:, None].fold_in(jnp.asarray(purposes)[None])
        return request[..., None].fold_in(jnp.arange(count)[None, None])

    # A branch also because XLA:CPU would compute all of it anew inside every draw that reads a part: written out,
    # those were more than half of a round's program.
    none = jnp.zeros((len(positions), len(purposes), count), jnp.uint32)
    return jax.lax.cond(jnp.any(params.stochastic), derived, lambda: Key(none, none))


@jax.named_scope(SCOPE)
def uniforms(key: Key, params: SamplingArrays) -> Float[Array, "r *k"]:
    """Acceptance draws u_k in [0, 1), float32, one for each key [R, *K]; zeros if no request samples. One-hot laws give
    ratios of 0 or 1, which any u in [0, 1) decides alike."""
    return jax.lax.cond(
        jnp.any(params.stochastic),
        lambda: key.uniform(1)[..., 0],
        lambda: jnp.zeros(key.high.shape, jnp.float32),
    )


@jax.named_scope(SCOPE)
def draw_token(law: Float[Array, "r v"], key: Key, params: SamplingArrays) -> Int[Array, " r"]:
    """Draw one int32 token per request from its law with its key [R]; if no request samples, the argmax, without random
    numbers."""
    return jax.lax.cond(jnp.any(params.stochastic), lambda: _race(law, key), lambda: first_argmax(law))


def draw_order(
    logits: Float[Array, "r v"], law: Float[Array, "r v"], key: Key, params: SamplingArrays, count: int
) -> Int[Array, "r c"]:
    """Tokens drawn one after the other without replacement, the first of them the token that `draw` drafts with this
    key [R], by the same clocks; the largest logits where greedy."""
    order = jnp.where(_per_request(params.stochastic, law), law / _waits(key, law.shape[-1]), logits)
    return jax.lax.top_k(order, count)[1].astype(jnp.int32)


def draw(
    logits: Float[Array, "r v"], key: Key, params: SamplingArrays, edits: LogitEdits | None = None
) -> tuple[Int[Array, " r"], Float[Array, "r v"]]:
    """(a token [R] drawn from each request's `sampling_law` with its key [R], that law [R, V]), in a single branch."""

    def greedy(logits: Array) -> tuple[Array, Array]:
        token = first_argmax(logits)
        return token, jax.nn.one_hot(token, logits.shape[-1], dtype=jnp.float32)

    def sampled(law_of: Callable, params: SamplingArrays, logits: Array) -> tuple[Array, Array]:
        # Law and token from one pass: a draft needs both.
        law = law_of(params, logits)
        return _race(law, key), law

    return _by_need(params, edits, greedy, partial(sampled, _plain_law), partial(sampled, _truncated_law), logits)


def _race(law: Float[Array, "r v"], key: Key) -> Int[Array, " r"]:
    """Draw a token [R] of each law with its key [R]: the first of V exponential clocks with rates `law`. Equivalent to
    Gumbel-max with one logarithm less."""
    return first_argmax(law / _waits(key, law.shape[-1]))


def _waits(key: Key, vocab: int) -> Float[Array, "*n v"]:
    """The clocks of a race: independent waits of rate 1 for each key, a token's from its id alone."""

    def plain(key: Key) -> Array:
        tiny = jnp.finfo(jnp.float32).tiny
        # `tiny` guards log(0); uniforms stay below 1, so no wait is 0 and a token of probability 0 never wins.
        return -jnp.log(jnp.maximum(key.uniform(vocab), tiny))

    def kernel(key: Key) -> Array:
        waits = native.waits(key.high.reshape(-1), key.low.reshape(-1), vocab)
        return waits.reshape(*key.high.shape, vocab)

    if not _has_kernel(vocab):
        return plain(key)
    return jax.lax.platform_dependent(key, cpu=kernel, default=plain)


@jax.named_scope(SCOPE)
def coupled_waits(
    keys: UInt32[Array, "r 2"], positions: Int[Array, "r n"], vocab: int, params: SamplingArrays
) -> Float[Array, "r n v"]:
    """The clocks that decide the tokens at absolute `positions`: functions of the request's seed, the position and the
    token id alone (docs/algorithm.md, rule 110); zeros if no request samples."""

    def draw() -> Array:
        # The purpose before the position: [R] keys are folded once, and positions [R, N] broadcast against them.
        request = Key.of(keys).fold_in(jnp.full_like(positions[:, 0], COUPLED))
        return _waits(request[:, None].fold_in(positions), vocab)

    shape = (*positions.shape, vocab)
    return jax.lax.cond(jnp.any(params.stochastic), draw, lambda: jnp.zeros(shape, jnp.float32))


def race(
    logits: Float[Array, "r *n v"],
    waits: Float[Array, "r *n v"],
    params: SamplingArrays,
    edits: LogitEdits | None = None,
) -> Int[Array, "r *n"]:
    """The tokens that win races of given clocks under each row's `sampling_law`; the argmax where greedy."""

    def greedy(logits: Array, waits: Array) -> Array:
        return first_argmax(logits)

    def sampled(cut: Callable, params: SamplingArrays, logits: Array, waits: Array) -> Array:
        # Greedy rows take the argmax itself: divided by their waits they would be sampled.
        winners = first_argmax(_odds(cut, params, logits, waits))
        return jnp.where(_per_request(params.stochastic, winners), winners, first_argmax(logits))

    return _by_need(params, edits, greedy, partial(sampled, _scaled), partial(sampled, _cut), logits, waits)


def race_values(
    logits: Float[Array, "r *n v"], waits: Float[Array, "r *n v"], params: SamplingArrays
) -> Float[Array, "r *n v"]:
    """Numbers in the order of a race's places, in nats: the first is its winner; the logits where greedy."""

    def greedy(logits: Array, waits: Array) -> Array:
        return logits.astype(jnp.float32)

    def sampled(cut: Callable, params: SamplingArrays, logits: Array, waits: Array) -> Array:
        # Logarithms, so that values of a path add up (docs/algorithm.md, rule 117).
        values = jnp.log(_odds(cut, params, logits, waits))
        return jnp.where(_per_request(params.stochastic, values), values, logits.astype(jnp.float32))

    return _by_need(params, None, greedy, partial(sampled, _scaled), partial(sampled, _cut), logits, waits)


def race_odds(
    logits: Float[Array, "r *n v"], waits: Float[Array, "r *n v"], params: SamplingArrays
) -> Float[Array, "r *n v"]:
    """The numbers whose largest wins a race of sampled rows; two that are close are a near-tie."""
    return _odds(_cut, params, logits, waits)


def _odds(cut: Callable, params: SamplingArrays, logits: Array, waits: Array) -> Array:
    # Rates need no common mass, so the law is not normalised.
    return _weights(params, cut(params, logits)) / waits


def first_argmax(x: Float[Array, "*n v"]) -> Int[Array, "*n"]:
    """int32 index of the largest entry, the lowest on ties."""
    if not _has_kernel(x.shape[-1], x.dtype):
        return _two_reductions(x)

    def kernel(x: Array) -> Array:
        return native.first_largest(x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1])

    return jax.lax.platform_dependent(x, cpu=kernel, default=_two_reductions)


def _two_reductions(x: Array) -> Array:
    # XLA:CPU does not vectorise argmax's reduction over pairs, which for a draft of seven rows cost as much as the
    # backbone.
    size = x.shape[-1]
    # Misses map to the last index, so that a row of NaN, which has no hit, still gives a valid id.
    hits = jnp.where(x == jnp.max(x, axis=-1, keepdims=True), jnp.arange(size, dtype=jnp.int32), size - 1)
    return jnp.min(hits, axis=-1)
