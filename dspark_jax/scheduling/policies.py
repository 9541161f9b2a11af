"""Verify policies: how many drafts of each request's block are verified in a round.

Whether x_k is verified may depend on x_<k, on other requests and on the past, never on x_k: that keeps scheduling
lossless. Admission runs along a frontier: a request shows only the survival a of its next draft, which its admitted
drafts determine; the best of the frontier is admitted, or admission stops. As a falls with k, that order is one sort of
all a (docs/algorithm.md, rules 73 to 80).

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
from dspark_jax.scheduling.ranking import Ranked, rank, survival


class PolicyState(NamedTuple):
    """A policy's memory from round to round.

    Attributes:
        slots: leaves [R, ...], reset when a request is admitted.
        shared: leaves that last as long as the loop.
    """

    slots: Any = ()
    shared: Any = ()


class NodeView(NamedTuple):
    """The drafted nodes of each request's tree by falling path value, those that may not be verified last."""

    scores: Float[Array, "r n"]
    verified: Bool[Array, "r n"] | None = None  # None until they are chosen
    reached: Bool[Array, "r n"] | None = None  # on the accepted path; None until they are judged


class RoundView(NamedTuple):
    """The inputs of a policy's decisions in one round. `drafted` and `confidence` are None until the drafter has run;
    draft tokens are not among them, so a policy cannot anticipate by them."""

    active: Bool[Array, " r"]
    lengths: Int[Array, " r"]  # committed tokens
    caps: Int[Array, " r"]  # the most drafts that may be verified; 0 for a request that is idle or does not draft
    occupancy: Occupancy
    tables: ScheduleTables | None
    drafted: Bool[Array, " r"] | None = None
    confidence: Float[Array, "r k"] | None = None  # logits; None also without a confidence head
    nodes: NodeView | None = None  # of draft trees, whose nodes are what the caps and verify lengths count


class VerifyPolicy(Protocol):
    """A frozen strategy that keeps what it learns in its state. Order of a round: `drafting`, the call, `observe`; a
    round in which no request drafts ends after `drafting`."""

    @property
    def always_drafts(self) -> bool:
        """Whether every active request drafts in every round, so that no plain rounds need be compiled."""
        ...

    @property
    def needs_tables(self) -> bool:
        """Whether `LoopParams.tables` must be given."""
        ...

    @property
    def anticipates(self) -> bool:
        """Whether the verification of x_k may depend on x_k or later tokens. Only coupled verification allows it."""
        ...

    def init(self, requests: int, block: int) -> PolicyState:
        """The state before the first round, for R = `requests` slots and blocks of K = `block` drafts."""
        ...

    def drafting(self, view: RoundView, state: PolicyState) -> tuple[Bool[Array, " r"], PolicyState]:
        """Choose which of the active requests draft; if none does, the drafter is not run."""
        ...

    def skipped(self, state: PolicyState, rounds: Int[Array, ""]) -> PolicyState:
        """The state after `rounds` further plain rounds for which `drafting` was not called."""
        ...

    def __call__(self, view: RoundView, state: PolicyState) -> tuple[Int[Array, " r"], PolicyState]:
        """Choose the verify lengths, 0..caps. Unless the policy `anticipates`, whether x_k is verified may depend on
        x_<k, never on x_k."""
        ...

    def observe(
        self, view: RoundView, lengths: Int[Array, " r"], accepted: Int[Array, " r"], state: PolicyState
    ) -> PolicyState:
        """The state after a round with these verify lengths and accepted drafts."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Verify as many drafts as each request's cap allows: the full block, a fixed length, or 0 (plain decoding)."""

    always_drafts = True
    needs_tables = False
    anticipates = False

    def init(self, requests: int, block: int) -> PolicyState:
        return PolicyState()

    def drafting(self, view: RoundView, state: PolicyState) -> tuple[Array, PolicyState]:
        # A request with a cap of 0 drafts too: its drafts are then not verified.
        return view.active, state

    def skipped(self, state: PolicyState, rounds: Array) -> PolicyState:
        return state

    def __call__(self, view: RoundView, state: PolicyState) -> tuple[Array, PolicyState]:
        return view.caps, state

    def observe(self, view: RoundView, lengths: Array, accepted: Array, state: PolicyState) -> PolicyState:
        return state


