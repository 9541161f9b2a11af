"""Kept prefixes: prompts that begin alike start from kept chunks, bit for bit as if they had been prefilled whole."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax.decoding.prefixes import KeptChunk
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.serving import engine as engine_module
from dspark_jax.serving import prefixes as prefixes_module
from dspark_jax.serving.chunks import plan_chunks, prompt_bucket
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.jobs import Job
from dspark_jax.serving.prefixes import Kept, PrefixCache
from dspark_jax.serving.requests import Counts, Generation, Request
from dspark_jax.serving.roster import Entry
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.attention import KeysValues
from dspark_jax.targets.target import Target
from infer.serve import ENGINE
from tests.decoding_tiny import kind_pair, tiny_pair
from tests.test_broken_laws import poisoned
from tests.test_engine_trust import CONFIG, SAMPLING, failing
from tests.v4_tiny import v4_pair

# Shapes of other files, whose compiled loops are shared.
KINDS = EngineConfig(8, 52, "fixed", rounds_per_dispatch=8, smallest_prompt_bucket=4, prefill_chunk=4, stop_slots=1)
CASES: dict[str, tuple[Callable[[], tuple[Target, Drafter | None]], EngineConfig]] = {
    "dspark": (tiny_pair, CONFIG),
    "plain": (lambda: (tiny_pair()[0], None), CONFIG),
    "mtp": (lambda: kind_pair("mtp"), replace(KINDS, buckets=(16,))),
    "v4": (v4_pair, replace(KINDS, longest=64, prefill_chunk=8, smallest_prompt_bucket=8, buckets=(24, 32))),
}


def engine_of(case: str, kept: int = 1, target: Target | None = None) -> Engine:
    pair, config = CASES[case]
    found, drafter = pair()
    return Engine(target or found, drafter, replace(config, prefix_cache=kept), SAMPLING)


@cache
def prompt(case: str, tokens: int, seed: int = 0) -> tuple[int, ...]:
    target = CASES[case][0]()[0]
    return tuple(np.random.default_rng(seed).integers(0, target.config.vocab_size - 1, tokens).tolist())


def answered(engine: Engine, request: Request) -> Generation:
    engine.submit(0, request)
    made = None
    for _ in range(200):
        if engine.idle:
            break
        try:
            made = [*engine.step(), None][0] or made
        except KeyboardInterrupt:
            continue
    assert made is not None and made.generation is not None and engine.idle
    return made.generation


def turns(case: str, sampling: SamplingParams) -> list[Request]:
    """A conversation of two turns, whose second holds an answer, and another prompt with the same first chunks."""
    chunk = CASES[case][1].prefill_chunk
    first = prompt(case, 3 * chunk + 1)
    other = (*first[: 2 * chunk + 1], *prompt(case, chunk, 1))
    return [Request(p, sampling) for p in (first, (*first, *prompt(case, chunk + 2, 2)), other, first[: 2 * chunk])]


@pytest.mark.parametrize("case", CASES)
def test_answers_and_acceptance_are_those_of_whole_prompts(case: str) -> None:
    """Greedy and sampled: the target's positions and the drafter's context are the same, to the bit."""
    kept, chunk = engine_of(case), CASES[case][1].prefill_chunk
    for sampling in (SAMPLING, replace(SAMPLING, temperature=1.0, seed=3)):
        assert kept.prefixes is not None
        kept.prefixes.clear()
        for request, cached in zip(turns(case, sampling), (0, 3, 2, 1), strict=True):
            made, alone = answered(kept, request), answered(_whole(case), request)
            assert made == alone and alone.cached_tokens == 0
            assert made.cached_tokens == cached * chunk, "whole chunks, and never the last token of a prompt"
            assert len(made.tokens) == SAMPLING.max_new_tokens


@cache
def _whole(case: str) -> Engine:
    return engine_of(case, kept=0)


@pytest.mark.parametrize("case", ["dspark", "mtp"])
def test_a_slot_holds_the_bits_of_a_whole_prefill(case: str) -> None:
    """Every valid position of every leaf, after the last chunk."""
    request, states = turns(case, SAMPLING)[1], []
    for kept in (1, 0):
        engine = engine_of(case, kept)
        if kept:
            answered(engine, turns(case, SAMPLING)[0])
        engine.submit(1, request)
        while not engine._seats or not all(entry.decoding for entry in engine._seats.values()):
            engine.admit()
        states.append(jax.device_get(engine.state))
    for reused, whole in zip(*map(_slot_leaves, states), strict=True):
        np.testing.assert_array_equal(reused, whole)


def _slot_leaves(state: Any) -> list[np.ndarray]:
    """Slot 0's caches; of keys and values the rows that are valid, which a drafter may complete up to the anchor's."""
    length = int(state.length[0]) - 2
    found = []

    def note(node: Any) -> None:
        for leaf in jax.tree.leaves(node):
            found.append(leaf[0, :, :length] if isinstance(node, KeysValues) else leaf[0])

    jax.tree.map(note, (state.target_cache, state.draft), is_leaf=lambda node: isinstance(node, KeysValues))
    return [state.tokens[0, : length + 2], *found]


def test_only_what_is_not_kept_is_prefilled(monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[int] = []
    real = engine_module.admit

    def admit(loop: Any, params: Any, state: Any, batch: Any, fresh: bool) -> Any:
        spent.append(int(batch.counts[0]))
        return real(loop, params, state, batch, fresh)

    monkeypatch.setattr(engine_module, "admit", admit)
    engine, seen = engine_of("dspark"), []
    for request in turns("dspark", SAMPLING):
        spent.clear()
        answered(engine, request)
        seen.append(tuple(spent))
    assert seen == [(8, 8, 8, 1), (8, 3), (8, 1), (8,)]
    assert engine.prefixes is not None and engine.prefixes.reused == (3 + 2 + 1) * 8


def test_a_second_turn_prefills_a_third_at_most_with_the_servers_defaults() -> None:
    """Of a conversation of 1,000 tokens or more, whose last 70 are the first answer and the second question."""

    def prefilled(start: int, tokens: int) -> int:
        """Padding included."""
        spent = 0
        while start < tokens:
            width = prompt_bucket(ENGINE, 4096, start, tokens - start)
            start, spent = start + width, spent + width
        return spent

    assert ENGINE.prefix_cache > 0
    for tokens in range(1000, 3000):
        kept = (tokens - 70) // ENGINE.prefill_chunk * ENGINE.prefill_chunk
        assert 3 * prefilled(kept, tokens) <= prefilled(0, tokens)


def test_only_chunks_that_are_kept_are_prefilled_apart() -> None:
    """Others of their width run together, as without kept prefixes."""
    config = EngineConfig(4, prefill_chunk=8, smallest_prompt_bucket=8)
    seats: Any = {
        slot: SimpleNamespace(decoding=False, turn=slot, prefilled=0, left_to_prefill=left)
        for slot, left in enumerate((7, 8, 6, 5))
    }
    assert plan_chunks(config, 64, seats, None, keeps=True).fresh == [(8, [1], 1), (8, [0, 2, 3], 4)]
    assert plan_chunks(config, 64, seats, None).fresh == [(8, [0, 1, 2, 3], 4)]


def test_penalties_count_the_tokens_of_a_kept_prefix() -> None:
    sampling = replace(SAMPLING, repetition_penalty=2.0, presence_penalty=1.0, logprobs=2)
    engine = engine_of("dspark")
    for request in turns("dspark", sampling):
        assert answered(engine, request) == answered(_whole("dspark"), request)


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    engine = engine_of("dspark")
    assert engine.prefixes is not None
    first, _, other, _ = turns("dspark", SAMPLING)
    answered(engine, first)
    three = engine.prefixes.used
    engine.prefixes.limit = three // 3 * 4  # four chunks
    assert answered(engine, other).cached_tokens == 16 and engine.prefixes.used == three // 3 * 4
    answered(engine, Request(prompt("dspark", 8, 5), SAMPLING))
    assert engine.prefixes.used <= engine.prefixes.limit
    # The new chunk has taken the place of the third of the first prompt, whose beginning was used again since.
    assert answered(engine, other).cached_tokens == 24 and answered(engine, first).cached_tokens == 16
    engine.prefixes.limit = 1
    answered(engine, Request(prompt("dspark", 20, 6), SAMPLING))
    assert engine.prefixes.used <= three // 3 * 4, "a chunk beyond the whole bound is not kept at all"


@pytest.mark.parametrize("name", ["restore_chunk", "keep_chunk", "run_rounds"])
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_leaves_kept_chunks_whole(name: str, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("dspark")
    owner = engine_module if name == "run_rounds" else prefixes_module
    failing(monkeypatch, name, KeyboardInterrupt(), {0, 2}, after, owner)
    for request in turns("dspark", SAMPLING):
        assert answered(engine, request).tokens == answered(_whole("dspark"), request).tokens


def test_a_failure_lets_go_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, (first, *_) = engine_of("dspark"), turns("dspark", SAMPLING)
    answered(engine, first)
    failing(monkeypatch, "run_rounds", RuntimeError("out of memory"), {0}, after=True)
    engine.submit(0, first)
    with pytest.raises(RuntimeError):
        while True:
            engine.step()
    engine.cancel(0)
    made = answered(engine, first)
    assert made.cached_tokens == 0 and made == answered(_whole("dspark"), first)


def test_a_kept_chunk_that_the_target_fails_on_fails_again() -> None:
    first = turns("dspark", SAMPLING)[0]
    assert not isinstance(first.prompt, str)
    engine = engine_of("dspark", target=poisoned(tiny_pair()[0], int(first.prompt[9])))  # type: ignore[call-overload]
    for cached in (0, 24):
        made = answered(engine, first)
        assert (made.finish_reason, made.tokens, made.cached_tokens) == ("error", (), cached)


def test_chunks_are_found_by_all_the_tokens_before_them() -> None:
    kept = PrefixCache(10**6, 2)
    chunk = Kept.of(KeptChunk(np.zeros(2), np.zeros(()), np.zeros(3), ()))
    for end in (2, 4):
        kept.add((1, 2, 3, 4)[:end], chunk)
    kept.add((9, 9), chunk)
    assert len(kept.match((1, 2, 3, 4, 5))) == 2 and len(kept.match((1, 2, 3, 4))) == 1
    assert not kept.match((3, 4, 5)) and len(kept.match((9, 9, 3, 4, 5))) == 1 and not kept.match((9, 9))
    kept.clear()
    assert kept.used == 0 and not kept.match((1, 2, 3))


def test_what_a_request_prefilled_itself_is_not_spared_when_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, held = PrefixCache(1, 4), [0]
    monkeypatch.setattr(kept, "restore", lambda loop, state, slot, prompt: (state, held[0]))
    entry = Entry(Job(0, (1,) * 12, SAMPLING, (0, 0), longest=20, given=12), 0.0)

    def begin(chunk: int) -> int:
        held[0] = chunk
        kept.begin(None, None, {0: entry})  # type: ignore[arg-type]
        return entry.cached

    # It waits for its first chunk, of which another prompt has kept four tokens meanwhile; then it loses the slot.
    assert [begin(0), begin(4)] == [0, 4]
    entry.prefilled = 12
    entry.see(None, [1, 2], Counts(), False, 0.0)
    entry.unseat()
    assert begin(12) == 4 and entry.prefilled == 12


def test_a_mesh_is_refused() -> None:
    loop: Any = SimpleNamespace(mesh=jax.make_mesh((1,), ("data",)))
    with pytest.raises(UserError, match="leave prefix_cache at 0 on a mesh"):
        PrefixCache.of(EngineConfig(prefix_cache=1), loop, None, None, None)  # type: ignore[arg-type]
    assert PrefixCache.of(EngineConfig(), loop, None, None, None) is None  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has prefix_cache = -1, which is out of range"):
        engine_of("dspark", kept=-1)
