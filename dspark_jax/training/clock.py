"""Where the wall time of a run goes: steps, waiting for data, saving, and what a restart has cost."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax

T = TypeVar("T")


@dataclass
class Clock:
    """The time of a run since its first start, and of the steps of the open window.

    Attributes:
        began: unix time of the run's first start; a resumed run has it from its checkpoint, so the time in which no
            process ran counts as lost.
        useful: seconds of steps behind the open window. Steps that a kill undid are not among them.
        timed_from: where the window's timed steps begin, by `perf_counter`; None while the first step still compiles.
        waited, saved: seconds within them in which the device ran dry for want of a batch, and in which a save held the
            loop up.
    """

    began: float = field(default_factory=lambda: time.time())
    useful: float = 0.0
    timed_from: float | None = None
    waited: float = 0.0
    saved: float = 0.0

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> "Clock":
        """Continues the clock of a checkpoint's notes; a new one without."""
        # A run that was begun without a checkpoint has no earlier time that is known.
        return cls(*extra["clock"]) if "clock" in extra else cls()

    def notes(self) -> list[float]:
        """What a checkpoint keeps; the steps of the open window count as useful."""
        return [self.began, self.useful + self.stepped(time.perf_counter())]

    def start(self) -> None:
        """Starts timing steps, where it has not begun: compilation of the first step counts as no training."""
        if self.timed_from is None:
            self.timed_from = time.perf_counter()

    def stepped(self, now: float) -> float:
        """Seconds of the window's timed span in which nothing but steps held the loop up."""
        return 0.0 if self.timed_from is None else max(now - self.timed_from - self.waited - self.saved, 0.0)

    def close(self, now: float) -> dict[str, float | None]:
        """The window's shares for its record; the next window is open, but not timed before `restart`."""
        # Steps that a checkpoint does not hold yet count here, and are lost with the process if it dies.
        self.useful += self.stepped(now)
        span = None if self.timed_from is None else now - self.timed_from
        shares = {
            "data_wait": self.waited / span if span else None,
            "save_seconds": self.saved,
            # 1 would be steps alone from the first start on.
            "goodput": self.useful / max(time.time() - self.began, 1e-9),
        }
        self.timed_from, self.waited, self.saved = None if span is None else now, 0.0, 0.0
        return shares

    def restart(self, now: float) -> None:
        """Begins the window's span here, which leaves out the evaluation since the last step."""
        # A run that has not finished its first step has no span to begin.
        if self.timed_from is not None:
            self.timed_from = now

    def waiting(self, take: Callable[[], T], running: Mapping[str, jax.Array]) -> T:
        """`take()`, a batch; its time counts as waiting where the step that was running has ended by then.

        An upper bound: when within that time the step ended is not known.
        """
        began = time.perf_counter()
        taken = take()
        # A batch that comes while the device works costs nothing, however long it took.
        ready = [value.is_ready() for value in running.values()]  # type: ignore[attr-defined]
        if self.timed_from is not None and all(ready):
            self.waited += time.perf_counter() - began
        return taken

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Counts the time of the block as a save's."""
        began = time.perf_counter()
        yield
        # Before the first step has ended nothing is timed, so nothing is to be taken off.
        if self.timed_from is not None:
            self.saved += time.perf_counter() - began
