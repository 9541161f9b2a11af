"""A cache in pages: the same answers as slot by slot, alone or crowded, whoever has to leave for want of memory."""

from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax.errors import UserError
from dspark_jax.scheduling.costs import CostTable, ScheduleTables
from dspark_jax.scheduling.policies import LookAhead
from dspark_jax.serving.api.service import longest_of
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.memory import PagedMemory, PagePool
from dspark_jax.serving.metering import Metering
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.serving.sampling import Mode, SamplingParams
from dspark_jax.serving.settings import EngineConfig, PolicyName, policy_named
from dspark_jax.targets.pages import PagedCache
from tests.decoding_tiny import kind_pair, next_logits, prompts, run_python, tiny_pair
from tests.switched import Switched, choose
from tests.test_engine_trust import CONFIG, SAMPLING, failing, finish
from tests.v4_tiny import v4_pair

PAGE, PAGES = 8, 10
# Of test_engine_trust, whose compiled loop is the other side of the comparison. A request takes up to 7 pages.
PAGED = replace(CONFIG, cache_pages=PAGES, page=PAGE)
PROMPTS = prompts(12, tiny_pair()[0].config.vocab_size, seed=4, longest=30)


def requests(temperature: float, verify_length: int | None = None) -> list[Request]:
    """Of many lengths: some fit into a page, some take most of the cache."""
    new = [2, 30, 12, 1, 25, 8, 20, 3, 30, 5, 12, 18]
    return [
        Request(prompt, SamplingParams(n, temperature, seed=i, verify_length=verify_length))
        for i, (prompt, n) in enumerate(zip(PROMPTS, new, strict=True))
    ]


def answers(engine: Engine, asked: list[Request]) -> list[Generation]:
    for index, request in enumerate(asked):
        engine.submit(index, request)
    done = finish(engine, {})
    return [done[index] for index in range(len(asked))]


def pool_of(engine: Engine) -> PagePool:
    """The pool, with the pages of requests that have ended given back."""
    memory = engine.memory
    assert isinstance(memory, PagedMemory)
    engine.admit()
    return memory.pool


@cache
def paged() -> Engine:
    """One for all tests of this pair: its programs are compiled once."""
    return Engine(*tiny_pair(), PAGED, SAMPLING)


@cache
def by_slot(temperature: float) -> list[Generation]:
    return answers(Engine(*tiny_pair(), CONFIG, SAMPLING), requests(temperature))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_a_cache_by_slot(temperature: float) -> None:
    """Whole generations, rounds and accepted drafts among them, though memory is too short for the slots: requests
    wait, and some leave and go on."""
    engine = paged()
    before = engine.memory.preempted
    assert answers(engine, requests(temperature)) == by_slot(temperature)
    assert engine.memory.preempted > before, "none had to leave"
    assert pool_of(engine).free == PAGES


def test_answers_are_those_of_requests_alone() -> None:
    for index in (1, 4, 8):
        request = replace(requests(1.0)[index])
        engine = paged()
        engine.submit(index, request)
        assert finish(engine, {})[index] == by_slot(1.0)[index]


def test_the_last_to_come_leaves_first_and_the_first_goes_on() -> None:
    """Two that need most of the pages each: the second leaves, keeps its tokens, and ends behind the first."""
    engine = paged()
    both = [Request((*PROMPTS[1], *PROMPTS[2])[:16], SamplingParams(40, 1.0, seed=seed)) for seed in (5, 6)]
    alone = []
    for request in both:
        engine.submit(0, request)
        alone.append(finish(engine, {})[0])

    before, said = engine.memory.preempted, dict[int, list[int]]()
    for index, request in enumerate(both):
        engine.submit(index, request)
    done = finish(engine, said)
    assert engine.memory.preempted == before + 1
    for index in (0, 1):
        assert done[index] == replace(alone[index], index=index) and tuple(said[index]) == done[index].tokens
    assert done[0].timing.ended < done[1].timing.ended


def test_a_request_that_can_never_fit_is_refused_and_others_are_not() -> None:
    engine = Engine(*tiny_pair(), replace(PAGED, cache_pages=3), SAMPLING)
    with pytest.raises(UserError, match=r"Request 0 needs 4 pages of the cache \(26 positions, 8 a page\); this"):
        engine.submit(0, Request((1,) * 6, SamplingParams(20)))
    engine.submit(0, Request((1,) * 6, SamplingParams(19)))
    assert engine.cancel(0) is not None


