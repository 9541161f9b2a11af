"""The joint law at temperature 1 under drafters of broken numbers, for every kind of drafter and every verify policy.

    python -m tests.broken_laws [--kinds dspark mtp ...] [--policies fixed ...] [--modes rejection block] [--batches 80]

Requests share one compiled loop: those of a damage have their own slots, where draft logits are NaN, infinite, zero or
huge, and confidences NaN in every other slot. The same loop then runs with drafters whose weights are all so. Tokens
2 to 4 are compared with the target's exact law by a chi-square test. Prints the p-values and a table; exits 1 where the
smallest of them is no matter of chance, or where the control, a rule that lets NaN through, is not rejected.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.decoding.acceptance import Acceptance, BlockVerification, RejectionSampling
from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.decoding.loop import borrowed_tables
from dspark_jax.decoding.prefill import admit
from dspark_jax.decoding.round import DecodeLoop, LoopParams
from dspark_jax.decoding.state import Admission, DecodeState
from dspark_jax.decoding.verifiers import Coupled, Draws, Independent
from dspark_jax.drafters.protocol import DraftOutput
from dspark_jax.drafters.registry import Drafter
from dspark_jax.scheduling.costs import CostTable, Occupancy, ScheduleTables
from dspark_jax.scheduling.policies import (
    Asynchronous,
    Causal,
    Fixed,
    LookAhead,
    PolicyState,
    RoundView,
    Threshold,
    VerifyPolicy,
)
from dspark_jax.serving.assembly import make_loop
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target
from tests.decoding_tiny import admission, kind_pair
from tests.test_lossless import PROMPT, exact_law, p_value

V, EACH, BATCHES, CHANCE = 6, 48, 80, 1e-3
HUGE = float(np.finfo(np.float32).max)

# Rows of V draft logits as a broken drafter might give them; "late" and "sound" rows are its own, but for late's last.
DAMAGES: dict[str, list[float] | None] = {
    "NaN": [np.nan] * V,
    "one NaN": [0.5, np.nan, 0.1, -1.0, 0.3, 0.0],
    "inf": [0.5, 0.2, np.inf, -1.0, 0.3, 0.0],
    "all -inf": [-np.inf] * V,
    "zeros": [0.0] * V,
    "huge": [HUGE, -HUGE, HUGE / 2, 0.0, -HUGE, HUGE],
    "late": None,
    "sound": None,
}
NO_LAW = ("NaN", "one NaN", "inf", "all -inf", "late")
"""Damages that leave no law to draw from: the control has to fail on them, and on no other."""
WEIGHTS = {"NaN": np.nan, "inf": np.inf, "zeros": 0.0, "huge": HUGE / 4}
"""What all weights of a drafter may be."""
KINDS: dict[str, tuple[str, str]] = {
    "dspark": ("dspark", "vanilla"),
    "dspark-gated": ("dspark", "gated"),
    "dspark-rnn": ("dspark", "rnn"),
    "dflash": ("dflash", "vanilla"),
    "eagle3": ("eagle3", "vanilla"),
    "mtp": ("mtp", "vanilla"),
}
"""Kinds of drafters by name: the registry's, and the Markov head."""
MODES: dict[str, Any] = {
    "rejection": Independent(RejectionSampling()),
    "block": Independent(BlockVerification()),
    "coupled": Coupled(),
}
POLICIES: dict[str, VerifyPolicy] = {
    "fixed": Fixed(),
    "threshold": Threshold(0.3),
    "causal": Causal(guard=None),
    "look-ahead": LookAhead(guard=None),
    "asynchronous": Asynchronous(guard=None),
}


@dataclass(frozen=True)
class Apportioned:
    """Every slot under one of several policies in turn, so that one compiled loop tries them all."""

    policies: tuple[VerifyPolicy, ...]
    always_drafts = True
    needs_tables = True
    anticipates = False

    def init(self, requests: int, block: int) -> PolicyState:
        states = [policy.init(requests, block) for policy in self.policies]
        return PolicyState(tuple(s.slots for s in states), tuple(s.shared for s in states))

    def drafting(self, view: RoundView, state: PolicyState) -> tuple[Any, PolicyState]:
        made = [policy.drafting(seen, own) for policy, seen, own, _ in self._parts(view, state)]
        return sum(drafts for drafts, _ in made) > 0, self._joined([own for _, own in made])

    def skipped(self, state: PolicyState, rounds: Any) -> PolicyState:
        return state

    def __call__(self, view: RoundView, state: PolicyState) -> tuple[Any, PolicyState]:
        made = [(mine, *policy(seen, own)) for policy, seen, own, mine in self._parts(view, state)]
        return sum(jnp.where(mine, lengths, 0) for mine, lengths, _ in made), self._joined([own for *_, own in made])

    def observe(self, view: RoundView, lengths: Any, accepted: Any, state: PolicyState) -> PolicyState:
        return self._joined(
            [
                policy.observe(seen, jnp.where(mine, lengths, 0), jnp.where(mine, accepted, 0), own)
                for policy, seen, own, mine in self._parts(view, state)
            ]
        )

    def _parts(self, view: RoundView, state: PolicyState) -> Iterator[tuple[VerifyPolicy, RoundView, PolicyState, Any]]:
        turn = jnp.arange(view.active.shape[0]) % len(self.policies)
        for i, policy in enumerate(self.policies):
            mine = turn == i
            seen = view._replace(active=view.active & mine, caps=jnp.where(mine, view.caps, 0))
            if view.drafted is not None:
                seen = seen._replace(drafted=view.drafted & mine)
            yield policy, seen, PolicyState(state.slots[i], state.shared[i]), mine

    @staticmethod
    def _joined(states: Sequence[PolicyState]) -> PolicyState:
        return PolicyState(tuple(s.slots for s in states), tuple(s.shared for s in states))


