"""The loop over optimizer steps: batches in, checkpoints and records out; the device does not wait for the host."""

import time
from collections.abc import Mapping
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
from dspark_jax.training.clock import Clock
from dspark_jax.training.evaluation import TAU, Evaluator
from dspark_jax.training.feeds import Offline, open_feed
from dspark_jax.training.guards import Preempted, Preemption, SkipGuard, updated
from dspark_jax.training.object_checkpoints import AnyCheckpoints
from dspark_jax.training.run import Due, Run
from dspark_jax.training.run_folder import MetricsLog, NoLog
from dspark_jax.training.spec import StepSpec
from dspark_jax.training.start import initial_state
from dspark_jax.training.step import TrainState


@dataclass
class Window:
    """The steps since the last record: their metrics, still on the device, and their tokens, operations and time.

    A checkpoint keeps the pending metrics, so that a record is the same whether or not the run stopped inside its
    window.

    Attributes:
        pending: metrics of a step each; scalars on the device, floats once fetched.
        clock: of the run.
        opened: time of the last record, in seconds of `perf_counter`.
        timed_steps, tokens, flops: of the timed steps; real tokens, and operations of the products.
    """

    spec: StepSpec
    batches: Batches
    pending: list[dict[str, Any]]
    clock: Clock
    opened: float = field(default_factory=time.perf_counter)
    timed_steps: int = 0
    tokens: int = 0
    flops: float = 0.0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of the step with index `step`, without waiting for them."""
        self.pending.append(metrics)
        # Metrics count from the first step, speed only after compilation.
        if self.clock.timed_from is not None:
            # Operations are counted at the padded length, which the device computes; tokens are the real ones.
            rows, length = self.batches.global_batch, self.batches.length_at(step)
            self.timed_steps += 1
            self.tokens += tokens_at(self.batches, step)
            self.flops += training_flops(self.spec.drafter, rows, length) or 0.0

    def fetch(self) -> list[dict[str, float]]:
        """The pending metrics as floats, one dict a step; waits for the steps."""
        # One transfer for all steps of the window; what was fetched before a checkpoint is kept as floats.
        self.pending = [{k: float(v) for k, v in m.items()} for m in jax.device_get(self.pending)]
        return self.pending

    def close(self, steps_done: int, total: int) -> dict[str, Any]:
        """The record of the window, its metrics averaged over the steps that updated; opens the next window."""
        rows = self.fetch()
        record: dict[str, Any] = {"step": steps_done, "epoch": steps_done / self.batches.steps_per_epoch}
        # Skipped steps count as skipped, not as losses; where no step was good there is no mean.
        good = [row for row in rows if not row["skipped"]]
        record |= {name: float(np.mean([row[name] for row in good])) if good else None for name in rows[-1]}
        # Not means: the rate of the last step, and counts over all steps.
        record |= {"learning_rate": rows[-1]["learning_rate"], "skipped": len(rows) - len(good)}
        record["unsupervised"] = int(sum(row["unsupervised"] for row in rows))
        record |= self._speed(total - steps_done)
        self.pending, self.timed_steps, self.tokens, self.flops = [], 0, 0, 0.0

        return record

    def restart_clock(self) -> None:
        """Starts the next window's clock here, which excludes the evaluation since the last step."""
        # The timed steps begin here too, or an evaluation would lower the next record's speed.
        self.opened = time.perf_counter()
        self.clock.restart(self.opened)

    def _speed(self, steps_left: int) -> dict[str, float | None]:
        # Speeds stay None where no step was timed: a record of the first step alone has compiled and not run.
        now = time.perf_counter()
        speed: dict[str, float | None] = {
            "seconds": now - self.opened,
            "step_seconds": None,
            "tokens_per_s": None,
            "mfu": None,
            "seconds_left": None,
        }
        if self.clock.timed_from is not None and self.timed_steps:
            # Only the span of the timed steps: `seconds` above also has compilation, and with it no throughput.
            elapsed = now - self.clock.timed_from
            step = elapsed / self.timed_steps
            speed |= {"step_seconds": step, "tokens_per_s": self.tokens / elapsed, "seconds_left": step * steps_left}

            # Utilisation counts the products that the algorithm needs, not what rematerialisation repeats.
            devices = self.spec.mesh.devices
            peak = peak_flops(devices.flat[0].device_kind, self.spec.dtype)

            if peak is not None and self.flops:
                speed["mfu"] = self.flops / (elapsed * peak * devices.size)

        return speed | self.clock.close(now)