def test_a_list_with_such_a_request_is_refused_before_an_engine_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine compiles, and may measure for minutes."""

    def made(*_: Any) -> None:
        raise AssertionError("an engine was made")

    monkeypatch.setattr(import_module("dspark_jax.serving.generate"), "Engine", made)
    asked = [Request((1,) * 6, SamplingParams(4)), Request((1,) * 6, SamplingParams(20))]
    config = EngineConfig(2, cache_pages=3, page=PAGE)
    with pytest.raises(UserError, match=r"Request 1 needs 4 pages of the cache \(26 positions, 8 a page\); this"):
        generate(*tiny_pair(), asked, engine=config)
    with pytest.raises(UserError, match="Request 1 needs 26 positions .* this engine holds 20"):
        generate(*tiny_pair(), asked, engine=EngineConfig(2, 20))
    with pytest.raises(UserError, match="page = 7"):
        generate(*tiny_pair(), asked, engine=replace(config, page=7))


@pytest.mark.subprocesses
def test_pages_over_eight_devices() -> None:
    """Split by kv head, and the answers of one device."""
    run_python("-m", "tests.sharded_decode", "pages")


def test_a_server_promises_no_more_positions_than_its_pages_hold() -> None:
    """Else an answer without a limit, which takes what its prompt leaves, would be refused each time."""
    config = EngineConfig(4, None, "fixed", cache_pages=4, page=PAGE)
    longest = longest_of(config, 256)
    assert longest == 33 and longest_of(replace(config, longest=20), 256) == 20
    assert longest_of(replace(config, cache_pages=0), 256) == 256 and longest_of(config, 24) == 24
    engine = Engine(*tiny_pair(), replace(config, longest=longest), SAMPLING)
    engine.submit(0, Request((1,) * 6, SamplingParams(longest - 6)))
    with pytest.raises(UserError, match="needs 34 positions"):
        engine.submit(1, Request((1,) * 6, SamplingParams(longest - 5)))


def test_cancelled_requests_give_their_pages_back() -> None:
    engine = paged()
    for index, request in enumerate(requests(0.0)[:4]):
        engine.submit(index, request)
    engine.step()
    assert pool_of(engine).free < PAGES and engine.memory.share(0) > 0
    names = engine.memory.figures()
    assert names["dspark_cache_pages"][1] == PAGES and names["dspark_cache_pages_used"][1] > 0
    for index in range(4):
        engine.cancel(index)
    assert pool_of(engine).free == PAGES and engine.memory.share(0) == 0


@pytest.mark.parametrize("name", ["run_rounds", "admit", "retire"])
def test_an_interrupt_loses_neither_tokens_nor_pages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled too: what goes on behind an interrupt draws what it would have drawn."""
    failing(monkeypatch, name, KeyboardInterrupt(), {2, 5, 7}, after=True)
    found = answers(paged(), requests(1.0))
    assert [g.tokens for g in found] == [g.tokens for g in by_slot(1.0)]
    monkeypatch.undo()
    assert pool_of(paged()).free == PAGES


KINDS = replace(PAGED, slots=3, longest=64, smallest_prompt_bucket=8, buckets=None)


def test_plain_decoding_and_rounds_that_draft_at_times() -> None:
    """Greedy text is the same whatever drafts it."""
    target, drafter = tiny_pair()
    adaptive = replace(KINDS, buckets=(3, 15))
    costs = ScheduleTables.of(CostTable.of((3, 15), [1.0, 2.2], 0.1), np.ones(4).tolist())
    for engine in (
        Engine(target, None, KINDS, SAMPLING),
        Engine(target, drafter, adaptive, SAMPLING, LookAhead(), costs, Metering(None)),
    ):
        found = answers(engine, requests(0.0))
        assert [g.tokens for g in found] == [g.tokens for g in by_slot(0.0)]
        assert engine.memory.preempted > 0


# By mode, in one compiled loop each.
IN_PAGES: dict[Mode, tuple[PolicyName, ...]] = {
    "block": ("threshold", "causal", "asynchronous"),
    "coupled": ("retrospective", "fixed"),
}


