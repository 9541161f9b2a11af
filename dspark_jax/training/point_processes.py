"""Runs the points of a sweep or study as subprocesses: finished ones are skipped, failed ones retried once.

A point is a command of this project and a JSON file that it writes, atomically, as its last act. While a point's
process lives it holds the lock of its log; so when the program that started it was killed, the next one waits for the
orphan instead of running the point twice.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dspark_jax.errors import UserError
from dspark_jax.programs import program_command
from dspark_jax.readers import read_object

TRIES = 2
POLL_SECONDS = 0.1
GRACE_SECONDS = 120


@dataclass(frozen=True)
class Point:
    """A program's run: `command`, module and arguments of `python -m`; `result` exists exactly when it has finished."""

    name: str
    command: tuple[str, ...]
    result: Path

    @property
    def done(self) -> bool:
        """Whether the result exists."""
        return self.result.exists()

    def read(self) -> dict[str, Any]:
        """The JSON object of the result; UserError if it is missing or damaged."""
        return read_object(self.result, expected="the result of a point")


@dataclass
class _Running:
    point: Point
    process: subprocess.Popen
    lane: int


@dataclass
class Runner:
    """Runs points, `jobs` at a time, each on its share of this process's cores; output goes to LOGS/NAME.log."""

    logs: Path
    jobs: int = 1
    tried: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    _running: list[_Running] = field(default_factory=list)

    def run(self, points: Sequence[Point]) -> dict[str, str]:
        """Runs the points until each is finished or has failed `TRIES` times.

        Returns:
            By name, the last line of the log of every point that failed each time.
        Raises:
            UserError: `jobs` is below 1.
        """
        if self.jobs < 1:
            raise UserError(f"--jobs is {self.jobs}; at least 1 was expected.")

        self.logs.mkdir(parents=True, exist_ok=True)
        # Results of an earlier command count: that is how a sweep continues.
        waiting = [point for point in points if not point.done]
        finished = len(points) - len(waiting)

        with _terminated_as_interrupt(), tqdm(total=len(points), initial=finished, unit="point", disable=None) as bar:
            try:
                while waiting or self._running:
                    # Polling, not waiting: a log may be held by an orphan that is no child of this process.
                    waiting = [point for point in waiting if not self._settled(point)]
                    for entry in [entry for entry in self._running if entry.process.poll() is not None]:
                        self._running.remove(entry)
                        # A point that failed goes to the end of the queue.
                        if not self._succeeded(entry) and self.tried[entry.point.name] < TRIES:
                            waiting.append(entry.point)

                    bar.update(len(points) - len(waiting) - len(self._running) - bar.n)
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop()

        return self.failed

    def _settled(self, point: Point) -> bool:
        """Starts the point if a lane and its log are free; True if it is now running here or finished."""
        free = sorted(set(range(self.jobs)) - {entry.lane for entry in self._running})

        if not free:
            return False

        # The lock belongs to the open file, which the child inherits: it lasts as long as the child does.
        log = open(self.logs / f"{point.name}.log", "ab")  # noqa: SIM115 (the child's copy holds the lock)
        with log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False  # a process of an earlier or another run has it

            # The orphan that held the lock until now may have finished it.
            if point.done:
                return True

            command = program_command(*point.command)
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

        self.tried[point.name] = self.tried.get(point.name, 0) + 1
        self._running.append(_Running(point, process, free[0]))
        # After the start: the child cannot pin itself, as it does not know its neighbours.
        self._give_cores(process.pid, free[0])

        return True

    def _give_cores(self, pid: int, lane: int) -> None:
        """Pins a point to its share of the cores: processes that share cores stall each other."""
        if self.jobs == 1 or not hasattr(os, "sched_setaffinity"):
            return

        cores = sorted(os.sched_getaffinity(0))
        # With fewer cores than jobs a share would be empty; then all points share all cores.
        if len(cores) >= self.jobs:
            os.sched_setaffinity(pid, cores[lane :: self.jobs])

    def _succeeded(self, entry: _Running) -> bool:
        # Exit code 0 without a result is a failure too: the result is the last act.
        code, name = entry.process.returncode, entry.point.name
        if code == 0 and entry.point.done:
            self.failed.pop(name, None)
            return True

        self.failed[name] = f"{last_line(self.logs / f'{name}.log')} (exit code {code})"
        return False

    def _stop(self) -> None:
        """Terminates the running points and waits up to `GRACE_SECONDS` in all: each saves its run first."""
        for entry in self._running:
            entry.process.terminate()

        # One deadline for all, since all were signalled together.
        until = time.monotonic() + GRACE_SECONDS
        for entry in self._running:
            try:
                entry.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                entry.process.kill()


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Turns SIGTERM into KeyboardInterrupt within the block, so that the subprocesses are stopped as on Ctrl-C."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    # Without this SIGTERM would end this process and leave its children running.
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def last_line(log: Path) -> str:
    """The last line of a log that is not blank, up to 300 characters."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "its log is empty")


def report_failures(failed: dict[str, str], logs: Path) -> None:
    """Says what failed on stderr and ends the program with exit code 1; does nothing when all went well."""
    if not failed:
        return

    for name, reason in failed.items():
        print(f"failed {TRIES} times: {name}: {reason}", file=sys.stderr)

    print(f"Their logs are in {logs}; the same command tries them again.", file=sys.stderr)
    # Not an exception: what failed has been said, and a traceback would bury it.
    raise SystemExit(1)
