"""Statistics of earlier rounds: how drafts fared, by request and by position, and whether drafting pays.

They come from rounds that have ended, so they may depend on those rounds' tokens, accepted or not, and remain
non-anticipating (docs/algorithm.md, rule 76). Axes: R request slots, K block position.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.scheduling.costs import RoundCosts


class SlotHistory(NamedTuple):
    """Per request, [R] each: decayed sums over the rounds in which it drafted, and whether drafting is disabled for it
    because its drafts do not pay."""

    rounds: Array
    accepted: Array
    verified: Array
    off: Array


class SharedHistory(NamedTuple):
    """Over all requests: the same sums []; drafts accepted and judged by position [K], judged meaning that x_<k was
    accepted and x_k verified; rounds since the last probe and until the next []; whether drafting is disabled for all
    of them []."""

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
    """Exponentially decayed sums. A request starts at the mean of the others, the first one at an optimistic prior."""

    slot_decay: float = 0.9
    shared_decay: float = 0.98
    prior_rounds: float = 4.0  # weight of the shared mean in a new request's own
    survival: float = 0.8  # prior of a position, with the weight of four judged drafts
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
        """Expected (accepted, verified) drafts of each request in a round in which it drafts."""
        # The others' mean fades as a request's own rounds fill its memory, of 1 / (1 - slot_decay) rounds.
        prior = self.prior_rounds * jnp.maximum(1.0 - (1.0 - self.slot_decay) * slots.rounds, 1e-3)
        weight, total = prior / shared.rounds, slots.rounds + prior
        return (slots.accepted + weight * shared.accepted) / total, (slots.verified + weight * shared.verified) / total

    def conditional(self, shared: SharedHistory) -> Float[Array, " k"]:
        """How often x_k was accepted where x_<k was: the forecast where confidences are not known yet."""
        return (shared.hits + 4.0 * self.survival) / (shared.tries + 4.0)

    def learn(
        self,
        slots: SlotHistory,
        shared: SharedHistory,
        drafted: Bool[Array, " r"],
        lengths: Int[Array, " r"],
        accepted: Int[Array, " r"],
    ) -> tuple[SlotHistory, SharedHistory]:
        """The sums after a round; requests that did not draft add nothing."""
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
    """Chooses which requests draft. Drafting is disabled for a request whose accepted drafts are worth less than the
    verify time they took, and for all of them where drafting as a whole is slower than plain decoding, both by recent
    rounds.

    Hysteresis: drafting resumes only above `1 + gain`. Disabled requests draft again in a probe round, all in the same
    one, after `probe_after` rounds, then after twice as many, and so on up to `probe_at_most`; a round in which none is
    disabled shortens that wait by an eighth.
    """

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
        # Each request: what its drafts are expected to bring against the verify time that they take.
        accepted, verified = history.expected(slots, shared)
        base = jnp.maximum(costs.base, 1).astype(jnp.float32)
        plain = costs.plain
        room = jnp.maximum(costs.tokens[-1] - base, 1.0)
        worth = base / plain  # tokens a second of plain decoding: the price of time
        price = worth * (costs.seconds[-1] - plain) / room
        good = able & (accepted > jnp.where(slots.off, 1 + self.gain, 1.0) * price * verified)

        # All of them: tokens a second of drafting for the good ones against plain decoding.
        tokens = base + jnp.sum(jnp.where(good, accepted, 0.0))
        wanted = costs.between(base + jnp.sum(jnp.where(good, verified, 0.0)))
        seconds = jnp.maximum(wanted, plain) + pressure * costs.drafting
        pays = tokens > jnp.where(shared.off, 1 + self.gain, 1.0) * worth * seconds
        wants = good & pays

        # Probes, and the wait between them.
        disabled = jnp.any(able & ~wants)
        probe = disabled & (shared.since >= shared.interval)
        longer = jnp.where(probe, jnp.minimum(2 * shared.interval, self.probe_at_most), shared.interval)
        # Little by little: a probe may have been lucky, and the next ones would cost as much.
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
        """The state `rounds` further plain rounds later, which count towards the probe where a request is disabled."""
        return shared._replace(since=shared.since + jnp.where(jnp.any(slots.off), rounds, 0))
