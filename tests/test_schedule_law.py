"""Scheduling is lossless, by enumeration (`enumeration.py`), and rules that break it are caught by the same means."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import shared_tables
from dspark_jax.decoding.acceptance import Acceptance, BlockVerification, RejectionSampling
from dspark_jax.decoding.sampling import SamplingArrays
from dspark_jax.decoding.verifiers import Draws, Independent
from dspark_jax.drafters.laws import Dense, DraftLaw, Sparse
from dspark_jax.scheduling.calibration import Online, Static
from dspark_jax.scheduling.costs import CostTable, Occupancy, ScheduleTables
from dspark_jax.scheduling.history import DraftGuard, History
from dspark_jax.scheduling.policies import (
    Adaptive,
    Asynchronous,
    Causal,
    Fixed,
    LookAhead,
    Ranked,
    Retrospective,
    RoundView,
    Threshold,
)
from tests.decoding_tiny import kind_pair
from tests.enumeration import Enumeration, World, decide, pasts, stack, world

pytestmark = pytest.mark.lossless


@dataclass(frozen=True)
class FallsBack(Adaptive):
    """Looks innocent and is not (docs/algorithm.md, rule 79): Algorithm 1, then no draft if the whole did not pay."""

    def admit(self, ranked: Ranked, costs: Any, conditional: Any, own: Any) -> Any:
        count = jnp.minimum(2, jnp.sum(ranked.valid))
        gained = jnp.sum(jnp.where(jnp.arange(ranked.survival.shape[0]) < count, ranked.survival, 0.0))
        pays = (costs.base + gained) * costs.of(costs.base) > costs.base * costs.of(costs.base + count)
        return jnp.where(pays, count, 0), own


# Guards that act within two rounds: no belief that outweighs what was seen, a probe after one round.
QUICK: dict[str, Any] = {
    "guard": DraftGuard(probe_at_most=2),
    "history": History(slot_decay=0.5, shared_decay=0.5, prior_rounds=0.5, probe_after=1),
}
POLICIES: dict[str, Any] = {
    "fixed": Fixed(),
    "threshold": Threshold(0.5),
    "causal": Causal(**QUICK),
    "causal, no guard": Causal(guard=None, min_gain=0.0),
    "look-ahead": LookAhead(**QUICK),
    "asynchronous": Asynchronous(**QUICK),
    "look-ahead, online calibration": LookAhead(calibration=Online(prior=0.2), **QUICK),
}


RULES: dict[str, Any] = {"rejection": RejectionSampling(), "block": BlockVerification()}


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("requests", [1, 2])
@pytest.mark.parametrize("name", POLICIES)
def test_two_rounds_follow_the_targets_law(name: str, requests: int, rule: str, record_property: Any) -> None:
    policy, lengths, states, worst = POLICIES[name], set(), 0, 0.0
    for load in (1.0, 1.5) if requests == 1 else (1.0,):
        enumeration = Enumeration(world(load, requests, RULES[rule]), policy, requests)
        deviation, entered = enumeration.run(pasts(policy, requests), most=100 if requests == 2 else 3000)
        lengths, states, worst = lengths | enumeration.seen, states + entered, max(worst, deviation)
    line = (
        f"{name}, {rule}, R = {requests}: {states} states, verify lengths {len(lengths)}, largest deviation {worst:.1e}"
    )
    print(line)
    record_property("enumeration", line)
    assert worst < 1e-6, line
    assert name == "fixed" or len(lengths) >= 2, "the policy is to choose in this world"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("policy", "requests"), [(Retrospective(), 1), (Retrospective(guard=None), 2), (FallsBack(guard=None), 1)]
)
def test_rules_that_look_back_are_rejected(policy: Any, requests: int, rule: str) -> None:
    assert one_round(world(requests=requests, rule=RULES[rule]), policy, requests) > 1e-3


def one_round(world: World, policy: Any, requests: int = 1) -> float:
    """The largest deviation of a round from a new policy's state."""
    enumeration = Enumeration(world, policy, requests)
    fresh = jax.device_get(policy.init(requests, 3))
    enumeration.round([(anchors, fresh) for anchors in product(range(3), repeat=requests)], False)
    return enumeration.worst


