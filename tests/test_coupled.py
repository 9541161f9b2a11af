"""Coupled decoding: the tokens of plain decoding with the seed, whatever drafts them, schedules them or runs beside."""

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from dspark_jax.decoding.sampling import SamplingArrays, coupled_waits, sampling_law
from dspark_jax.decoding.verifiers import Coupled, Decision, Draws
from dspark_jax.drafters.protocol import DraftOutput
from dspark_jax.errors import UserError
from dspark_jax.evaluation.timing import differences
from dspark_jax.scheduling.policies import Asynchronous, Causal, LookAhead, Retrospective, Threshold
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.prompts import EncodedPrompt
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig, policy_named
from tests.decoding_tiny import kind_pair, prompts
from tests.enumeration import Enumeration, decide, remember, stack, take, world
from tests.switched import Switched, choose
from tests.test_schedule_law import POLICIES, QUICK, joint
from tests.test_scheduled_loop import BUCKETS, STAIRS, pair, tables

pytestmark = pytest.mark.lossless

NEAR_TIE = 1e-4
ANY_POLICY: dict[str, Any] = POLICIES | {"retrospective": Retrospective(**QUICK)}


def sampled(count: int, **law: float) -> SamplingArrays:
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | law
    kinds = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    return SamplingArrays(*(jnp.full((count,), v, kind) for v, kind in zip(full.values(), kinds, strict=True)))


# The noise and the race


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    keys = jnp.asarray([[3, 1], [3, 1], [4, 1]], jnp.uint32)
    positions = jnp.asarray([[5, 6, 7], [7, 8, 9], [5, 6, 7]])
    wide = np.asarray(coupled_waits(keys, positions, 40, sampled(3)))
    narrow = np.asarray(coupled_waits(keys[::-1], positions[::-1], 29, sampled(3, top_k=2)))
    np.testing.assert_array_equal(wide[:, :, :29], narrow[::-1])  # another slot, padded width, law
    np.testing.assert_array_equal(wide[0, 2], wide[1, 0])  # the same position from another anchor
    assert len(np.unique(wide)) == wide.size - 40 and np.all(wide > 0)


