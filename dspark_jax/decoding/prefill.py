"""Prefill: the target's K/V and the drafter's context of a prompt, chunk by chunk, and its first token.

A prompt's first chunk attends to itself alone; a later one, through the attention core of a verify block, also to what
its slot holds already. The drafter takes a first chunk by `prefill`, a later one by `commit`, as verified rows.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dspark_jax.decoding.round import DecodeLoop, LoopParams, borrowed_tables, finite_or_zero, sound_rows
from dspark_jax.decoding.sampling import RESIDUAL, draw_token, sampling_law
from dspark_jax.decoding.state import Admission, DecodeState, empty_counters
from dspark_jax.decoding.verification import zeros_of
from dspark_jax.drafters.protocol import DrafterModel, SharedTables
from dspark_jax.targets.attention import Attend, CachedBlock, CausalRows
from dspark_jax.targets.decoder import Cache, TargetModel
from dspark_jax.targets.kv_cache import insert_rows, take_slots


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def admit(loop: DecodeLoop, params: LoopParams, state: DecodeState, new: Admission, fresh: bool) -> DecodeState:
    """Runs one chunk of A prompts. `fresh`: they all start at 0, so nothing cached is read.

    A final chunk samples the request's first token, its first anchor (docs/algorithm.md, rule 9). Until then the slot
    stays inactive, with a length that keeps the junk of rounds behind what it holds.
    """
    target, drafter = loop.models(params)
    rows = jnp.arange(new.tokens.shape[0])
    out = _forward(target, loop.tap_layers, state.target_cache, new, fresh)
    ends = new.starts + new.counts

    # The first token, from the target's law behind the prompt.
    logits = loop.decodable(target.logits(out.hidden[rows, new.counts - 1]))
    failed = _unusable(out.hidden, new) | (new.final & (sound_rows(logits[:, None]) == 0))
    if not fresh:
        failed |= state.failed[new.slots]
    first = draw_token(sampling_law(logits, new.sampling), new.keys, ends - 1, 0, RESIDUAL, new.sampling)
    stopped = new.final & ~failed & jnp.any(first[:, None] == new.stop_tokens, axis=1)
    length = ends + ~(new.final & failed)

    # The small leaves of the slots.
    apart: Any = ()  # what is written on its own below
    entering = replace(
        state,
        tokens=apart,
        length=length,
        limit=new.limit,
        active=new.final & ~stopped & ~failed & (length < new.limit),
        stopped=stopped,
        failed=failed,
        stop_tokens=new.stop_tokens,
        verify_cap=new.verify_cap,
        keys=new.keys,
        sampling=new.sampling,
        counters=empty_counters(len(rows), loop.block),
        target_cache=apart,
        draft=apart,
        policy=loop.policy.init(len(rows), loop.block).slots,
        predicted_seconds=apart,
    )
    slots = replace(
        state, tokens=apart, target_cache=apart, draft=apart, policy=state.policy.slots, predicted_seconds=apart
    )
    settled = insert_rows(slots, entering, new.slots)

    # The large ones: tokens, the target's K/V, the drafter's context.
    padded = jnp.pad(new.tokens, ((0, 0), (0, 1)))  # room for the first token after a full chunk
    padded = padded.at[rows, new.counts].set(first)
    kv = jax.tree.map(finite_or_zero, out.kv)
    draft = state.draft
    if drafter is not None:
        draft = _context(drafter, borrowed_tables(target), draft, finite_or_zero(out.taps), new, fresh)
    return loop.place(
        replace(
            settled,
            tokens=insert_rows(state.tokens, padded, new.slots, new.starts, axis=1),
            target_cache=target.insert(state.target_cache, kv, new.slots, new.starts, new.counts),
            draft=draft,
            policy=state.policy._replace(slots=settled.policy),
            predicted_seconds=state.predicted_seconds,
        )
    )


def _forward(target: TargetModel, layers: tuple[int, ...], cache: Cache, new: Admission, fresh: bool) -> Any:
    """The target on a chunk; one that is not `fresh` attends to what its slot holds."""
    positions = new.starts[:, None] + jnp.arange(new.tokens.shape[1])

    def run(cache: Cache) -> Any:
        attend: Attend = CausalRows() if fresh else CachedBlock(take_slots(cache, new.slots), new.starts)
        return target(new.tokens, positions, attend, layers)

    # A branch that is always taken: in straight-line code XLA may write the cache before it is read, and so copies it.
    return run(()) if fresh else jax.lax.cond(new.counts[0] > 0, run, partial(zeros_of, run), cache)


def _unusable(hidden: Array, new: Admission) -> Array:
    """[A]: whether the target failed on a token of the chunk, whose K/V are then not what is stored."""
    real = jnp.arange(hidden.shape[1]) < new.counts[:, None]
    return jnp.any(real & ~jnp.all(jnp.isfinite(hidden), axis=-1), axis=1)


def _context(drafter: DrafterModel, shared: SharedTables, stored: Any, taps: Array, new: Admission, fresh: bool) -> Any:
    """The drafter's state with the chunk's context."""
    if fresh:
        return insert_rows(stored, drafter.prefill(shared, taps, new.tokens, new.counts), new.slots)

    def run(state: Any) -> Any:
        return drafter.commit(shared, take_slots(state, new.slots), taps, new.tokens, new.starts, new.counts)

    return insert_rows(stored, jax.lax.cond(new.counts[0] > 0, run, partial(zeros_of, run), stored), new.slots)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def retire(loop: DecodeLoop, state: DecodeState, slots: Bool[Array, " r"]) -> DecodeState:
    """Ends the requests of the marked slots."""
    return loop.place(replace(state, active=state.active & ~slots))