class NoFactor(BlockVerification):
    """The control: the residual of a prefix that was certain to be accepted, without the factor p_n."""

    def __call__(self, draft_tokens: Any, draft_law: Any, target_law: Any, uniforms: Any, verify_lengths: Any) -> Any:
        right = super().__call__(draft_tokens, draft_law, target_law, uniforms, verify_lengths)
        row = jnp.take_along_axis(target_law, right.accepted[:, None, None], axis=1)[:, 0]
        residual = draft_law.residual(row, jnp.minimum(right.accepted, draft_tokens.shape[1] - 1))
        residual = residual / jnp.maximum(residual.sum(-1, keepdims=True), 1e-9)
        return Acceptance(right.accepted, jnp.where((right.accepted < verify_lengths)[:, None], residual, row))


def joint(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """[3, 3] probability that token i wins the race of q and j that of p, on the same clocks (docs/algorithm.md, rule
    111): a integral over the ratio s of the waits of j and i."""
    made = np.zeros((3, 3))
    for i, j in product(range(3), repeat=2):
        if i == j:
            made[i, i] = 1 / np.maximum(p / p[i], q / q[i]).sum()
            continue
        k = 3 - i - j
        low, high = q[j] / q[i], p[j] / p[i]
        # The third clock waits at least as long as max(q_k / q_i, s p_k / p_j) times the wait of i.
        alpha, beta = q[k] / q[i], p[k] / p[j]
        if low < high:
            turn = np.clip(alpha / beta, low, high)
            made[i, j] = 1 / (1 + alpha + low) - 1 / (1 + alpha + turn)
            made[i, j] += (1 / (1 + turn * (1 + beta)) - 1 / (1 + high * (1 + beta))) / (1 + beta)
    return made


class SharedNoise(World):
    """The control: drafts drawn with the clocks of coupled decoding, but verified by rejection, so that the correction
    reads the clocks that chose the draft."""

    @cached_property
    def outcomes(self) -> Any:
        made: dict[Any, dict[tuple[int, int], float]] = {}
        for (anchor, i, length), right in World.outcomes.func(self).items():
            draft, found = self.drafts()[i], {}
            for (n, token), chance in right.items():
                if n == length:
                    found[n, token] = chance
                    continue
                # The whole chance of this rejection goes to the token that wins on the clocks of the draft.
                before = draft[n - 1] if n else anchor
                q = self.draft[n, before]
                residual = np.maximum(self.target[before] - q, 1e-12)
                both = joint(q, residual / residual.sum())[draft[n]]
                rejected = sum(c for (m, _), c in right.items() if m == n)
                found[n, token] = rejected * both[token] / both.sum()
            made[anchor, i, length] = found
        return made


def test_wrong_verification_is_rejected() -> None:
    """Far beyond the 1e-6 of the right ones, by the same enumeration."""
    right = world()
    assert one_round(replace(right, rule=NoFactor()), Fixed()) > 5e-4
    shared = SharedNoise(*(getattr(right, name) for name in ("target", "draft", "logits", "costs")))
    assert one_round(shared, Fixed()) > 1e-3


def mean_accepted(target: list[float], draft: list[float], block: int, rule: Any) -> float:
    """Mean accepted drafts of a round that verifies whole blocks; the laws do not depend on the token before."""
    size, costs = len(target), CostTable.of((1,), (1.0,))
    laws = np.tile(target, (size, 1)), np.tile(draft, (block, size, 1))
    w = World(*laws, np.zeros((block, size)), costs, rule=rule)
    found = [w.outcomes[0, i, block] for i in range(len(w.drafts()))]
    return float(w.draft_law(0) @ [sum(n * chance for (n, _), chance in outcome.items()) for outcome in found])


def test_block_verification_accepts_more() -> None:
    """Its paper's example: 11/9 against 10/9 drafts a round; one draft alone is no block."""
    laws = [1 / 3, 2 / 3], [2 / 3, 1 / 3]
    assert mean_accepted(*laws, 2, RejectionSampling()) == pytest.approx(10 / 9, abs=1e-6)
    assert mean_accepted(*laws, 2, BlockVerification()) == pytest.approx(11 / 9, abs=1e-6)
    for rule in RULES.values():
        assert mean_accepted(*laws, 1, rule) == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_sparse_law_is_verified_like_the_dense_one(rule: str) -> None:
    rng = np.random.default_rng(0)
    count, block, vocab, candidates = 500, 3, 12, 4
    ids = np.argsort(rng.random((count, block, vocab)), axis=-1)[..., :candidates]
    probs = rng.dirichlet(np.ones(candidates), (count, block)).astype(np.float32)
    dense = np.zeros((count, block, vocab), np.float32)
    np.put_along_axis(dense, ids, probs, axis=-1)
    tokens = np.take_along_axis(ids, rng.integers(0, candidates, (count, block, 1)), axis=-1)[..., 0]
    target = rng.dirichlet(0.3 * np.ones(vocab), (count, block + 1)).astype(np.float32)
    rest = target, rng.random((count, block)).astype(np.float32), rng.integers(0, block + 1, count)
    whole = jnp.zeros((count, block, vocab)).at[jnp.arange(count)[:, None], jnp.arange(block), tokens].set(1.0)
    pairs = [
        (Sparse(jnp.asarray(ids), jnp.asarray(probs)), Dense(jnp.asarray(dense))),
        (Sparse.one_hot(jnp.asarray(tokens)), Dense(whole)),
    ]
    run = jax.jit(RULES[rule])
    for sparse, same in pairs:
        found, expected = run(tokens, sparse, *rest), run(tokens, same, *rest)
        assert len(set(np.asarray(found.accepted).tolist())) > 2
        np.testing.assert_array_equal(found.accepted, expected.accepted)
        np.testing.assert_allclose(found.next_law, expected.next_law, atol=1e-5)


class Candidates(World):
    """A world whose drafter hands over candidates: two of three tokens, best first."""

    def handed_over(self, q: np.ndarray) -> DraftLaw:
        ids = np.argsort(-q, axis=-1)[..., :2].astype(np.int32)
        return Sparse(ids, np.take_along_axis(q, ids, axis=-1).astype(np.float32))


def selector_worlds(temperature: float, rule: Any) -> list[World]:
    """A world for each anchor, of the very laws that a random DFlash 2 drafter draws from at this temperature."""
    options = (("selector_top_k", 2), ("conv_kernel_size", 2), ("conv_group_size", 4), ("sample_from_anchor", False))
    target, drafter = kind_pair("dspark", head="selector", spread=1.0, options=options, vocab_size=3)
    forced = jnp.asarray(list(product(range(3), repeat=3)), jnp.int32)
    count, worlds = len(forced), []
    keys, per_request = jnp.zeros((count, 2), jnp.uint32), np.ones(count, np.float32)
    sampling = SamplingArrays(temperature * per_request, np.zeros(count, np.int32), per_request, 0 * per_request)
    taps = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 4, 8)), (count, 4, 8))

    @jax.jit
    def laws(anchor: jax.Array) -> tuple[Sparse, jax.Array]:
        model, shared = drafter.model(drafter.params), shared_tables(target)
        positions = jnp.full((count,), 4)
        state = model.prefill(shared, taps, jnp.zeros((count, 4), jnp.int32), positions)
        draws = Draws(keys, positions, jax.tree.map(jnp.asarray, sampling))
        noise = Independent().noise(draws, 3, 3)

        def sample(logits: jax.Array, k: int, ids: jax.Array | None = None) -> Any:
            return forced[:, k], Independent().draft(logits, k, noise, draws, ids)[1]

        out = model.draft(shared, state, jnp.broadcast_to(anchor, (count,)), positions, sample)
        return out.law, out.confidence

    for anchor in range(3):
        law, confidence = jax.device_get(laws(jnp.int32(anchor)))
        assert isinstance(law, Sparse) and law.ids.shape == (count, 3, 2)
        np.testing.assert_allclose(law.probs.sum(-1), 1, atol=1e-6)
        rows = np.zeros((count, 3, 3))
        np.put_along_axis(rows, law.ids, law.probs.astype(np.float64), axis=-1)
        # By the token before: what x_k is drawn from depends on x_{k-1} alone, and that on nothing forced later.
        draft, logits = np.full((3, 3, 3), 1 / 3), np.zeros((3, 3))
        draft[0, anchor], logits[0, anchor] = rows[0, 0], confidence[0, 0]
        for k, before in product((1, 2), range(3)):
            mine = np.asarray(forced)[:, k - 1] == before
            draft[k, before], logits[k, before] = rows[mine][0, k], confidence[mine][0, k]
            np.testing.assert_allclose(rows[mine][:, k], rows[mine][:1, k].repeat(mine.sum(), 0), atol=1e-6)
        costs = world().costs
        worlds.append(Candidates(world().target, draft / draft.sum(-1, keepdims=True), logits, costs, rule=rule))
    return worlds


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
@pytest.mark.parametrize("rule", RULES)
def test_a_selectors_drafts_follow_the_targets_law(rule: str, temperature: float) -> None:
    """What DFlash 2 hands over is what it draws from, and the law of the output is the target's, whole blocks or by
    confidence; with the law before the selector's choice it would not be."""
    for anchor, made in enumerate(selector_worlds(temperature, RULES[rule])):
        for policy in (Fixed(), Causal(guard=None, min_gain=0.0)):
            enumeration = Enumeration(made, policy, 1)
            enumeration.round([((anchor,), jax.device_get(policy.init(1, 3)))], False)
            assert enumeration.worst < 1e-6, (anchor, policy)

        if temperature:
            wrong = Flattened(*(getattr(made, name) for name in ("target", "draft", "logits", "costs")), rule=made.rule)
            enumeration = Enumeration(wrong, Fixed(), 1)
            enumeration.round([((anchor,), jax.device_get(Fixed().init(1, 3)))], False)
            assert enumeration.worst > 1e-3


