"""The compiled loop under every load-adaptive policy: lossless, in place, without a recompile, quick to follow load."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding.dispatch import record_rounds, run_rounds
from dspark_jax.decoding.round import DecodeLoop, LoopParams, init_state
from dspark_jax.decoding.state import DecodeState
from dspark_jax.drafters.registry import Drafter
from dspark_jax.scheduling.costs import Occupancy
from dspark_jax.scheduling.policies import LookAhead
from dspark_jax.serving.assembly import make_loop
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.metering import Metering
from dspark_jax.serving.requests import Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target
from tests.decoding_tiny import admitted, kind_pair, prompts, tiny_pair
from tests.scheduled_laws import CERTAIN, CONTROL, POLICIES, RUNS, sampled, sharp, tables
from tests.switched import Switched, choose
from tests.test_dispatch import bytes_of, cache_copies

# All policies in one compiled loop, which is asked for one after the other; in the other none may disable drafting.
GUARDED = Switched(tuple(POLICIES.values()))
FREE = Switched(tuple(replace(policy, guard=None) for policy in POLICIES.values()))
NEW, SLOTS = 24, 4
BUCKETS = (4, 10, 20)
STAIRS = {n: 1.0 + 0.09 * (n - 4) for n in range(4, 21)}  # finer than the buckets: one token can be worth its price


# Temperature 1: the law, over 50 thousand seeded requests a policy, and 200 thousand where most is remembered


@pytest.mark.lossless
@pytest.mark.parametrize("name", POLICIES)
def test_samples_follow_the_targets_law(name: str, record_property: Any) -> None:
    """`python -m tests.scheduled_laws` draws four runs of every policy."""
    runs = RUNS if name == "look-ahead, online" else 1
    found = sampled(name, runs)
    print(f"{name}: {found}")
    record_property("chi-square", f"{name}: {found}")
    assert found.requests >= 50_000 * runs
    assert found.right, found


@pytest.mark.lossless
def test_a_policy_that_looks_back_is_rejected(record_property: Any) -> None:
    found = sampled(CONTROL, 1)
    record_property("chi-square", f"looks back: {found}")
    assert found.later < CERTAIN


# Temperature 0: token for token, at every load


@cache
def pair() -> tuple[Target, Drafter]:
    target, drafter = tiny_pair()
    return target, sharp(drafter, 6.0, 2.0)


def engine_of(name: str, drafting: float = 0.1, load: float = 1.0, policies: Switched = GUARDED) -> Engine:
    target, drafter = pair()
    config = EngineConfig(SLOTS, 64, rounds_per_dispatch=4, buckets=BUCKETS)
    costs = tables(tuple(STAIRS), list(STAIRS.values()), drafting, drafter.config.block_size)
    engine = Engine(target, drafter, config, SamplingParams(NEW), policies, costs, Metering(None, load))
    engine.state = choose(engine.state, [*POLICIES].index(name))
    return engine


PROMPTS = prompts(10, tiny_pair()[0].config.vocab_size)


@cache
def plain() -> list[tuple[int, ...]]:
    from dspark_jax.serving.generate import generate

    made = generate(pair()[0], None, PROMPTS, SamplingParams(NEW), EngineConfig(SLOTS))
    return [g.tokens for g in made]


@pytest.mark.lossless
@pytest.mark.parametrize("name", POLICIES)
def test_greedy_outputs_are_the_targets_at_every_load(name: str) -> None:
    """Verified drafts fall as the load rises, and the tokens stay the same; so they do where drafting never pays."""
    verified = []
    for load, drafting in ((0.5, 0.1), (1.0, 0.1), (4.0, 0.1), (16.0, 0.1), (1.0, 50.0)):
        engine = engine_of(name, drafting, load)
        for i, prompt in enumerate(PROMPTS):
            engine.submit(i, Request(prompt))
        done: dict[int, Any] = {}
        while not engine.idle:
            done |= {p.index: p.generation for p in engine.step() if p.generation is not None}
        assert [done[i].tokens for i in range(len(PROMPTS))] == plain(), (name, load)
        verified.append(sum(sum(g.verified_at) for g in done.values()) / sum(g.rounds for g in done.values()))
        if drafting > 1:
            assert sum(g.drafted for g in done.values()) < sum(g.rounds for g in done.values()) / 2
    assert verified[0] >= verified[1] > verified[2] >= verified[3] and verified[4] < verified[1] / 2, verified


# A dispatch


def test_state_is_updated_in_place() -> None:
    """Whatever the policy: all of them, in caches large enough that a copy of one would show."""
    target, drafter = tiny_pair(block_size=2, head_dim=64, max_position_embeddings=4096)
    buckets = (4, 8, 12)
    loop = make_loop(target, drafter, EngineConfig(4, 1000, buckets=buckets), GUARDED)
    params = LoopParams(target.params, drafter.params, tables(buckets, [1.0, 1.1, 1.2], 0.1, 2))
    state = init_state(loop, params)
    limits = jnp.int32(8), jnp.asarray(False)
    compiled = run_rounds.lower(loop, params, state, Occupancy.of(), *limits).compile()
    caches = bytes_of((state.target_cache, state.draft))
    assert compiled.memory_analysis().alias_size_in_bytes >= bytes_of(state) >= caches
    assert compiled.memory_analysis().temp_size_in_bytes < caches / 8
    assert not cache_copies(compiled, state)


@pytest.mark.parametrize("name", POLICIES)
def test_load_is_followed_within_two_dispatches_without_a_recompile(name: str) -> None:
    """Raised from 1 to 4 and lowered again. New costs and temperatures of the same shape compile nothing either, and
    the host is asked for nothing inside."""
    engine = engine_of(name, policies=FREE)
    loop, params = engine.loop, engine.params
    state = admitted(loop, params, engine.state, PROMPTS[:SLOTS], 40)
    levels, programs = [], None
    for load in (1.0, 1.0, 4.0, 4.0, 1.0, 1.0):
        occupancy = Occupancy.of(load)
        if programs is None:
            state, records = record_rounds(loop, params, state, occupancy, 3)
            programs = record_rounds._cache_size()
        with jax.transfer_guard("disallow"):
            state, records = record_rounds(loop, params, state, occupancy, 3)
        lengths = np.asarray(records.verify_lengths)[np.asarray(records.committed) > 0]
        levels.append(float(lengths.mean()) if lengths.size else float("nan"))
        state = replace(state, length=jnp.full((SLOTS,), 24, jnp.int32), active=jnp.ones((SLOTS,), bool))
    assert levels[3] < levels[1] * 0.8 and levels[5] == pytest.approx(levels[1], rel=0.5), levels
    other = tables(tuple(STAIRS), [3.0 * seconds for seconds in STAIRS.values()], 0.1, loop.block)
    state, records = record_rounds(loop, params._replace(tables=other), state, Occupancy.of(), 3)
    assert record_rounds._cache_size() == programs


def test_predicted_seconds_are_the_tables() -> None:
    """The prediction for a dispatch: the buckets that its rounds ran at, and drafting where a request drafted."""
    engine = engine_of("look-ahead", policies=FREE)
    loop, params = engine.loop, engine.params
    state = admitted(loop, params, engine.state, PROMPTS[:SLOTS], NEW)
    state, records = record_rounds(loop, params, state, Occupancy.of(3.0), 3)
    expected = sum(STAIRS[int(b)] + 0.1 for b in records.bucket)
    assert float(state.predicted_seconds) == pytest.approx(expected, rel=1e-5)
    loop = engine_of("look-ahead").loop
    state = run_rounds(loop, params, state, Occupancy.of(), jnp.int32(0), jnp.asarray(False))
    assert float(state.predicted_seconds) == 0.0
    once = jnp.int32(1), jnp.asarray(False)
    assert "cond" in str(jax.make_jaxpr(run_rounds, static_argnums=0)(loop, params, state, Occupancy.of(), *once))


def test_rounds_without_drafts_cost_what_plain_decoding_does() -> None:
    """Drafting never pays here, so all but the probes are plain rounds: predicted at the plain price, verified one row
    a request, at the target's price of one row. The drafter's context is extended by several at once."""
    engine = engine_of("look-ahead", drafting=50.0)
    loop, params = engine.loop, engine.params
    assert params.tables is not None
    costs = params.tables.costs._replace(plain=jnp.full((1,), 0.25, jnp.float32))
    params = params._replace(tables=params.tables._replace(costs=costs))
    state = admitted(loop, params, engine.state, PROMPTS[:SLOTS], NEW)
    state = run_rounds(loop, params, state, Occupancy.of(), jnp.int32(4), jnp.asarray(False))
    rounds, drafted = np.asarray(state.counters.rounds).max(), np.asarray(state.counters.drafted).max()
    assert rounds == 4 and drafted == 0
    assert float(state.predicted_seconds) == pytest.approx(4 * 0.25, rel=1e-5)

    def flops(loop: DecodeLoop, params: LoopParams, state: DecodeState, plain: bool) -> float:
        def one(state: DecodeState) -> Any:
            if plain:
                return loop.plain_round(params, state)
            plan = loop.plan(params, state, Occupancy.of())
            return loop.speculative_round(params, state, Occupancy.of(), plan)

        return jax.jit(one).lower(state).cost_analysis()["flops"]

    alone = make_loop(engine.target, None, EngineConfig(SLOTS, 64))
    weights = LoopParams(params.target, {})
    baseline = flops(alone, weights, init_state(alone, weights), plain=True)
    assert baseline <= flops(loop, params, state, plain=True) < 1.1 * baseline
    assert flops(loop, params, state, plain=False) > 2 * baseline


def test_plain_rounds_count_for_the_next_probe() -> None:
    """Though the policy is asked once a stretch of them, and not once a round."""
    engine = engine_of("look-ahead", drafting=50.0)
    state = admitted(engine.loop, engine.params, engine.state, PROMPTS[:SLOTS], 42)
    drafted = []
    for _ in range(3):
        state = run_rounds(engine.loop, engine.params, state, Occupancy.of(), jnp.int32(13), jnp.asarray(False))
        drafted.append(int(np.asarray(state.counters.drafted).max()))
    assert drafted == [0, 0, 1], "the first probe is due after 32 rounds"


@pytest.mark.parametrize("kind", ["dspark", "eagle3", "mtp"])  # DFlash keeps DSpark's state
def test_a_drafters_context_covers_the_tokens_of_plain_rounds(kind: str) -> None:
    """After more plain rounds than a block has rows, drafts are as if it had been extended round by round. One request
    ends on the way."""
    target, drafter = kind_pair(kind)
    policy, rounds = LookAhead(), 2 * drafter.config.block_size + 3
    loop = make_loop(target, drafter, EngineConfig(3, 64, stop_slots=1), policy)
    costs = tables(loop.buckets, [1.0 + 0.1 * i for i in range(len(loop.buckets))], 50.0, loop.block)
    params = LoopParams(target.params, drafter.params, costs)
    rows = prompts(3, target.config.vocab_size)

    def start() -> DecodeState:
        state = admitted(loop, params, init_state(loop, params), rows, 30)
        return replace(state, limit=state.limit.at[1].add(-25))

    together = run_rounds(loop, params, start(), Occupancy.of(), jnp.int32(rounds), jnp.asarray(False))
    singly = start()
    for _ in range(rounds):
        singly = run_rounds(loop, params, singly, Occupancy.of(), jnp.int32(1), jnp.asarray(False))
    np.testing.assert_array_equal(together.length, singly.length)
    for row, other, length in zip(together.tokens, singly.tokens, together.length, strict=True):
        np.testing.assert_array_equal(row[:length], other[:length])
    assert np.asarray(together.counters.rounds).tolist() == [rounds, 4, rounds] and not np.any(
        together.counters.drafted
    )

    @jax.jit
    def drafts(state: DecodeState) -> Any:
        anchors = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)[:, 0]
        model, drafting = loop.models(params)
        assert drafting is not None
        return loop.draft(model, drafting, state, anchors, loop.noise(model, state)).law.probs

    warm = together.sampling._replace(temperature=jnp.ones(3))
    found, expected = (np.asarray(drafts(replace(state, sampling=warm)))[[0, 2]] for state in (together, singly))
    np.testing.assert_allclose(found, expected, atol=1e-5)
