"""Load metering for policies: times dispatches against the seconds that the cost table predicts."""

from dataclasses import dataclass, field

from dspark_jax.scheduling.costs import LoadMeter, Occupancy

SELDOM_TIMED = 4
"""One in this many of the dispatches that follow a prefill is timed."""


@dataclass
class Metering:
    """An engine's view of the load on its device, kept on the host.

    Attributes:
        meter: compares measured with predicted seconds; None: the load stays as profiled.
        signal: external load factor set by the caller, 1.0 for no other load. May be set at any time.
        dispatch_seconds: overhead of a dispatch, which the predicted seconds of its rounds do not include.
        occupancy: of the last dispatch.
    """

    meter: LoadMeter | None = field(default_factory=LoadMeter)
    signal: float = 1.0
    dispatch_seconds: float = 0.0
    occupancy: Occupancy = field(default_factory=Occupancy.of)
    _known: tuple[float, float] = (1.0, 1.0)  # (load, signal) that `occupancy` holds
    _untimed: int = 0  # dispatches since one was timed

    def current(self) -> Occupancy:
        """The occupancy for the next dispatch; the same device arrays as before while neither factor has changed."""
        # Replaced only when a factor has changed: each is a transfer to the device.
        known = (1.0 if self.meter is None else self.meter.load, self.signal)
        if known != self._known:
            self.occupancy, self._known = Occupancy.of(*known), known
        return self.occupancy

    def due(self, behind_prefill: bool) -> bool:
        """Whether the next dispatch is to be timed.

        The clock can start only once a prefill has ended, and waiting for that stalls the host: of the dispatches that
        follow a prefill, one in `SELDOM_TIMED` is timed. The first dispatch, which may have to compile, follows one.

        Args:
            behind_prefill: whether the device may still be running a prefill.
        """
        if self.meter is None:
            return False
        self._untimed += 1
        return not behind_prefill or self._untimed >= SELDOM_TIMED

    def took(self, seconds: float, predicted: float) -> None:
        """Add a timed dispatch: `seconds` by the clock, `predicted` for its rounds by the cost table."""
        if self.meter is not None:
            # A dispatch may end sooner than its mean overhead; the meter ignores times that are not positive.
            self.meter.update(seconds - self.dispatch_seconds, predicted)
        self._untimed = 0
