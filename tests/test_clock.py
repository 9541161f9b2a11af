"""Goodput, waiting for data and the time that saves take, as a run's records have them."""

import json
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from dspark_jax.training import loop
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.clock import Clock
from dspark_jax.training.run_folder import read_records
from tests.test_guards import command, folder  # noqa: F401 - a fixture
from train.fit import main

DONE = {"loss": jnp.zeros(())}


def test_time_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1000 + now[0])

    def passing(seconds: float) -> None:
        now[0] += seconds

    clock = Clock()
    passing(10)  # compilation
    clock.waiting(lambda: passing(3), DONE)
    clock.start()
    passing(4)
    clock.waiting(lambda: passing(1), DONE)
    with clock.saving():
        passing(2)
    # Of 20 seconds since the start, 7 were timed, of which 4 were steps.
    assert clock.notes() == [1100.0, 4.0]
    assert clock.close(now[0]) == {"data_wait": 1 / 7, "save_seconds": 2.0, "goodput": 4 / 20}

    # A resumed run lost what came after its checkpoint, and the time until it was started.
    notes = json.loads(json.dumps(clock.notes()))
    passing(80)
    resumed = Clock.of({"clock": notes})
    assert resumed.close(now[0]) == {"data_wait": None, "save_seconds": 0.0, "goodput": 4 / 100}


def test_a_batch_that_comes_while_the_step_runs_is_no_waiting():
    class Running:
        def is_ready(self) -> bool:
            return False

    clock = Clock(timed_from=0.0)
    clock.waiting(lambda: time.sleep(0.01), {"loss": Running()})  # type: ignore[dict-item]
    assert clock.waited == 0.0
    clock.waiting(lambda: time.sleep(0.01), DONE)
    assert clock.waited >= 0.01


def test_records_and_the_bar_say_where_the_time_goes(folder: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    save, shown = Checkpoints.save, list[dict[str, Any]]()
    plain = loop.postfix

    def slow(self: Checkpoints, *rest: Any) -> None:
        time.sleep(0.2)
        save(self, *rest)

    def postfix(record: dict[str, Any]) -> dict[str, Any]:
        shown.append(plain(record))
        return shown[-1]

    monkeypatch.setattr(Checkpoints, "save", slow)
    monkeypatch.setattr(loop, "postfix", postfix)
    main(command(folder, "clocked", "--checkpoint.every-steps", 3))

    records = read_records(folder / "clocked" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[0]["step_seconds"] is None and records[0]["goodput"] < 0.01
    # The save after step 3 held up the window of step 4.
    assert records[3]["save_seconds"] >= 0.2 > records[4]["save_seconds"]
    assert all(0 <= record["data_wait"] <= 1 and 0 < record["goodput"] < 1 for record in records[1:])
    assert records[-2]["seconds_left"] == records[-2]["step_seconds"] and records[-1]["seconds_left"] == 0
    assert {"loss", "tau", "tokens/s", "waits for data", "goodput"} == set(shown[-1])
    summary = json.loads((folder / "clocked" / "metrics.json").read_text())
    assert summary["goodput"] == records[-1]["goodput"] and "seconds_left" not in summary
