"""What earlier rounds taught a policy: how drafts fared, by request and by position, and whether drafting pays.

Everything here is decided from rounds that have ended, so it may depend on their tokens, accepted or not, and stays
non-anticipating (SPEC section 5). Axes: R request slots, K block position.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.scheduling.costs import RoundCosts


class SlotHistory(NamedTuple):
    """Of the request in a slot, [R] each: decayed sums over the rounds in which it drafted, and whether it is set
    aside (its drafts do not pay)."""

    rounds: Array
    accepted: Array
    verified: Array
    off: Array


class SharedHistory(NamedTuple):
    """Of all requests so far: the same sums []; drafts accepted and judged by position [K], judged meaning that x_<k
    was accepted and x_k verified; rounds since the last probe and until the next []; whether all are set aside []."""

    rounds: Array
    accepted: Array
    verified: Array
    hits: Array
    tries: Array
    since: Array
    interval: Array
    off: Array


@dataclass(frozen=True)
class History:
    """Sums that forget. A request starts at the mean of the others; the first one starts hopeful."""

    slot_decay: float = 0.9
    shared_decay: float = 0.98
    prior_rounds: float = 4.0  # weight of the shared mean in a new request's own
    survival: float = 0.8  # of a position that was not judged yet, with the weight of four judgements
    probe_after: int = 32

    def init_slots(self, requests: int) -> SlotHistory:
        zero = jnp.zeros((requests,), jnp.float32)
        return SlotHistory(zero, zero.copy(), zero.copy(), jnp.zeros((requests,), bool))

    def init_shared(self, block: int) -> SharedHistory:
        def full(value: float) -> Array:
            return jnp.full((), value, jnp.float32)

        counts = jnp.zeros((block,), jnp.float32), jnp.zeros((block,), jnp.float32)
        probe = jnp.zeros((), jnp.int32), jnp.full((), self.probe_after, jnp.int32)
        return SharedHistory(full(1.0), full(0.9 * block), full(block), *counts, *probe, jnp.zeros((), bool))

    def expected(self, slots: SlotHistory, shared: SharedHistory) -> tuple[Float[Array, " r"], Float[Array, " r"]]:
        """(accepted, verified) drafts of a round that drafts, by request."""
        # The others' mean fades as a request's own rounds fill its memory, of 1 / (1 - slot_decay) rounds.
        prior = self.prior_rounds * jnp.maximum(1.0 - (1.0 - self.slot_decay) * slots.rounds, 1e-3)
        weight, total = prior / shared.rounds, slots.rounds + prior
        return (slots.accepted + weight * shared.accepted) / total, (slots.verified + weight * shared.verified) / total

    def conditional(self, shared: SharedHistory) -> Float[Array, " k"]:
        """How often x_k was accepted where x_<k was: the forecast for confidences that nobody has seen yet."""
        return (shared.hits + 4.0 * self.survival) / (shared.tries + 4.0)

    def learn(
        self,
        slots: SlotHistory,
        shared: SharedHistory,
        drafted: Bool[Array, " r"],
        lengths: Int[Array, " r"],
        accepted: Int[Array, " r"],
    ) -> tuple[SlotHistory, SharedHistory]:
        """After a round; rows that did not draft teach nothing."""
        position = jnp.arange(shared.hits.shape[0])
        judged = drafted[:, None] & (position < lengths[:, None]) & (position <= accepted[:, None])
        hits = judged & (position < accepted[:, None])
        decay = jnp.where(jnp.any(drafted), self.shared_decay, 1.0)

        def own(total: Array, new: Array) -> Array:
            return jnp.where(drafted, self.slot_decay * total + new, total)

        def common(total: Array, new: Array) -> Array:
            return decay * total + jnp.sum(jnp.where(drafted, new, 0))

        one = jnp.ones_like(slots.rounds)
        return (
            SlotHistory(
                own(slots.rounds, one), own(slots.accepted, accepted), own(slots.verified, lengths), slots.off
            ),
            shared._replace(
                rounds=common(shared.rounds, one),
                accepted=common(shared.accepted, accepted),
                verified=common(shared.verified, lengths),
                hits=decay * shared.hits + jnp.sum(hits, axis=0),
                tries=decay * shared.tries + jnp.sum(judged, axis=0),
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class DraftGuard:
    """Who drafts this round. A request is set aside when its accepted drafts are worth less than the verify time they
    took, and all of them when drafting as a whole is slower than plain decoding; both by recent rounds. Sticky: what is
    set aside comes back by `gain` or more, and is looked at again in a probe round, all of them in the same one, after
    `probe_after` rounds, then after twice as many, and so on up to `probe_at_most`. A round with nobody set aside takes
    an eighth off that wait."""

    gain: float = 0.05
    probe_at_most: int = 2048

    def __call__(
        self,
        history: History,
        costs: RoundCosts,
        able: Bool[Array, " r"],
        pressure: Array,
        slots: SlotHistory,
        shared: SharedHistory,
    ) -> tuple[Bool[Array, " r"], SlotHistory, SharedHistory]:
        """(which of the `able` requests draft, histories)."""
        accepted, verified = history.expected(slots, shared)
        base = jnp.maximum(costs.base, 1).astype(jnp.float32)
        plain = costs.plain
        room = jnp.maximum(costs.tokens[-1] - base, 1.0)
        worth = base / plain  # tokens a second that plain decoding makes: what time costs
        price = worth * (costs.seconds[-1] - plain) / room
        good = able & (accepted > jnp.where(slots.off, 1 + self.gain, 1.0) * price * verified)
        tokens = base + jnp.sum(jnp.where(good, accepted, 0.0))
        wanted = costs.between(base + jnp.sum(jnp.where(good, verified, 0.0)))
        seconds = jnp.maximum(wanted, plain) + pressure * costs.drafting
        pays = tokens > jnp.where(shared.off, 1 + self.gain, 1.0) * worth * seconds
        wants = good & pays
        aside = jnp.any(able & ~wants)
        probe = aside & (shared.since >= shared.interval)
        longer = jnp.where(probe, jnp.minimum(2 * shared.interval, self.probe_at_most), shared.interval)
        # Little by little: a probe may have been lucky, and the next ones would be as dear as it was.
        shorter = jnp.maximum(shared.interval - shared.interval // 8, history.probe_after)
        # A round in which nobody could draft, as at a request's last token, says nothing: the wait goes on.
        someone = jnp.any(able)
        shared = shared._replace(
            since=jnp.where(aside & ~probe, shared.since + 1, jnp.where(someone, 0, shared.since)),
            interval=jnp.where(aside, longer, jnp.where(someone, shorter, shared.interval)),
            off=jnp.where(someone, ~pays, shared.off),
        )
        return able & (wants | probe), slots._replace(off=able & ~wants), shared

    def rested(self, slots: SlotHistory, shared: SharedHistory, rounds: Int[Array, ""]) -> SharedHistory:
        """`rounds` more rounds passed as the last one did; those in which somebody is set aside count for the probe."""
        return shared._replace(since=shared.since + jnp.where(jnp.any(slots.off), rounds, 0))
