"""A round of the compiled draft-verify-accept loop, as often as `decoding/dispatch.py` wants it in one call.

Axes: R request slots, W = K + 1 rows of a block (anchor and drafts), S cached positions, V vocab. Plain decoding is
this loop with no drafter: K = 0, W = 1.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from dspark_jax.decoding.acceptance import AcceptanceRule, RejectionSampling, first_stop
from dspark_jax.decoding.sampling import DRAFT, RESIDUAL, SamplingArrays, draw, draw_token, sampling_law, uniforms
from dspark_jax.decoding.state import DecodeState, RoundCounters, RoundRecord, empty_counters, spread
from dspark_jax.decoding.verification import VerifyOutput, verify, zeros_of
from dspark_jax.drafters.protocol import DrafterModel, DraftOutput, SharedTables
from dspark_jax.scheduling.costs import Occupancy, ScheduleTables, idle_costs
from dspark_jax.scheduling.policies import Fixed, PolicyState, RoundView, VerifyPolicy
from dspark_jax.targets.decoder import TargetModel


class LoopParams(NamedTuple):
    """The weights, an argument of every compiled call; `drafter` is {} without one. `tables`: what adaptive policies
    need, None where nobody does; other values in the same shapes compile nothing."""

    target: dict
    drafter: dict
    tables: ScheduleTables | None = None


@dataclass(frozen=True)
class DecodeLoop:
    """Static part of the loop; hashable, so it is a jit-static argument and equal loops share compiled programs.

    `buckets` are the token counts that the verify pass is compiled for, ascending, the last one R * W.
    """

    target: nnx.GraphDef
    drafter: nnx.GraphDef | None
    requests: int
    size: int
    block: int
    tap_layers: tuple[int, ...]
    buckets: tuple[int, ...]
    stop_slots: int
    policy: VerifyPolicy = Fixed()
    rule: AcceptanceRule = RejectionSampling()
    mesh: Mesh | None = None  # devices that the parameters are spread over; slots are spread over them too

    @cached_property
    def _hash(self) -> int:
        return hash((self.target, self.drafter, self.requests, self.size, self.block, self.buckets, self.policy))

    def __hash__(self) -> int:  # graphdefs are large: hash once, not at every dispatch
        return self._hash

    @property
    def width(self) -> int:
        return self.block + 1

    def place(self, state: DecodeState) -> DecodeState:
        return state if self.mesh is None else spread(state, self.mesh)

    def models(self, params: LoopParams) -> tuple[TargetModel, DrafterModel | None]:
        target = nnx.merge(self.target, params.target)
        return target, None if self.drafter is None else nnx.merge(self.drafter, params.drafter)

    def init_state(self, params: LoopParams) -> DecodeState:
        """All slots empty. Pure: run it under `jax.jit` or `jax.eval_shape`."""
        target, drafter = self.models(params)
        r = self.requests
        dtype = params.target["embed_weight_vd"].dtype
        zeros, floats, flags = (jnp.zeros((r,), kind) for kind in (jnp.int32, jnp.float32, bool))
        empty = DecodeState(
            tokens=jnp.zeros((r, self.size), jnp.int32),
            length=zeros + 1,
            limit=zeros + 1,
            active=flags,
            stopped=flags,
            stop_tokens=jnp.full((r, self.stop_slots), -1, jnp.int32),
            verify_cap=zeros,
            keys=jnp.zeros((r, 2), jnp.uint32),
            sampling=SamplingArrays(floats, zeros, floats + 1, floats),
            target_cache=target.empty_cache(r, self.size, self.width, dtype),
            draft=() if drafter is None else drafter.init_state(r, self.size, dtype),
            counters=empty_counters(r, self.block),
            policy=self.policy.init(r, self.block),
            predicted_seconds=jnp.zeros((), jnp.float32),
        )
        return self.place(empty)

    def round(self, params: LoopParams, state: DecodeState, occupancy: Occupancy) -> tuple[DecodeState, RoundRecord]:
        """One round for every slot: draft, schedule, verify, accept, commit (SPEC section 1)."""
        if self.block == 0:
            state, record, _ = self.plain_round(params, state)
            return state, record
        view, policy = self.view(params, state, occupancy)
        return self._speculative_round(params, state, view, policy)

    def planned_round(
        self, params: LoopParams, state: DecodeState, occupancy: Occupancy, drafted: Array, policy: PolicyState
    ) -> DecodeState:
        """A round in which those of `drafted` [R] draft, one at least, as the policy has said; `policy`: its state
        since."""
        view = self._drafted_view(params, state, occupancy, drafted)
        return self._speculative_round(params, state, view, policy, someone=True)[0]

    def _speculative_round(
        self, params: LoopParams, state: DecodeState, view: RoundView, policy: PolicyState, someone: bool = False
    ) -> tuple[DecodeState, RoundRecord]:
        """`someone`: it is known that one request at least drafts, so the round need not ask."""
        target, drafter = self.models(params)
        starts, anchors = _anchors(state)
        draft = self.draft(target, drafter, state, anchors, starts, None if someone else view.drafted)
        view = view._replace(confidence=draft.confidence)
        lengths, policy = self.policy(view, policy) if someone else self._schedule(view, policy)
        block = jnp.concatenate([anchors[:, None], draft.tokens], axis=1)
        verified, bucket = self.verify(target, state, block, starts, lengths)
        target_law = sampling_law(verified.logits, state.sampling)
        draws = uniforms(state.keys, starts, self.block, state.sampling)
        accepted, next_law = self.rule(draft.tokens, draft.probs, target_law, draws, lengths)
        next_token = draw_token(next_law, state.keys, starts, self.block, RESIDUAL, state.sampling)
        state, record = self._commit(
            drafter, state, block, draft, lengths, verified, accepted, next_token, bucket, target
        )
        policy = self.policy.observe(view, record.verify_lengths, record.accepted, policy)
        return self._account(state, view, policy, bucket), record

    def plain_round(self, params: LoopParams, state: DecodeState) -> tuple[DecodeState, RoundRecord, Array]:
        """A round in which nobody drafts, at the cost of plain decoding: the target on one row a request, whose taps
        [R, 1, m D] are the third result. Neither drafter nor policy is told. The number drawn is the one that a
        speculative round with verify length 0 would draw."""
        target, _ = self.models(params)
        starts, anchors = _anchors(state)
        none = jnp.zeros_like(starts)
        verified, bucket = self.verify(target, state, anchors[:, None], starts, none)
        logits = verified.logits[:, 0]
        next_token, _ = draw(logits, state.keys, starts, self.block, RESIDUAL, state.sampling)
        draft = self.draft(target, None, state, anchors, starts, None)
        state, record = self._commit(
            None, state, anchors[:, None], draft, none, verified, none, next_token, bucket, target
        )
        return state, record, verified.taps

    def view(self, params: LoopParams, state: DecodeState, occupancy: Occupancy) -> tuple[RoundView, PolicyState]:
        """What the policy sees before anything is drafted, with its own word on who drafts."""
        view = self._drafted_view(params, state, occupancy, None)
        if self.block == 0:
            return view, state.policy
        drafted, policy = self.policy.drafting(view, state.policy)
        return self._drafted_view(params, state, occupancy, drafted), policy

    def _drafted_view(
        self, params: LoopParams, state: DecodeState, occupancy: Occupancy, drafted: Array | None
    ) -> RoundView:
        caps = jnp.where(state.active, jnp.clip(state.verify_cap, 0, self.block), 0)
        if self.policy.needs_tables:  # one token comes without a draft, so more than this could not be kept
            caps = jnp.clip(state.limit - state.length - 1, 0, caps)
        if drafted is not None:
            caps = jnp.where(drafted, caps, 0)
        return RoundView(state.active, state.length, caps, occupancy, params.tables, drafted)

    def _account(self, state: DecodeState, view: RoundView, policy: PolicyState, bucket: Array) -> DecodeState:
        """Counts who drafted, and what the cost table says that this round takes with nothing beside it."""
        drafted = view.active if view.drafted is None else view.active & view.drafted
        counters = state.counters._replace(drafted=state.counters.drafted + drafted)
        predicted = state.predicted_seconds
        if view.tables is not None:
            costs = idle_costs(view.tables.costs, view.active, view.lengths)
            predicted += jnp.where(jnp.any(drafted), costs.of(bucket) + costs.drafting, costs.plain)
        return replace(state, counters=counters, policy=policy, predicted_seconds=predicted)

    def plain_seconds(self, params: LoopParams, state: DecodeState) -> Array:
        """What the cost table says of a plain round; 0 without one."""
        if params.tables is None:
            return jnp.zeros((), jnp.float32)
        return idle_costs(params.tables.costs, state.active, state.length).plain

    def draft(
        self,
        target: TargetModel,
        drafter: DrafterModel | None,
        state: DecodeState,
        anchors: Array,
        starts: Array,
        drafted: Array | None,
    ) -> DraftOutput:
        """Drafts of every slot; zeros where `drafted` is given and nobody does. Without a drafter, none."""
        if drafter is None:
            empty = jnp.zeros((self.requests, 0), jnp.int32)
            return DraftOutput(empty, jnp.zeros((self.requests, 0, 1), jnp.float32), None)

        def sample(logits: Array, offset: int) -> tuple[Array, Array]:
            return draw(logits, state.keys, starts, offset, DRAFT, state.sampling)

        shared = shared_tables(target)

        def run(context: Any) -> DraftOutput:
            return drafter.draft(shared, context, anchors, starts, sample)

        if drafted is None:
            return run(state.draft)
        # Zeros where nobody drafts: no length above 0 follows, so nothing of them is looked at.
        return jax.lax.cond(jnp.any(drafted), run, partial(zeros_of, run), state.draft)

    def _schedule(self, view: RoundView, policy: PolicyState) -> tuple[Array, PolicyState]:
        """Verify lengths; where nobody drafted there is nothing to choose."""
        if view.drafted is None:
            return self.policy(view, policy)

        def nothing(policy: PolicyState) -> tuple[Array, PolicyState]:
            return jnp.zeros_like(view.caps), policy

        return jax.lax.cond(jnp.any(view.drafted), partial(self.policy, view), nothing, policy)

    def verify(
        self, target: TargetModel, state: DecodeState, block: Array, starts: Array, lengths: Array
    ) -> tuple[VerifyOutput, Array]:
        wanted = state.active[:, None] & (jnp.arange(block.shape[1]) <= lengths[:, None])
        return verify(target, self.buckets, self.tap_layers, state.target_cache, block, starts, wanted)

    def _commit(
        self,
        drafter: DrafterModel | None,
        state: DecodeState,
        block: Array,
        draft: DraftOutput,
        lengths: Array,
        verified: VerifyOutput,
        accepted: Array,
        next_token: Array,
        bucket: Array,
        target: TargetModel,
    ) -> tuple[DecodeState, RoundRecord]:
        """Appends x_1..x_n and the next token, cut at the first stop token and at the request's limit."""
        starts, columns = state.length - 1, jnp.arange(block.shape[1])
        fresh = jnp.where(columns == accepted[:, None], next_token[:, None], jnp.roll(block, -1, axis=1))
        kept, stopped = first_stop(fresh, state.stop_tokens, accepted + 1)
        kept = jnp.where(state.active, kept, 0)
        count = jnp.minimum(kept, state.limit - state.length)
        length = state.length + count
        # A stop among the drafts ends the proposal there: what lies behind it counts neither as verified nor accepted.
        cut = stopped & (kept <= accepted)
        accepted = jnp.where(cut, kept, accepted)
        lengths = jnp.where(cut, kept, lengths)
        stopped &= state.active & (kept == count)
        draft_state = state.draft
        if drafter is not None:
            counts = jnp.where(state.active, accepted + 1, 0)
            draft_state = drafter.commit(shared_tables(target), draft_state, verified.taps, block, starts, counts)
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
        positions, live = jnp.arange(self.block), state.active[:, None]
        counters = RoundCounters(
            rounds=state.counters.rounds + state.active,
            drafted=state.counters.drafted,
            committed=state.counters.committed + kept,
            verified_at=state.counters.verified_at + (live & (positions < lengths[:, None])),
            accepted_at=state.counters.accepted_at + (live & (positions < accepted[:, None])),
        )
        confidence = draft.confidence if draft.confidence is not None else jnp.zeros((self.requests, 0))
        record = RoundRecord(starts, draft.tokens, confidence, lengths, accepted, next_token, kept, bucket)
        return (
            replace(
                state,
                tokens=write(state.tokens, fresh, state.length),
                length=length,
                active=state.active & ~stopped & (length < state.limit),
                stopped=state.stopped | stopped,
                target_cache=target.append(state.target_cache, verified.kv, starts),
                draft=draft_state,
                counters=counters,
            ),
            record,
        )


def _anchors(state: DecodeState) -> tuple[Array, Array]:
    """(positions, tokens) [R] of the last committed tokens."""
    starts = state.length - 1
    return starts, jnp.take_along_axis(state.tokens, starts[:, None], axis=1)[:, 0]


def shared_tables(target: TargetModel) -> SharedTables:
    return SharedTables.of(target.config, target.embed_weight_vd[...], target.head_weight())


@partial(jax.jit, static_argnums=0)
def init_state(loop: DecodeLoop, params: LoopParams) -> DecodeState:
    return loop.init_state(params)
