"""The cost of a round as a function of the tokens verified, and the load on the device it runs on.

Axes: R request slots, C context probes, P token rungs, K block position. Everything that the compiled loop reads is an
array of fixed shape, so that a new profile, load or share does not recompile.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.errors import UserError


class Occupancy(NamedTuple):
    """The load on the device, an argument of every dispatch; float32 scalars, 1 = as profiled.

    Attributes:
        load: measured over profiled round time (`LoadMeter`).
        signal: external load factor set by the caller: 2 for a co-located job of equal weight, 1 / share for a tenant.
    """

    load: Array
    signal: Array

    @classmethod
    def of(cls, load: float = 1.0, signal: float = 1.0) -> "Occupancy":
        """Put both factors on the device.

        Raises:
            UserError: a factor that is not a finite number above 0.
        """
        # Refused here, on the host: a NaN on the device would silently turn every comparison of costs false.
        for name, value in (("load", load), ("signal", signal)):
            if not math.isfinite(value) or value <= 0:
                raise UserError(f"The occupancy's {name} is {value}; expected a number above 0, 1 for as profiled.")

        return cls(*jax.device_put((np.float32(load), np.float32(signal))))

    @property
    def pressure(self) -> Array:
        """Factor on the profiled seconds above the cheapest pass, those of more tokens and of drafting alike. Spare
        capacity is free on an idle device but costs co-located work; the cheapest pass itself runs in any case."""
        return self.load * self.signal


class CostTable(NamedTuple):
    """Seconds of a round, measured (`serving.profiling`) or given: SPS(B) = 1 / (verify + drafting), docs/algorithm.md,
    rule 73.

    A round of B tokens costs as much as the first rung >= B, since it runs at that bucket. Between context probes costs
    are interpolated linearly.
    """

    tokens: Array  # [P] int32 ascending
    contexts: Array  # [C] float32 ascending: mean committed positions of the active requests
    verify: Array  # [C, P] float32: a round's seconds without drafting
    drafting: Array  # [C] float32: what drafting adds
    plain: Array | None = None  # [C] float32: a round without drafts; None: what its tokens cost in `verify`
    dispatch: Array | None = None  # [] float32: overhead of a dispatch; None: none
    alone: Array | None = None  # [C] float32: a plain round of a program without a drafter; None: as `plain`

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        verify: Any,
        drafting: Any = 0.0,
        contexts: Sequence[float] = (0.0,),
        plain: Any = None,
        dispatch: float | None = None,
        alone: Any = None,
    ) -> "CostTable":
        """A table on the device, from host numbers.

        Args:
            tokens: P rungs, ascending.
            verify: seconds [P] or [C, P], > 0.
            drafting: seconds, one or [C].
            contexts: C probes in mean committed positions, ascending.
            plain: seconds of a round without drafts, one or [C]. None: as its tokens cost in `verify`.
            dispatch: seconds of overhead per dispatch. None: none.
            alone: seconds of a plain round of a program without a drafter, one or [C]. None: as `plain`.
        Raises:
            UserError: seconds that don't fit the rungs and probes, or rungs or probes that don't ascend.
        """
        seconds = np.atleast_2d(np.asarray(verify, np.float32))
        # A single cost of drafting holds at every context.
        draft = np.broadcast_to(np.asarray(drafting, np.float32), (len(contexts),))
        rungs, probes = np.asarray(tokens, np.int32), np.asarray(contexts, np.float32)

        if np.any(np.diff(rungs) <= 0) or np.any(np.diff(probes) <= 0) or not len(rungs):
            raise UserError(f"A cost table's tokens {list(tokens)} and contexts {list(contexts)} must ascend.")
        if seconds.shape != (len(probes), len(rungs)) or not np.all(np.isfinite(seconds) & (seconds > 0)):
            raise UserError(
                f"A cost table for {len(probes)} contexts and {len(rungs)} token counts needs that many seconds, all "
                f"above 0; found an array of {seconds.shape}."
            )

        rest, bare = (
            None if given is None else np.broadcast_to(np.asarray(given, np.float32), (len(contexts),))
            for given in (plain, alone)
        )
        beside = None if dispatch is None else np.float32(dispatch)
        return cls(*jax.device_put((rungs, probes, seconds, draft, rest, beside, bare)))

    def at(self, context: Array) -> tuple[Float[Array, " p"], Float[Array, ""], Float[Array, ""] | None]:
        """(verify [P], drafting [], plain [] or None) at a mean context length; clamped outside the probes."""
        # A single probe: there is no second row to interpolate with.
        if self.contexts.shape[0] == 1:
            return self.verify[0], self.drafting[0], None if self.plain is None else self.plain[0]

        # The pair of probes around the context; outside all probes, the nearest pair with its share clipped.
        index = jnp.clip(below(self.contexts, context) - 1, 0, self.contexts.shape[0] - 2)
        low, high = self.contexts[index], self.contexts[index + 1]
        share = jnp.clip((context - low) / (high - low), 0.0, 1.0)

        def mixed(x: Array) -> Array:
            return x[index] * (1 - share) + x[index + 1] * share

        return mixed(self.verify), mixed(self.drafting), None if self.plain is None else mixed(self.plain)


class ScheduleTables(NamedTuple):
    """The tables that load-adaptive policies read."""

    costs: CostTable
    temperatures: Array  # [K] float32, of the confidence logits; ones if not calibrated
    forced: Array  # [] bool: drafting and verify lengths follow the caps alone, while rounds are profiled

    @classmethod
    def of(cls, costs: CostTable, temperatures: Sequence[float], forced: bool = False) -> "ScheduleTables":
        return cls(costs, *jax.device_put((np.asarray(temperatures, np.float32), np.bool_(forced))))


class RoundCosts(NamedTuple):
    """A cost table at the contexts and pressure of one round."""

    tokens: Int[Array, " p"]
    seconds: Float[Array, " p"]  # of a round without drafting, under pressure
    drafting: Float[Array, ""]  # seconds that drafting adds, under pressure
    base: Int[Array, ""]  # tokens verified whatever is scheduled: the anchors
    plain: Float[Array, ""]  # seconds of a round without drafts

    def rung(self, tokens: Array) -> Array:
        """Index of the rung that a pass over `tokens` runs at; the last one if no rung is as large."""
        return jnp.minimum(below(self.tokens, tokens), self.tokens.shape[0] - 1)

    def of(self, tokens: Array) -> Array:
        """Seconds of a round that verifies `tokens`, drafting not included."""
        return self.seconds[self.rung(tokens)]

    def between(self, tokens: Float[Array, ""]) -> Float[Array, ""]:
        """Seconds at a mean number of tokens, interpolated between rungs: rounds around that mean use both."""
        high = self.rung(tokens)
        low = jnp.maximum(high - 1, 0)
        start, end = self.tokens[low], self.tokens[high]
        share = jnp.clip((tokens - start) / jnp.maximum(end - start, 1), 0.0, 1.0)
        return self.seconds[low] * (1 - share) + self.seconds[high] * share


def below(rungs: Array, values: Array) -> Int[Array, "..."]:
    """How many of a few ascending `rungs` are below each value: `searchsorted` without its loop, which took as long as
    a layer of the target (docs/log.md)."""
    return jnp.sum(jnp.expand_dims(values, -1) > rungs, axis=-1)


def round_costs(
    table: CostTable, occupancy: Occupancy, active: Bool[Array, " r"], lengths: Int[Array, " r"]
) -> RoundCosts:
    """Costs of this round: the table at the mean context of the active requests, with the seconds above the cheapest
    possible pass, the one over the anchors alone, multiplied by the occupancy's pressure, drafting included.

    That is the one place where pressure enters: the guard, which chooses whether to draft, and the policies, which
    choose how much of the drafts to verify, then maximise the same tokens a second.

    Args:
        table: as profiled.
        occupancy: load on the device.
        active: slots with a request.
        lengths: committed tokens of each slot.
    """
    base = jnp.sum(active)
    # With no active slot base is 0: the maximum avoids 0 / 0.
    mean = jnp.sum(jnp.where(active, lengths, 0)) / jnp.maximum(base, 1)

    verify, drafting, plain = table.at(mean)
    least = verify[jnp.minimum(below(table.tokens, base), table.tokens.shape[0] - 1)]

    # Noise may leave a rung below the anchors' own; the maximum keeps pressure from making wide passes cheaper.
    seconds = least + occupancy.pressure * jnp.maximum(verify - least, 0.0)

    drafting = occupancy.pressure * drafting
    return RoundCosts(table.tokens, seconds, drafting, base, least if plain is None else plain)


def idle_costs(table: CostTable, active: Bool[Array, " r"], lengths: Int[Array, " r"]) -> RoundCosts:
    """Costs without other load, for comparison with measured times."""
    ones = jnp.ones((), jnp.float32)
    return round_costs(table, Occupancy(ones, ones), active, lengths)


@dataclass
class LoadMeter:
    """Exponential average of measured over predicted seconds; lives on the host, updated between dispatches.

    Attributes:
        weight: of the newest dispatch in the average.
        tolerance: ratios up to 1 + `tolerance` count as 1. A profile is of quiet moments, and what slows all rounds
            alike is no reason to draft less; a co-located job of equal weight makes it 2.
        highest: cap on a single dispatch's ratio, so that one stall does not dominate.
        ratio: the current average.
    """

    weight: float = 0.5
    tolerance: float = 0.5
    highest: float = 16.0
    ratio: float = 1.0

    def update(self, measured: float, predicted: float) -> float:
        """Add one dispatch and return `load`. A dispatch that ran no round (0 predicted) changes nothing.

        Args:
            measured: seconds by the clock.
            predicted: seconds by the cost table, `DecodeState.predicted_seconds`.
        """
        if predicted > 0 and measured > 0:
            # An average, since a single dispatch may have met a pause of the machine.
            newest = min(measured / predicted, self.highest)
            self.ratio += self.weight * (newest - self.ratio)
        return self.load

    @property
    def load(self) -> float:
        """Never below 1: a device faster than its profile has no more spare capacity than was profiled."""
        return self.ratio if self.ratio > 1 + self.tolerance else 1.0


def bucket_ladder(requests: int, width: int, rungs: int = 3) -> tuple[int, ...]:
    """Token counts that the verify pass is compiled for, ascending: evenly spaced from one row per request to `width`
    rows per request. Each is one more program to compile."""
    # The full block is always among them: the verify pass needs a bucket that holds every row.
    steps = min(rungs, width)
    widths = {1 + round((width - 1) * i / max(steps - 1, 1)) for i in range(steps)} | {width}
    return tuple(requests * w for w in sorted(widths))
