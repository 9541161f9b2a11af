"""Verify lengths: how many of a block's drafts each request has verified this round (SPEC sections 1 and 5).

A policy may let x_k in by what x_<k, other requests and the past say, never by x_k itself: that keeps it lossless. Read
admission as a frontier: every request shows only the survival a of its next draft, which depends on drafts that are in
already; the best of the frontier is let in, or admission stops. As a falls with k, that order is one sort of all a.

Axes: R request slots, K block position, M = R * K drafts, P token rungs.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.errors import UserError
from dspark_jax.scheduling.calibration import Calibration, Static
from dspark_jax.scheduling.costs import Occupancy, RoundCosts, ScheduleTables, round_costs
from dspark_jax.scheduling.history import DraftGuard, History, SharedHistory


class PolicyState(NamedTuple):
    """`slots`: leaves [R, ...], set back when a request is admitted; `shared`: leaves that live as long as the loop."""

    slots: Any = ()
    shared: Any = ()


class RoundView(NamedTuple):
    """What a policy is shown of a round. `caps` are 0 for a request that is idle or did not draft; `confidence` and
    `drafted` are there once the drafter has run."""

    active: Bool[Array, " r"]
    lengths: Int[Array, " r"]  # committed tokens
    caps: Int[Array, " r"]  # the most drafts that may be verified
    occupancy: Occupancy
    tables: ScheduleTables | None
    drafted: Bool[Array, " r"] | None = None
    confidence: Float[Array, "r k"] | None = None  # logits; None too when the drafter has no confidence head


class VerifyPolicy(Protocol):
    """A frozen strategy; what it learns is in its state. Order of a round: `drafting`, call, `observe`."""

    @property
    def needs_tables(self) -> bool:
        """Whether `LoopParams.tables` must be there."""
        ...

    def init(self, requests: int, block: int) -> PolicyState: ...

    def drafting(self, view: RoundView, state: PolicyState) -> tuple[Bool[Array, " r"] | None, PolicyState]:
        """Which requests draft at all; where none does, the drafter is not run. None: always everybody."""
        ...

    def rested(self, state: PolicyState, rounds: Int[Array, ""]) -> PolicyState:
        """After `rounds` more rounds in which nobody drafted, without being asked."""
        ...

    def __call__(self, view: RoundView, state: PolicyState) -> tuple[Int[Array, " r"], PolicyState]:
        """Verify lengths 0..caps."""
        ...

    def observe(
        self, view: RoundView, lengths: Int[Array, " r"], accepted: Int[Array, " r"], state: PolicyState
    ) -> PolicyState:
        """Learns from what became of this round's drafts."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Verify as many drafts as each request's cap says: the full block, a fixed length, or 0 (plain decoding)."""

    needs_tables = False

    def init(self, requests: int, block: int) -> PolicyState:
        return PolicyState()

    def drafting(self, view: RoundView, state: PolicyState) -> tuple[None, PolicyState]:
        return None, state

    def rested(self, state: PolicyState, rounds: Array) -> PolicyState:
        return state

    def __call__(self, view: RoundView, state: PolicyState) -> tuple[Array, PolicyState]:
        return view.caps, state

    def observe(self, view: RoundView, lengths: Array, accepted: Array, state: PolicyState) -> PolicyState:
        return state


@dataclass(frozen=True)
class Threshold(Fixed):
    """Verify the prefix before the first draft whose confidence is below `threshold` (golden/NOTES 35)."""

    threshold: float = 0.0

    def __call__(self, view: RoundView, state: PolicyState) -> tuple[Array, PolicyState]:
        if self.threshold <= 0:
            return view.caps, state
        if view.confidence is None:
            raise UserError(
                "The threshold policy needs a drafter with a confidence head; use the fixed policy instead."
            )
        sure = (jax.nn.sigmoid(view.confidence) >= self.threshold).astype(jnp.int32)
        return jnp.minimum(view.caps, jnp.sum(jnp.cumprod(sure, axis=1), axis=1)), state


class AdaptiveShared(NamedTuple):
    history: SharedHistory
    calibration: Any
    own: Any  # the strategy's


@dataclass(frozen=True)
class Adaptive:
    """What the load-adaptive strategies share: calibrated survival, history, and the guard that may leave drafting off.

    Subclasses choose how many of the ranked drafts are let in. `min_gain`: a step must gain that much more than it
    costs, judged when it is taken; a whole round is never judged afterwards, which would anticipate.
    """

    calibration: Calibration = Static()
    min_gain: float = 0.02
    guard: DraftGuard | None = DraftGuard()
    history: History = History()

    needs_tables = True

    def init(self, requests: int, block: int) -> PolicyState:
        shared = AdaptiveShared(self.history.init_shared(block), self.calibration.init(block), self.init_own())
        return PolicyState(self.history.init_slots(requests), shared)

    def init_own(self) -> Any:
        return ()

    def admit(
        self, ranked: "Ranked", costs: RoundCosts, conditional: Float[Array, " k"], own: Any
    ) -> tuple[Int[Array, ""], Any]:
        """How many of the ranked drafts are let in, and the strategy's own state."""
        raise NotImplementedError

    def drafting(self, view: RoundView, state: PolicyState) -> tuple[Array, PolicyState]:
        able = view.active & (view.caps > 0)
        if self.guard is None:
            return able, state
        pressure = view.occupancy.pressure
        drafts, slots, history = self.guard(
            self.history, _costs(view), able, pressure, state.slots, state.shared.history
        )
        return drafts, PolicyState(slots, state.shared._replace(history=history))

    def rested(self, state: PolicyState, rounds: Array) -> PolicyState:
        if self.guard is None:
            return state
        history = self.guard.rested(state.slots, state.shared.history, rounds)
        return PolicyState(state.slots, state.shared._replace(history=history))

    def __call__(self, view: RoundView, state: PolicyState) -> tuple[Array, PolicyState]:
        shared = state.shared
        conditional = self.history.conditional(shared.history)
        caps = jnp.where(view.active, view.caps, 0)
        ranked = rank(survival(self.confidences(view, shared)), caps)
        count, own = self.admit(ranked, _costs(view), conditional, shared.own)
        return ranked.lengths(count), PolicyState(state.slots, shared._replace(own=own))

    def confidences(self, view: RoundView, shared: AdaptiveShared) -> Float[Array, "r k"]:
        """Calibrated c; without a confidence head the history's rate of each position."""
        if view.confidence is None:
            conditional = self.history.conditional(shared.history)
            return jnp.broadcast_to(conditional, (view.caps.shape[0], conditional.shape[0]))
        return self.calibration(view.confidence, _tables(view).temperatures, shared.calibration)

    def observe(self, view: RoundView, lengths: Array, accepted: Array, state: PolicyState) -> PolicyState:
        drafted = view.active if view.drafted is None else view.active & view.drafted
        slots, history = self.history.learn(state.slots, state.shared.history, drafted, lengths, accepted)
        calibration = state.shared.calibration
        if view.confidence is not None:
            lengths = jnp.where(drafted, lengths, 0)
            temperatures = _tables(view).temperatures
            calibration = self.calibration.observe(view.confidence, temperatures, lengths, accepted, calibration)
        return PolicyState(slots, state.shared._replace(history=history, calibration=calibration))


