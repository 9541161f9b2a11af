"""The law of a scheduled round by enumeration: every draft, every outcome, every state a policy can be in after it.

A vocabulary of three, blocks of three, laws by hand, confidences that depend on drawn tokens, jagged costs. Acceptance
rules are run on both sides of every threshold that they should have, and weighted by the measure of those sides. If the
law of what a round commits is the target's in every reachable state (requests' last tokens and the policy's memory),
then so is that of any number of rounds; states are enumerated to the second round. Axes: n draft combinations, R
requests, K block position, V vocab, S = V^(K+1) continuations.
"""

from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.decoding.acceptance import BlockVerification, RejectionSampling
from dspark_jax.drafters.laws import Dense, DraftLaw
from dspark_jax.scheduling.costs import CostTable, Occupancy, ScheduleTables
from dspark_jax.scheduling.policies import PolicyState, RoundView

EDGE = 1e-6
REJECTION = RejectionSampling()


@dataclass(frozen=True)
class World:
    """Laws by the token before: `target` [V, V]; `draft` [K, V, V] and confidence `logits` [K, V] by block position."""

    target: np.ndarray
    draft: np.ndarray
    logits: np.ndarray
    costs: CostTable
    load: float = 1.0
    rule: Any = REJECTION
    vocab: int = field(init=False)
    block: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab", self.target.shape[0])
        object.__setattr__(self, "block", self.draft.shape[0])

    @property
    def tables(self) -> ScheduleTables:
        return ScheduleTables.of(self.costs, [1.3, 0.8, 1.1][: self.block])

    def drafts(self) -> np.ndarray:
        return np.array(list(product(range(self.vocab), repeat=self.block)))

    def draft_law(self, anchor: int) -> np.ndarray:
        """[n] probability of every draft after an anchor."""
        before = np.concatenate([np.full((len(self.drafts()), 1), anchor), self.drafts()[:, :-1]], axis=1)
        return np.prod([self.draft[k, before[:, k], self.drafts()[:, k]] for k in range(self.block)], axis=0)

    def confidence(self, anchor: int) -> np.ndarray:
        """[n, K] logits: c_k by the token before x_k, as the confidence head has it."""
        before = np.concatenate([np.full((len(self.drafts()), 1), anchor), self.drafts()[:, :-1]], axis=1)
        return np.stack([self.logits[k, before[:, k]] for k in range(self.block)], axis=1)

    def continuations(self, anchor: int) -> np.ndarray:
        """[S] the target's law of the next K + 1 tokens."""
        return self._tail(anchor, self.block + 1)

    @cached_property
    def outcomes(self) -> dict[tuple[int, int, int], dict[tuple[int, int], float]]:
        """{(anchor, draft, verify length): {(accepted, next token): probability}} by the rule itself."""
        drafts, length = self.drafts(), self.block + 1
        cases = list(product(range(self.vocab), range(len(drafts)), range(length)))
        anchors, index, lengths = np.array(cases).T
        before = np.concatenate([anchors[:, None], drafts[index]], axis=1)  # [n, W]
        q = np.stack([self.draft[k, before[:, k]] for k in range(self.block)], axis=1)
        p = self.target[before]

        # Every threshold splits [0, 1) in two: a row for each combination of sides, next to the thresholds.
        edges = self.thresholds(p, q, before[:, 1:], lengths)[:, None]  # [n, 1, K]
        sides = np.array(list(product((False, True), repeat=self.block)))
        near = np.clip(np.where(sides, edges + EDGE, edges - EDGE), 0, 1 - EDGE)
        measure = np.prod(np.where(sides, 1 - edges, edges), axis=-1)  # [n, sides]

        def rows(x: np.ndarray) -> jax.Array:
            return jnp.asarray(np.repeat(x, len(sides), axis=0), jnp.int32 if x.dtype == np.int64 else jnp.float32)

        law = jax.tree.map(jnp.asarray, self.handed_over(np.repeat(q, len(sides), axis=0)))
        found = jax.jit(self.rule)(rows(before[:, 1:]), law, rows(p), near.reshape(-1, self.block), rows(lengths))
        accepted = np.asarray(found.accepted).reshape(measure.shape)
        chances = measure[..., None] * np.asarray(found.next_law).reshape(*measure.shape, -1)

        made: dict[Any, dict[tuple[int, int], float]] = {case: {} for case in cases}
        for n, side, token in np.argwhere(chances > 1e-12).tolist():
            key = int(accepted[n, side]), token
            made[cases[n]][key] = made[cases[n]].get(key, 0.0) + float(chances[n, side, token])
        return made

    def handed_over(self, q: np.ndarray) -> DraftLaw:
        """The law of drafts as a drafter hands it over, from rows [n, K, V]."""
        return Dense(q.astype(np.float32))

    def thresholds(self, p: np.ndarray, q: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """[n, K] acceptance probabilities of the rule's tests, in float64, as docs/algorithm.md has them (rules 3 and
        112); 1 past the verify lengths."""
        # Drafts of probability 0 are enumerated too, with weight 0.
        ratios = np.divide(p[:, :-1], q, out=np.full(q.shape, np.inf), where=q > 0)
        ratios = np.take_along_axis(ratios, tokens[..., None], axis=-1)[..., 0]
        chances = np.minimum(ratios, 1.0)
        if isinstance(self.rule, BlockVerification):
            reach = np.ones(len(p))
            for k in range(self.block):
                reach = np.minimum(1.0, reach * ratios[:, k])
                excess = np.zeros(len(p))
                if k + 1 < self.block:
                    excess = np.maximum(0, reach[:, None] * p[:, k + 1] - q[:, k + 1]).sum(-1)
                inner = np.divide(excess, excess + 1 - reach, out=np.ones(len(p)), where=excess + 1 - reach > 1e-12)
                chances[:, k] = np.where(k + 1 == lengths, reach, inner)
        return np.where(np.arange(self.block) < lengths[:, None], chances, 1.0)

    def extended(self, anchor: int) -> np.ndarray:
        """[n, K + 1, S]: law of the next K + 1 tokens for every draft and verify length, the target going on alone
        after what the round commits."""
        s, k1 = self.vocab ** (self.block + 1), self.block + 1
        made = np.zeros((len(self.drafts()), k1, s))
        for i, draft in enumerate(self.drafts()):
            for length in range(k1):
                for (accepted, token), p in self.outcomes[anchor, i, length].items():
                    committed = [*draft[:accepted], token]
                    tail = self._tail(token, k1 - len(committed))
                    start = int(np.dot(committed, self.vocab ** np.arange(k1 - 1, k1 - 1 - len(committed), -1)))
                    made[i, length, start : start + len(tail)] += p * tail
        return made

    def _tail(self, anchor: int, count: int) -> np.ndarray:
        law, last = np.ones(1), np.array([anchor])
        for _ in range(count):
            law = (law[:, None] * self.target[last]).ravel()
            last = np.tile(np.arange(self.vocab), len(last))
        return law


@cache
def world(load: float = 1.0, requests: int = 1, rule: Any = REJECTION) -> World:
    target = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.35, 0.25, 0.4]])
    draft = np.array(
        [
            [[0.2, 0.5, 0.3], [0.3, 0.3, 0.4], [0.6, 0.2, 0.2]],
            [[0.45, 0.35, 0.2], [0.05, 0.7, 0.25], [0.1, 0.1, 0.8]],
            [[0.7, 0.1, 0.2], [0.2, 0.4, 0.4], [0.3, 0.4, 0.3]],
        ]
    )
    logits = np.array([[0.4, 3.5, 1.0], [3.0, -2.5, 0.3], [-3.0, 2.0, 0.8]])
    # A first draft is dear and those behind it cheap, so that looking ahead at today's confidences would tempt.
    tokens = (1, 2, 4) if requests == 1 else (1, 2, 3, 5, 6, 8)
    seconds = (1.0, 1.8, 1.95) if requests == 1 else (0.9, 1.0, 1.5, 1.75, 1.8, 2.2)
    return World(target, draft, logits, CostTable.of(tokens, seconds, 0.1), load, rule)