@pytest.mark.parametrize("law", [{}, {"temperature": 0.6}, {"top_k": 3, "temperature": 1.5}, {"top_p": 0.8}])
def test_drafts_win_at_the_rate_of_the_formula(law: dict[str, float]) -> None:
    """P(x = t) = sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), and both tokens follow their laws."""
    count, vocab = 40_000, 5
    rng = np.random.default_rng(0)
    logits = jnp.asarray(1.5 * rng.standard_normal((2, vocab)), jnp.float32)
    draws = Draws(jnp.asarray(rng.integers(0, 2**32, (count, 2), np.uint32)), jnp.arange(count), sampled(count, **law))
    verifier = Coupled()

    @jax.jit
    def run(draws: Draws) -> Any:
        rows = jnp.broadcast_to(logits, (count, 2, vocab))
        noise = verifier.noise(draws, 1, vocab)
        token, none = verifier.draft(rows[:, 0], 0, noise, draws)
        assert none is None
        target = jnp.stack([rows[:, 1], rows[:, 1]], axis=1)
        made = verifier.decide(DraftOutput.of([token], [None]), target, jnp.ones(count, jnp.int32), noise, draws)
        return token, made, verifier.next_token(rows[:, 1], draws, 3)

    token, made, plain = jax.device_get(run(draws))
    q, p = np.asarray(sampling_law(logits[:, None], sampled(2, **law)), np.float64)[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.maximum(p / p[:, None], q / q[:, None]).sum(axis=1)
    rate = np.sum(1 / ratios[(p > 0) & (q > 0)])
    assert abs(made.accepted.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / count)
    assert np.all((made.accepted == 1) == (token == plain)) and np.all(
        made.next_token[made.accepted == 0] == plain[made.accepted == 0]
    )
    tv = 0.5 * np.abs(p - q).sum()
    assert (1 - tv) / (1 + tv) - 1e-9 <= rate <= 1 - tv + 1e-9
    for found, expected in ((token, q), (plain, p)):
        expected = count * expected
        seen = np.bincount(found, minlength=vocab)
        assert not np.any(seen[expected == 0])
        kept = expected > 0
        assert chi2.sf(np.sum((seen - expected)[kept] ** 2 / expected[kept]), kept.sum() - 1) > 1e-4


def test_the_joint_law_has_both_laws_as_margins() -> None:
    for p, q in product(world().target, world().draft.reshape(-1, 3)):
        np.testing.assert_allclose(joint(q, p).sum(1), q, atol=1e-12)
        np.testing.assert_allclose(joint(q, p).sum(0), p, atol=1e-12)


# Every combination of a few clocks at four positions, through the verifier and the policies themselves


@jax.jit
def raced(logits: jax.Array, k: Any, noise: jax.Array, draws: Draws) -> jax.Array:
    return Coupled().draft(logits, k, noise, draws)[0]


@jax.jit
def judged(tokens: jax.Array, logits: jax.Array, lengths: jax.Array, noise: jax.Array, draws: Draws) -> Decision:
    return Coupled().decide(DraftOutput(tokens, None, None), logits, lengths, noise, draws)


@pytest.mark.parametrize("requests", [1, 2])
@pytest.mark.parametrize("name", ANY_POLICY)
def test_every_policy_gives_the_text_of_the_noise(name: str, requests: int) -> None:
    w, policy = world(requests=requests), ANY_POLICY[name]
    rng = np.random.default_rng(2)
    atoms = rng.exponential(size=(4, w.vocab))
    if requests == 1:
        chosen = np.array(list(product(range(len(atoms)), repeat=w.block + 1)))[:, None]
    else:
        chosen = rng.integers(0, len(atoms), (1024, requests, w.block + 1))
    chosen = np.concatenate([chosen, rng.integers(0, len(atoms), (*chosen.shape[:2], w.block + 1))], axis=2)
    waits = np.tile(atoms[chosen], (w.vocab if requests == 1 else 1, 1, 1, 1))  # [g, R, P, V]
    count, positions = len(waits), waits.shape[2]
    anchors = np.arange(count * requests).reshape(count, requests) % w.vocab

    text = [anchors]
    for at in range(positions):
        text.append(np.argmax(w.target[text[-1]] / waits[:, :, at], axis=-1))
    text = np.stack(text, axis=2)

    def flat(x: np.ndarray) -> np.ndarray:
        return x.reshape(count * requests, *x.shape[2:]).astype(np.float32)

    view = Enumeration(w, policy, requests).view
    draws = Draws(
        jnp.zeros((count * requests, 2), jnp.uint32), jnp.zeros(count * requests, jnp.int32), sampled(count * requests)
    )
    states, done, seen = stack([jax.device_get(policy.init(requests, w.block))] * count), np.zeros_like(anchors), set()
    made = np.full_like(text, -1)
    made[:, :, 0] = anchors
    while np.any(done <= w.block):
        window = np.minimum(done[:, :, None] + np.arange(w.block + 1), positions - 1)
        noise = flat(np.take_along_axis(waits, window[..., None], axis=2))
        block = [np.take_along_axis(made, np.minimum(done, positions)[:, :, None], axis=2)[:, :, 0]]
        for k in range(w.block):
            token = raced(np.log(flat(w.draft[k][block[-1]])), k, noise, draws)
            block.append(np.asarray(token).reshape(count, requests))
        block = np.stack(block, axis=2)
        rows = np.stack([w.logits[k, block[:, :, k]] for k in range(w.block)], axis=2).astype(np.float32)
        drafted, lengths, after = jax.device_get(decide(policy, view, states, rows[:, None]))
        lengths = lengths[:, 0]
        seen |= set(map(tuple, lengths.tolist()))
        found = judged(
            block[:, :, 1:].reshape(-1, w.block), np.log(flat(w.target[block])), lengths.ravel(), noise, draws
        )
        n, token = (np.asarray(x).reshape(count, requests) for x in found)
        assert np.all(n <= lengths)
        for g, r in np.ndindex(count, requests):
            new = [*block[g, r, 1 : n[g, r] + 1], token[g, r]][: positions - done[g, r]]
            made[g, r, done[g, r] + 1 : done[g, r] + 1 + len(new)] = new
            done[g, r] += len(new)
        states = remember(policy, view, drafted, rows, lengths, n.astype(np.int32), take(after, (slice(None), 0)))
    np.testing.assert_array_equal(made[:, :, : w.block + 2], text[:, :, : w.block + 2])
    assert name == "fixed" or len(seen) >= 2, "the policy is to choose in this world"


# The loop: 200 seeds

NEW, SLOTS = 12, 4


@cache
def asked() -> tuple[Request, ...]:
    """200 prompts with a seed and settings each; every twelfth is greedy."""
    made = []
    laws = ({}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 1.5}, {"temperature": 0.7}, {})
    for i, prompt in enumerate(prompts(200, pair()[0].config.vocab_size, seed=4)):
        law = {"temperature": 1.0} | laws[i % 6] | ({"temperature": 0.0} if i % 12 == 11 else {})
        made.append(Request(prompt, SamplingParams(NEW, seed=1000 + i, stop_tokens=(), mode="coupled", **law)))
    return tuple(made)


@cache
def plain() -> list[Generation]:
    return generate(pair()[0], None, asked(), engine=EngineConfig(SLOTS))


def check(found: list[Generation], what: str, record: Any) -> None:
    target, requests = pair()[0], asked()
    given = [EncodedPrompt(str(i), what, tuple(r.prompt)) for i, r in enumerate(requests)]
    parted = differences(target, given, plain(), found, [r.sampling for r in requests])
    accepted, rounds = sum(sum(g.accepted_at) for g in found), sum(g.rounds for g in found)
    line = (
        f"{what}: {len(found) - len(parted)}/{len(found)} texts identical, near-ties "
        f"{[(d.prompt, d.position, d.gap) for d in parted]}; {accepted} drafts accepted in {rounds} rounds"
    )
    print(line)
    record("coupled", line)
    assert all(d.gap < NEAR_TIE for d in parted) and len(parted) <= 2, line
    assert len(found) == 200 and accepted > 200, line


