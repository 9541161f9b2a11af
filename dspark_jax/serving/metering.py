"""The load that a policy sees: dispatches timed against the seconds that the cost table predicts."""

from dataclasses import dataclass, field

from dspark_jax.scheduling.costs import LoadMeter, Occupancy

SELDOM_TIMED = 4


@dataclass
class Metering:
    """Lives on the host, beside an engine.

    Attributes:
        meter: compares measured with predicted seconds; None: the load stays as profiled.
        signal: the user's word for what else the device carries, 1.0 for nothing. May be set at any time.
        dispatch_seconds: what a dispatch takes beside its rounds.
    """

    meter: LoadMeter | None = field(default_factory=LoadMeter)
    signal: float = 1.0
    dispatch_seconds: float = 0.0
    occupancy: Occupancy = field(default_factory=Occupancy.of)
    _known: tuple[float, float] = (1.0, 1.0)
    _untimed: int = 0  # dispatches since one was timed

    def current(self) -> Occupancy:
        """The occupancy for the next dispatch; the same arrays while nothing has changed."""
        known = (1.0 if self.meter is None else self.meter.load, self.signal)
        if known != self._known:
            self.occupancy, self._known = Occupancy.of(*known), known
        return self.occupancy

    def due(self, behind_prefill: bool) -> bool:
        """Whether the coming dispatch is to be timed.

        A prefill's seconds say nothing about the rounds', and waiting for its end costs more than it is worth: behind
        one, one dispatch in `SELDOM_TIMED` is timed. The first, which may meet the compiler, is behind one.
        """
        if self.meter is None:
            return False
        self._untimed += 1
        return not behind_prefill or self._untimed >= SELDOM_TIMED

    def took(self, seconds: float, predicted: float) -> None:
        if self.meter is not None:
            self.meter.update(seconds - self.dispatch_seconds, predicted)
        self._untimed = 0
