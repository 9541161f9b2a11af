"""The policy that an engine chooses for itself, and the line that says why."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from dspark_jax.checkpoints.drafters import shared_tables
from dspark_jax.checkpoints.serving_tables import StsTable
from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.decoding.round import LoopParams
from dspark_jax.errors import UserError
from dspark_jax.readers import read_object, sealed
from dspark_jax.scheduling.costs import CostTable, ScheduleTables
from dspark_jax.scheduling.policies import Causal, Fixed, LookAhead
from dspark_jax.serving import assembly
from dspark_jax.serving.acceptance import Accepted, load_or_ask, measure_acceptance, questions_for
from dspark_jax.serving.assembly import make_loop
from dspark_jax.serving.crowd import PATIENCE, Crowd
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import drain, engine_for, generate
from dspark_jax.serving.profiling import profile_key
from dspark_jax.serving.requests import Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.serving.temperatures import validity, write_calibration
from dspark_jax.serving.worth import Worth
from tests.decoding_tiny import prompts, tiny_pair

PROMPTS = prompts(4, tiny_pair()[0].config.vocab_size, seed=4)
SAMPLING = SamplingParams(10)
WHOLE = Accepted((10,) * 4, (10,) * 4)
HALF = Accepted((10, 5, 2, 1), (5, 2, 1, 0))


def measured(
    monkeypatch: pytest.MonkeyPatch,
    plain: float,
    drafting: float,
    step: float,
    accepted: Accepted = WHOLE,
    alone: float | None = None,
) -> list[float]:
    """Profiles of made-up costs, and a made-up acceptance; the temperatures that they were asked for."""
    asked: list[float] = []

    def profile(loop: Any, params: Any, temperature: float, *_: Any) -> Any:
        asked.append(temperature)
        rounds = [plain + step * i for i in range(len(loop.buckets))]
        costs = CostTable.of(loop.buckets, rounds, drafting, plain=plain, dispatch=0.0, alone=alone)
        return SimpleNamespace(cost_table=lambda: costs)

    monkeypatch.setattr(assembly, "load_or_measure", profile)
    monkeypatch.setattr(assembly, "load_or_ask", lambda *_: accepted)
    return asked


def test_look_ahead_where_drafts_can_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch, plain=1.0, drafting=0.2, step=0.1)
    engine = engine_for(*tiny_pair(), PROMPTS, SamplingParams(10, temperature=0.7))
    assert engine is not None and isinstance(engine.loop.policy, LookAhead) and engine.drafter is not None
    assert engine.why.startswith(
        "look-ahead: drafts where that pays; a round of whole blocks takes as long as 1.40 plain ones and gives 5.00"
    )
    assert asked == [0.7] and engine.config.longest == 128, "rounded up, so that many lists share one profile"
    plain = generate(tiny_pair()[0], None, PROMPTS, SAMPLING)
    assert [g.tokens for g in generate(*tiny_pair(), PROMPTS, SAMPLING)] == [g.tokens for g in plain]


def test_plain_decoding_where_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, plain=1.0, drafting=5.0, step=0.1)
    monkeypatch.setattr(assembly, "load_or_ask", lambda *_: pytest.fail("asked, though not even whole blocks pay"))
    engine = engine_for(*tiny_pair(), PROMPTS, SAMPLING)
    assert engine is not None and engine.drafter is None and engine.loop.block == 0
    assert engine.why.startswith(
        "plain decoding: drafting cannot pay here, since a round of whole blocks takes as long as 6.20 plain ones"
    )
    plain = generate(tiny_pair()[0], None, PROMPTS, SAMPLING)
    assert [g.tokens for g in generate(*tiny_pair(), PROMPTS, SAMPLING)] == [g.tokens for g in plain]


def test_plain_decoding_where_too_little_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same costs, under which whole blocks would pay: the pair's own acceptance decides."""
    for accepted, kind in ((WHOLE, LookAhead), (HALF, Fixed)):
        measured(monkeypatch, plain=1.0, drafting=1.5, step=0.5, accepted=accepted)
        engine = Engine(*tiny_pair(), EngineConfig(1, 40))
        assert isinstance(engine.loop.policy, kind)
    assert engine.drafter is None and "3.50 plain ones and gives 1.80 tokens" in engine.why
    assert "at best 0.57 times as fast in the mean, with 1 request" in engine.why


