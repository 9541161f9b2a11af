"""The compiled loop under every load-adaptive policy: lossless, in place, without a recompile, quick to follow load."""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding.dispatch import record_rounds, run_rounds
from dspark_jax.decoding.prefill import admit
from dspark_jax.decoding.round import DecodeLoop, LoopParams, init_state
from dspark_jax.decoding.state import Admission, DecodeState
from dspark_jax.drafters.registry import DRAFTERS, Drafter
from dspark_jax.scheduling.calibration import Online
from dspark_jax.scheduling.costs import CostTable, Occupancy, ScheduleTables
from dspark_jax.scheduling.policies import Adaptive, Asynchronous, Causal, LookAhead, VerifyPolicy
from dspark_jax.serving.assembly import make_loop
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.metering import Metering
from dspark_jax.serving.requests import Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target
from tests.decoding_tiny import admission, admitted, kind_pair, prompts, tiny_pair
from tests.test_dispatch import bytes_of, cache_copies
from tests.test_lossless import PROMPT, V, exact_law, p_value
from tests.xla import FAST_PROGRAM

POLICIES: dict[str, VerifyPolicy] = {
    "causal": Causal(),
    "look-ahead": LookAhead(),
    "asynchronous": Asynchronous(),
}
ONLINE = LookAhead(calibration=Online())
NEW, SLOTS = 24, 4
BUCKETS = (4, 10, 20)
STAIRS = {n: 1.0 + 0.09 * (n - 4) for n in range(4, 21)}  # finer than the buckets: one token can be worth its price


def tables(buckets: tuple[int, ...], seconds: Any, drafting: float, block: int) -> ScheduleTables:
    # A plain price of its own in all of them: one structure, so that tests share compiled programs.
    plain = np.asarray(seconds, float).ravel()[0]
    return ScheduleTables.of(CostTable.of(buckets, seconds, drafting, plain=plain), [1.0] * block)


def sharp(drafter: Drafter, scale: float, bias: float) -> Drafter:
    """Confidences that differ: a tiny drafter's own lie around one half."""
    head = drafter.params["confidence_head"]
    proj = {"weight_io": scale * head["proj"]["weight_io"], "bias_o": head["proj"]["bias_o"] + bias}
    return replace(drafter, params=drafter.params | {"confidence_head": {"proj": proj}})


# Temperature 1: the law, over 200 thousand seeded requests

# So many at once that operations, and not their starts, take the time.
REQUESTS, BATCHES, BLOCK = 256, 800, 3


@dataclass(frozen=True)
class LooksBack(Adaptive):
    """The control: a request whose last confidence is low is dropped whole, so x_1's admission hangs on x_1."""

    def __call__(self, view: Any, state: Any) -> Any:
        sure = jax.nn.sigmoid(view.confidence)[:, -1] > 0.5
        return jnp.where(sure, view.caps, 0), state


@cache
def unlike_pair() -> tuple[Target, Drafter]:
    """A target and a drafter of unlike laws over V tokens, as test_lossless has them."""
    shapes = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    target, drafter = tiny_pair(
        5, 1.0, BLOCK, **shapes, num_key_value_heads=1, head_dim=4, initializer_range=0.4, max_position_embeddings=64
    )
    markov = drafter.params["markov_head"]
    params = drafter.params | {"markov_head": markov | {"w2_vr": 0.3 * markov["w2_vr"]}}
    return target, sharp(replace(drafter, params=params), 4.0, 0.5)