@dataclass(frozen=True)
class Damaged(DecodeLoop):
    """`each` slots a damage, whose drafts are drawn from its logits; every other slot's confidences are NaN too."""

    each: int = EACH

    def __hash__(self) -> int:
        return super().__hash__()

    def draft(self, target: Any, drafter: Any, state: DecodeState, anchors: Any, noise: Any) -> DraftOutput:
        rows = np.repeat([[0.0] * V if row is None else row for row in DAMAGES.values()], self.each, axis=0)
        own = np.repeat([row is None for row in DAMAGES.values()], self.each)
        late = np.repeat([name == "late" for name in DAMAGES], self.each)

        def sample(logits: Any, offset: int) -> Any:
            logits = jnp.where(own[:, None], logits, rows.astype(np.float32))
            logits = jnp.where(late[:, None] & (offset > 0), jnp.nan, logits)
            draws = Draws(state.keys, state.length - 1, state.sampling)
            return self.verifier.draft(logits, offset, noise, draws)

        made = drafter.draft(borrowed_tables(target), state.draft, anchors, state.length - 1, sample)
        if made.confidence is None:
            return made
        odd = jnp.arange(len(own))[:, None] % 2 == 1
        return made._replace(confidence=jnp.where(odd & ~own[:, None], jnp.nan, made.confidence))


class OldComparison(RejectionSampling):
    """The control: the rule as it was, which let a NaN mass through to the draw."""

    def __call__(self, draft_tokens: Any, draft_law: Any, target_law: Any, uniforms: Any, verify_lengths: Any) -> Any:
        right = super().__call__(draft_tokens, draft_law, target_law, uniforms, verify_lengths)
        pick = partial(jnp.take_along_axis, axis=1)
        target = pick(target_law, right.accepted[:, None, None])[:, 0]
        draft = pick(draft_law.probs, jnp.minimum(right.accepted, draft_tokens.shape[1] - 1)[:, None, None])[:, 0]
        residual = jnp.maximum(target - draft, 0.0)
        mass = jnp.sum(residual, axis=-1, keepdims=True)
        law = jnp.where(mass <= 1e-8, target, residual / jnp.maximum(mass, 1e-8))
        return Acceptance(right.accepted, jnp.where((right.accepted < verify_lengths)[:, None], law, target))


def pair(kind: str) -> tuple[Target, Drafter]:
    name, head = KINDS[kind]
    return kind_pair(name, head=head)


def policies_of(kind: str) -> dict[str, VerifyPolicy]:
    """All of them; a threshold needs a confidence head."""
    return {name: p for name, p in POLICIES.items() if name != "threshold" or KINDS[kind][0] == "dspark"}


def loop_of(kind: str, policy: VerifyPolicy, each: int = EACH) -> tuple[Damaged, LoopParams]:
    target, drafter = pair(kind)
    slots, width = each * len(DAMAGES), drafter.config.block_size + 1
    made = make_loop(target, drafter, EngineConfig(slots, 20, buckets=(slots * width,), stop_slots=1), policy)
    fields = {name: getattr(made, name) for name in DecodeLoop.__dataclass_fields__}
    stairs = np.arange(slots, slots * width + 1, each)  # so cheap that nearly every draft is worth its price
    costs = CostTable.of(tuple(stairs.tolist()), 1.0 + 2e-6 * (stairs - slots), 0.01)
    tables = ScheduleTables.of(costs, [1.0] * made.block) if policy.needs_tables else None
    return Damaged(**fields, each=each), LoopParams(target.params, drafter.params, tables)