@dataclass(frozen=True)
class Causal(Adaptive):
    """Algorithm 1 of the paper: let drafts in by falling survival while tokens a second strictly improve."""

    def admit(self, ranked: "Ranked", costs: RoundCosts, conditional: Array, own: Any) -> tuple[Array, Any]:
        seconds = costs.drafting + costs.of(costs.base + jnp.arange(ranked.survival.shape[0] + 1))
        tokens = costs.base + jnp.cumsum(ranked.survival) - ranked.survival  # expected, before each draft
        gains = ranked.survival * seconds[:-1] > (1 + self.min_gain) * tokens * jnp.diff(seconds)
        return jnp.sum(jnp.cumprod(gains & ranked.valid)), own


@dataclass(frozen=True)
class LookAhead(Adaptive):
    """Causal for costs that are stairs: fills a bucket that is paid for, and opens the next one by a forecast.

    At an edge the frontier's survival is known; what lies behind it is forecast as that times the historical
    conditional survival by position. If the forecast for this or any later bucket gains, the next bucket is filled and
    the question asked again.
    """

    def admit(self, ranked: "Ranked", costs: RoundCosts, conditional: Array, own: Any) -> tuple[Array, Any]:
        total = jnp.cumsum(jnp.where(ranked.valid, ranked.survival, 0.0))
        available = jnp.sum(ranked.valid)
        steps = costs.tokens.shape[0]

        def filled(rung: Array) -> Array:
            return jnp.clip(costs.tokens[jnp.minimum(rung, steps - 1)] - costs.base, 0, available)

        def worth_it(count: Array, rung: Array) -> Array:
            ahead = jnp.cumsum(ranked.forecast(count, conditional))
            more = jnp.clip(costs.tokens - costs.base - count, 0, ahead.shape[0])
            gain = jnp.where(more > 0, ahead[jnp.maximum(more - 1, 0)], 0.0)
            tokens = costs.base + jnp.where(count > 0, total[jnp.maximum(count - 1, 0)], 0.0)
            now = costs.seconds[rung]
            gains = gain * (costs.drafting + now) > (1 + self.min_gain) * tokens * (costs.seconds - now)
            return jnp.any(gains & (jnp.arange(steps) > rung) & (gain > 0))

        def more(carry: tuple[Array, Array, Array]) -> Array:
            return carry[2]

        def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            count, rung, _ = carry
            opens = (count < available) & (rung < steps - 1)
            opens &= worth_it(count, rung)
            rung = jnp.where(opens, rung + 1, rung)
            return jnp.where(opens, filled(rung), count), rung, opens

        rung = costs.rung(costs.base)
        count, _, _ = jax.lax.while_loop(more, step, (filled(rung), rung, jnp.ones((), bool)))
        return count, own


