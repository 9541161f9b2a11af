"""Statistics of earlier rounds: accepted drafts by request and by position, and whether drafting pays.

They come from rounds that have ended, so they may depend on those rounds' tokens, accepted or not, and remain
non-anticipating (docs/algorithm.md, rule 76). Axes: R request slots, K block position.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.scheduling.costs import RoundCosts


class SlotHistory(NamedTuple):
    """Per request, [R] each: decayed sums, float32, over the rounds in which it drafted."""

    rounds: Array
    accepted: Array  # drafts
    verified: Array  # drafts
    off: Array  # bool: drafting is disabled, because the request's drafts do not pay


class SharedHistory(NamedTuple):
    """Over all requests: decayed sums in float32, and the clock of the guard's probes."""

    rounds: Array  # [] summed over requests, as are the next two
    accepted: Array  # [] drafts
    verified: Array  # [] drafts
    hits: Array  # [K] drafts accepted, by position
    tries: Array  # [K] drafts judged, by position: x_<k accepted and x_k verified
    since: Array  # [] int32: rounds since the last probe
    interval: Array  # [] int32: rounds from one probe to the next
    off: Array  # [] bool: drafting is disabled for all requests


@dataclass(frozen=True)
class History:
    """Exponentially decayed sums. A request starts at the mean of the others, the first one at an optimistic prior.

    Attributes:
        slot_decay, shared_decay: per round in which the request, or any request, drafted.
        prior_rounds: weight of the shared mean in a new request's own statistics, in rounds.
        survival: prior conditional survival of each position, with the weight of four judged drafts.
        probe_after: shortest wait between probes, in rounds.
    """

    slot_decay: float = 0.95
    shared_decay: float = 0.98
    prior_rounds: float = 4.0
    survival: float = 0.8
    probe_after: int = 32

    def init_slots(self, requests: int) -> SlotHistory:
        # A buffer per leaf: a donated state must not hold one buffer twice.
        zero = jnp.zeros((requests,), jnp.float32)
        return SlotHistory(zero, zero.copy(), zero.copy(), jnp.zeros((requests,), bool))

    def init_shared(self, block: int) -> SharedHistory:
        def full(value: float) -> Array:
            return jnp.full((), value, jnp.float32)

        counts = jnp.zeros((block,), jnp.float32), jnp.zeros((block,), jnp.float32)
        probe = jnp.zeros((), jnp.int32), jnp.full((), self.probe_after, jnp.int32)
        # The prior, one round in which 0.9 of a block was accepted, fades with the first rounds.
        return SharedHistory(full(1.0), full(0.9 * block), full(block), *counts, *probe, jnp.zeros((), bool))

    def expected(
        self, slots: SlotHistory, shared: SharedHistory
    ) -> tuple[Float[Array, " r"], Float[Array, " r"], Float[Array, " r"]]:
        """Expected (accepted, verified) drafts [R] of each request in a round in which it drafts, and the rounds that
        these are means of."""
        # The shared mean fades out as a request's own rounds fill its memory of 1 / (1 - slot_decay) rounds.
        # Bounded below, as rounding may take the memory beyond full and the weight below 0.
        prior = self.prior_rounds * jnp.maximum(1.0 - (1.0 - self.slot_decay) * slots.rounds, 1e-3)
        weight, total = prior / shared.rounds, slots.rounds + prior
        accepted = (slots.accepted + weight * shared.accepted) / total
        return accepted, (slots.verified + weight * shared.verified) / total, total

    def conditional(self, shared: SharedHistory) -> Float[Array, " k"]:
        """Rate at which x_k was accepted given that x_<k was: the forecast for drafts whose confidence must not be
        looked at yet (docs/algorithm.md, rule 80)."""
        return (shared.hits + 4.0 * self.survival) / (shared.tries + 4.0)

    def learn(
        self,
        slots: SlotHistory,
        shared: SharedHistory,
        drafted: Bool[Array, " r"],
        lengths: Int[Array, " r"],
        accepted: Int[Array, " r"],
        spent: Int[Array, " r"] | None = None,
    ) -> tuple[SlotHistory, SharedHistory]:
        """The sums after a round; requests that did not draft add nothing.

        Args:
            slots, shared: the sums before it.
            drafted: requests that drafted.
            lengths: drafts verified, by position: of a tree its levels.
            accepted: drafts accepted.
            spent: rows that they took. None: as many as `lengths`.
        """
        spent = lengths if spent is None else spent
        # [R, K]. Drafts after a rejection are not judged: their test presupposes that the ones before were accepted.
        position = jnp.arange(shared.hits.shape[0])
        judged = drafted[:, None] & (position < lengths[:, None]) & (position <= accepted[:, None])
        hits = judged & (position < accepted[:, None])
        # A round without drafts carries no evidence, so it does not age the sums either.
        decay = jnp.where(jnp.any(drafted), self.shared_decay, 1.0)

        def own(total: Array, new: Array) -> Array:
            return jnp.where(drafted, self.slot_decay * total + new, total)

        def common(total: Array, new: Array) -> Array:
            return decay * total + jnp.sum(jnp.where(drafted, new, 0))

        one = jnp.ones_like(slots.rounds)
        return (
            SlotHistory(
                own(slots.rounds, one), own(slots.accepted, accepted), own(slots.verified, spent), slots.off
            ),
            shared._replace(
                rounds=common(shared.rounds, one),
                accepted=common(shared.accepted, accepted),
                verified=common(shared.verified, spent),
                hits=decay * shared.hits + jnp.sum(hits, axis=0),
                tries=decay * shared.tries + jnp.sum(judged, axis=0),
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class DraftGuard:
    """Chooses which requests draft. Judged by recent rounds, drafting is disabled for a request whose accepted drafts
    are worth less than the verify time they took, and for all requests if drafting is slower than plain decoding.

    It judges earlier rounds only: dropping a request because of today's confidences would anticipate
    (docs/algorithm.md, rule 79).

    Means of a few dozen rounds are off by a sixth, and a request that is disabled by mistake shows nothing until the
    next probe. So accepted drafts count for `doubt` standard errors more than their mean, as in an upper confidence
    bound: one that loses a little is drafted for rather than one that gains given up (docs/log.md). Whether drafting
    pays for all together is doubted less, by the standard error that the recent rounds of several requests leave.

    Hysteresis: drafting resumes only above `1 + gain`. Disabled requests all draft again in the same probe round, after
    `probe_after` rounds, then after twice as many, and so on up to `probe_at_most`; a round in which no request is
    disabled shortens that wait by an eighth.
    """

    gain: float = 0.05
    doubt: float = 1.5
    probe_at_most: int = 2048

    def __call__(
        self,
        history: History,
        costs: RoundCosts,
        able: Bool[Array, " r"],
        slots: SlotHistory,
        shared: SharedHistory,
    ) -> tuple[Bool[Array, " r"], SlotHistory, SharedHistory]:
        """Choose the requests that draft in the coming round.

        Args:
            history: turns the sums into expectations.
            costs: of this round.
            able: active requests that may have drafts verified.
            slots, shared: the sums, and what is disabled.
        Returns:
            (which of the `able` requests draft, the histories with the new decisions).
        """
        # Each request: the tokens that its drafts are expected to bring, against the verify time that they take.
        accepted, verified, rounds = history.expected(slots, shared)
        # Nearly geometric, as a block ends at the first rejection; variances of requests add up.
        variance = self.doubt**2 * accepted * (1 + accepted) / rounds
        base = jnp.maximum(costs.base, 1).astype(jnp.float32)
        plain = costs.plain
        room = jnp.maximum(costs.tokens[-1] - base, 1.0)
        worth = base / plain  # tokens a second of plain decoding: the value of a second
        # Mean price of one verified draft in tokens, from plain decoding up to the full block of every request.
        price = worth * (costs.seconds[-1] - plain) / room
        asked = jnp.where(slots.off, 1 + self.gain, 1.0) * price * verified
        good = able & (accepted + jnp.sqrt(variance) > asked)

        # All requests: tokens a second if the good ones draft, against plain decoding.
        # Together they are known by the rounds of the others too: by their own alone, four short requests would be
        # drafted for at a loss until their ends. A request without others is known by its own (docs/log.md).
        others = shared.rounds * (base - 1) / base
        pooled = variance * rounds / jnp.maximum(rounds, others / base)
        tokens = base + jnp.sum(jnp.where(good, accepted, 0.0)) + jnp.sqrt(jnp.sum(jnp.where(good, pooled, 0.0)))
        # The mean number of verified drafts falls between rungs; rounds around it run at either.
        wanted = costs.between(base + jnp.sum(jnp.where(good, verified, 0.0)))
        seconds = jnp.maximum(wanted, plain) + costs.drafting
        pays = tokens > jnp.where(shared.off, 1 + self.gain, 1.0) * worth * seconds
        wants = good & pays

        # Probes, and the wait between them.
        disabled = jnp.any(able & ~wants)
        probe = disabled & (shared.since >= shared.interval)
        longer = jnp.where(probe, jnp.minimum(2 * shared.interval, self.probe_at_most), shared.interval)
        # Shortened gradually: a probe may have been lucky, and the next ones would cost as much.
        shorter = jnp.maximum(shared.interval - shared.interval // 8, history.probe_after)
        # A round in which no request could draft, as at a last token, is no evidence: the wait goes on.
        any_able = jnp.any(able)
        shared = shared._replace(
            since=jnp.where(disabled & ~probe, shared.since + 1, jnp.where(any_able, 0, shared.since)),
            interval=jnp.where(disabled, longer, jnp.where(any_able, shorter, shared.interval)),
            off=jnp.where(any_able, ~pays, shared.off),
        )
        return able & (wants | probe), slots._replace(off=able & ~wants), shared

    def skipped(self, slots: SlotHistory, shared: SharedHistory, rounds: Int[Array, ""]) -> SharedHistory:
        """The state after `rounds` further plain rounds. They count towards the next probe if requests are disabled."""
        return shared._replace(since=shared.since + jnp.where(jnp.any(slots.off), rounds, 0))