@dataclass(frozen=True)
class Threshold(Fixed):
    """Verify the prefix before the first draft whose confidence is below `threshold` (docs/algorithm.md, rule 70).

    Raises:
        UserError: while tracing, for a drafter without a confidence head.
    """

    threshold: float = 0.0

    def __call__(self, view: RoundView, state: PolicyState) -> tuple[Array, PolicyState]:
        # Off: everything is verified, and no confidence head is needed.
        if self.threshold <= 0:
            return view.caps, state
        if view.confidence is None:
            raise UserError(
                "The threshold policy needs a drafter with a confidence head; use the fixed policy instead."
            )

        # [R, K]; a cumulative product stays 0 after the first draft below the threshold.
        sure = (jax.nn.sigmoid(view.confidence) >= self.threshold).astype(jnp.int32)
        return jnp.minimum(view.caps, jnp.sum(jnp.cumprod(sure, axis=1), axis=1)), state


class AdaptiveShared(NamedTuple):
    """`PolicyState.shared` of the load-adaptive strategies."""

    history: SharedHistory
    calibration: Any
    own: Any  # state of the subclass


@dataclass(frozen=True)
class Adaptive:
    """Base of the load-adaptive strategies: calibrated survival, history, and the guard that can disable drafting.

    Subclasses choose how many of the ranked drafts are admitted.

    Attributes:
        calibration: maps confidence logits to probabilities.
        min_gain: relative gain that a step of admission must exceed, judged when the step is taken: judging the whole
            round afterwards would anticipate (docs/algorithm.md, rule 79).
        guard: disables drafting where it does not pay. None: every request with a cap above 0 drafts in every round.
        history: statistics of earlier rounds.
    """

    calibration: Calibration = Static()
    min_gain: float = 0.02
    guard: DraftGuard | None = DraftGuard()
    history: History = History()

    always_drafts = False
    needs_tables = True
    anticipates = False

    def init(self, requests: int, block: int) -> PolicyState:
        shared = AdaptiveShared(self.history.init_shared(block), self.calibration.init(block), self.init_own())
        return PolicyState(self.history.init_slots(requests), shared)

    def init_own(self) -> Any:
        """Initial state of the subclass."""
        return ()

    def admit(
        self, ranked: Ranked, costs: RoundCosts, conditional: Float[Array, " k"], own: Any
    ) -> tuple[Int[Array, ""], Any]:
        """Choose how many of the ranked drafts are admitted.

        Args:
            ranked: the drafts [M], by falling survival.
            costs: of this round.
            conditional: historical conditional survival by position.
            own: the subclass's state.
        Returns:
            (how many of the first drafts are admitted, the new state of the subclass).
        """
        raise NotImplementedError

    def best_count(self, ranked: Ranked, costs: RoundCosts) -> Int[Array, ""]:
        """How many of the ranked drafts have the highest expected rate, searched over every count; 0 unless that gains
        enough over none. The search reads the survival of drafts that it leaves out."""
        available = jnp.sum(ranked.valid)
        expected = costs.base + jnp.cumsum(jnp.where(ranked.valid, ranked.survival, 0.0))
        tokens = jnp.concatenate([costs.base[None].astype(jnp.float32), expected])
        seconds = costs.drafting + costs.of(costs.base + jnp.arange(tokens.shape[0]))

        # Entry n is the rate with the n best drafts; entry 0, none, is always there.
        rate = jnp.where(jnp.arange(tokens.shape[0]) <= available, tokens / seconds, -jnp.inf)
        best = jnp.argmax(rate)
        return jnp.where(rate[best] > (1 + self.min_gain) * rate[0], best, 0)

    def drafting(self, view: RoundView, state: PolicyState) -> tuple[Array, PolicyState]:
        # At its last token a request has a cap of 0. Being unable to draft is no evidence about its drafts, so the
        # guard has to know it from requests that it disables.
        able = view.active & (view.caps > 0)
        if self.guard is None:
            return able, state

        drafts, slots, history = self.guard(self.history, _costs(view), able, state.slots, state.shared.history)
        # A round that is being profiled drafts, whatever junk weights make of its drafts.
        drafts |= able & _tables(view).forced
        return drafts, PolicyState(slots, state.shared._replace(history=history))

    def skipped(self, state: PolicyState, rounds: Array) -> PolicyState:
        if self.guard is None:
            return state
        history = self.guard.skipped(state.slots, state.shared.history, rounds)
        return PolicyState(state.slots, state.shared._replace(history=history))

    def __call__(self, view: RoundView, state: PolicyState) -> tuple[Array, PolicyState]:
        shared = state.shared
        conditional = self.history.conditional(shared.history)
        # Idle slots still have a row of junk confidences; a cap of 0 ranks them last, as not valid.
        caps = jnp.where(view.active, view.caps, 0)
        ranked = rank(self.reach(view, shared), caps)

        count, own = self.admit(ranked, _costs(view), conditional, shared.own)
        lengths = jnp.where(_tables(view).forced, caps, ranked.lengths(count))
        return lengths, PolicyState(state.slots, shared._replace(own=own))

    def reach(self, view: RoundView, shared: AdaptiveShared) -> Float[Array, "r m"]:
        """The probability that each draft is accepted, falling along each request's."""
        return survival(self.confidences(view, shared))

    def confidences(self, view: RoundView, shared: AdaptiveShared) -> Float[Array, "r k"]:
        """Calibrated c [R, K]; without a confidence head the historical rate of each position."""
        if view.confidence is None:
            conditional = self.history.conditional(shared.history)
            return jnp.broadcast_to(conditional, (view.caps.shape[0], conditional.shape[0]))
        return self.calibration(view.confidence, _tables(view).temperatures, shared.calibration)

    def observe(self, view: RoundView, lengths: Array, accepted: Array, state: PolicyState) -> PolicyState:
        drafted = view.active if view.drafted is None else view.active & view.drafted
        slots, history = self.history.learn(state.slots, state.shared.history, drafted, lengths, accepted)

        # Requests that did not draft have junk confidences: a length of 0 leaves them out of the fit.
        calibration = state.shared.calibration
        if view.confidence is not None:
            lengths = jnp.where(drafted, lengths, 0)
            temperatures = _tables(view).temperatures
            calibration = self.calibration.observe(view.confidence, temperatures, lengths, accepted, calibration)

        return PolicyState(slots, state.shared._replace(history=history, calibration=calibration))


