"""One of several verify policies by a number in the state, so that a single compiled loop tries them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.decoding.state import DecodeState
from dspark_jax.scheduling.policies import PolicyState, RoundView, VerifyPolicy


@dataclass(frozen=True)
class Switched:
    """Each policy keeps a state of its own; `choose` says whose turn it is, for all slots alike."""

    policies: tuple[VerifyPolicy, ...]

    needs_tables = True

    @property
    def always_drafts(self) -> bool:
        return all(policy.always_drafts for policy in self.policies)

    @property
    def anticipates(self) -> bool:
        return any(policy.anticipates for policy in self.policies)

    def init(self, requests: int, block: int) -> PolicyState:
        return self._joined(jnp.int32(0), [policy.init(requests, block) for policy in self.policies])

    def drafting(self, view: RoundView, state: PolicyState) -> tuple[Any, PolicyState]:
        return self._switch(lambda policy, own: policy.drafting(view, own), state)

    def skipped(self, state: PolicyState, rounds: Any) -> PolicyState:
        return self._switch(lambda policy, own: ((), policy.skipped(own, rounds)), state)[1]

    def __call__(self, view: RoundView, state: PolicyState) -> tuple[Any, PolicyState]:
        return self._switch(lambda policy, own: policy(view, own), state)

    def observe(self, view: RoundView, lengths: Any, accepted: Any, state: PolicyState) -> PolicyState:
        return self._switch(lambda policy, own: ((), policy.observe(view, lengths, accepted, own)), state)[1]

    def _switch(self, call: Callable[[VerifyPolicy, PolicyState], Any], state: PolicyState) -> tuple[Any, PolicyState]:
        turn, shared = state.shared
        states = [PolicyState(*own) for own in zip(state.slots, shared, strict=True)]

        def branch(i: int) -> Callable[[list[PolicyState]], Any]:
            def run(states: list[PolicyState]) -> Any:
                made, own = call(self.policies[i], states[i])
                return made, [*states[:i], own, *states[i + 1 :]]

            return run

        made, states = jax.lax.switch(turn, [branch(i) for i in range(len(self.policies))], states)
        return made, self._joined(turn, states)

    @staticmethod
    def _joined(turn: Any, states: Sequence[PolicyState]) -> PolicyState:
        return PolicyState(tuple(s.slots for s in states), (turn, tuple(s.shared for s in states)))


def choose(state: DecodeState, turn: Any) -> DecodeState:
    """The state of a loop under `Switched`, whose policy number `turn` decides from now on."""
    policy = state.policy
    return replace(state, policy=policy._replace(shared=(jnp.int32(turn), policy.shared[1])))