def test_a_drafter_at_hand_has_to_earn_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting that just pays is tried where the drafter costs plain rounds nothing, not where it costs a fifth."""
    for alone, kind in ((1.0, LookAhead), (1 / 1.2, Fixed)):
        measured(monkeypatch, plain=1.0, drafting=0.2, step=0.4, accepted=HALF, alone=alone)
        assert isinstance(Engine(*tiny_pair(), EngineConfig(1, 40)).loop.policy, kind)


def test_the_others_are_taken_as_asked() -> None:
    target, drafter = tiny_pair()
    for policy, strategy, why, kind in (
        ("auto", Causal(guard=None), "Causal: as asked", Causal),
        ("fixed", None, "fixed: as asked", Fixed),
        ("plain", None, "plain decoding: as asked, without the drafter", Fixed),
    ):
        tables = assembly.ScheduleTables.of(CostTable.of((2, 10), [1.0, 2.0]), (1.0,) * 4) if strategy else None
        config = EngineConfig(2, 40, policy, buckets=None if policy == "plain" else (2, 10))
        engine = Engine(target, drafter, config, strategy=strategy, tables=tables)
        assert engine.why == why and isinstance(engine.loop.policy, kind)
    assert Engine(target, None, EngineConfig(2, 40)).why == "plain decoding: there is no drafter"


def test_a_forced_form_of_attention_has_a_profile_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = tiny_pair()
    loop = make_loop(target, drafter, EngineConfig(4, 40))
    params = LoopParams(target.params, drafter.params, shared_tables(target))
    own = profile_key(loop, params, 0.0)
    monkeypatch.setenv("DSPARK_ATTENTION", "einsum")
    assert profile_key(loop, params, 0.0) == own | {"attention": "einsum"} != own


def test_what_drafting_is_worth() -> None:
    """Plain rounds of 1 second; drafting takes 0.5, and verifying 1, 2, 3 rows a request 1, 1.5, 2.5 seconds."""
    target, drafter = tiny_pair(block_size=2)
    loop = make_loop(target, drafter, EngineConfig(4, 40, buckets=(4, 8, 12)))
    costs = CostTable.of((4, 8, 12), [1.0, 1.5, 2.5], 0.5, alone=0.8)
    bound = Worth.of(costs, loop, None)
    assert bound.whole == pytest.approx(3.0 / 0.8) and bound.tokens == 3 and bound.carried == pytest.approx(1.25)
    # One request of three tokens fits in the first bucket, two and three of them in the second, or four of two tokens.
    assert bound.speedups == pytest.approx([0.8 * 3 / 1.5, 0.8 * 3 / 2.0, 0.8 * 2 / 2.0, 0.8 * 3 / 3.0])
    assert bound.most == 1, "a drafter that costs a quarter has to bring as much"

    worth = Worth.of(costs, loop, Accepted((8, 4), (4, 1)))
    assert worth.tokens == pytest.approx(1.625)
    assert worth.speedups == pytest.approx([0.8 * 1.625 / 1.5, 0.8 * 1.5 / 1.5, 0.6, 0.6])
    assert Worth.of(costs._replace(alone=None), loop, Accepted((8, 4), (4, 1))).most == 2, (
        "three reach 0.75 of plain in the mean"
    )


def test_a_crowd_is_decoded_without_the_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting pays for one request at a time: three of them are decoded by the program without a drafter, and
    what comes alone afterwards drafts. In mode "coupled" every text is fixed by its seed, whatever was drafted."""
    measured(monkeypatch, plain=1.0, drafting=0.2, step=4.0, alone=1.0)
    sampling = SamplingParams(14, temperature=1.0, mode="coupled", stop_tokens=())
    config = EngineConfig(3, 40, rounds_per_dispatch=2)
    engine = Engine(*tiny_pair(), config, sampling)
    assert engine.crowd.most == 1 and "with up to 1 requests at a time" in engine.why
    engine.warm_up()
    compiled = run_rounds._cache_size()

    found: list[Any] = []
    for indices in ((0, 1, 2), (3,)):
        for index in indices:
            engine.submit(index, Request(PROMPTS[index]))
        found += [progress.generation for progress in drain(engine) if progress.generation is not None]
    assert run_rounds._cache_size() == compiled, "warming up has compiled both programs"

    made = sorted(found, key=lambda g: g.index)
    alone = Engine(tiny_pair()[0], None, config, sampling)
    for index in range(4):
        alone.submit(index, Request(PROMPTS[index]))
    plain = sorted((p.generation for p in drain(alone) if p.generation), key=lambda g: g.index)
    assert [g.tokens for g in made] == [g.tokens for g in plain]
    # Patience: so many dispatches of two rounds come first.
    assert all(g.drafted <= 2 * PATIENCE < g.rounds for g in made[:3])
    assert made[3].drafted > 2 and made[3].accepted_length > 1


def test_contexts_that_lack_tokens_are_not_drafted_from() -> None:
    entries = [SimpleNamespace(decoding=True, undrafted=False) for _ in range(3)]
    crowd = Crowd(2)
    assert not any(crowd.alone(entries) for _ in range(PATIENCE)), "a short burst"
    assert not crowd.alone(entries[:2]) and not crowd.alone(entries), "the burst is over, and the next one new"
    assert [crowd.alone(entries) for _ in range(PATIENCE)][-1] and all(e.undrafted for e in entries)

    late = SimpleNamespace(decoding=True, undrafted=False)
    assert crowd.alone(entries[:2]), "nothing can be drafted for either"
    assert not crowd.alone([entries[0], late]) and not late.undrafted


