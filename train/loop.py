"""The loop over optimizer steps: batches in, checkpoints and records out, the device never waiting for the host."""

import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dspark_jax.data.pipeline import Batches
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.flops import peak_flops, training_flops
from dspark_jax.training.step import TrainState
from train.run_folder import MetricsLog
from train.trainer import Trainer


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
            self.flops += training_flops(config, batches.global_batch, batches.length_at(step))

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
        record |= {name: float(np.mean([row[name] for row in rows])) for name in rows[-1]}
        record["learning_rate"] = rows[-1]["learning_rate"]
        record |= self._speed()
        self.pending, self.timed_steps, self.tokens, self.flops = [], 0, 0, 0.0
        self.opened = time.perf_counter()
        if self.timed_from is not None:
            self.timed_from = self.opened
        return record

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
            if peak is not None:
                speed["mfu"] = self.flops / (elapsed * peak * devices.size)
        return speed


def tokens_at(batches: Batches, step: int) -> int:
    """Real tokens of a step's sequences, over all hosts."""
    return int(batches.source.lengths[batches.indices_at(step)].sum())


def train(trainer: Trainer, shared: SharedTables, checkpoints: Checkpoints) -> tuple[TrainState, list[dict[str, Any]]]:
    """Runs the steps that are left, from the latest checkpoint if there is one; returns state and all records."""
    plan, start = trainer.plan, checkpoints.latest or 0
    total, save_every, log_every = plan.total_steps, plan.config.checkpoint.every_steps, plan.config.log_every
    state, extra = checkpoints.restore(start, trainer.abstract) if start else (trainer.initial(), {"pending": []})
    step = trainer.step()
    with (
        MetricsLog(plan.folder, start) as log,
        tqdm(total=total, initial=start, desc=plan.config.name, unit="step", disable=None) as bar,
        closing(trainer.device_batches(start)) as batches,
        jax.transfer_guard("disallow"),
    ):
        window = Window(trainer, extra["pending"])
        upcoming, before = next(batches, {}), None
        for index in range(start, total):
            state, metrics = step(state, shared, upcoming)
            # While that step runs: the next batch. Then at most this step and the one before it are under way.
            upcoming = next(batches, {})
            window.add(index, metrics)
            jax.block_until_ready(before if before is not None else metrics)
            if before is None:
                window.start_clock()
            before, done = metrics, index + 1
            if done % log_every == 0 or done == total:
                record = window.close(done)
                log.write(record)
                bar.set_postfix(loss=f"{record['loss']:.3f}", tau=f"{record['tau_probabilistic']:.2f}", refresh=False)
            if done % save_every == 0 or done == total:
                checkpoints.save(done, state, {"pending": window.fetch()})
            bar.update()
    checkpoints.wait()
    return state, log.records