@partial(jax.jit, static_argnums=0)
def decide(policy: Any, view: RoundView, states: PolicyState, confidence: jax.Array) -> tuple[Any, Any, Any, Any]:
    """(drafted [g, R], lengths [g, n, R], states between [g, n], rounds' states before them) as the loop has it."""

    def one(state: PolicyState, logits: jax.Array) -> Any:
        drafted, before = policy.drafting(view, state)
        drafted = view.active if drafted is None else drafted
        shown = view._replace(drafted=drafted, caps=jnp.where(drafted, view.caps, 0))

        def lengths(rows: jax.Array) -> Any:
            found, after = policy(shown._replace(confidence=rows), before)
            some = jnp.any(drafted)
            return jnp.where(some, found, 0), jax.tree.map(lambda a, b: jnp.where(some, a, b), after, before)

        return drafted, *jax.vmap(lengths)(logits)

    return jax.vmap(one)(states, confidence)


@partial(jax.jit, static_argnums=0)
def remember(policy: Any, view: RoundView, drafted: Any, rows: Any, lengths: Any, accepted: Any, states: Any) -> Any:
    def one(drafted: Any, rows: Any, lengths: Any, accepted: Any, state: Any) -> Any:
        caps = jnp.where(drafted, view.caps, 0)
        return policy.observe(view._replace(drafted=drafted, caps=caps, confidence=rows), lengths, accepted, state)

    return jax.vmap(one)(drafted, rows, lengths, accepted, states)


def stack(states: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states)