@dataclass(frozen=True)
class Asynchronous(Adaptive):
    """The capacity comes from the confidences of two rounds ago, searched over every size; today's drafts then fill it
    from the top. Nothing about today's tokens sets the capacity, so it can be known before they are drafted.

    The queue holds drafts per active request, as requests come and go; the bucket that a capacity pays for is filled.
    """

    def init_own(self) -> Array:
        return jnp.full((2,), jnp.inf, jnp.float32)  # until two rounds have been seen: everything

    def admit(self, ranked: "Ranked", costs: RoundCosts, conditional: Array, own: Array) -> tuple[Array, Array]:
        base = jnp.maximum(costs.base, 1)
        available = jnp.sum(ranked.valid)
        wanted = jnp.minimum(own[0] * base, 1.0 * available).astype(jnp.int32)
        paid = jnp.clip(costs.tokens[costs.rung(costs.base + wanted)] - costs.base, 0, available)
        expected = costs.base + jnp.cumsum(jnp.where(ranked.valid, ranked.survival, 0.0))
        tokens = jnp.concatenate([costs.base[None].astype(jnp.float32), expected])
        seconds = costs.drafting + costs.of(costs.base + jnp.arange(tokens.shape[0]))
        rate = jnp.where(jnp.arange(tokens.shape[0]) <= available, tokens / seconds, -jnp.inf)
        best = jnp.argmax(rate)
        best = jnp.where(rate[best] > (1 + self.min_gain) * rate[0], best, 0)
        return paid, jnp.stack([own[1], best / base])


