"""The compiled draft-verify-accept loop. One dispatch runs many rounds on the device; the host reads results between.

Axes: R request slots, W = K + 1 rows of a block (anchor and drafts), S cached positions, V vocab, P packed rows of a
bucket. Plain decoding is this loop with no drafter: K = 0, W = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from dspark_jax.decoding.acceptance import AcceptanceRule, RejectionSampling, first_stop
from dspark_jax.decoding.sampling import DRAFT, RESIDUAL, SamplingParams, draw_token, sampling_law, uniforms
from dspark_jax.decoding.scheduler import Fixed, VerifyPolicy
from dspark_jax.decoding.state import Admission, DecodeState, RoundCounters, RoundRecord, empty_counters
from dspark_jax.drafters.protocol import Drafter, DraftOutput, SharedTables
from dspark_jax.sharding import ShardingRules
from dspark_jax.targets.attention import CachedBlock, Causal, KeysValues, PackedRows
from dspark_jax.targets.decoder import TargetModel
from dspark_jax.targets.kv_cache import append_rows, empty_cache, head_major, insert_rows


class LoopParams(NamedTuple):
    """The weights, an argument of every compiled call; `drafter` is {} without one."""

    target: dict
    drafter: dict


class VerifyOutput(NamedTuple):
    """Target results on the [R, W] grid; cells past a request's verify length are junk or zero."""

    logits: Array
    taps: Array
    kv: tuple[KeysValues, ...]


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

    def _place(self, state: DecodeState) -> DecodeState:
        """Slots over all devices where their number allows it, else the whole state on each."""
        if self.mesh is None:
            return state
        rules = ShardingRules() if self.requests % self.mesh.size == 0 else ShardingRules(batch=None)
        spec = NamedSharding(self.mesh, rules.spec(["batch"]))
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, spec), state)

    def _models(self, params: LoopParams) -> tuple[TargetModel, Drafter | None]:
        target = nnx.merge(self.target, params.target)
        return target, None if self.drafter is None else nnx.merge(self.drafter, params.drafter)

    def init_state(self, params: LoopParams) -> DecodeState:
        """All slots empty. Pure: run it under `jax.jit` or `jax.eval_shape`."""
        target, drafter = self._models(params)
        r = self.requests
        dtype = params.target["embed_weight_vd"].dtype
        zeros, flags = jnp.zeros((r,), jnp.int32), jnp.zeros((r,), bool)
        empty = DecodeState(
            tokens=jnp.zeros((r, self.size), jnp.int32),
            length=zeros + 1,
            limit=zeros + 1,
            active=flags,
            stopped=flags,
            stop_tokens=jnp.full((r, self.stop_slots), -1, jnp.int32),
            verify_cap=zeros,
            keys=jnp.zeros((r, 2), jnp.uint32),
            sampling=SamplingParams(zeros * 0.0, zeros, zeros + 1.0, zeros * 0.0),
            target_cache=empty_cache(target.config.kv_shapes, r, self.size, dtype),
            draft=() if drafter is None else drafter.init_state(r, self.size, dtype),
            counters=empty_counters(r, self.block),
        )
        return self._place(empty)

    def admit(self, params: LoopParams, state: DecodeState, new: Admission) -> DecodeState:
        """Prefills A prompts into slots and samples the first token of each: its first anchor (golden/NOTES 32)."""
        target, drafter = self._models(params)
        count, length = new.tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), (count, length))
        out = target(new.tokens, positions, Causal(), self.tap_layers)
        rows = jnp.arange(count)
        logits = target.logits(out.hidden[rows, new.lengths - 1])
        law = sampling_law(logits, new.sampling)
        first = draw_token(law, new.keys, new.lengths - 1, 0, RESIDUAL, new.sampling)
        padded = jnp.pad(new.tokens, ((0, 0), (0, 1)))  # room for the first token after a full bucket
        padded = padded.at[rows, new.lengths].set(first)
        stopped = jnp.any(first[:, None] == new.stop_tokens, axis=1)
        draft = state.draft
        if drafter is not None:
            draft = insert_rows(draft, drafter.prefill(out.taps, new.tokens, new.lengths), new.slots)
        entering = replace(
            state,
            tokens=padded,
            length=new.lengths + 1,
            limit=new.limit,
            active=~stopped & (new.lengths + 1 < new.limit),
            stopped=stopped,
            stop_tokens=new.stop_tokens,
            verify_cap=new.verify_cap,
            keys=new.keys,
            sampling=new.sampling,
            counters=empty_counters(count, self.block),
            target_cache=tuple(head_major(kv) for kv in out.kv),
            draft=(),
        )
        return self._place(replace(insert_rows(replace(state, draft=()), entering, new.slots), draft=draft))

    def round(self, params: LoopParams, state: DecodeState) -> tuple[DecodeState, RoundRecord]:
        """One round for every slot: draft, schedule, verify, accept, commit (SPEC section 1)."""
        target, drafter = self._models(params)
        starts = state.length - 1
        anchors = jnp.take_along_axis(state.tokens, starts[:, None], axis=1)[:, 0]
        draft = self._draft(target, drafter, state, anchors, starts)
        lengths = self._schedule(state, draft)
        block = jnp.concatenate([anchors[:, None], draft.tokens], axis=1)
        verified, bucket = self._verify(target, state, block, starts, lengths)
        target_law = sampling_law(verified.logits, state.sampling)
        if drafter is None:
            accepted, next_law = jnp.zeros_like(starts), target_law[:, 0]
        else:
            draws = uniforms(state.keys, starts, self.block, state.sampling)
            accepted, next_law = self.rule(draft.tokens, draft.probs, target_law, draws, lengths)
        next_token = draw_token(next_law, state.keys, starts, self.block, RESIDUAL, state.sampling)
        return self._commit(drafter, state, block, draft, lengths, verified, accepted, next_token, bucket)

    def _draft(
        self, target: TargetModel, drafter: Drafter | None, state: DecodeState, anchors: Array, starts: Array
    ) -> DraftOutput:
        if drafter is None:
            empty = jnp.zeros((self.requests, 0), jnp.int32)
            return DraftOutput(empty, jnp.zeros((self.requests, 0, 1), jnp.float32), None)

        def sample(logits: Array, offset: int) -> tuple[Array, Array]:
            law = sampling_law(logits, state.sampling)
            return draw_token(law, state.keys, starts, offset, DRAFT, state.sampling), law

        shared = SharedTables.of(target.config, target.embed_weight_vd[...], target.head_weight())
        return drafter.draft(shared, state.draft, anchors, starts, sample)

    def _schedule(self, state: DecodeState, draft: DraftOutput) -> Array:
        if self.block == 0:
            return jnp.zeros_like(state.length)
        lengths = self.policy(draft.confidence, jnp.clip(state.verify_cap, 0, self.block))
        return jnp.where(state.active, lengths, 0)

    def _verify(
        self, target: TargetModel, state: DecodeState, block: Array, starts: Array, lengths: Array
    ) -> tuple[VerifyOutput, Array]:
        """The target on [anchor, x_1..x_l] of every request, packed into the smallest bucket that holds them.

        The cache is a read-only operand of the switch: branches that updated it would copy it whole every round.
        """
        wanted = state.active[:, None] & (jnp.arange(self.width) <= lengths[:, None])
        needed = jnp.sum(wanted)
        buckets = jnp.asarray(self.buckets)
        choice = jnp.searchsorted(buckets, needed)  # the last bucket holds every row, so this is in range
        branches = [partial(self._verify_bucket, target, size) for size in self.buckets]
        operands = (state.target_cache, block, starts, wanted)
        if len(branches) == 1:
            # Still a branch: in straight-line code XLA may write a layer's new K/V before its attention has read the
            # cache, and so copies the whole cache first, every round.
            out = jax.lax.cond(needed > 0, branches[0], partial(_nothing, branches[0]), *operands)
        else:
            out = jax.lax.switch(choice, branches, *operands)
        return out, buckets[choice]

    def _verify_bucket(
        self, target: TargetModel, size: int, cache: Any, block: Array, starts: Array, wanted: Array
    ) -> VerifyOutput:
        positions = starts[:, None] + jnp.arange(self.width)
        if size == self.requests * self.width:  # every cell has its row: no packing to undo
            out = target(block, positions, CachedBlock(cache, starts), self.tap_layers)
            return VerifyOutput(target.logits(out.hidden), out.taps, out.kv)
        cells = self.requests * self.width
        index = jnp.nonzero(wanted.ravel(), size=size, fill_value=cells)[0]
        packed = PackedRows(index, self.requests, self.width)
        attend = CachedBlock(cache, starts, packed)
        out = target(packed.from_grid(block), packed.from_grid(positions), attend, self.tap_layers)
        grid = packed.to_grid
        kv = tuple(KeysValues(grid(layer.keys), grid(layer.values)) for layer in out.kv)
        return VerifyOutput(grid(target.logits(out.hidden)), grid(out.taps), kv)

    def _commit(
        self,
        drafter: Drafter | None,
        state: DecodeState,
        block: Array,
        draft: DraftOutput,
        lengths: Array,
        verified: VerifyOutput,
        accepted: Array,
        next_token: Array,
        bucket: Array,
    ) -> tuple[DecodeState, RoundRecord]:
        """Appends x_1..x_n and the next token, cut at the first stop token and at the request's limit."""
        starts, columns = state.length - 1, jnp.arange(self.width)
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
            draft_state = drafter.commit(draft_state, verified.taps, block, starts, accepted + 1)
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
        positions = columns[: self.block]
        live = state.active[:, None]
        counters = RoundCounters(
            rounds=state.counters.rounds + state.active,
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
                target_cache=append_rows(state.target_cache, verified.kv, starts),
                draft=draft_state,
                counters=counters,
            ),
            record,
        )

    def run(self, params: LoopParams, state: DecodeState, rounds: Array, until_free: Array) -> DecodeState:
        """Up to `rounds` rounds; fewer when no slot is active or, with `until_free`, once an active slot has ended."""
        started = jnp.sum(state.active)

        def unfinished(carry: tuple[Array, DecodeState]) -> Array:
            done, current = carry
            remaining = jnp.sum(current.active)
            return (done < rounds) & (remaining > 0) & ~(until_free & (remaining < started))

        def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
            done, current = carry
            return done + 1, self.round(params, current)[0]

        return self._place(jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state))[1])


def _nothing(branch: Callable, *operands: Any) -> Any:
    """Zeros in the shape of what `branch` returns."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(branch, *operands))


@partial(jax.jit, static_argnums=0)
def init_state(loop: DecodeLoop, params: LoopParams) -> DecodeState:
    return loop.init_state(params)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def admit(loop: DecodeLoop, params: LoopParams, state: DecodeState, new: Admission) -> DecodeState:
    return loop.admit(params, state, new)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def run_rounds(
    loop: DecodeLoop, params: LoopParams, state: DecodeState, rounds: Array, until_free: Array
) -> DecodeState:
    return loop.run(params, state, rounds, until_free)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def run_round(loop: DecodeLoop, params: LoopParams, state: DecodeState) -> tuple[DecodeState, RoundRecord]:
    return loop.round(params, state)