def take(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


@dataclass
class Enumeration:
    """Rounds of a policy in a world, with R requests, from every state in a set."""

    world: World
    policy: Any
    requests: int
    worst: float = 0.0
    seen: set = field(default_factory=set)  # verify lengths
    extended: dict[int, np.ndarray] = field(init=False)
    outcomes: dict[tuple[int, int, int], list[tuple[int, int]]] = field(init=False)

    def __post_init__(self) -> None:
        w = self.world
        self.extended = {a: w.extended(a) for a in range(w.vocab)}
        self.outcomes = {case: sorted(found) for case, found in w.outcomes.items()}

    @property
    def view(self) -> RoundView:
        ones = np.ones(self.requests, np.int32)
        load = Occupancy.of(self.world.load)
        caps = ones * self.world.block
        return RoundView(jnp.asarray(ones > 0), jnp.asarray(ones), jnp.asarray(caps), load, self.world.tables)

    def round(self, group: list[tuple[tuple[int, ...], Any]], expand: bool) -> list[tuple[tuple[int, ...], Any]]:
        """Plays a round from each (last tokens, policy state); notes the largest deviation of the law of the next K + 1
        tokens of all requests together, and returns the distinct states that follow if asked."""
        w, r = self.world, self.requests
        grids = [np.array(list(product(range(len(w.drafts())), repeat=r)))] * len(group)
        rows = [
            np.stack([w.confidence(a)[grid[:, i]] for i, a in enumerate(anchors)], axis=1)
            for (anchors, _), grid in zip(group, grids, strict=True)
        ]
        rows = np.stack(rows).astype(np.float32)
        drafted, lengths, after = jax.device_get(
            decide(self.policy, self.view, stack([state for _, state in group]), rows)
        )
        self.seen |= set(map(tuple, lengths.reshape(-1, r).tolist()))
        follow: dict[Any, Any] = {}
        for g, (anchors, _) in enumerate(group):
            self._check(anchors, grids[g], lengths[g])
            if expand:
                self._follow(anchors, grids[g], rows[g], drafted[g], lengths[g], take(after, g), follow)
        return list(follow.values())

    def _check(self, anchors: tuple[int, ...], grid: np.ndarray, lengths: np.ndarray) -> None:
        w = self.world
        weight = np.prod([w.draft_law(a)[grid[:, i]] for i, a in enumerate(anchors)], axis=0)
        laws = [self.extended[a][grid[:, i], lengths[:, i]] for i, a in enumerate(anchors)]
        exact = [w.continuations(a) for a in anchors]
        if self.requests == 1:
            found, wanted = weight @ laws[0], exact[0]
        else:
            found, wanted = (weight[:, None] * laws[0]).T @ laws[1], np.outer(*exact)
        self.worst = max(self.worst, float(np.abs(found - wanted).max()))

    def _follow(
        self, anchors: tuple[int, ...], grid: Any, rows: Any, drafted: Any, lengths: Any, after: Any, follow: dict
    ) -> None:
        n, tails = [], []
        for i, (drafts, ell) in enumerate(zip(grid.tolist(), lengths.tolist(), strict=True)):
            each = [self.outcomes[a, d, m] for a, d, m in zip(anchors, drafts, ell, strict=True)]
            for outcome in product(*each):
                n.append((i, tuple(k for k, _ in outcome)))
                tails.append(tuple(t for _, t in outcome))
        index = np.array([i for i, _ in n])
        unique, inverse = np.unique(np.column_stack([index, np.array([k for _, k in n])]), axis=0, return_inverse=True)
        size = 128 if self.requests == 1 else 8192  # few shapes to compile
        size *= -(-len(unique) // size)
        padded = np.concatenate([unique, np.repeat(unique[:1], size - len(unique), axis=0)])
        at, accepted = padded[:, 0], padded[:, 1:].astype(np.int32)
        many = np.broadcast_to(drafted, (size, self.requests))
        states = jax.device_get(
            remember(self.policy, self.view, many, rows[at], lengths[at], accepted, take(after, at))
        )
        for tail, u in {(t, int(u)) for t, u in zip(tails, inverse.ravel(), strict=True)}:
            state = take(states, u)
            key = tail, b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))
            follow.setdefault(key, (tail, state))

    def run(self, start: list[Any], most: int = 3000) -> tuple[float, int]:
        """(largest deviation over two rounds, states entered). `start`: policy states of the past."""
        anchors = list(product(range(self.world.vocab), repeat=self.requests))
        group = [(a, state) for a in anchors[:: 2 if self.requests > 1 else 1] for state in start]
        states = self.round(group, True)
        if len(states) > most:  # the rest differ in their memory's last digits only
            keep = np.random.default_rng(0).choice(len(states), most, replace=False)
            states = [states[i] for i in keep]
        for i in range(0, len(states), len(group)):
            batch = states[i : i + len(group)]
            self.round(batch + batch[:1] * (len(group) - len(batch)), False)
        return self.worst, len(states)


def pasts(policy: Any, requests: int) -> list[Any]:
    """The policy's state at the start, and after rounds that went well and rounds that went badly."""
    fresh = jax.device_get(policy.init(requests, 3))
    states, view = [fresh], Enumeration(world(requests=requests), policy, requests).view
    rng = np.random.default_rng(1)
    for accepted in (3, 0):
        state = fresh
        for _ in range(4):
            rows = rng.normal(size=(requests, 3)).astype(np.float32)
            drafted, lengths, after = decide(policy, view, stack([state]), rows[None, None])
            accept = np.minimum(accepted, lengths[:, 0])
            state = remember(policy, view, drafted, rows[None], lengths[:, 0], accept, take(after, (slice(None), 0)))
            state = take(jax.device_get(state), 0)
        states.append(state)
    return states
