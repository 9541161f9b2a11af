"""The compiled decode loop: a request's output depends on nothing beside it, and ends where it must."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding.round import init_state
from dspark_jax.decoding.state import DecodeState
from dspark_jax.decoding.verification import VerifyOutput, verify
from dspark_jax.errors import UserError
from dspark_jax.scheduling.costs import bucket_ladder
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import drain, generate, stream
from dspark_jax.serving.requests import Generation, Prompt, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target
from tests.decoding_tiny import admitted, one_round, prompts, run_python, tiny_pair

NEW = 24
SAMPLING = SamplingParams(NEW)
# Of one shape, whatever the list of prompts: one loop is compiled for four slots, one for a single slot, one without
# drafts.
CONFIG = EngineConfig(4, 44, "fixed", rounds_per_dispatch=3, buckets=(4, 12, 20), stop_slots=2)
SINGLE = replace(CONFIG, slots=1, buckets=(5,))
PROMPTS = prompts(10, tiny_pair()[0].config.vocab_size)


def decoded(
    prompts: Sequence[Prompt | Request], sampling: SamplingParams = SAMPLING, config: EngineConfig = CONFIG,
    drafts: bool = True, target: Target | None = None,
) -> list[Generation]:  # fmt: skip
    """The tiny pair's generations, in the order of the prompts."""
    own, drafter = tiny_pair()
    engine = Engine(target or own, drafter if drafts else None, config, sampling)
    for index, prompt in enumerate(prompts):
        engine.submit(index, prompt if isinstance(prompt, Request) else Request(prompt))
    done = {p.index: p.generation for p in drain(engine) if p.generation is not None}
    return [done[index] for index in range(len(prompts))]


@cache
def reference() -> tuple[tuple[int, ...], ...]:
    """Greedy plain outputs of PROMPTS."""
    return tuple(tokens_of(decoded(PROMPTS, drafts=False)))


def tokens_of(generations: list[Generation]) -> list[tuple[int, ...]]:
    return [g.tokens for g in generations]


# Independence of neighbours, places and widths


