"""Kept prefixes in pages: requests that begin alike have pages in common, and answer as if each were alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from dspark_jax.decoding.prefixes import restore_chunk
from dspark_jax.decoding.round import DecodeLoop
from dspark_jax.decoding.state import DecodeState
from dspark_jax.errors import UserError
from dspark_jax.serving import engine as engine_module
from dspark_jax.serving import prefixes as prefixes_module
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.page_pool import PagePool
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.serving.sampling import SamplingParams
from tests.decoding_tiny import kind_pair, prompts, tiny_pair
from tests.test_engine_trust import CONFIG, SAMPLING, failing, finish
from tests.test_paged import PAGED, PAGES, pool_of

CHUNK = CONFIG.prefill_chunk
SHARED = prompts(1, tiny_pair()[0].config.vocab_size, seed=11, longest=200)[0][: 3 * CHUNK]
OWN = prompts(6, tiny_pair()[0].config.vocab_size, seed=12, longest=7)
"""Prompts of 25 to 31 tokens, 24 of them the same: 4 pages each with what follows, 3 of them in common."""


@cache
def sharing() -> Engine:
    """One for all tests: its programs are compiled once."""
    return Engine(*tiny_pair(), replace(PAGED, prefix_cache=1), SAMPLING)


def fresh() -> Engine:
    """The same engine with nothing kept."""
    engine = sharing()
    assert engine.prefixes is not None
    engine.prefixes.clear()
    assert pool_of(engine).free == PAGES and pool_of(engine).kept == 0
    return engine


def requests(temperature: float, new: int = 30) -> list[Request]:
    return [Request((*SHARED, *own), SamplingParams(new, temperature, seed=seed)) for seed, own in enumerate(OWN)]


@cache
def alone(temperature: float) -> list[Generation]:
    """The answers of a cache by slot that keeps nothing."""
    return run(Engine(*tiny_pair(), CONFIG, SAMPLING), requests(temperature))


def run(engine: Engine, asked: list[Request], meanwhile: Callable[[PagePool], None] | None = None) -> list[Generation]:
    """The answers without their counts of cached tokens; `meanwhile` is called before each step."""
    for index, request in enumerate(asked):
        engine.submit(index, request)
    done: dict[int, Generation] = {}
    while not engine.idle:
        if meanwhile is not None:
            meanwhile(pool_of(engine))
        try:
            gained = engine.step()
        except KeyboardInterrupt:
            continue
        done |= {p.index: replace(p.generation, cached_tokens=0) for p in gained if p.generation is not None}
    return [done[index] for index in range(len(asked))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_requests_that_share_nothing(temperature: float) -> None:
    """Whole generations, rounds and accepted drafts among them, though some leave while they share and come back."""
    engine, seen = fresh(), list[tuple[int, int]]()
    before, reused = engine.memory.preempted, engine.prefixes.reused  # type: ignore[union-attr]
    found = run(engine, requests(temperature), lambda pool: seen.append((pool.shared, engine.memory.preempted)))
    assert found == alone(temperature)
    assert max(shared for shared, _ in seen) == 3 and engine.prefixes.reused > reused  # type: ignore[union-attr]
    assert any(shared and left > before for shared, left in seen), "none had to leave while pages were shared"

    # No slot has a page any more; the prompt's three stay, to be begun with or to be given up.
    pool = pool_of(engine)
    assert pool.free == PAGES and pool.kept >= 3 and pool.shared == 0
    engine.prefixes.clear()  # type: ignore[union-attr]
    assert pool.kept == 0 and pool.grow(0, 80) and pool.free == 0
    pool.release(0)


def test_admission_counts_shared_pages_once() -> None:
    """Four at once in 10 pages, each of which takes 4 by itself."""
    engine, most = fresh(), list[int]()
    asked = requests(0.0, new=2)
    run(engine, asked[:1])
    run(engine, asked, lambda pool: most.append(PAGES - pool.free))
    assert engine.config.slots == 4 and max(most) == 3 + 4

    whole = Engine(*tiny_pair(), PAGED, SAMPLING)
    for index, request in enumerate(asked):
        whole.submit(index, request)
    whole.step()
    assert whole.running == 2, "the third leaves no page for these two"


def test_a_prefix_that_is_dropped_stays_with_the_requests_that_have_it() -> None:
    """Its pages are handed out again only when the last of them has ended."""
    engine = fresh()
    run(engine, requests(0.0)[:1])

    def drop(pool: PagePool) -> None:
        if pool.shared:
            engine.prefixes.clear()  # type: ignore[union-attr]
            assert pool.kept == 0 and pool.shared == 3

    assert run(engine, requests(0.0), drop) == alone(0.0)
    assert pool_of(engine).free == PAGES


def test_requests_take_kept_pages_that_no_other_has() -> None:
    """One that needs all pages is not held up by what is kept, and keeps its own prompt in their place."""
    engine = fresh()
    run(engine, requests(0.0)[:1])
    assert pool_of(engine).kept == 3
    long = Request(tuple(range(1, 4)) * 12, SamplingParams(80 - 36 + 1))
    assert run(engine, [long]) == run(Engine(*tiny_pair(), CONFIG, SAMPLING), [long])
    assert pool_of(engine).free == PAGES and pool_of(engine).kept == 4
    engine.submit(0, requests(0.0)[0])
    assert finish(engine, {})[0].cached_tokens == 0


@pytest.mark.parametrize("name", ["restore_chunk", "keep_chunk", "run_rounds"])
def test_an_interrupt_leaves_no_page_behind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages go with the state, and so does what is kept in them."""
    engine = fresh()
    owner = engine_module if name == "run_rounds" else prefixes_module
    failing(monkeypatch, name, KeyboardInterrupt(), {1, 4}, True, owner)
    assert [g.tokens for g in run(engine, requests(1.0))] == [g.tokens for g in alone(1.0)]
    monkeypatch.undo()
    assert pool_of(engine).free == PAGES