def test_a_calibration_holds_the_acceptance(tmp_path: Path) -> None:
    target, drafter = tiny_pair()
    counts = {"judged": [100, 60, 30, 10], "accepted": [60, 30, 10, 5]}
    sts = tmp_path / "sts.json"
    write_calibration(sts, StsTable((1.0,) * 4), {**validity(target, drafter, SamplingParams()), **counts})
    config = EngineConfig(4, 60, buckets=(4, 20), sts=sts)
    loop = make_loop(target, drafter, config, LookAhead())
    params = LoopParams(target.params, drafter.params)
    found = load_or_ask(target, drafter, loop, params, config, SamplingParams(), tmp_path)
    assert found == Accepted((100, 60, 30, 10), (60, 30, 10, 5)) and list(tmp_path.iterdir()) == [sts]
    assert found.expected == pytest.approx([1, 1.6, 1.9, 2.0, 2.05])

    write_calibration(sts, StsTable((1.0,) * 4), {**validity(target, drafter, SamplingParams()), "judged": [1, 2]})
    with pytest.raises(UserError, match="sts.json, under valid_for,"):
        load_or_ask(target, drafter, loop, params, config, SamplingParams(), tmp_path)


def test_a_pair_is_asked_once(tmp_path: Path) -> None:
    target, drafter = tiny_pair()
    config, sampling = EngineConfig(4, 60, buckets=(4, 20)), SamplingParams()
    loop = make_loop(target, drafter, config, LookAhead())
    costs = CostTable.of((4, 20), [[1.0, 9.0]] * 2, 5.0, (6.0, 40.0), plain=1.0, dispatch=0.0, alone=1.0)
    params = LoopParams(target.params, drafter.params, ScheduleTables.of(costs, (1.0,) * 4))

    found = load_or_ask(target, drafter, loop, params, config, sampling, tmp_path)
    assert found.judged[0] > 50 and all(a <= j for a, j in zip(found.accepted, found.judged, strict=True))
    # Whole blocks are verified, whatever drafting costs: all but those that the end of an answer cuts.
    assert all(0.9 * a <= j <= a for a, j in zip(found.accepted, found.judged[1:], strict=False))
    assert 1 < found.expected[-1] < 5 and found.expected[0] == 1

    (path,) = tmp_path.iterdir()
    fields = read_object(path)
    path.write_text(
        json.dumps({**sealed({k: v for k, v in fields.items() if k != "xxh3"} | {"accepted": [1, 0, 0, 0]})})
    )
    again = load_or_ask(target, drafter, loop, params, config, sampling, tmp_path)
    assert again.accepted == (1, 0, 0, 0), "read, not measured"
    path.write_text("{torn")
    assert load_or_ask(target, drafter, loop, params, config, sampling, tmp_path) == found


def test_a_pair_in_pages_is_asked_as_one_by_slot() -> None:
    """Its figures serve both: two questions at a time find pages here, and four find slots."""
    target, drafter = tiny_pair()
    costs = CostTable.of((4, 20), [[1.0, 9.0]] * 2, 5.0, (6.0, 40.0), plain=1.0, dispatch=0.0, alone=1.0)
    forced = ScheduleTables.of(costs, (1.0,) * 4)._replace(forced=jnp.asarray(True))
    params, found = LoopParams(target.params, drafter.params, forced), []
    for config in (EngineConfig(4, 60, buckets=(4, 20)), EngineConfig(4, 60, buckets=(4, 20), cache_pages=17, page=8)):
        loop = make_loop(target, drafter, config, LookAhead())
        jobs = questions_for(target, loop, config, SamplingParams(24))[:4]
        found.append(measure_acceptance(loop, params, jobs, config, budget=1e6))
    assert found[0] == found[1] and found[0].accepted[0] > 0

    few = replace(config, cache_pages=2)
    loop = make_loop(target, drafter, few, LookAhead())
    assert all(job.longest <= 16 for job in questions_for(target, loop, few, SamplingParams(24)))


def test_bad_engine_settings_are_refused() -> None:
    for config, message in (
        (EngineConfig(2), "needs to know how long requests may become"),
        (EngineConfig(0, 40), "The engine has slots = 0, which is out of range"),
        (EngineConfig(True, 40), "The engine has slots = True; expected a whole number"),
        (EngineConfig(2, 40, "causal-ish"), "The engine has policy = 'causal-ish'; known are auto, plain, fixed"),
        (EngineConfig(2, 40, threshold=float("nan")), "The engine has threshold = nan; expected a number"),
        (EngineConfig(2, 40, stop_slots=0), "The engine has stop_slots = 0"),
    ):
        with pytest.raises(UserError, match=message):
            Engine(*tiny_pair(), config)
