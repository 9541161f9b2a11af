"""The engine around the loop: prompts in chunks, cancellation, the queue's bound, statistics, bad requests."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax.errors import UserError
from dspark_jax.scheduling.costs import CostTable, LoadMeter, ScheduleTables
from dspark_jax.scheduling.policies import Causal
from dspark_jax.serving import engine as engine_module
from dspark_jax.serving.chunks import chunk_widths, prompt_bucket
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.metering import SELDOM_TIMED, Metering
from dspark_jax.serving.requests import Generation, QueueFull, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from tests.decoding_tiny import prompts, tiny_pair

NEW = 12
LONGEST = 90
# One bucket and one number of slots everywhere: the loop is then compiled once for all tests.
CONFIG = EngineConfig(4, LONGEST, "fixed", rounds_per_dispatch=4, buckets=(20,), smallest_prompt_bucket=64)
SAMPLING = SamplingParams(NEW)
CHUNKED = replace(CONFIG, smallest_prompt_bucket=8, prefill_chunk=8, prefill_budget=8)
VOCAB = tiny_pair()[0].config.vocab_size
LONG = [tuple(np.random.default_rng(n).integers(0, VOCAB, n).tolist()) for n in (3, 8, 9, 16, 17, 31, 40)]


def made_with(
    config: EngineConfig, requests: list[Request], speculative: bool = True, sampling: SamplingParams = SAMPLING
) -> list[Generation]:
    target, drafter = tiny_pair()
    engine = Engine(target, drafter if speculative else None, config, sampling)
    for index, request in enumerate(requests):
        engine.submit(index, request)
    done = drain(engine)
    return [done[i] for i in range(len(requests))]


def drain(engine: Engine) -> dict[int, Generation]:
    done = {}
    while not engine.idle:
        done |= {p.index: p.generation for p in engine.step() if p.generation is not None}
    return done


def test_plain_requests_pay_for_no_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that drafts in every round does not while no request wants drafts."""
    ways: list[str] = []
    for name in ("run_rounds", "run_alone", "record_alone"):
        real = getattr(engine_module, name)
        call = lambda *given, name=name, real=real: (ways.append(name), real(*given))[1]  # noqa: E731
        monkeypatch.setattr(engine_module, name, call)

    requests = [Request(p, replace(SAMPLING, verify_length=0 if i % 2 else None)) for i, p in enumerate(LONG[:2])]
    expected = made_with(CONFIG, requests, speculative=False)
    engine = Engine(*tiny_pair(), CONFIG, SAMPLING)
    for together in ((1,), (0, 1), (1, 0)):
        ways.clear()
        for index in together:
            engine.submit(index, requests[index])
        made = drain(engine)
        assert all(made[index].tokens == expected[index].tokens for index in together)
        # A request that was decoded beside others is left over when they have ended.
        assert ways[0] == ("run_alone" if together == (1,) else "run_rounds")
        assert ways[-1] == "run_alone" and (made[1].drafted == 0) == (together == (1,))

    records: list[Any] = []
    engine.recorder = lambda holders, record: records.append(record)
    engine.submit(1, requests[1])
    assert drain(engine)[1].tokens == expected[1].tokens
    assert {record.draft_tokens.shape for record in records} == {(CONFIG.rounds_per_dispatch, CONFIG.slots, 0)}
    assert set(ways[-len(records) :]) == {"record_alone"}