def with_weights(params: LoopParams, value: float) -> LoopParams:
    """All floating weights of the drafter are `value`, with their own sign where it is huge."""

    def broken(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.sign(x) * value if 1 < value < np.inf else jnp.full_like(x, value)

    return params._replace(drafter=jax.tree.map(broken, params.drafter))


def asked(loop: DecodeLoop, **settings: Any) -> Admission:
    """PROMPT in every slot; at temperature 1, unless `settings` say otherwise."""
    keys = np.zeros((loop.requests, 2))
    return admission(loop, [PROMPT] * loop.requests, 4, keys, bucket=4, **{"temperature": 1.0} | settings)


@partial(jax.jit, static_argnums=0)
def samples(loop: Damaged, params: LoopParams, blank: Admission, batches: Any) -> Any:
    """([batches, R, 4] first tokens of seeded requests, [batches, R] drafts verified)."""

    def batch(state: DecodeState, number: Any) -> Any:
        ids = jnp.arange(loop.requests) + number * loop.requests
        keys = jnp.stack([ids, jnp.full_like(ids, 3)], axis=1).astype(jnp.uint32)
        state = admit(loop, params, state, blank._replace(keys=keys), True)
        state = run_rounds(loop, params, state, Occupancy.of(), jnp.int32(8), jnp.asarray(False))
        made = state.tokens[:, len(PROMPT) : len(PROMPT) + 4]
        return state, (made, jnp.sum(state.counters.verified_at, axis=1))

    return jax.lax.scan(batch, loop.init_state(params), batches)[1]


def p_values(
    loop: Damaged, params: LoopParams, law: np.ndarray, policies: Sequence[str], batches: int = BATCHES, **settings: Any
) -> dict[str, dict[str, tuple[float, int]]]:
    """By policy (of the slots in turn) and damage: p of tokens 2-4's joint law, and how many drafts were verified."""
    made, verified = (np.asarray(x) for x in samples(loop, params, asked(loop, **settings), jnp.arange(batches)))
    slots = np.arange(loop.requests)
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for turn, policy in enumerate(policies):
        for i, damage in enumerate(DAMAGES):
            at = (slots // loop.each == i) & (slots % len(policies) == turn)
            p = p_value(made[:, at, 1:].reshape(-1, 3), law.sum(0))
            found.setdefault(policy, {})[damage] = (p, int(verified[:, at].sum()))
    return found


def tried(kind: str, policy: str, batches: int, mode: str = "rejection") -> dict[str, float]:
    """p by damage, of logits and of weights, under one policy and verifier."""
    loop, params = loop_of(kind, POLICIES[policy])
    loop = replace(loop, verifier=MODES[mode])
    law = exact_law(pair(kind)[0])
    found = p_values(loop, params, law, [policy], batches)[policy]
    assert all(verified > 0 for _, verified in found.values()), f"{kind}, {policy}: drafts of every damage are verified"
    values = {damage: p for damage, (p, _) in found.items()}

    # Compiled already. With other weights the slots of every damage but "sound" see little that is new.
    for name, value in WEIGHTS.items():
        again = p_values(loop, with_weights(params, value), law, [policy], batches)[policy]
        values[f"weights {name}"] = again["sound"][0]
    return values


def control(kind: str, batches: int) -> dict[str, float]:
    """p by damage under the old comparison; without "late" for a drafter of one draft a round, which has none."""
    loop, params = loop_of(kind, Fixed())
    law = exact_law(pair(kind)[0])
    found = p_values(replace(loop, verifier=Independent(OldComparison())), params, law, ["fixed"], batches)["fixed"]
    return {damage: p for damage, (p, _) in found.items() if damage != "late" or loop.block > 1}


def control_is_rejected(values: Mapping[str, float]) -> bool:
    lawless = [p for name, p in values.items() if name in NO_LAW]
    return max(lawless) < 1e-9 and min(p for name, p in values.items() if name not in NO_LAW) > 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["rejection"])
    parser.add_argument("--batches", type=int, default=BATCHES)
    options = parser.parse_args()
    smallest, everything, right = dict[tuple[str, str, str], float](), list[float](), True
    for kind in options.kinds:
        for mode, policy in product(options.modes, [name for name in policies_of(kind) if name in options.policies]):
            values = tried(kind, policy, options.batches, mode)
            everything += values.values()
            smallest[kind, mode, policy] = min(values.values())
            print(f"{kind}, {mode}, {policy}: " + ", ".join(f"{n} {p:.3f}" for n, p in values.items()), flush=True)
        values = control(kind, options.batches)
        right &= control_is_rejected(values)
        print(f"{kind}, control: " + ", ".join(f"{n} {p:.2g}" for n, p in values.items()), flush=True)
        jax.clear_caches()

    print(f"\n| drafter | mode | {' | '.join(options.policies)} |\n|---|---|{'---|' * len(options.policies)}")
    for kind, mode in product(options.kinds, options.modes):
        found = [smallest.get((kind, mode, name)) for name in options.policies]
        cells = ["-" if p is None else f"{p:.3f}" for p in found]
        print(f"| {kind} | {mode} | {' | '.join(cells)} |")

    least = min(everything)
    chance = 1 - (1 - least) ** len(everything)
    verdict = "rejected" if right else "NOT REJECTED"
    print(
        f"\n{len(everything)} p-values of {EACH * options.batches:,} requests each, the smallest {least:.4f}; the "
        f"smallest of so many is below that in {chance:.0%} of cases. Control: {verdict}."
    )
    return 0 if right and chance > CHANCE else 1


if __name__ == "__main__":
    sys.exit(main())
