"""Dispatches: many rounds of a loop in one compiled call, after which the host reads the state.

`run_rounds` is for serving; `record_rounds` also returns a record of every round; `run_alone` and `record_alone` run
plain rounds on the state of a loop with a drafter, without its code. All donate the state.

A policy that can disable drafting is compiled to two loops instead of a branch: XLA copies everything that a branch
updates, caches included, while a loop updates it in place.

Axes: R request slots, K drafts of a block, W = K + 1 rows, m tapped layers, D hidden.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dspark_jax.decoding.loop import borrowed_tables
from dspark_jax.decoding.round import DecodeLoop, LoopParams, RoundPlan
from dspark_jax.decoding.state import DecodeState, RoundRecord
from dspark_jax.decoding.verification import zeros_of
from dspark_jax.scheduling.costs import Occupancy
from dspark_jax.scheduling.policies import PolicyState
from dspark_jax.sharding import traced_over


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def run_rounds(
    loop: DecodeLoop,
    params: LoopParams,
    state: DecodeState,
    occupancy: Occupancy,
    rounds: Int[Array, ""],
    until_free: Bool[Array, ""],
) -> DecodeState:
    """Run up to `rounds` rounds; stop early when no slot is active.

    Args:
        loop: static part; equal loops share compiled programs.
        params: weights and cost tables.
        state: donated.
        occupancy: load on the device, for load-adaptive policies.
        rounds: traced, so that another number does not recompile.
        until_free: whether to stop as soon as one of the active slots has ended.
    Returns:
        The state after the last round; its `predicted_seconds` covers this dispatch alone.
    """
    dispatch = _Dispatch(loop, params, occupancy, rounds, until_free, jnp.sum(state.active))

    # Zero, but computed from the old value: a donated buffer that nothing reads would not be reused.
    state = replace(state, predicted_seconds=jnp.minimum(state.predicted_seconds, 0.0))
    with traced_over(loop.mesh):
        return loop.place(dispatch.run(state))


def run_alone(
    loop: DecodeLoop,
    params: LoopParams,
    state: DecodeState,
    occupancy: Occupancy,
    rounds: Int[Array, ""],
    until_free: Bool[Array, ""],
) -> DecodeState:
    """Run plain rounds on the state of a loop with a drafter, at the cost of a target that has none.

    The drafter's context and the policy stay as they are. The requests in the slots draft no more afterwards: their
    contexts lack the tokens of these rounds. Verify caps of 0 see to that, and the next admission into a slot ends it.

    Args:
        loop: with a drafter; a chain.
        params, state, occupancy, rounds, until_free: as for `run_rounds`.
    Returns:
        The state after the last round; its `predicted_seconds` is 0.
    """
    after = run_rounds(loop.alone, *_apart(params, state), occupancy, rounds, until_free)
    return replace(after, draft=state.draft, policy=state.policy)


def _apart(params: LoopParams, state: DecodeState) -> tuple[LoopParams, DecodeState]:
    """The arguments of a loop without the drafter."""
    # Not handed over at all: a program that returned them would be another one for each kind of drafter.
    return LoopParams(params.target, {}), replace(state, draft=(), policy=PolicyState())


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def record_rounds(
    loop: DecodeLoop, params: LoopParams, state: DecodeState, occupancy: Occupancy, rounds: int
) -> tuple[DecodeState, RoundRecord]:
    """Run exactly `rounds` rounds, active slots or not, and record each.

    Args:
        loop: static part.
        params: weights and cost tables.
        state: donated.
        occupancy: load on the device, for load-adaptive policies.
        rounds: static, as it is the leading axis of the records.
    Returns:
        The state, and the records with leaves [rounds, ...]; `committed` is 0 in rounds after a slot's request ended.
    """

    # Inactive slots run along: their rounds are recorded with nothing committed.
    def body(current: DecodeState, _: None) -> tuple[DecodeState, RoundRecord]:
        return _recorded_round(loop, params, current, occupancy)

    # A scan and no while loop, as the records need a fixed number of rounds.
    with traced_over(loop.mesh):
        state, records = jax.lax.scan(body, state, None, length=rounds)
    return loop.place(state), records


def record_alone(
    loop: DecodeLoop, params: LoopParams, state: DecodeState, occupancy: Occupancy, rounds: int
) -> tuple[DecodeState, RoundRecord]:
    """As `run_alone`, with the arguments and records of `record_rounds`; the records hold no drafts."""
    after, records = record_rounds(loop.alone, *_apart(params, state), occupancy, rounds)
    return replace(after, draft=state.draft, policy=state.policy), records


class _Turn(NamedTuple):
    """Loop carry between two rounds: the number of rounds run, the state, and the plan of the next round."""

    done: Array
    state: DecodeState
    plan: RoundPlan


class _Stretch(NamedTuple):
    """Loop carry of successive plain rounds: their number so far, the state, and the taps [R, W, m D] of the tokens
    they fed to the target, which are missing from the drafter's context."""

    rounds: Array
    state: DecodeState
    taps: Array