@dataclass(frozen=True)
class Causal(Adaptive):
    """Algorithm 1 of the paper: admit drafts by falling survival while tokens a second strictly improve
    (docs/algorithm.md, rule 74)."""

    def admit(self, ranked: Ranked, costs: RoundCosts, conditional: Array, own: Any) -> tuple[Array, Any]:
        # [M + 1]: seconds of a round that verifies the anchors and the first 0, 1, .. M drafts.
        seconds = costs.drafting + costs.of(costs.base + jnp.arange(ranked.survival.shape[0] + 1))
        tokens = costs.base + jnp.cumsum(ranked.survival) - ranked.survival  # expected, before each draft

        # (tokens + a) / seconds' > (1 + min_gain) * tokens / seconds, with the margin on the added cost alone and no
        # division. A step that costs nothing gains at any a > 0.
        gains = ranked.survival * seconds[:-1] > (1 + self.min_gain) * tokens * jnp.diff(seconds)

        # Stop at the first draft that does not gain, even if a later one would: the rule must run along the frontier.
        return jnp.sum(jnp.cumprod(gains & ranked.valid)), own


@dataclass(frozen=True)
class LookAhead(Adaptive):
    """Algorithm 1 for staircase costs: fills a bucket that is paid for, and opens the next one by a forecast.

    At an edge only the frontier's survival is known. The drafts beyond it are forecast as that survival times the
    historical conditional survival by position. If the forecast gains for the next or any later bucket, the next bucket
    is filled and the test repeated (docs/algorithm.md, rule 80).
    """

    def admit(self, ranked: Ranked, costs: RoundCosts, conditional: Array, own: Any) -> tuple[Array, Any]:
        # [M]: position i has the sum over the first i + 1 drafts.
        total = jnp.cumsum(jnp.where(ranked.valid, ranked.survival, 0.0))  # expected of the first 1, 2, .. drafts
        available = jnp.sum(ranked.valid)
        steps = costs.tokens.shape[0]

        def filled(rung: Array) -> Array:
            """Drafts that fit into this rung's tokens, beside the anchors."""
            return jnp.clip(costs.tokens[jnp.minimum(rung, steps - 1)] - costs.base, 0, available)

        def worth_it(count: Array, rung: Array) -> Array:
            """[] bool: whether any higher rung gains by the forecast, once `count` drafts have filled this one."""
            # [P]: expected tokens that each rung would add to the `count` drafts that are in.
            ahead = jnp.cumsum(ranked.forecast(count, conditional))
            more = jnp.clip(costs.tokens - costs.base - count, 0, ahead.shape[0])
            gain = jnp.where(more > 0, ahead[jnp.maximum(more - 1, 0)], 0.0)

            # The test of `Causal`, from this rung to every other at once; only rungs above this one count.
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
            # One rung at a time, though a farther one may have gained: its drafts show their own survival on the way.
            rung = jnp.where(opens, rung + 1, rung)
            return jnp.where(opens, filled(rung), count), rung, opens

        # The anchors' own bucket is paid for whatever is scheduled, so it is filled without a test.
        rung = costs.rung(costs.base)
        count, _, _ = jax.lax.while_loop(more, step, (filled(rung), rung, jnp.ones((), bool)))
        return count, own


