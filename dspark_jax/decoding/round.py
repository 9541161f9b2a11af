"""One round of speculative decoding: draft, schedule, verify, accept, commit (the DSpark paper's Figure 1).

dispatch.py runs many rounds in one compiled call. A round without drafts is a round of plain decoding, and so is every
round of a loop without a drafter (K = 0, W = 1).

Axes: R request slots, K drafts of a block, W = K + 1 rows of a block (anchor and drafts), S cached positions, V vocab,
m tapped layers, D hidden.
"""

from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from dspark_jax.decoding.acceptance import first_stop
from dspark_jax.decoding.judging import Verdict, judge_chain, judge_tree
from dspark_jax.decoding.logprobs import Logprobs
from dspark_jax.decoding.loop import LoopSettings, anchors_of, borrowed_tables, draws_of
from dspark_jax.decoding.penalties import Penalties
from dspark_jax.decoding.sampling import SamplingArrays
from dspark_jax.decoding.soundness import sound_rows
from dspark_jax.decoding.state import DecodeState, RoundCounters, RoundRecord, empty_counters, spread
from dspark_jax.decoding.verification import VerifyOutput
from dspark_jax.drafters.protocol import DrafterModel
from dspark_jax.scheduling.costs import Occupancy, ScheduleTables, idle_costs
from dspark_jax.scheduling.policies import Fixed, PolicyState, RoundView
from dspark_jax.targets.decoder import TargetModel
from dspark_jax.targets.kv_cache import finite_or_zero


class LoopParams(NamedTuple):
    """Traced arguments of every compiled call; new values of the same shapes do not recompile.

    Attributes:
        target: the target's weights.
        drafter: the drafter's weights; {} without one.
        tables: cost tables, which load-adaptive policies need; None for the others.
    """

    target: dict
    drafter: dict
    tables: ScheduleTables | None = None


class RoundPlan(NamedTuple):
    """The policy's decisions before a round is drafted."""

    drafted: Bool[Array, " r"]  # active requests that draft
    caps: Int[Array, " r"]  # the most drafts that may be verified; 0 where nothing is drafted
    policy: PolicyState  # the policy's state after choosing