class Ranked(NamedTuple):
    """All drafts by falling survival (ties: the lower position, then the lower slot), those past a cap last."""

    survival: Float[Array, " m"]
    owner: Int[Array, " m"]  # request
    valid: Bool[Array, " m"]  # within the request's cap
    grid: Float[Array, "r k"]
    caps: Int[Array, " r"]

    def lengths(self, count: Array) -> Int[Array, " r"]:
        """Of each request, how many are among the first `count`."""
        if self.caps.shape[0] == 1:
            return count[None].astype(jnp.int32)
        inside = (jnp.arange(self.owner.shape[0]) < count).astype(jnp.int32)
        return jnp.zeros(self.caps.shape, jnp.int32).at[self.owner].add(inside)

    def forecast(self, count: Array, conditional: Float[Array, " k"]) -> Float[Array, " m"]:
        """Survival, falling, of the drafts that are not among the first `count`, from the frontier's alone."""
        lengths = self.lengths(count)[:, None]
        position = jnp.arange(self.grid.shape[1])
        shown = jnp.take_along_axis(self.grid, jnp.minimum(lengths, self.grid.shape[1] - 1), axis=1)
        logs = jnp.cumsum(jnp.log(conditional))
        behind = jnp.exp(logs - jnp.take(logs, jnp.minimum(lengths, self.grid.shape[1] - 1)))
        open_ = (position >= lengths) & (position < self.caps[:, None])
        values = jnp.where(open_, shown * behind, 0.0)
        return -jnp.sort(-values.ravel()) if values.shape[0] > 1 else _left_aligned(values[0], lengths[0, 0])


def survival(confidences: Float[Array, "r k"]) -> Float[Array, "r k"]:
    """a_k = c_1 ... c_k, multiplied from the left so that rounding never lets it rise with k."""
    columns = [confidences[:, 0]]
    for k in range(1, confidences.shape[1]):
        columns.append(columns[-1] * confidences[:, k])
    return jnp.stack(columns, axis=1)


def rank(grid: Float[Array, "r k"], caps: Int[Array, " r"]) -> Ranked:
    """The drafts of a survival `grid`, which does not rise along k: so the best n hold a prefix of each request."""
    requests, block = grid.shape
    inside = jnp.arange(block) < caps[:, None]
    # Position-major, so that the stable sort breaks ties by position and within a request keeps the order of the block.
    flat, owner = grid.T.ravel(), jnp.tile(jnp.arange(requests, dtype=jnp.int32), block)
    keys = jnp.where(inside.T.ravel(), -flat, 1.0)
    if requests > 1:
        keys, owner = jax.lax.sort((keys, owner), num_keys=1, is_stable=True)
    valid = keys <= 0
    return Ranked(jnp.where(valid, -keys, 0.0), owner, valid, grid, caps)


def _left_aligned(values: Float[Array, " k"], start: Array) -> Float[Array, " k"]:
    """values[start:] and then zeros: what a falling sort would give where all before `start` is zero."""
    index = jnp.arange(values.shape[0]) + start
    return jnp.where(index < values.shape[0], jnp.take(values, index, mode="clip"), 0.0)


def _tables(view: RoundView) -> ScheduleTables:
    if view.tables is None:
        raise UserError("A load-adaptive policy needs measured costs: profile the target and drafter first.")
    return view.tables


def _costs(view: RoundView) -> RoundCosts:
    return round_costs(_tables(view).costs, view.occupancy, view.active, view.lengths)


def bucket_ladder(requests: int, width: int, rungs: int = 3) -> tuple[int, ...]:
    """Token counts that the verify pass is compiled for: from one row a request to the full block, evenly spaced."""
    steps = min(rungs, width)
    widths = {1 + round((width - 1) * i / max(steps - 1, 1)) for i in range(steps)} | {width}
    return tuple(requests * w for w in sorted(widths))