def test_the_memory_of_kept_pages_is_bounded() -> None:
    engine = fresh()
    assert engine.prefixes is not None
    run(engine, requests(0.0, new=1)[:1])
    chunk, limit = engine.prefixes.used // 3, engine.prefixes.limit
    # A page of both models' keys and values, in float32, beside tokens and a flag.
    layers = [layer for cache in (engine.state.target_cache, engine.state.draft) for layer in cache.layers]
    assert chunk == sum(x.nbytes for layer in layers for x in layer) // PAGES + 4 * CHUNK + 1
    engine.prefixes.limit = 4 * chunk
    try:
        run(engine, [Request(prompts(1, 50, seed=s, longest=200)[0][:20], SamplingParams(1)) for s in (1, 3)])
        assert engine.prefixes.used <= 4 * chunk and pool_of(engine).kept <= 4
    finally:
        engine.prefixes.limit = limit


def test_a_paired_drafters_prefixes_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes a chunk's last row again with the token behind it, so that no two requests may have that page."""
    config = replace(PAGED, slots=3, longest=64, buckets=None, prefix_cache=1)
    engine, named = Engine(*kind_pair("mtp"), config, SAMPLING), list[bool]()
    pool = engine.memory.pool
    assert pool is not None and engine.prefixes is not None and engine.prefixes.pool is None
    assert sharing().prefixes is not None and sharing().prefixes.pool is sharing().memory.pool  # type: ignore[union-attr]

    def noted(loop: DecodeLoop, state: DecodeState, *rest: Any) -> DecodeState:
        named.extend(np.array_equal(x.tables, pool.tables) for x in (state.target_cache, state.draft.cache))
        return restore_chunk(loop, state, *rest)

    monkeypatch.setattr(prefixes_module, "restore_chunk", noted)
    asked = [Request(tuple(range(5)) * 4, SamplingParams(20)), Request((0, 3) * 10, SamplingParams(20))]
    first = run(engine, asked)
    # Again, in slots and pages that others have had: copies are written once the tables name each slot's own.
    assert run(engine, asked[::-1]) == [replace(made, index=1 - made.index) for made in first[::-1]]
    assert len(named) >= 8 and all(named)


def test_a_chunk_is_whole_pages() -> None:
    with pytest.raises(UserError, match="prefill_chunk = 8 and page = 16; .* Make the chunk a multiple of the page"):
        Engine(*tiny_pair(), replace(PAGED, prefix_cache=1, page=16), SAMPLING)