@partial(jax.jit, static_argnums=(0, 3), compiler_options=FAST_PROGRAM)
def many_samples(
    loop: DecodeLoop, params: LoopParams, occupancy: Occupancy, batches: int, seed: Any, new: Admission
) -> Any:
    """[batches, R, 4] tokens, and [batches] sums of drafts verified, accepted and of rounds: what an engine does batch
    after batch, in one program. The policy's memory goes from one to the next."""

    def batch(state: DecodeState, number: jax.Array) -> tuple[DecodeState, Any]:
        ids = jnp.arange(loop.requests) + number * loop.requests
        keys = jnp.stack([ids, jnp.full_like(ids, seed)], axis=1).astype(jnp.uint32)
        state = admit(loop, params, state, new._replace(keys=keys), True)
        state = run_rounds(loop, params, state, occupancy, jnp.int32(8), jnp.asarray(False))
        made = state.tokens[:, len(PROMPT) : len(PROMPT) + 4]
        counts = state.counters.verified_at, state.counters.accepted_at, state.counters.rounds
        return state, (made, jnp.stack([jnp.sum(x) for x in counts]))

    return jax.lax.scan(batch, loop.init_state(params), jnp.arange(batches))[1]


def sampled(policy: VerifyPolicy, seed: int, batches: int = BATCHES) -> tuple[np.ndarray, np.ndarray]:
    target, drafter = unlike_pair()
    buckets = (REQUESTS, 2 * REQUESTS, 4 * REQUESTS)
    loop = make_loop(target, drafter, EngineConfig(REQUESTS, 20, buckets=buckets, stop_slots=1), policy)
    stairs = np.arange(REQUESTS, 4 * REQUESTS + 1)
    costs = tables(tuple(stairs.tolist()), 1.0 + 0.32 * (stairs / REQUESTS - 1), 0.05, BLOCK)
    params = LoopParams(target.params, drafter.params, costs)
    new = admission(loop, [PROMPT] * REQUESTS, 5, np.zeros((REQUESTS, 2)), bucket=4, temperature=1.0)
    made, counts = many_samples(loop, params, Occupancy.of(), batches, jnp.int32(seed), new)
    return np.asarray(made).reshape(-1, 4), np.asarray(counts).sum(axis=0)


@pytest.mark.lossless
@pytest.mark.parametrize("name", [*POLICIES, "look-ahead, online"])
def test_samples_follow_the_targets_law(name: str, record_property: Any) -> None:
    policy = POLICIES.get(name, ONLINE)
    tokens, (verified, accepted, rounds) = sampled(policy, 100 + [*POLICIES, name].index(name))
    law = exact_law(unlike_pair()[0])
    first, later = p_value(tokens[:, :3], law.sum(3)), p_value(tokens[:, 1:], law.sum(0))
    line = (
        f"{name}: {len(tokens)} requests, p = {first:.4f} (tokens 1-3), {later:.4f} (2-4); "
        f"{verified / rounds:.2f} verified, {accepted / rounds:.2f} accepted a round"
    )
    print(line)
    record_property("chi-square", line)
    assert len(tokens) >= 200_000
    assert 0.2 < verified / rounds < 0.95 * BLOCK, "the policy is to choose"
    assert min(first, later) > 1e-3, line