class Flattened(Candidates):
    """The control: it hands over another law on the candidates than the one it draws from."""

    def handed_over(self, q: np.ndarray) -> DraftLaw:
        ids, probs = super().handed_over(q)
        return Sparse(ids, np.full_like(probs, 0.5))


# The paper's counterexample (docs/algorithm.md, rule 77)


def counterexample() -> World:
    sure, never = np.log(0.9 / 0.1), -200.0
    return World(
        target=np.array([[0.7, 0.3], [0.7, 0.3]]),
        draft=np.full((2, 2, 2), 0.5),
        logits=np.array([[np.log(4.0)] * 2, [sure, never]]),
        costs=CostTable.of((1, 2, 3), 1 / np.array([1.0, 0.5, 0.45])),
    )


def chance_of_a(policy: Any) -> float:
    w = counterexample()
    tables = ScheduleTables.of(w.costs, [1.0, 1.0])
    one = jnp.ones(1, jnp.int32)
    view = RoundView(one > 0, one, 2 * one, Occupancy.of(), tables)
    state = stack([jax.device_get(policy.init(1, 2))])
    rows = w.confidence(0)[None, :, None].astype(np.float32)
    lengths = np.asarray(decide(policy, view, state, rows)[1])[0, :, 0]
    law = w.draft_law(0) @ w.extended(0)[np.arange(len(lengths)), lengths]
    return float(law.reshape(2, -1).sum(1)[0])


@pytest.mark.parametrize(
    "policy", [Fixed(), Threshold(0.85), Causal(), LookAhead(), Asynchronous(), Causal(Static(), 0.0, None)]
)
def test_the_papers_counterexample(policy: Any) -> None:
    assert chance_of_a(policy) == pytest.approx(0.70, abs=1e-6)


def test_the_paper_rejects_a_global_search() -> None:
    assert chance_of_a(Retrospective(guard=None)) == pytest.approx(0.85, abs=1e-6)