def with_policy(name: str) -> list[Generation]:
    """By one compiled loop for all of them."""
    target, drafter = pair()
    config = EngineConfig(SLOTS, 64, rounds_per_dispatch=4, buckets=BUCKETS)
    costs = tables(tuple(STAIRS), list(STAIRS.values()), 0.1, drafter.config.block_size)
    policies = Switched(tuple(IN_LOOP.values()))
    engine = Engine(target, drafter, config, SamplingParams(mode="coupled"), policies, costs)
    engine.state = choose(engine.state, [*IN_LOOP].index(name))
    for i, request in enumerate(asked()):
        engine.submit(i, request)
    done: dict[int, Any] = {}
    while not engine.idle:
        done |= {p.index: p.generation for p in engine.step() if p.generation is not None}
    return [done[i] for i in range(200)]


IN_LOOP = {
    "look-ahead": LookAhead(guard=None),
    "retrospective": Retrospective(guard=None),
    "threshold": Threshold(0.5),
    "causal, guarded": Causal(**QUICK),
    "asynchronous, guarded": Asynchronous(**QUICK),
}


def test_the_text_is_that_of_plain_decoding(record_property: Any) -> None:
    """Without a drafter in other slots, with whole blocks, after a restart in the middle."""
    target, drafter = pair()
    assert len({g.tokens for g in plain()}) > 150
    alone = generate(target, None, asked()[::-1], engine=EngineConfig(SLOTS))[::-1]
    assert [g.tokens for g in alone] == [g.tokens for g in plain()]

    config = EngineConfig(SLOTS, policy="fixed")
    check(generate(target, drafter, asked(), engine=config), "whole blocks", record_property)

    # Each request goes on from its own tokens, as one that was cut off does.
    again = [
        Request((*r.prompt, *g.tokens[:5]), replace(r.sampling, max_new_tokens=NEW - 5))
        for r, g in zip(asked(), plain(), strict=True)
    ]
    rest = generate(target, drafter, again, engine=replace(config, slots=SLOTS))
    parted = sum(g.tokens != whole.tokens[5:] for g, whole in zip(rest, plain(), strict=True))
    assert parted <= 2, f"{parted} of 200 continuations differ"


def test_penalised_texts_are_those_of_plain_decoding() -> None:
    """Penalties and biases change the races of the target's rows, each by the tokens before it."""
    edits = {"presence_penalty": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.4, "logit_bias": ((3, 2.0),)}
    free, requests = plain()[:40], asked()[:40]
    edited = [Request(r.prompt, replace(r.sampling or SamplingParams(), **edits)) for r in requests]
    target, drafter = pair()
    alone = generate(target, None, edited, engine=EngineConfig(SLOTS))
    found = generate(target, drafter, edited, engine=EngineConfig(SLOTS, policy="fixed"))
    assert sum(a.tokens != b.tokens for a, b in zip(alone, free, strict=True)) > 20
    assert sum(a.tokens != b.tokens for a, b in zip(alone, found, strict=True)) <= 1, "but for a near-tie"
    assert sum(sum(g.accepted_at) for g in found) > 20


@pytest.mark.long
@pytest.mark.parametrize("name", IN_LOOP)
def test_the_text_is_that_of_plain_decoding_under_every_policy(name: str, record_property: Any) -> None:
    check(with_policy(name), name, record_property)


def test_the_text_does_not_depend_on_the_kind_of_drafter() -> None:
    target, drafter = kind_pair("eagle3")
    sampling = SamplingParams(24, 1.0, seed=5, mode="coupled", stop_tokens=())
    given = prompts(24, 6, seed=3)
    alone, drafted = (generate(target, d, given, sampling, EngineConfig(8, policy="fixed")) for d in (None, drafter))
    assert sum(a.tokens != b.tokens for a, b in zip(alone, drafted, strict=True)) <= 1
    assert sum(sum(g.accepted_at) for g in drafted) > 24


# What is refused


def test_pairs_that_are_not_exact_are_refused_when_they_are_put_together() -> None:
    target, drafter = kind_pair("dspark")
    config = EngineConfig(2, 32, "retrospective")
    for mode in (None, "rejection", "block"):
        with pytest.raises(UserError, match="Retrospective looks at the tokens whose verification it decides"):
            Engine(target, drafter, config, SamplingParams(temperature=1.0, mode=mode), policy_named("retrospective"))
    with pytest.raises(UserError, match="mode = 'best'; expected one of rejection, block, coupled"):
        Engine(target, drafter, EngineConfig(2, 32, "fixed"), SamplingParams(mode="best"))
    mixed = [Request((1,), SamplingParams(2, 1.0, mode=mode)) for mode in ("block", "coupled")]
    with pytest.raises(UserError, match="Request 1 has mode = 'coupled', and this engine verifies in mode 'block'"):
        generate(target, drafter, mixed, engine=EngineConfig(2, policy="fixed"))