@pytest.mark.lossless
def test_a_policy_that_looks_back_is_rejected(record_property: Any) -> None:
    tokens, _ = sampled(LooksBack(guard=None), 100, BATCHES // 4)
    p = p_value(tokens[:, 1:], exact_law(unlike_pair()[0]).sum(0))
    record_property("chi-square", f"looks back: p = {p:.3g}")
    assert p < 1e-9


# Temperature 0: token for token, at every load


@cache
def pair() -> tuple[Target, Drafter]:
    target, drafter = tiny_pair()
    return target, sharp(drafter, 6.0, 2.0)


def engine_of(policy: VerifyPolicy, drafting: float = 0.1, load: float = 1.0) -> Engine:
    target, drafter = pair()
    config = EngineConfig(SLOTS, 64, rounds_per_dispatch=4, buckets=BUCKETS)
    costs = tables(tuple(STAIRS), list(STAIRS.values()), drafting, drafter.config.block_size)
    return Engine(target, drafter, config, SamplingParams(NEW), policy, costs, Metering(None, load))


PROMPTS = prompts(10, tiny_pair()[0].config.vocab_size)


@cache
def plain() -> list[tuple[int, ...]]:
    from dspark_jax.serving.generate import generate

    made = generate(pair()[0], None, PROMPTS, SamplingParams(NEW), EngineConfig(SLOTS))
    return [g.tokens for g in made]


@pytest.mark.lossless
@pytest.mark.parametrize("name", [*POLICIES, "look-ahead, online"])
def test_greedy_outputs_are_the_targets_at_every_load(name: str) -> None:
    """Verified drafts fall as the load rises, and the tokens stay the same; so they do where drafting never pays."""
    policy, verified = POLICIES.get(name, ONLINE), []
    for load, drafting in ((0.5, 0.1), (1.0, 0.1), (4.0, 0.1), (16.0, 0.1), (1.0, 50.0)):
        engine = engine_of(policy, drafting, load)
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


@pytest.mark.parametrize("name", POLICIES)
def test_state_is_updated_in_place(name: str) -> None:
    check_in_place(run_rounds, POLICIES[name])


def check_in_place(program: Any, policy: VerifyPolicy) -> None:
    """A dispatch of this kind, on caches large enough that a copy of one would show."""
    target, drafter = tiny_pair(block_size=2, head_dim=64, max_position_embeddings=4096)
    buckets = (4, 8, 12)
    loop = make_loop(target, drafter, EngineConfig(4, 1000, buckets=buckets), policy)
    params = LoopParams(target.params, drafter.params, tables(buckets, [1.0, 1.1, 1.2], 0.1, 2))
    state = init_state(loop, params)
    limits = jnp.int32(8), jnp.asarray(False)
    compiled = program.lower(loop, params, state, Occupancy.of(), *limits).compile()
    caches = bytes_of((state.target_cache, state.draft))
    assert compiled.memory_analysis().alias_size_in_bytes >= bytes_of(state) >= caches
    assert compiled.memory_analysis().temp_size_in_bytes < caches / 8
    assert not cache_copies(compiled, state)


@pytest.mark.parametrize("name", POLICIES)
def test_load_is_followed_within_two_dispatches_without_a_recompile(name: str) -> None:
    """Raised from 1 to 4 and lowered again. New costs and temperatures of the same shape compile nothing either, and
    the host is asked for nothing inside."""
    policy = replace(POLICIES[name], guard=None)
    engine = engine_of(policy)
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
    engine = engine_of(LookAhead(guard=None))
    loop, params = engine.loop, engine.params
    state = admitted(loop, params, engine.state, PROMPTS[:SLOTS], NEW)
    state, records = record_rounds(loop, params, state, Occupancy.of(3.0), 3)
    expected = sum(STAIRS[int(b)] + 0.1 for b in records.bucket)
    assert float(state.predicted_seconds) == pytest.approx(expected, rel=1e-5)
    loop = engine_of(LookAhead()).loop
    state = run_rounds(loop, params, state, Occupancy.of(), jnp.int32(0), jnp.asarray(False))
    assert float(state.predicted_seconds) == 0.0
    once = jnp.int32(1), jnp.asarray(False)
    assert "cond" in str(jax.make_jaxpr(run_rounds, static_argnums=0)(loop, params, state, Occupancy.of(), *once))


def test_rounds_without_drafts_cost_what_plain_decoding_does() -> None:
    """Drafting never pays here, so all but the probes are plain rounds: predicted at the plain price, verified one row
    a request, at the target's price of one row. The drafter's context is extended by several at once."""
    engine = engine_of(LookAhead(), drafting=50.0)
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
    engine = engine_of(LookAhead(), drafting=50.0)
    state = admitted(engine.loop, engine.params, engine.state, PROMPTS[:SLOTS], 42)
    drafted = []
    for _ in range(3):
        state = run_rounds(engine.loop, engine.params, state, Occupancy.of(), jnp.int32(13), jnp.asarray(False))
        drafted.append(int(np.asarray(state.counters.drafted).max()))
    assert drafted == [0, 0, 1], "the first probe is due after 32 rounds"


@pytest.mark.parametrize("kind", DRAFTERS)
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
    singly, _ = record_rounds(loop, params, start(), Occupancy.of(), rounds)
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