@dataclass(frozen=True)
class Records:
    """The records of a run: the open window, the evaluation that some of them bring, the log and the bar."""

    window: Window
    evaluator: Evaluator | None
    log: MetricsLog | NoLog
    bar: tqdm

    def write(self, done: int, state: TrainState, due: Due) -> float | None:
        """Closes the window after `done` steps and logs its record; the score of its evaluation, if it has one."""
        record = self.window.close(done, self.bar.total)
        # The record's time is taken first, so that an evaluation does not count as training.
        scores = self.evaluator(state.params) if self.evaluator and due.evaluation else {}
        self.window.restart_clock()

        self.log.write(record | scores)
        self.bar.set_postfix(postfix(record), refresh=False)
        return scores.get(TAU)

    def save(
        self, checkpoints: AnyCheckpoints, feed: Offline, done: int, state: TrainState, score: float | None
    ) -> None:
        """Starts a checkpoint after `done` steps, with what the run had counted by then."""
        # Waits for the step, which is no part of the save.
        pending = self.window.fetch()
        notes = {"pending": pending, "records": self.log.digest(), "clock": self.window.clock.notes()}

        with self.window.clock.saving():
            # The cache of a hybrid run first: a checkpoint must not be ahead of its records.
            feed.flush()
            checkpoints.save(done, state, notes, score)


@dataclass
class InFlight:
    """Keeps two steps in flight at most: a step is waited for, and watched by the guard, while the next one runs."""

    guard: SkipGuard
    last: tuple[int, dict[str, jax.Array]] | None = None

    def started(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for the step before `step`; for `step` itself where it is the first, which compiles."""
        jax.block_until_ready(metrics if self.last is None else self.last[1])
        self.watch()
        self.last = step, metrics

    def watch(self) -> None:
        """Shows the guard the step that started last; UserError where it stops the run."""
        if self.last is not None:
            self.guard.watch(*self.last)


def progress_bar(run: Run, start: int) -> tqdm:
    """The bar over a run's steps, shown by the first process and on a terminal only."""
    quiet = None if is_first() else True  # None: tqdm looks for a terminal itself
    return tqdm(total=run.total_steps, initial=start, desc=run.name, unit="step", disable=quiet)


def postfix(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's figures beside the bar, which shows the time to the end itself; unknown ones are left out."""
    shown = {
        "loss": ("loss", "{:.4f}"),
        "tau": ("tau_probabilistic", "{:.3f}"),
        "tokens/s": ("tokens_per_s", "{:,.0f}"),
        "mfu": ("mfu", "{:.1%}"),
        "waits for data": ("data_wait", "{:.0%}"),
        "goodput": ("goodput", "{:.0%}"),
    }
    return {name: form.format(record[key]) for name, (key, form) in shown.items() if record[key] is not None}


def tokens_at(batches: Batches, step: int) -> int:
    """Real tokens of a step's sequences, over all hosts."""
    return int(batches.source.lengths[batches.indices_at(step)].sum())


def train(run: Run, shared: SharedTables, checkpoints: AnyCheckpoints) -> tuple[TrainState, list[dict[str, Any]]]:
    """Runs the steps that are left, from the latest whole checkpoint if there is one.

    Args:
        run: what is trained.
        shared: the target's embedding and head on the run's mesh.
        checkpoints: of the run.
    Returns:
        The state after the last step, and the records of all steps; [] on processes that write no log.
    Raises:
        Preempted: after SIGTERM; the step in progress was finished and saved.
        UserError: a guard stopped the run, or the disk is full.
    """
    start, state, extra = checkpoints.restore_latest(run.step.abstract) or (0, initial_state(run), {})
    checkpoints.prepare(state)
    feed = open_feed(run, shared, start)
    evaluator = None if run.heldout is None else Evaluator.of(run.name, run.target, run.step, run.heldout)

    with (
        MetricsLog(run.folder, start, extra.get("records", "")) if is_first() else NoLog() as log,
        progress_bar(run, start) as bar,
        closing(feed),
        Preemption() as preemption,
        # An implicit transfer would stall the device at every step, so it is an error.
        jax.transfer_guard("disallow"),
    ):
        clock = Clock.of(extra)
        records = Records(Window(run.step, run.batches, extra.get("pending", []), clock), evaluator, log, bar)
        flight = InFlight(SkipGuard(run.folder, run.max_skipped, run.batches, run.data.cache))
        upcoming = next(feed.batches, {})

        for done in range(start + 1, run.total_steps + 1):
            # `state` is donated: from here on only the new one may be read.
            state, metrics = feed.step(state, upcoming)
            # Dispatch is asynchronous: the next batch is prepared while the step runs.
            upcoming = clock.waiting(lambda: next(feed.batches, {}), metrics)
            records.window.add(done - 1, metrics)
            flight.started(done - 1, metrics)
            clock.start()  # the first step is over, and with it compilation

            due = run.cadence.at(done)
            score = records.write(done, state, due) if due.record else None

            # A step that changed nothing is no place to continue from, unless the run ends with it.
            stop = preemption.requested(done)
            if stop or due.end or (due.save and updated(metrics)):
                records.save(checkpoints, feed, done, state, score)

            if stop:
                checkpoints.wait()  # the exception says that the step is saved
                raise Preempted(done)

            bar.update()

        # In the loop each step is watched one step later; the last one has no successor.
        flight.watch()

    checkpoints.wait()
    return state, log.records