@dataclass(frozen=True)
class _Dispatch:
    """One dispatch while it is traced: the operands that its rounds share, and its loops."""

    loop: DecodeLoop
    params: LoopParams
    occupancy: Occupancy
    rounds: Array
    until_free: Array
    started: Array  # [] active slots when the dispatch began

    def run(self, state: DecodeState) -> DecodeState:
        """The state after the dispatch's rounds."""
        # Static: a loop without a drafter is compiled without any of a drafter's code.
        none = jnp.zeros((), jnp.int32)
        if self.loop.drafter is None:
            # From here on a drafter's context, should the caller hold one, would lack tokens.
            state = replace(state, verify_cap=jnp.minimum(state.verify_cap, 0))
            return jax.lax.while_loop(self._plain_goes_on, self._plain_round, (none, state))[1]

        round_of = self._speculate if self.loop.policy.always_drafts else self._alternate
        # The plan that the last round leaves is dropped: the next dispatch makes its own, under its own occupancy.
        return jax.lax.while_loop(self._turn_goes_on, round_of, self._planned(none, state)).state

    def goes_on(self, done: Array, state: DecodeState) -> Array:
        """[] bool: whether another round is to run after `done` of them."""
        # `until_free` compares with the start: slots that were empty then do not end the dispatch.
        remaining = jnp.sum(state.active)
        return (done < self.rounds) & (remaining > 0) & ~(self.until_free & (remaining < self.started))

    def _planned(self, done: Array, state: DecodeState) -> _Turn:
        # The plan is made before the loop's condition is tested, since the condition asks whether any request drafts.
        return _Turn(done, state, self.loop.plan(self.params, state, self.occupancy))

    def _turn_goes_on(self, turn: _Turn) -> Array:
        return self.goes_on(turn.done, turn.state)

    # Loops without a drafter

    def _plain_goes_on(self, carry: tuple[Array, DecodeState]) -> Array:
        return self.goes_on(*carry)

    def _plain_round(self, carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        done, state = carry
        return done + 1, self.loop.plain_round(self.params, state)[0]

    # Loops with a drafter

    def _alternate(self, turn: _Turn) -> _Turn:
        """Run speculative rounds while any request drafts, then plain rounds while none does."""
        # Either condition or the other holds as long as the dispatch goes on, so that the outer loop cannot spin.
        turn = jax.lax.while_loop(self._drafts, self._speculate, turn)
        return jax.lax.while_loop(self._drafts_nothing, self._decode_plainly, turn)

    def _drafts(self, turn: _Turn) -> Array:
        return self._turn_goes_on(turn) & jnp.any(turn.plan.drafted)

    def _drafts_nothing(self, turn: _Turn) -> Array:
        return self._turn_goes_on(turn) & ~jnp.any(turn.plan.drafted)

    def _speculate(self, turn: _Turn) -> _Turn:
        state, _ = self.loop.speculative_round(self.params, turn.state, self.occupancy, turn.plan)
        return self._planned(turn.done + 1, state)

    def _decode_plainly(self, turn: _Turn) -> _Turn:
        """Run up to W plain rounds, then extend the drafter's context and let the policy plan again. The context grows
        by the rows of one block, which cost the drafter about as much as a single row."""
        loop, params = self.loop, self.params

        def more(stretch: _Stretch) -> Array:
            return (stretch.rounds < loop.width) & self.goes_on(turn.done + stretch.rounds, stretch.state)

        def plain_round(stretch: _Stretch) -> _Stretch:
            state, _, taps = loop.plain_round(params, stretch.state)
            taps = jax.lax.dynamic_update_slice_in_dim(stretch.taps, taps, stretch.rounds, axis=1)
            return _Stretch(stretch.rounds + 1, state, taps)

        # Each plain round fills one row [R, 1, m D] of the taps; rows of rounds that do not run stay 0, past the
        # commit's counts.
        shape = (loop.requests, loop.width, loop.models(params)[0].config.tap_width(loop.tap_layers))
        taps = jnp.zeros(shape, params.target["embed_weight_vd"].dtype)

        first = _Stretch(jnp.zeros((), jnp.int32), turn.state, taps)
        rounds, state, taps = jax.lax.while_loop(more, plain_round, first)

        # `turn.state` is from before the stretch: its lengths tell which tokens the drafter lacks.
        state = _caught_up(loop, params, turn.state, turn.plan, state, taps, rounds)
        return self._planned(turn.done + rounds, state)


def _caught_up(
    loop: DecodeLoop,
    params: LoopParams,
    before: DecodeState,
    plan: RoundPlan,
    after: DecodeState,
    taps: Array,
    rounds: Array,
) -> DecodeState:
    """Complete the state after `rounds` plain rounds: extends the drafter's context by the tokens that they fed to the
    target, with their `taps` [R, W, m D]; advances the policy by the rounds it did not plan; adds the seconds that the
    cost table predicts."""
    target, drafter = loop.models(params)
    assert drafter is not None

    # The tokens fed are the anchors of these rounds: positions length - 1 before them up to, not including, length - 1
    # after.
    starts, counts = before.length - 1, after.length - before.length
    tokens = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (taps.shape[1],)))(after.tokens, starts)

    # The first of the rounds was planned by `drafting`; `skipped` accounts for the others.
    return replace(
        after,
        draft=drafter.commit(borrowed_tables(target), after.draft, taps, tokens, starts, counts),
        policy=loop.policy.skipped(plan.policy, rounds - 1),
        predicted_seconds=after.predicted_seconds + rounds * loop.plain_seconds(params, before),
    )


