"""Prefill: computes the target's K/V and the drafter's context of a prompt, chunk by chunk, and its first token.

A prompt's first chunk attends only to itself. A later chunk also attends to the positions cached in its slot, through
the attention core of a verify block. The drafter receives a first chunk through `prefill`, a later one through
`commit`, like verified rows.

Axes: R request slots, A admitted requests, T width of a chunk, m tapped layers, D hidden, V vocab.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dspark_jax.decoding.loop import borrowed_tables
from dspark_jax.decoding.penalties import LogitEdits
from dspark_jax.decoding.round import DecodeLoop, LoopParams
from dspark_jax.decoding.soundness import sound_rows
from dspark_jax.decoding.state import Admission, DecodeState, empty_counters
from dspark_jax.decoding.verification import zeros_of
from dspark_jax.decoding.verifiers import Draws
from dspark_jax.drafters.protocol import DrafterModel, SharedTables
from dspark_jax.sharding import traced_over
from dspark_jax.targets.attention import Attend, CachedBlock, CausalRows
from dspark_jax.targets.decoder import Cache, TargetModel
from dspark_jax.targets.kv_cache import finite_or_zero, insert_rows, take_slots


class FirstTokens(NamedTuple):
    """The target's decision after the last row of each chunk; after a prompt's last chunk, the request's first token.

    Attributes:
        logits: [A, V], raw.
        tokens: [A] int32, drawn from each request's law, or the anchor that it goes on from.
        failed: [A] bool: the target gave no finite numbers in this chunk or an earlier one.
    """

    logits: Array
    tokens: Array
    failed: Array


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def admit(loop: DecodeLoop, params: LoopParams, state: DecodeState, new: Admission, fresh: bool) -> DecodeState:
    """Prefill one chunk of A prompts.

    A final chunk samples the request's first token, its first anchor (docs/algorithm.md, rule 9). Until then the slot
    stays inactive. Rounds write junk rows into inactive slots too: its length puts them behind the prompt so far.

    Args:
        loop: static shapes, policy and models.
        params: weights; the target's and the drafter's.
        state: donated.
        new: the chunks, one compiled program for each shape [A, T].
        fresh: whether all chunks start at position 0, so that no cached position is read.
    Returns:
        The state with the chunks in their slots.
    """
    target, drafter = loop.models(params)
    rows, ends = jnp.arange(new.tokens.shape[0]), new.starts + new.counts

    with traced_over(loop.mesh):
        out = _forward(target, loop.tap_layers, state.target_cache, new, fresh)
    first = _first_tokens(loop, target, state, new, out.hidden, fresh)
    settled = _entered(loop, state, new, first)

    # The large leaves, written from `starts` on: tokens, the target's K/V, the drafter's context.
    padded = jnp.pad(new.tokens, ((0, 0), (0, 1)))  # room for the first token after a full chunk
    padded = padded.at[rows, new.counts].set(first.tokens)

    # A NaN in the cache would outlive its request (docs/algorithm.md, rule 105).
    kv = jax.tree.map(finite_or_zero, out.kv)

    draft = state.draft
    if drafter is not None:
        with traced_over(loop.mesh):
            draft = _context(drafter, borrowed_tables(target), draft, finite_or_zero(out.taps), new, fresh)

    wanted, vocab = new.final & new.wants_logprobs, loop.vocab_sharding(target)
    logits, drawn = first.logits[:, None], first.tokens[:, None]
    return loop.place(
        replace(
            settled,
            tokens=insert_rows(state.tokens, padded, new.slots, new.starts, axis=1),
            logprobs=state.logprobs.noted(wanted, logits, drawn, new.slots, ends, vocab),
            target_cache=target.insert(state.target_cache, kv, new.slots, new.starts, new.counts),
            draft=draft,
            policy=state.policy._replace(slots=settled.policy),
            predicted_seconds=state.predicted_seconds,
        )
    )


def _first_tokens(
    loop: DecodeLoop, target: TargetModel, state: DecodeState, new: Admission, hidden: Array, fresh: bool
) -> FirstTokens:
    """Sample behind the chunks' last rows, from the target's final hidden states [A, T, D]."""
    rows, ends = jnp.arange(new.tokens.shape[0]), new.starts + new.counts

    logits = loop.decodable(target.logits(hidden[rows, new.counts - 1]))
    failed = _unusable(hidden, new) | (new.final & (sound_rows(logits[:, None]) == 0))

    # A failure in an earlier chunk sticks: the K/V stored for that chunk are not the target's.
    if not fresh:
        failed |= state.failed[new.slots]

    # Penalties count the whole prompt, of which the slot holds the earlier chunks.
    prompts = insert_rows(take_slots(state.tokens, new.slots), new.tokens, rows, new.starts, axis=1)
    edits = LogitEdits(new.penalties, new.final, prompts, ends, jnp.zeros((len(rows), 1), jnp.int32))

    # As after an anchor at the prompt's last position, which is no round's anchor: with independent noise the draw
    # shares no random number with any round.
    tokens = loop.verifier.next_token(logits, Draws(new.keys, ends - 1, new.sampling, edits), 0)

    # A request that goes on has its anchor already: its next round is the one that it would have run, draw for draw.
    known = new.anchor >= 0
    return FirstTokens(logits, jnp.where(known, new.anchor, tokens), failed)


def _entered(loop: DecodeLoop, state: DecodeState, new: Admission, first: FirstTokens) -> DecodeState:
    """The state with the per-slot leaves of the chunks' requests, and without its large leaves."""
    ends, failed = new.starts + new.counts, first.failed

    # A first token that is a stop token ends the request at once; a failed request commits none.
    stopped = new.final & ~failed & jnp.any(first.tokens[:, None] == new.stop_tokens, axis=1)
    length = ends + ~(new.final & failed)

    # All of them are overwritten: nothing of the slot's previous request survives.
    apart: Any = ()  # leaves that `admit` writes
    # [A] leaves: one row for each chunk, scattered to its slot at the end.
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
        penalties=new.penalties,
        wants_logprobs=new.wants_logprobs,
        logprobs=apart,
        counters=empty_counters(len(failed), loop.block),
        target_cache=apart,
        draft=apart,
        policy=loop.policy.init(len(failed), loop.block).slots,
        predicted_seconds=apart,
    )

    # `entering` and `slots` have the same tree, as both leave out the same leaves.
    large = {"tokens": apart, "logprobs": apart, "target_cache": apart, "draft": apart, "predicted_seconds": apart}
    slots = replace(state, **large, policy=state.policy.slots)
    return insert_rows(slots, entering, new.slots)


