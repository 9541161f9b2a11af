"""What a policy hears of the load: dispatches timed against what the cost table says that they take."""

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
    _told: tuple[float, float] = (1.0, 1.0)
    _untimed: int = 0  # dispatches since one was timed

    def told(self) -> Occupancy:
        """The occupancy for the next dispatch; the same arrays while nothing has changed."""
        known = (1.0 if self.meter is None else self.meter.load, self.signal)
        if known != self._told:
            self.occupancy, self._told = Occupancy.of(*known), known
        return self.occupancy

    def due(self, behind_prefill: bool) -> bool:
        """Whether the coming dispatch is to be timed.

        A prefill's seconds say nothing about the rounds', and waiting for its end costs more than it tells: behind one,
        one dispatch in `SELDOM_TIMED` is timed. The first, which may meet the compiler, is behind one.
        """
        if self.meter is None:
            return False
        self._untimed += 1
        return not behind_prefill or self._untimed >= SELDOM_TIMED

    def took(self, seconds: float, predicted: float) -> None:
        if self.meter is not None:
            self.meter.update(seconds - self.dispatch_seconds, predicted)
        self._untimed = 0