@pytest.mark.long
@pytest.mark.parametrize(("mode", "policy"), [(mode, name) for mode, names in IN_PAGES.items() for name in names])
def test_every_policy_in_pages(mode: Mode, policy: PolicyName) -> None:
    """Greedy text is that of a cache by slot whoever decides what is verified; so is what coupled decoding samples."""
    sampling, config = replace(SAMPLING, mode=mode), replace(KINDS, buckets=(3, 15))
    costs = ScheduleTables.of(CostTable.of((3, 15), [1.0, 1.1], 0.01), np.ones(4).tolist())
    policies = Switched(tuple(policy_named(name, 0.3) for name in IN_PAGES[mode]))

    def found(temperature: float) -> list[tuple[int, ...]]:
        engine = Engine(*tiny_pair(), config, sampling, policies, costs, Metering(None))
        engine.state = choose(engine.state, IN_PAGES[mode].index(policy))
        made = answers(engine, in_mode(mode, temperature))
        assert engine.memory.preempted > 0 and sum(sum(g.accepted_at) for g in made) > 0
        return [g.tokens for g in made]

    assert found(0.0) == [g.tokens for g in by_slot(0.0)]
    if mode == "coupled":
        alone = Engine(tiny_pair()[0], None, CONFIG, sampling)
        assert found(1.0) == [g.tokens for g in answers(alone, in_mode(mode, 1.0))]


def in_mode(mode: Mode, temperature: float) -> list[Request]:
    return [replace(r, sampling=replace(r.sampling or SAMPLING, mode=mode)) for r in requests(temperature)]


@pytest.mark.long
def test_auto_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiled and asked in pages of its own, it says what a cache by slot does."""
    monkeypatch.setenv("DSPARK_JAX_CACHE", str(tmp_path))
    config = replace(PAGED, policy="auto", longest=None, buckets=None, slots=2, smallest_prompt_bucket=32)
    asked = requests(0.0)[:3]
    found = generate(*tiny_pair(), asked, SAMPLING, config)
    assert [g.tokens for g in found] == [g.tokens for g in by_slot(0.0)[:3]]


def test_policies_that_are_not_exact_are_refused_in_pages_as_by_slot() -> None:
    for policy, mode, tree, said in (
        ("retrospective", "rejection", 0, "Retrospective"),
        ("look-ahead", "coupled", 8, "tree"),
    ):
        config = replace(KINDS, policy=policy, tree=tree)
        with pytest.raises(UserError, match=said):
            Engine(*tiny_pair(), config, replace(SAMPLING, mode=mode))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_trees_in_pages(mode: Mode) -> None:
    """The rows of the path that was accepted are written, and those of its siblings are not."""
    sampling = replace(SAMPLING, mode=mode)
    engine = Engine(*tiny_pair(), replace(KINDS, tree=8), sampling)
    assert [g.tokens for g in answers(engine, in_mode(mode, 0.0))] == [g.tokens for g in by_slot(0.0)]
    assert engine.memory.preempted > 0


def test_a_drafter_whose_rows_lag_and_kept_prefixes() -> None:
    """MTP's row before an anchor waits for its token; prompts that begin alike start from copies of whole chunks."""
    target, drafter = kind_pair("mtp")
    shared = prompts(1, target.config.vocab_size, seed=9, longest=30)[0]
    asked = [
        Request((*shared, *prompt, *shared)[:20], SamplingParams(24))
        for prompt in prompts(6, target.config.vocab_size, seed=3)
    ]
    engine = Engine(target, drafter, replace(KINDS, prefix_cache=1, longest=44), SAMPLING)
    found = answers(engine, asked)
    # Whole rows at every token, without a cache: one program for all of them.
    rows = np.zeros((len(asked), 44), np.int32)
    rows[:, :20] = [request.prompt for request in asked]
    for at in range(20, 44):
        rows[:, at] = next_logits(target, rows)[:, at - 1].argmax(axis=-1)
    assert [g.tokens for g in found] == [tuple(row[20:].tolist()) for row in rows]
    assert engine.memory.preempted > 0 and engine.prefixes is not None and engine.prefixes.reused > 0


def test_what_pages_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match="keeps a decode state of its own, not keys and values by position"):
        Engine(*v4_pair(), EngineConfig(2, 40, "fixed", cache_pages=4), SAMPLING)
    for bad in (0, 24, 1024):
        with pytest.raises(UserError, match=r"page = "):
            Engine(*tiny_pair(), replace(PAGED, page=bad), SAMPLING)
    with pytest.raises(UserError, match="cache_pages = -1"):
        Engine(*tiny_pair(), replace(PAGED, cache_pages=-1), SAMPLING)


def test_a_dispatch_leaves_no_table_behind() -> None:
    """A table that is still the old one would let a request that has left write into pages of another."""
    engine = paged()
    for index, request in enumerate(requests(0.0)[:6]):
        engine.submit(index, request)
    while not engine.idle:
        engine.step()
        memory = engine.memory
        assert isinstance(memory, PagedMemory)
        for node in jax.tree.leaves(
            (engine.state.target_cache, engine.state.draft), is_leaf=lambda node: isinstance(node, PagedCache)
        ):
            np.testing.assert_array_equal(node.tables, memory.pool.tables)