def mixed_requests() -> list[Request]:
    laws = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 0.8, "top_k": 7}]
    laws += [{"temperature": 1.3, "min_p": 0.05}]
    caps = [None, 2, 0, 4, 1]
    return [
        Request(p, SamplingParams(8 + i, seed=100 + i, verify_length=caps[(i // 5) % 5], **laws[i % 5]))
        for i, p in enumerate(PROMPTS)
    ]


@cache
def alone() -> tuple[tuple[int, ...], ...]:
    """Each request of `mixed_requests` with no neighbour, in the only slot."""
    return tuple(decoded([request], config=SINGLE)[0].tokens for request in mixed_requests())


@pytest.mark.parametrize(("config", "rounds"), [(CONFIG, 3), (SINGLE, 16)])
@pytest.mark.parametrize("order", ["as it is", "backwards"])
def test_output_is_the_requests_own(config: EngineConfig, rounds: int, order: str) -> None:
    """Slots, neighbours (greedy, sampled, truncated, of other verify lengths), order of admission: none matters."""
    step = -1 if order == "backwards" else 1
    sampling = SamplingParams(seed=config.slots)
    found = decoded(mixed_requests()[::step], sampling, replace(config, rounds_per_dispatch=rounds))
    assert tokens_of(found)[::step] == list(alone())


def test_seeds_and_places_make_the_sample() -> None:
    hot = replace(SAMPLING, temperature=1.0)
    same = [PROMPTS[0]] * 3

    def run(requests: list[Any], seed: int = 0) -> list[tuple[int, ...]]:
        return tokens_of(decoded(requests, replace(hot, seed=seed)))

    base = run(same)
    assert len(set(base)) == 3 and run(same) == base and not set(run(same, seed=1)) & set(base)
    assert len(set(run([Request(PROMPTS[0], replace(hot, seed=5))] * 3))) == 1


def test_packed_rows_are_the_padded_ones() -> None:
    """Verify lengths 0, 1, 2 and mixed, through small buckets, leave greedy outputs as the full width has them."""
    full = decoded(PROMPTS)
    assert tokens_of(full) == list(reference())
    assert 0 < sum(sum(g.accepted_at) for g in full) < sum(sum(g.verified_at) for g in full)

    for length in (0, 1, 2):
        found = decoded(PROMPTS, replace(SAMPLING, verify_length=length))
        assert tokens_of(found) == list(reference())
        assert all(not any(g.verified_at[length:]) for g in found)
        assert length == 0 or all(g.verified_at[length - 1] > 0 for g in found if g.rounds > 1)
    mixed = [Request(p, replace(SAMPLING, verify_length=i % 6)) for i, p in enumerate(PROMPTS)]
    found = decoded(mixed)
    assert tokens_of(found) == list(reference())
    # The first draft is judged wherever it is verified, a later one only behind accepted ones.
    assert all(g.judged_at[0] == g.verified_at[0] for g in found)
    behind = [
        (g.accepted_at[k], g.judged_at[k], g.accepted_at[k - 1]) for g in found for k in range(1, len(g.judged_at))
    ]
    assert all(accepted <= judged <= before for accepted, judged, before in behind)


def test_every_bucket_computes_the_same_rows() -> None:
    target, drafter = tiny_pair()
    engine = Engine(target, drafter, CONFIG, SAMPLING)
    loop = engine.loop
    state = admitted(loop, engine.params, engine.state, PROMPTS[:4], NEW)
    state, _ = one_round(loop, engine.params, state, engine.occupancy)
    wanted = np.arange(loop.width) <= np.array([0, 2, 1, 3])[:, None]
    wanted[2] = False  # an idle slot
    block = jnp.asarray(np.random.default_rng(0).integers(0, target.config.vocab_size, (4, loop.width)), jnp.int32)

    @jax.jit
    def both(params: Any, state: DecodeState) -> list[tuple[VerifyOutput, jax.Array]]:
        model, operands = loop.models(params)[0], (state.target_cache, block, state.length - 1, jnp.asarray(wanted))
        return [verify(model, buckets, loop.tap_layers, *operands) for buckets in ((9,), ())]

    (packed, small), (padded, whole) = both(engine.params, state)
    assert (small, whole) == (9, block.size)
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(np.asarray(a)[wanted], np.asarray(b)[wanted], atol=2e-5)


def test_the_bucket_is_the_smallest_that_fits() -> None:
    target, drafter = tiny_pair()
    engine, seen = Engine(target, drafter, CONFIG, SAMPLING), set()
    for caps in ([0, 0, 0, 0], [1, 1, 1, 0], [4, 4, 4, 4], [0, 4, 1, 2], [4, 0, 0, 0]):
        state = init_state(engine.loop, engine.params)
        state = admitted(engine.loop, engine.params, state, PROMPTS[:4], 9, caps=caps)
        for _ in range(10):
            active = np.asarray(state.active)
            state, record = one_round(engine.loop, engine.params, state, engine.occupancy)
            needed = int(np.sum(active * (np.minimum(caps, engine.loop.block) + 1)))
            assert int(record.bucket) == min(b for b in engine.loop.buckets if b >= needed)
            np.testing.assert_array_equal(np.asarray(record.committed) > 0, active)
            seen.add(int(record.bucket))
    assert seen == set(engine.loop.buckets) == {4, 12, 20}


@pytest.mark.parametrize(("requests", "width"), [(1, 1), (1, 8), (8, 1), (8, 2), (3, 5), (32, 17)])
def test_ladders_reach_from_plain_to_full(requests: int, width: int) -> None:
    ladder = bucket_ladder(requests, width)
    assert ladder[-1] == requests * width and list(ladder) == sorted(set(ladder)) and len(ladder) <= 4
    assert ladder[0] == requests


def test_buckets_that_cannot_hold_a_block_are_refused() -> None:
    target, drafter = tiny_pair()
    for buckets in ((4, 8), (20, 4), (4, 4, 20)):
        with pytest.raises(UserError, match=r"must ascend and end at slots x \(drafts \+ 1\), 20"):
            Engine(target, drafter, replace(CONFIG, buckets=buckets))


# Ends of requests


def first_occurrences(tokens: tuple[int, ...]) -> dict[int, int]:
    """Position -> token, for tokens that stand nowhere before."""
    return {i: t for i, t in enumerate(tokens) if t not in tokens[:i]}


def kinds_of_positions(chosen: list[tuple[int, ...]]) -> list[list[str]]:
    """Whether each new token of four greedy outputs came from the prefill, as an accepted draft or as a bonus."""
    target, drafter = tiny_pair()
    engine = Engine(target, drafter, CONFIG, SAMPLING)
    state, kinds = admitted(engine.loop, engine.params, engine.state, chosen, NEW), [["first"] for _ in chosen]
    while bool(jnp.any(state.active)):
        state, record = one_round(engine.loop, engine.params, state, engine.occupancy)
        for mine, accepted in zip(kinds, np.asarray(record.accepted), strict=True):
            mine += ["draft"] * int(accepted) + ["bonus"]
    return kinds


def test_stop_tokens_end_a_request_where_they_stand() -> None:
    """As the first token, inside the drafts, as the bonus: the stop token is the last one, whatever comes behind."""
    requests, expected, kinds = [], [], set()
    for prompt, tokens, kind_of in zip(PROMPTS, reference(), kinds_of_positions(PROMPTS[:4]), strict=False):
        for at, token in first_occurrences(tokens).items():
            requests.append(Request(prompt, replace(SAMPLING, stop_tokens=(token, 60))))
            expected.append(tokens[: at + 1] if 60 not in tokens[:at] else tokens[: tokens.index(60) + 1])
            kinds.add(kind_of[at])
    assert kinds == {"first", "draft", "bonus"}
    for drafts in (True, False):
        found = decoded(requests, drafts=drafts)
        assert tokens_of(found) == expected
        assert {g.finish_reason for g in found} == {"stop"}
    assert all(g.rounds == 0 and g.accepted_length == 0 for g in found if len(g.tokens) == 1)
    never = decoded(PROMPTS[:1], replace(SAMPLING, stop_tokens=()))[0]
    assert never.tokens == reference()[0] and never.finish_reason == "length"


def test_counts_leave_out_what_lies_behind_a_stop() -> None:
    pairs = list(zip(PROMPTS, reference(), strict=True))
    requests = [Request(p, replace(SAMPLING, stop_tokens=(t[len(t) // 2],))) for p, t in pairs]
    for g in decoded(requests):
        assert g.finish_reason == "stop" and g.committed == len(g.tokens) - 1
        assert sum(g.accepted_at) <= g.committed <= sum(g.accepted_at) + g.rounds


def test_limits_are_exact() -> None:
    requests = [Request(PROMPTS[i % 10], SamplingParams(i)) for i in range(1, NEW + 1)]
    for drafts in (True, False):
        found = decoded(requests, drafts=drafts)
        assert tokens_of(found) == [reference()[i % 10][:i] for i in range(1, NEW + 1)]
        assert {g.finish_reason for g in found} == {"length"} and found[0].rounds == 0
        assert [g.prompt_tokens for g in found] == [r.prompt for r in requests]
        assert all(sum(g.accepted_at) <= g.committed == len(g.tokens) - 1 for g in found)


def test_a_context_can_be_filled_to_its_end() -> None:
    target, drafter = tiny_pair()
    target = replace(target, config=replace(target.config, max_positions=40))
    prompt = tuple(range(20))
    config = replace(CONFIG, longest=40)
    found = decoded([prompt], SamplingParams(20), config, target=target)[0]
    assert len(found.tokens) == 20
    assert found.tokens == decoded([prompt], SamplingParams(20), config, drafts=False, target=target)[0].tokens
    for request, message in (
        (Request(prompt, SamplingParams(21)), "has a context of 40. Ask for at most 20"),
        (Request(tuple(range(40)), SamplingParams(1)), "a prompt of 40 tokens; tiny has a context of 40"),
        (Request((), SamplingParams(1)), "has an empty prompt"),
        (Request((61,), SamplingParams(1)), "token id 61, outside the vocabulary of 61"),
        (Request((1,), SamplingParams(0)), "max_new_tokens = 0, which is out of range; expected 1 or more"),
        (Request((1,), SamplingParams(-90)), "max_new_tokens = -90, which is out of range"),
        (Request((1,), SamplingParams(2, top_p=1.5)), "top_p = 1.5, which is out of range"),
        (Request("text", SamplingParams(2)), "has no tokenizer files"),
    ):
        with pytest.raises(UserError, match=message):
            generate(target, drafter, [request], engine=EngineConfig(4, policy="fixed"))


@pytest.mark.parametrize("config", [SINGLE, CONFIG])
def test_more_requests_than_slots(config: EngineConfig) -> None:
    found = decoded(PROMPTS * 2, config=config)
    assert tokens_of(found) == list(reference()) * 2 and [g.index for g in found] == list(range(20))


def test_streamed_tokens_are_the_generations() -> None:
    target, drafter = tiny_pair()
    gained: dict[int, list[int]] = {}
    whole, pieces = {}, []
    said = set().union(*reference())
    never = tuple(token for token in range(target.config.vocab_size) if token not in said)[:2]
    requests = [Request(p, SamplingParams(4 + 2 * i, stop_tokens=never)) for i, p in enumerate(PROMPTS)]
    for progress in stream(target, drafter, requests, engine=replace(CONFIG, rounds_per_dispatch=1)):
        gained.setdefault(progress.index, []).extend(progress.tokens)
        pieces.append(len(progress.tokens))
        if progress.generation is not None:
            assert progress.index not in whole
            whole[progress.index] = progress.generation
    assert max(pieces) <= drafter.config.block_size + 2 and len(pieces) > len(PROMPTS)
    assert {i: tuple(t) for i, t in gained.items()} == {i: g.tokens for i, g in whole.items()}
    assert [whole[i].tokens for i in range(10)] == [reference()[i][: 4 + 2 * i] for i in range(10)]
    assert not list(stream(target, drafter, [], engine=CONFIG))


# Types and places


def test_bfloat16_stays_bfloat16() -> None:
    target, drafter = tiny_pair(dtype="bfloat16")
    engine = Engine(target, drafter, replace(CONFIG, buckets=(20,)), SAMPLING)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), engine.state)
    assert {x.dtype for x in jax.tree.leaves((engine.state.target_cache, engine.state.draft))} == {
        jnp.dtype("bfloat16")
    }
    for i, prompt in enumerate(PROMPTS):
        engine.submit(i, Request(prompt, SamplingParams(12, float(i % 2))))
    done = []
    while not engine.idle:
        done += [p.generation for p in engine.step() if p.generation]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), engine.state) == before
    assert len(done) == 10 and all(len(g.tokens) == 12 for g in done)
    assert sum(sum(g.accepted_at) for g in done) > 0


@pytest.mark.subprocesses
def test_eight_devices_decode_as_one() -> None:
    """A target whose parameters are split over 8 simulated devices, and a drafter on top: the same tokens."""
    run_python("-m", "tests.sharded_decode", "generate")
