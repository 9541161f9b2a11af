"""The loop over optimizer steps: batches in, checkpoints and records out, the device never waiting for the host."""

import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dspark_jax.data.pipeline import Batches
from dspark_jax.distributed import is_first
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.roofline.hardware import peak_flops
from dspark_jax.roofline.training import training_flops
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.evaluation import TAU, Evaluator
from dspark_jax.training.feeds import open_feed
from dspark_jax.training.guards import Preempted, Preemption, SkipGuard, updated
from dspark_jax.training.run import RunPlan
from dspark_jax.training.run_folder import MetricsLog, NoLog
from dspark_jax.training.step import TrainState
from dspark_jax.training.trainer import Trainer


@dataclass
class Window:
    """The steps since the last record: their metrics, still on the device, and what the host knows of their work.

    A checkpoint keeps the metrics, so that a record is the same whether or not a stop fell into its window.
    """

    trainer: Trainer
    pending: list[dict[str, Any]]
    opened: float = field(default_factory=time.perf_counter)
    timed_from: float | None = None
    timed_steps: int = 0
    tokens: int = 0
    flops: float = 0.0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self.pending.append(metrics)
        if self.timed_from is not None:
            config, batches = self.trainer.plan.drafter, self.trainer.plan.batches
            self.timed_steps += 1
            self.tokens += tokens_at(batches, step)
            self.flops += training_flops(config, batches.global_batch, batches.length_at(step)) or 0.0

    def start_clock(self) -> None:
        """From here on steps are timed: compilation is behind."""
        self.timed_from = time.perf_counter()

    def fetch(self) -> list[dict[str, float]]:
        self.pending = [{k: float(v) for k, v in m.items()} for m in jax.device_get(self.pending)]
        return self.pending

    def close(self, steps_done: int) -> dict[str, Any]:
        """The record of the window, whose metrics are means over its steps; opens the next."""
        rows = self.fetch()
        record: dict[str, Any] = {"step": steps_done, "epoch": steps_done / self.trainer.plan.batches.steps_per_epoch}
        # Skipped steps count as skipped, not as losses; where no step was good there is no mean.
        good = [row for row in rows if not row["skipped"]]
        record |= {name: float(np.mean([row[name] for row in good])) if good else None for name in rows[-1]}
        record |= {"learning_rate": rows[-1]["learning_rate"], "skipped": len(rows) - len(good)}
        record |= self._speed()
        self.pending, self.timed_steps, self.tokens, self.flops = [], 0, 0, 0.0
        return record

    def restart_clock(self) -> None:
        """The next window's time begins now: what came since the last step was no training."""
        self.opened = time.perf_counter()
        if self.timed_from is not None:
            self.timed_from = self.opened

    def _speed(self) -> dict[str, float | None]:
        now = time.perf_counter()
        speed: dict[str, float | None] = {
            "seconds": now - self.opened,
            "step_seconds": None,
            "tokens_per_s": None,
            "mfu": None,
        }
        if self.timed_from is not None and self.timed_steps:
            elapsed = now - self.timed_from
            speed |= {"step_seconds": elapsed / self.timed_steps, "tokens_per_s": self.tokens / elapsed}
            devices = self.trainer.plan.mesh.devices
            peak = peak_flops(devices.flat[0].device_kind, self.trainer.plan.config.compute_dtype)
            if peak is not None and self.flops:
                speed["mfu"] = self.flops / (elapsed * peak * devices.size)
        return speed


def tokens_at(batches: Batches, step: int) -> int:
    """Real tokens of a step's sequences, over all hosts."""
    return int(batches.source.lengths[batches.indices_at(step)].sum())


def train(trainer: Trainer, shared: SharedTables, checkpoints: Checkpoints) -> tuple[TrainState, list[dict[str, Any]]]:
    """Runs the steps that are left, from the latest checkpoint if there is one; returns state and all records.

    Raises Preempted once a step that SIGTERM interrupted is saved, UserError where a guard stops the run.
    """
    plan, start = trainer.plan, checkpoints.latest or 0
    state, extra = checkpoints.restore(start, trainer.abstract) if start else (trainer.initial(), {"pending": []})
    feed, evaluator = open_feed(trainer, shared, start), Evaluator.of(trainer)
    quiet = None if is_first() else True  # None: unless stderr is no terminal
    with (
        MetricsLog(plan.folder, start) if is_first() else NoLog() as log,
        tqdm(total=plan.total_steps, initial=start, desc=plan.config.name, unit="step", disable=quiet) as bar,
        closing(feed),
        Preemption() as preemption,
        jax.transfer_guard("disallow"),
    ):
        window, guard = Window(trainer, extra["pending"]), SkipGuard(plan)
        upcoming, before = next(feed.batches, {}), None
        for done in range(start + 1, plan.total_steps + 1):
            state, metrics = feed.step(state, upcoming)
            # While that step runs: the next batch. Then at most this step and the one before it are under way.
            upcoming = next(feed.batches, {})
            window.add(done - 1, metrics)
            jax.block_until_ready(before if before is not None else metrics)
            if before is None:
                window.start_clock()
            else:
                guard.watch(done - 2, before)
            before, scores = metrics, None
            due = Due.at(done, plan)
            if due.record:
                record = window.close(done)
                scores = evaluator(state.params) if evaluator and due.evaluation else None
                window.restart_clock()
                log.write(record | (scores or {}))
                bar.set_postfix(loss=record["loss"], tau=record["tau_probabilistic"], refresh=False)
            told = preemption.requested(done)
            if told or due.end or (due.save and updated(metrics)):
                feed.flush()
                checkpoints.save(done, state, {"pending": window.fetch()}, scores[TAU] if scores else None)
            if told:
                checkpoints.wait()
                raise Preempted(done)
            bar.update()
        if before is not None:
            guard.watch(plan.total_steps - 1, before)
    checkpoints.wait()
    return state, log.records


@dataclass(frozen=True)
class Due:
    """What a step ends with. An evaluation ends a record's window, and is saved so that the best drafter is kept."""

    record: bool
    evaluation: bool
    save: bool
    end: bool

    @classmethod
    def at(cls, done: int, plan: RunPlan) -> "Due":
        config, last = plan.config, done == plan.total_steps
        every = config.evaluation.every_steps
        evaluation = bool(every) and (last or done % every == 0)
        record = last or evaluation or done % config.log_every == 0
        return cls(record, evaluation, save=evaluation or done % config.checkpoint.every_steps == 0, end=last)