class DecodeLoop(LoopSettings):
    """The rounds of a loop, as pure functions of weights and state; see `LoopSettings` for the attributes."""

    def place(self, state: DecodeState) -> DecodeState:
        """Constrain the state to the mesh, on which the next call expects it; nothing on a single device."""
        return state if self.mesh is None else spread(state, self.mesh)

    @cached_property
    def alone(self) -> "DecodeLoop":
        """The loop of plain rounds on this loop's state, without any of the drafter's code; see `run_alone`."""
        return replace(self, drafter=None, tap_layers=(), policy=Fixed(), tree=None)

    def models(self, params: LoopParams) -> tuple[TargetModel, DrafterModel | None]:
        """The target and the drafter as modules, for use while tracing."""
        target = nnx.merge(self.target, params.target)
        return target, None if self.drafter is None else nnx.merge(self.drafter, params.drafter)

    def init_state(self, params: LoopParams) -> DecodeState:
        """All slots empty. Pure: run it under `jax.jit` or `jax.eval_shape`."""
        target, drafter = self.models(params)
        r = self.requests
        dtype = params.target["embed_weight_vd"].dtype
        zeros, floats, flags = (jnp.zeros((r,), kind) for kind in (jnp.int32, jnp.float32, bool))

        # A length of 1 keeps length - 1, where rounds look for an anchor, in range for slots without a request.
        empty = DecodeState(
            tokens=jnp.zeros((r, self.size), jnp.int32),
            length=zeros + 1,
            limit=zeros + 1,
            active=flags,
            stopped=flags,
            failed=flags,
            stop_tokens=jnp.full((r, self.stop_slots), -1, jnp.int32),
            verify_cap=zeros,
            keys=jnp.zeros((r, 2), jnp.uint32),
            sampling=SamplingArrays(floats, zeros, floats + 1, floats),
            penalties=Penalties.off(r, self.bias_slots),
            wants_logprobs=flags,
            logprobs=Logprobs.empty(r, self.size, min(self.top_logprobs, target.config.vocab_size)),
            target_cache=self.layout.empty(partial(target.empty_cache, width=self.width, dtype=dtype), r, self.size),
            draft=() if drafter is None else self.layout.empty(partial(drafter.init_state, dtype=dtype), r, self.size),
            counters=empty_counters(r, self.block),
            policy=self.policy.init(r, self.block),
            predicted_seconds=jnp.zeros((), jnp.float32),
        )
        return self.place(empty)

    def plan(self, params: LoopParams, state: DecodeState, occupancy: Occupancy) -> RoundPlan:
        """Decide which requests draft in the next round, and how many of their drafts may be verified.

        Drafts of this round do not exist yet, so nothing here can anticipate them (docs/algorithm.md, rule 76)."""
        caps = jnp.where(state.active, jnp.clip(state.verify_cap, 0, self.drafts), 0)
        if self.policy.needs_tables:
            # A round commits one token beyond its accepted drafts, so more drafts than this could not be committed.
            # Of a tree it bounds the depth: `judge_tree` counts the nodes.
            room = state.limit - state.length - 1
            caps = jnp.clip(room, 0, caps) if self.tree is None else jnp.where(room > 0, caps, 0)

        # Everything that a policy may look at here: no draft and no confidence exists yet.
        view = RoundView(state.active, state.length, caps, occupancy, params.tables)
        drafted, policy = self.policy.drafting(view, state.policy)
        return RoundPlan(drafted, jnp.where(drafted, caps, 0), policy)

    def speculative_round(
        self, params: LoopParams, state: DecodeState, occupancy: Occupancy, plan: RoundPlan
    ) -> tuple[DecodeState, RoundRecord]:
        """Run a round in which the requests of `plan.drafted` (at least one) draft; the others decode one token.

        Args:
            params: weights and cost tables.
            state: R slots; inactive ones are carried along and commit nothing.
            occupancy: load on the device, for load-adaptive policies.
            plan: of this round, from `plan` on the same state.
        Returns:
            (the state after the round, its record).
        """
        target, drafter = self.models(params)
        assert drafter is not None, "a loop without a drafter runs plain rounds"

        # 1. Draft. 2. Schedule: the policy cuts what was drafted to what is worth verifying. 3. Verify: one pass of the
        # target over the anchors and the drafts that are left. 4. Accept: a prefix, and one token after it.
        view = RoundView(state.active, state.length, plan.caps, occupancy, params.tables, plan.drafted)
        judge = judge_chain if self.tree is None else judge_tree
        verdict, verified, bucket, view, policy = judge(self, target, drafter, state, view, plan.policy)

        # 5. Commit: tokens, the target's K/V, the drafter's context, and what the policy learns from the outcome. The
        # context grows by the anchor's row and those of the accepted drafts (docs/algorithm.md, rule 5).
        after, verdict, count = self._commit(target, state, verdict, verified)

        # The anchors' positions before this round; `after` has moved on.
        starts = state.length - 1
        rows, taps = jnp.where(state.active, verdict.accepted + 1, 0), finite_or_zero(verified.taps)
        context = drafter.commit(borrowed_tables(target), state.draft, taps, verdict.block, starts, rows)

        after = replace(
            after,
            draft=context,
            policy=self.policy.observe(view, verdict.lengths, verdict.accepted, policy),
            counters=after.counters._replace(drafted=state.counters.drafted + plan.drafted),
            predicted_seconds=state.predicted_seconds + self._predicted(params, state, bucket),
        )

        shown = jnp.zeros((self.requests, 0)) if view.confidence is None else view.confidence
        return after, _record(starts, verdict, shown, count, bucket)

    def plain_round(self, params: LoopParams, state: DecodeState) -> tuple[DecodeState, RoundRecord, Array]:
        """Run a round without drafts, at the cost of plain decoding: the target on one row per request.

        Neither the drafter's context nor the policy is updated; the caller does that from the taps. Each request gets
        the token of a speculative round of verify length 0.

        Returns:
            (the state after the round, its record, taps [R, 1, m D] of the anchors).
        """
        target, _ = self.models(params)
        starts, anchors = anchors_of(state)
        # Verify length 0 for all: one row of each request, the anchor's.
        none = jnp.zeros_like(starts)

        # 3. Verify the anchor alone. 4. There is nothing to accept: the next token follows the target's law.
        verified, bucket = self.verify(target, state, anchors[:, None], starts, none)
        logits = self.decodable(verified.logits)
        next_token = self.verifier.next_token(logits[:, 0], draws_of(state, anchors[:, None]), self.block)

        # 5. Commit that token and the anchor's K/V.
        verdict = Verdict(anchors[:, None], none, none, next_token, sound_rows(logits) == 0)
        after, verdict, count = self._commit(target, state, verdict, verified)

        record = _record(starts, verdict, jnp.zeros((self.requests, 0)), count, bucket)
        # Cleaned here as for drafts: the drafter's context keeps them longer than this request (docs/algorithm.md, rule
        # 105).
        return after, record, finite_or_zero(verified.taps)

    def plain_seconds(self, params: LoopParams, state: DecodeState) -> Array:
        """Predicted seconds of a plain round on an otherwise idle device; 0 without a cost table."""
        if params.tables is None:
            return jnp.zeros((), jnp.float32)
        return idle_costs(params.tables.costs, state.active, state.length).plain

    def _predicted(self, params: LoopParams, state: DecodeState, bucket: Array) -> Array:
        """Predicted seconds of a speculative round at this bucket on an otherwise idle device; 0 without a table."""
        if params.tables is None:
            return jnp.zeros((), jnp.float32)
        # On an idle device: the meter compares with the clock, and so finds the load.
        costs = idle_costs(params.tables.costs, state.active, state.length)
        return costs.of(bucket) + costs.drafting

    def _commit(
        self, target: TargetModel, state: DecodeState, verdict: Verdict, verified: VerifyOutput
    ) -> tuple[DecodeState, Verdict, Array]:
        """Append x_1..x_n and the token after them, up to the first stop token and the request's limit.

        Returns:
            (the state; the verdict, with proposals cut at the request's end so that drafts past it count neither as
            verified nor as accepted; the number of tokens committed [R]).
        """
        # Tokens offered, [R, W]: rolling moves x_1 to column 0, the token after the prefix takes column n, the rest is
        # junk.
        starts, columns = state.length - 1, jnp.arange(verdict.block.shape[1])
        accepted = verdict.accepted
        fresh = jnp.where(
            columns == accepted[:, None], verdict.next_token[:, None], jnp.roll(verdict.block, -1, axis=1)
        )

        # How many of them are committed: up to a stop token, the limit, or the last finite law.
        offered, room = accepted + ~verdict.failed, state.limit - state.length
        kept, stopped = first_stop(fresh, state.stop_tokens, offered)
        count = jnp.where(state.active, jnp.minimum(kept, room), 0)
        length = state.length + count

        # A stop token past the limit is not committed, and a row without a law behind the request's end does not
        # matter.
        stopped &= state.active & (kept == count)
        failed = state.active & verdict.failed & (count == offered) & ~stopped & (length < state.limit)

        # The limit cuts every proposal, whether or not it was accepted that far: otherwise rates by position would be
        # biased.
        cut = count < offered
        verdict = verdict._replace(
            lengths=jnp.where(cut, count, jnp.minimum(verdict.lengths, room)),
            accepted=jnp.where(cut, count, accepted),
        )

        # Rows of rejected drafts are written too, as junk past the new length, so that rolling back is free
        # (docs/algorithm.md, rule 13).
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
        after = replace(
            state,
            tokens=write(state.tokens, fresh, state.length),
            length=length,
            active=state.active & ~stopped & ~failed & (length < state.limit),
            stopped=state.stopped | stopped,
            failed=state.failed | failed,
            target_cache=target.append(state.target_cache, verified.kv, starts),
            counters=self._counted(state, verdict, count),
            logprobs=state.logprobs.noted(
                state.active & state.wants_logprobs,
                self.decodable(verified.logits),
                fresh,
                jnp.arange(len(count)),
                state.length,
                self.vocab_sharding(target),
            ),
        )
        return after, verdict, count

    def _counted(self, state: DecodeState, verdict: Verdict, count: Array) -> RoundCounters:
        # [R, K] masks of the drafts verified and accepted; slots that were idle before the round count nothing.
        position, live, counters = jnp.arange(self.block), state.active[:, None], state.counters
        verified = live & (position < verdict.lengths[:, None])
        accepted = verdict.accepted[:, None]

        return counters._replace(
            rounds=counters.rounds + state.active,
            committed=counters.committed + count,
            verified_at=counters.verified_at + verified,
            accepted_at=counters.accepted_at + (live & (position < accepted)),
            # The first rejected draft was judged too; those behind it were not, as their prefix had failed.
            judged_at=counters.judged_at + (verified & (position <= accepted)),
        )


@partial(jax.jit, static_argnums=0)
def init_state(loop: DecodeLoop, params: LoopParams) -> DecodeState:
    """All slots empty, on the devices of the loop's mesh."""
    return loop.init_state(params)


def _record(starts: Array, verdict: Verdict, confidence: Array, count: Array, bucket: Array) -> RoundRecord:
    lengths, accepted = verdict.lengths, verdict.accepted
    drafts = verdict.block[:, 1:]
    return RoundRecord(starts, drafts, confidence, lengths, accepted, verdict.next_token, count, bucket)