@dataclass(frozen=True)
class Asynchronous(Adaptive):
    """The capacity of a round comes from the confidences of two rounds ago, searched over every size, and is known
    before its drafts exist; they only fill it, by falling survival (docs/algorithm.md, rule 75).

    The queue holds drafts per active request, since requests come and go; a bucket that is paid for is filled.
    """

    def init_own(self) -> Array:
        """[2] drafts per active request: the capacities of this round and the next."""
        return jnp.full((2,), jnp.inf, jnp.float32)  # no bound until two rounds have passed

    def admit(self, ranked: Ranked, costs: RoundCosts, conditional: Array, own: Array) -> tuple[Array, Array]:
        base = jnp.maximum(costs.base, 1)

        # This round's capacity, decided two rounds ago.
        # A little more than the product, which may have been rounded to just below a whole number.
        wanted = jnp.floor(jnp.minimum(own[0] * base + 1e-3, 1.0 * jnp.sum(ranked.valid))).astype(jnp.int32)

        # The capacity of the round after the next. All of this round's survival may be searched, since it does not
        # decide this round's lengths.
        return _paid(ranked, costs, wanted), jnp.stack([own[1], self.best_count(ranked, costs) / base])


@dataclass(frozen=True)
class Retrospective(Adaptive):
    """The count of today's drafts with the highest expected rate, all of today's confidences considered: the search
    that Algorithm 1 must not make (docs/algorithm.md, rules 77 and 79), and that coupled verification allows."""

    anticipates = True

    def admit(self, ranked: Ranked, costs: RoundCosts, conditional: Array, own: Any) -> tuple[Array, Any]:
        return _paid(ranked, costs, self.best_count(ranked, costs)), own


def _paid(ranked: Ranked, costs: RoundCosts, count: Array) -> Int[Array, ""]:
    """As many drafts as fit into the rung that `count` of them run at, which is paid for."""
    return jnp.clip(costs.tokens[costs.rung(costs.base + count)] - costs.base, 0, jnp.sum(ranked.valid))


def _tables(view: RoundView) -> ScheduleTables:
    """The loop's tables; UserError while tracing if it was given none."""
    if view.tables is None:
        raise UserError("A load-adaptive policy needs measured costs: profile the target and drafter first.")
    return view.tables


def _costs(view: RoundView) -> RoundCosts:
    """The cost table at this round's contexts and pressure."""
    return round_costs(_tables(view).costs, view.occupancy, view.active, view.lengths)
