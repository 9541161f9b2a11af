"""Plain decoding with the drafter left out, for as long as drafts do not pay, and the way back.

A drafter costs something by being there: every prompt and every token goes through its context projections. Where
nobody has drafted for long, an engine stops that: prompts enter without the drafter's context, and rounds keep their
tokens from it. Every dispatch still asks the policy, with today's load, whether it would draft again; then `recall`
(decoding/prefill.py) makes up what the drafter has missed before a request drafts.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dspark_jax.decoding.loop import DecodeLoop, LoopParams
from dspark_jax.decoding.occupancy import Occupancy
from dspark_jax.decoding.state import DecodeState

SELDOM = 16
"""Drafting in one round of so many, as probes do, is as good as none."""


@dataclass
class DraftRest:
    """Whether the drafter is left out: after `after` rounds of which hardly one drafted. Lives on the host."""

    after: int
    resting: bool = False
    _needed: int = field(init=False)
    _seen: deque[tuple[int, int]] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        self._needed = self.after

    def saw(self, rounds: int, drafted: int) -> None:
        """A dispatch of so many rounds, so many of which drafted."""
        self._seen.append((rounds, drafted))
        while sum(rounds for rounds, _ in self._seen) - self._seen[0][0] >= self._needed:
            self._seen.popleft()
        total, drafts = (sum(column) for column in zip(*self._seen, strict=True))
        if 2 * drafts > total:
            self._needed = self.after
        self.resting = total >= self._needed and SELDOM * drafts <= total

    def wake(self) -> None:
        """Drafts may pay again. If they don't after all, it takes a quarter of the rounds to see that."""
        self._seen.clear()
        self._needed, self.resting = max(1, self.after // 4), False


class _Undrafted(NamedTuple):
    done: Array
    state: DecodeState


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def run_undrafted(
    loop: DecodeLoop,
    params: LoopParams,
    state: DecodeState,
    occupancy: Occupancy,
    rounds: Array,
    until_free: Array,
) -> tuple[DecodeState, Bool[Array, ""]]:
    """`run_rounds` with plain rounds alone, of which the drafter hears nothing: requests that decode here have a
    verify cap of 0 afterwards, until they are recalled. Second result: whether the policy, asked once at the start,
    would have drafted for any of them; it then waits as it was."""
    state, unfinished = loop.opened(state, rounds, until_free)
    able = replace(state, verify_cap=jnp.full_like(state.verify_cap, loop.block))
    view, policy = loop.view(params, able, occupancy)
    wake = jnp.any(state.active if view.drafted is None else view.drafted)

    def more(carry: _Undrafted) -> Array:
        return unfinished(carry.done, carry.state)

    def plain(carry: _Undrafted) -> _Undrafted:
        return _Undrafted(carry.done + 1, loop.plain_round(params, carry.state)[0])

    done, after = jax.lax.while_loop(more, plain, _Undrafted(jnp.zeros((), jnp.int32), state))
    rested = loop.policy.rested(policy, jnp.maximum(done - 1, 0))
    after = replace(
        after,
        verify_cap=jnp.where(state.active, 0, state.verify_cap),
        policy=jax.tree.map(partial(jnp.where, wake), state.policy, rested),
        predicted_seconds=after.predicted_seconds + done * loop.plain_seconds(params, state),
    )
    return loop.place(after), wake