def _forward(target: TargetModel, layers: tuple[int, ...], cache: Cache, new: Admission, fresh: bool) -> Any:
    """Run the target on a chunk [A, T]; unless `fresh`, it also attends to the positions cached in its slot."""
    # [A, T], absolute: a later chunk goes on where the earlier one ended.
    positions = new.starts[:, None] + jnp.arange(new.tokens.shape[1])

    def run(cache: Cache) -> Any:
        attend: Attend = CausalRows() if fresh else CachedBlock(take_slots(cache, new.slots), new.starts)
        return target(new.tokens, positions, attend, layers)

    # A branch that is always taken: in straight-line code XLA may write the cache before it is read, and so copies it.
    return run(()) if fresh else jax.lax.cond(new.counts[0] > 0, run, partial(zeros_of, run), cache)


def _unusable(hidden: Array, new: Admission) -> Array:
    """[A] bool: whether the target gave a non-finite hidden state for a real token, whose stored K/V are then wrong."""
    # Padding on the right may be anything, a NaN included.
    real = jnp.arange(hidden.shape[1]) < new.counts[:, None]
    return jnp.any(real & ~jnp.all(jnp.isfinite(hidden), axis=-1), axis=1)


def _context(drafter: DrafterModel, shared: SharedTables, stored: Any, taps: Array, new: Admission, fresh: bool) -> Any:
    """The drafter's state with the context features of the chunk's taps [A, T, m D]."""
    if fresh:
        return insert_rows(stored, drafter.prefill(shared, taps, new.tokens, new.counts), new.slots)

    def run(state: Any) -> Any:
        return drafter.commit(shared, take_slots(state, new.slots), taps, new.tokens, new.starts, new.counts)

    # A branch that is always taken, for the reason given in `_forward`.
    return insert_rows(stored, jax.lax.cond(new.counts[0] > 0, run, partial(zeros_of, run), stored), new.slots)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def retire(loop: DecodeLoop, state: DecodeState, slots: Bool[Array, " r"]) -> DecodeState:
    """End the requests of the marked slots; their caches stay as junk until the next admission. `state` is donated."""
    return loop.place(replace(state, active=state.active & ~slots))