class _Recorded(NamedTuple):
    """Loop carry of a single recorded round; `due`: whether it is still to run."""

    due: Array
    state: DecodeState
    record: RoundRecord


def _recorded_round(
    loop: DecodeLoop, params: LoopParams, state: DecodeState, occupancy: Occupancy
) -> tuple[DecodeState, RoundRecord]:
    """Run one round, speculative or plain, and record it: two loops, exactly one of which runs, once."""
    if loop.drafter is None:
        state, record, _ = loop.plain_round(params, state)
        return state, record

    # As a dispatch would have made it: recording must not change what is decoded.
    plan = loop.plan(params, state, occupancy)
    speculate = partial(loop.speculative_round, params)
    if loop.policy.always_drafts:
        return speculate(state, occupancy, plan)

    def speculative(carry: _Recorded) -> _Recorded:
        return _Recorded(jnp.zeros((), bool), *speculate(carry.state, occupancy, plan))

    def plain(carry: _Recorded) -> _Recorded:
        after, record, taps = loop.plain_round(params, carry.state)
        after = _caught_up(loop, params, carry.state, plan, after, taps, jnp.ones((), jnp.int32))

        # Both loops carry the same tree, so a plain round's record gets the blank drafts of a speculative one.
        blank = carry.record
        record = record._replace(draft_tokens=blank.draft_tokens, confidence=blank.confidence)
        return _Recorded(jnp.zeros((), bool), after, record)

    # The loops stand for a branch, which would copy the caches (see above).
    blank = zeros_of(lambda current: speculate(current, occupancy, plan)[1], state)
    drafts = jnp.any(plan.drafted)
    carry = jax.lax.while_loop(lambda carry: carry.due, speculative, _Recorded(drafts, state, blank))
    carry = jax.lax.while_loop(lambda carry: carry.due, plain, carry._replace(due=~drafts))
    return carry.state, carry.record
