"""The policy that an engine chooses for itself, and the line that says why."""

from types import SimpleNamespace
from typing import Any

import pytest

from dspark_jax.errors import UserError
from dspark_jax.scheduling.costs import CostTable
from dspark_jax.scheduling.policies import Causal, Fixed, LookAhead
from dspark_jax.serving import assembly
from dspark_jax.serving.assembly import drafting_worth, make_loop
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import engine_for, generate
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from tests.decoding_tiny import prompts, tiny_pair

PROMPTS = prompts(4, tiny_pair()[0].config.vocab_size, seed=4)
SAMPLING = SamplingParams(10)


def measured(monkeypatch: pytest.MonkeyPatch, plain: float, drafting: float, step: float) -> list[float]:
    """Profiles of made-up costs; the temperatures that they were asked for."""
    asked: list[float] = []

    def profile(loop: Any, params: Any, temperature: float, *_: Any) -> Any:
        asked.append(temperature)
        rounds = [plain + step * i for i in range(len(loop.buckets))]
        costs = CostTable.of(loop.buckets, rounds, drafting, plain=plain, dispatch=0.0)
        return SimpleNamespace(cost_table=lambda: costs)

    monkeypatch.setattr(assembly, "load_or_measure", profile)
    return asked


def test_look_ahead_where_drafts_can_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch, plain=1.0, drafting=0.2, step=0.1)
    engine = engine_for(*tiny_pair(), PROMPTS, SamplingParams(10, temperature=0.7))
    assert engine is not None and isinstance(engine.loop.policy, LookAhead) and engine.drafter is not None
    assert engine.why.startswith(
        "look-ahead: drafts where that pays; a round of whole blocks takes as long as 1.4 plain"
    )
    assert asked == [0.7] and engine.config.longest == 128, "rounded up, so that many lists share one profile"
    plain = generate(tiny_pair()[0], None, PROMPTS, SAMPLING)
    assert [g.tokens for g in generate(*tiny_pair(), PROMPTS, SAMPLING)] == [g.tokens for g in plain]


def test_plain_decoding_where_they_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, plain=1.0, drafting=5.0, step=0.1)
    engine = engine_for(*tiny_pair(), PROMPTS, SAMPLING)
    assert engine is not None and engine.drafter is None and engine.loop.block == 0
    assert engine.why.startswith(
        "plain decoding: drafting cannot pay here, since a round of whole blocks takes as long"
    )
    plain = generate(tiny_pair()[0], None, PROMPTS, SAMPLING)
    assert [g.tokens for g in generate(*tiny_pair(), PROMPTS, SAMPLING)] == [g.tokens for g in plain]


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


def test_what_drafting_is_worth() -> None:
    """Plain rounds of 1 second; drafting takes 0.5, and verifying 1, 2, 3 rows a request 1, 1.5, 2.5 seconds."""
    target, drafter = tiny_pair(block_size=2)
    loop = make_loop(target, drafter, EngineConfig(4, 40, buckets=(4, 8, 12)))
    worth = drafting_worth(CostTable.of((4, 8, 12), [1.0, 1.5, 2.5], 0.5), loop)
    assert worth.plain_rounds == pytest.approx(3.0)
    assert worth.best_speedup == pytest.approx(3 / 1.5), "one request of three tokens fits in the first bucket"


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
