"""Dispatches: many rounds of a loop in one compiled call, after which the host reads what they made.

`run_rounds` serves, `record_rounds` also returns a record of every round. Both donate the state.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dspark_jax.decoding.round import DecodeLoop, LoopParams, shared_tables
from dspark_jax.decoding.state import DecodeState, RoundRecord
from dspark_jax.scheduling.costs import Occupancy
from dspark_jax.scheduling.policies import PolicyState

GoesOn = Callable[[Array, DecodeState], Array]
"""Whether a dispatch goes on after so many rounds, which have left this state."""


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def run_rounds(
    loop: DecodeLoop,
    params: LoopParams,
    state: DecodeState,
    occupancy: Occupancy,
    rounds: Int[Array, ""],
    until_free: Bool[Array, ""],
) -> DecodeState:
    """Up to `rounds` rounds; fewer when no slot is active or, with `until_free`, once an active slot has ended."""
    state, goes_on = _opened(state, rounds, until_free)
    if loop.block and loop.view(params, state, occupancy)[0].drafted is not None:
        return loop.place(_by_stretches(loop, params, state, occupancy, goes_on))

    def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        done, current = carry
        return done + 1, loop.round(params, current, occupancy)[0]

    begin = jnp.zeros((), jnp.int32)
    return loop.place(jax.lax.while_loop(lambda carry: goes_on(*carry), body, (begin, state))[1])


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def record_rounds(
    loop: DecodeLoop, params: LoopParams, state: DecodeState, occupancy: Occupancy, rounds: int
) -> tuple[DecodeState, RoundRecord]:
    """`rounds` rounds and what each did, leaves [rounds, ...]; `committed` is 0 where a slot had ended."""

    def body(current: DecodeState, _: None) -> tuple[DecodeState, RoundRecord]:
        return loop.round(params, current, occupancy)

    state, records = jax.lax.scan(body, state, None, length=rounds)
    return loop.place(state), records


def _opened(state: DecodeState, rounds: Array, until_free: Array) -> tuple[DecodeState, GoesOn]:
    """A dispatch begins: the state with nothing predicted yet, and when it goes on."""
    started = jnp.sum(state.active)

    def goes_on(done: Array, current: DecodeState) -> Array:
        remaining = jnp.sum(current.active)
        return (done < rounds) & (remaining > 0) & ~(until_free & (remaining < started))

    # Zero, but computed from the old value: a donated buffer that nothing reads would not be reused.
    return replace(state, predicted_seconds=jnp.minimum(state.predicted_seconds, 0.0)), goes_on


class _Planned(NamedTuple):
    """Between two rounds: how many have run, the state, and what the policy says of the next one: who drafts, and the
    policy's state once it has said so."""

    done: Array
    state: DecodeState
    drafted: Array
    policy: PolicyState


class _Stretch(NamedTuple):
    """Plain rounds so far [], and the taps [R, W, m D] of the tokens that they fed: the drafter has not seen them."""

    rounds: Array
    state: DecodeState
    taps: Array


def _by_stretches(
    loop: DecodeLoop, params: LoopParams, state: DecodeState, occupancy: Occupancy, goes_on: GoesOn
) -> DecodeState:
    """Rounds of a policy that may leave drafting off: a loop of speculative rounds for as long as somebody drafts, then
    one of plain rounds, in turn. Two loops and no branch: what a branch updates, XLA copies whole.

    Plain rounds run W at a time before the drafter is given their tokens, as rows of one block which cost it about as
    much as one of them, and before the policy is asked again."""
    target, drafter = loop.models(params)
    shape = (loop.requests, loop.width, target.config.tap_width(loop.tap_layers))
    dtype = params.target["embed_weight_vd"].dtype

    def plan(done: Array, current: DecodeState) -> _Planned:
        view, policy = loop.view(params, current, occupancy)
        drafted = current.active if view.drafted is None else view.drafted
        return _Planned(done, current, drafted, policy)

    def someone(carry: _Planned) -> Array:
        return goes_on(carry.done, carry.state) & jnp.any(carry.drafted)

    def nobody(carry: _Planned) -> Array:
        return goes_on(carry.done, carry.state) & ~jnp.any(carry.drafted)

    def speculative(carry: _Planned) -> _Planned:
        new = loop.planned_round(params, carry.state, occupancy, carry.drafted, carry.policy)
        return plan(carry.done + 1, new)

    def plain_round(stretch: _Stretch) -> _Stretch:
        new, _, taps = loop.plain_round(params, stretch.state)
        taps = jax.lax.dynamic_update_slice_in_dim(stretch.taps, taps, stretch.rounds, axis=1)
        return _Stretch(stretch.rounds + 1, new, taps)

    def plain(carry: _Planned) -> _Planned:
        def more(stretch: _Stretch) -> Array:
            return (stretch.rounds < loop.width) & goes_on(carry.done + stretch.rounds, stretch.state)

        first = _Stretch(jnp.zeros((), jnp.int32), carry.state, jnp.zeros(shape, dtype))
        rounds, state, taps = jax.lax.while_loop(more, plain_round, first)
        starts, counts, draft = carry.state.length - 1, state.length - carry.state.length, state.draft
        tokens = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (loop.width,)))(state.tokens, starts)
        if drafter is not None:
            draft = drafter.commit(shared_tables(target), draft, taps, tokens, starts, counts)
        seconds = state.predicted_seconds + rounds * loop.plain_seconds(params, carry.state)
        policy = loop.policy.rested(carry.policy, rounds - 1)
        new = replace(state, draft=draft, policy=policy, predicted_seconds=seconds)
        return plan(carry.done + rounds, new)

    def stretches(carry: _Planned) -> _Planned:
        return jax.lax.while_loop(nobody, plain, jax.lax.while_loop(someone, speculative, carry))

    # A plan that the last round has left is dropped: the next dispatch, told of another load, makes its own.
    first = plan(jnp.zeros((), jnp.int32), state)
    return jax.lax.while_loop(lambda carry: goes_on(carry.done, carry.state), stretches, first).state