def test_results_are_handed_out_while_the_device_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meanwhile` is called between a dispatch's start and the reading of its results."""
    order: list[str] = []
    engine = Engine(*tiny_pair(), CONFIG, SAMPLING)
    for name in ("_dispatch", "_read"):
        real = getattr(engine, name)
        monkeypatch.setattr(engine, name, lambda *given, name=name, real=real: (real(*given), order.append(name))[0])
    engine.meanwhile = lambda: order.append("meanwhile")
    engine.submit(0, Request(LONG[0], SamplingParams(40)))
    drain(engine)
    # Appended at the end of each call: `meanwhile` is the last thing that starting a dispatch does.
    assert order == ["meanwhile", "_dispatch", "_read"] * (len(order) // 3) and len(order) >= 6


# Chunks


@pytest.mark.parametrize("speculative", [True, False])
def test_prompts_in_chunks_say_the_same(speculative: bool) -> None:
    """Prompts shorter than a chunk, of exactly one, of several and a rest; greedy and sampled."""
    requests = [Request(p, replace(SAMPLING, temperature=float(i % 2), seed=i)) for i, p in enumerate(LONG)]
    whole, chunked = (made_with(config, requests, speculative) for config in (CONFIG, CHUNKED))
    assert [g.tokens for g in chunked] == [g.tokens for g in whole]


def test_chunks_give_the_drafter_its_whole_context() -> None:
    """The drafter's own proposals, not just the outputs, are those of an unchunked prompt."""
    plain, chunked = (made_with(config, [Request(p) for p in LONG]) for config in (CONFIG, CHUNKED))
    assert [(g.rounds, g.accepted_at) for g in chunked] == [(g.rounds, g.accepted_at) for g in plain]


def test_decoding_goes_on_while_a_long_prompt_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """While others decode, no more than the budget is prefilled between two dispatches, in order of arrival."""
    spent: list[int] = []

    def admit(loop: Any, params: Any, state: Any, batch: Any, *how: bool) -> Any:
        spent.append(batch.tokens.size)
        return real(loop, params, state, batch, *how)

    real = engine_module.admit
    monkeypatch.setattr(engine_module, "admit", admit)
    engine = Engine(*tiny_pair(), CHUNKED, SamplingParams(40))
    engine.submit(0, Request(LONG[0], SamplingParams(40, verify_length=0)))
    gained, reached = [len(p.tokens) for p in engine.step()], False
    engine.submit(1, Request(LONG[-1]))  # 40 tokens: five chunks
    steps = 0
    while not reached:
        progress = engine.step()
        steps += 1
        reached = any(p.index == 1 for p in progress)
        assert len(spent) == 1 + steps and max(spent) <= 8
        gained += [len(p.tokens) for p in progress if p.index == 0]
    assert steps == 5 and all(gained) and len(gained) == 6
    alone = made_with(CONFIG, [Request(LONG[-1])], sampling=SamplingParams(40))[0]
    assert drain(engine)[1].tokens == alone.tokens


def test_chunks_fit_where_they_are_written() -> None:
    """No chunk's padding reaches beyond the slot, whatever the lengths: a clamped write would move over live rows."""
    for smallest, chunk, size in ((32, 256, 320), (4, 8, 64), (32, 100, 128), (3, 7, 64)):
        config = EngineConfig(smallest_prompt_bucket=smallest, prefill_chunk=chunk)
        for length in range(1, size - 1):
            start = 0
            while start < length:
                width = prompt_bucket(config, size, start, length - start)
                assert width >= 1 and start + width + 1 <= size
                assert width >= min(length - start, chunk)
                start += min(width, length - start)
        first, later = chunk_widths(config, size, size - 2)
        assert max(first) <= chunk and (not later or max(later) <= chunk)


# Steady state


def test_a_warm_engine_compiles_nothing_and_keeps_its_memory(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(*tiny_pair(), CHUNKED, SAMPLING)
    engine.warm_up()
    sizes = []
    with jax.log_compiles():
        for turn in range(3):
            caplog.clear()
            for i, p in enumerate(LONG + prompts(6, VOCAB, seed=turn)):
                engine.submit(i, Request(p, SamplingParams(4 + i, temperature=float(i % 2))))
            engine.step()
            engine.cancel(1), engine.cancel(12)
            assert len(drain(engine)) == 11
            assert not [r.message for r in caplog.records if "Compiling" in r.message]
            sizes.append(sum(x.nbytes for x in jax.live_arrays()))
    assert sizes[0] == sizes[1] == sizes[2]
    engine.submit(0, Request((1, 2)))
    with pytest.raises(UserError, match="warm it up before the first one"):
        engine.warm_up()


# Cancellation


def test_cancelled_requests_leave_their_slots() -> None:
    engine = Engine(*tiny_pair(), replace(CHUNKED, rounds_per_dispatch=1), SamplingParams(30))
    wanted = [Request(LONG[i]) for i in (0, 6, 1, 3, 1, 2)]
    alone = [g.tokens for g in made_with(CONFIG, wanted, sampling=SamplingParams(30))]
    for i, request in enumerate(wanted):
        engine.submit(i, request)
    said = [token for p in engine.step() for token in p.tokens if p.index == 0]
    assert (engine.running, engine.waiting) == (4, 2)
    running, prefilling, queued = engine.cancel(0), engine.cancel(1), engine.cancel(4)
    assert running is not None and prefilling is not None and queued is not None
    assert list(running.tokens) == said and running.tokens == alone[0][: len(said)] and said
    assert running.rounds >= 1 and running.timing.first_token < running.timing.ended
    assert {g.finish_reason for g in (running, prefilling, queued)} == {"cancelled"}
    assert prefilling.tokens == queued.tokens == () and queued.tokens_per_second == 0
    assert engine.cancel(0) is None and engine.cancel(99) is None
    engine.submit(0, wanted[1])  # the index is free again, and so are the slots
    done = {index: g.tokens for index, g in drain(engine).items()}
    assert done == {0: alone[1], 2: alone[2], 3: alone[3], 5: alone[5]}


# The queue


def test_a_full_queue_refuses() -> None:
    engine = Engine(*tiny_pair(), replace(CHUNKED, queue=2, rounds_per_dispatch=1), SAMPLING)
    engine.submit(0, Request((1, 2)))
    engine.submit(1, Request((1, 2)))
    with pytest.raises(QueueFull, match="Request 2 finds 2 others waiting, as many as this engine's queue holds"):
        engine.submit(2, Request((1, 2)))
    assert all(p.generation is None for p in engine.step())
    engine.submit(2, Request((1, 2)))
    with pytest.raises(UserError, match="Request 1 is in the engine already"):
        engine.submit(1, Request((1, 2)))
    assert engine.cancel(2) is not None and set(drain(engine)) == {0, 1}
    for name in ("queue", "prefill_chunk", "prefill_budget"):
        with pytest.raises(UserError, match=f"The engine has {name} = 0, which is out of range; expected 1 or more"):
            Engine(*tiny_pair(), replace(CONFIG, **{name: 0}))


# What is told of a request


def test_times_and_counts_of_requests() -> None:
    done = made_with(CONFIG, [Request(LONG[0], replace(SAMPLING, seed=i)) for i in range(6)])
    for g in done:
        times = g.timing
        assert 0 <= times.admitted < times.first_token <= times.ended
        assert g.tokens_per_second == pytest.approx(len(g.tokens) / (times.ended - times.admitted))
        assert g.committed == len(g.tokens) - 1 and g.verified_at[0] == g.drafted == g.rounds
        assert list(g.accepted_at) == sorted(g.accepted_at, reverse=True)
    waited, served = (min(g.timing.admitted for g in group) for group in (done[4:], done[:4]))
    assert waited > served, "four slots: the fifth and sixth wait for one of the others to end"
    assert replace(done[0], timing=done[1].timing) == done[0], "times are no part of what was generated"


def asked(**sampling: Any) -> Request:
    return Request((1,), SamplingParams(**{"max_new_tokens": 2} | sampling))


BAD: dict[str, tuple[Any, str]] = {
    "no request": ([1, 2], "is a list; wrap its prompt in a Request"),
    "number": (Request(7), "is a int; expected text, token ids or a list of chat messages"),
    "nothing": (Request(None), "is a NoneType; expected text"),
    "bytes": (Request(b"ab"), "is a bytes; expected text"),
    "one message": (Request({"role": "user", "content": "a"}), "is a dict; expected text"),
    "fractions": (Request([1.5, 2.0]), "is neither text, nor a list of token ids, nor a list of"),
    "booleans": (Request([True, False]), "is neither text, nor a list of token ids, nor a list of"),
    "mixed": (Request([1, "a"]), "is neither text, nor a list of token ids"),
    "no content": (Request([{"role": "user"}]), "nor a list of {'role', 'content'} messages"),
    "empty": (Request(()), "has an empty prompt"),
    "id": (Request((VOCAB,)), "outside the vocabulary"),
    "huge id": (Request((2**40,)), "outside the vocabulary"),
    "negative id": (Request((-1,)), "outside the vocabulary"),
    "too long": (Request((1,) * 89), "this engine holds 90. Shorten it or raise the limit"),
    "settings": (Request((1,), {"temperature": 1.0}), "has sampling = {'temperature': 1.0}; expected SamplingParams"),
    "new tokens": (asked(max_new_tokens="8"), "has max_new_tokens = '8'; expected a whole number"),
    "no new tokens": (asked(max_new_tokens=0), "has max_new_tokens = 0, which is out of range; expected 1 or more"),
    "None": (asked(max_new_tokens=None), "has max_new_tokens = None; expected a whole number"),
    "bool": (asked(max_new_tokens=True), "has max_new_tokens = True; expected a whole number"),
    "temperature": (asked(temperature="hot"), "has temperature = 'hot'; expected a number"),
    "not a number": (asked(temperature=float("nan")), "has temperature = nan; expected a number"),
    "infinite": (asked(temperature=float("inf")), "has temperature = inf; expected a number"),
    "too hot": (asked(temperature=1e39), "has temperature = 1e+39, which is out of range"),
    "top_k": (asked(top_k=-1), "has top_k = -1, which is out of range"),
    "top_p": (asked(top_p=(0.5,)), "has top_p = (0.5,); expected a number"),
    "min_p": (asked(min_p=1.5), "has min_p = 1.5, which is out of range; expected 0 to 1"),
    "seed": (asked(seed=0.5), "has seed = 0.5; expected a whole number"),
    "long seed": (asked(seed=2**64), "has seed = 18446744073709551616, which is out of range"),
    "verify": (asked(verify_length=-1), "has verify_length = -1, which is out of range"),
    "mode": (asked(mode="best"), "has mode = 'best'; expected one of rejection, block, coupled"),
    "another mode": (
        asked(mode="block", temperature=1.0),
        "has mode = 'block', and this engine verifies in mode 'rejection'",
    ),
    "stop": (asked(stop_tokens=3), "has stop_tokens = 3; expected token ids"),
    "far stop": (asked(stop_tokens=(2**40,)), "has stop_tokens = 1099511627776, which is out of range"),
    "negative stop": (asked(stop_tokens=(-1,)), "has stop_tokens = -1, which is out of range"),
    "stops": (asked(stop_tokens=(1, 2, 3, 4, 5)), "names 5 stop tokens; this engine holds 4"),
    "stop texts": (asked(stop="."), "has stop = '.'; expected a list of texts"),
    "no tokenizer": (asked(max_new_tokens=2, stop=(".",)), "has stop texts, but tiny has no tokenizer files"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_in_a_sentence(case: str) -> None:
    request, message = BAD[case]
    engine = _idle()
    with pytest.raises(UserError) as refused:
        engine.submit(5, request)
    assert message in str(refused.value) and "equest 5" in str(refused.value)
    assert engine.idle


@pytest.mark.parametrize("index", [1.5, "a", None, True, (1,)])
def test_an_index_is_a_whole_number(index: Any) -> None:
    with pytest.raises(UserError, match="expected a whole number"):
        _idle().submit(index, Request((1,)))
    assert _idle().idle


def test_numpy_numbers_are_numbers() -> None:
    sampling = SamplingParams(np.int64(3), np.float32(1.0), np.int32(4), np.float64(0.9), seed=np.uint32(7))
    requests = [Request(np.asarray([1, 2]), sampling), Request((1, 2), SamplingParams(3, 1.0, 4, 0.9, seed=7))]
    numpy, python = made_with(CONFIG, requests)
    assert numpy.tokens == python.tokens and len(numpy.tokens) == 3


def test_every_bit_of_a_seed_counts() -> None:
    hot = replace(SAMPLING, temperature=1.0)
    seeds = (5, 5 + 2**32, 5 + 2**63, 5)
    low, high, highest, again = made_with(CONFIG, [Request(LONG[3], replace(hot, seed=seed)) for seed in seeds])
    assert again.tokens == low.tokens and len({low.tokens, high.tokens, highest.tokens}) == 3
    shared = made_with(CONFIG, [Request(LONG[3])] * 2, sampling=replace(hot, seed=5))
    assert [g.tokens for g in shared] == [low.tokens, high.tokens], "request i of a call: seed + i * 2**32"


@cache
def _idle() -> Engine:
    return Engine(*tiny_pair(), CONFIG, SAMPLING)


def test_measured_load_reaches_the_next_dispatch() -> None:
    """A device slower than its table says, and the user's word for another job on it: both are told the loop."""
    tables = ScheduleTables.of(CostTable.of((20,), [1e-7], 0.0), (1.0,) * 4)
    config = replace(CONFIG, rounds_per_dispatch=2)
    engine = Engine(*tiny_pair(), config, SamplingParams(40), Causal(), tables)
    told = []
    for i in range(4):
        engine.submit(i, Request(LONG[0]))
    while not engine.idle:
        engine.step()
        told.append(float(engine.occupancy.load))
    assert told[0] == told[1] == 1.0, "the first dispatch had the compiler beside it"
    assert max(told) > 5 and engine.metering.meter is not None and engine.metering.meter.load > 5
    engine.metering.signal = 2.0
    engine.submit(0, Request(LONG[0]))
    engine.step()
    assert float(engine.occupancy.signal) == 2.0


def test_what_a_dispatch_takes_by_itself_is_no_load() -> None:
    tables = ScheduleTables.of(CostTable.of((20,), [1e-7], 0.0, dispatch=1e3), (1.0,) * 4)
    config = replace(CONFIG, rounds_per_dispatch=2)
    engine = Engine(*tiny_pair(), config, SamplingParams(40), Causal(), tables)
    engine.submit(0, Request(LONG[0]))
    while not engine.idle:
        engine.step()
    assert engine.metering.meter is not None and engine.metering.meter.ratio == 1.0


def test_dispatches_behind_prefills_are_seldom_timed() -> None:
    """To time one, the host waits until the prompts are through; others leave them to the device."""
    seen: list[int] = []

    class Counting(LoadMeter):
        def update(self, measured: float, predicted: float) -> float:
            seen.append(step)
            return super().update(measured, predicted)

    tables = ScheduleTables.of(CostTable.of((20,), [1.0], 0.0), (1.0,) * 4)
    config = replace(CONFIG, rounds_per_dispatch=1)
    engine = Engine(*tiny_pair(), config, SamplingParams(40), Causal(), tables, Metering(Counting()))
    for step in range(12):
        if step < 8:
            engine.cancel(step - 1)
            engine.submit(step, Request(LONG[0]))
        engine.step()
    assert seen == [SELDOM_TIMED - 1, 2 * SELDOM_TIMED - 1, *range(8, 12)]
