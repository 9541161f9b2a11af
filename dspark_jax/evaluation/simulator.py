"""An engine under load, simulated from recorded proposals and a cost table: for accelerators and loads not at hand.

The policies are the real ones, run on recorded confidences; only drafting, verifying and the clock are simulated. A
request follows the proposals of a recorded one in order, each of them judged once with the whole block verified.

Axes: n recorded rounds, m recorded requests, R request slots, K block position.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.errors import UserError
from dspark_jax.scheduling.costs import Occupancy, ScheduleTables, round_costs
from dspark_jax.scheduling.policies import PolicyState, RoundView, VerifyPolicy


@dataclass(frozen=True)
class Traces:
    """`logits` [n, K] and `accepted` [n] of rounds that verified the whole block, sorted by request; `request` [n] the
    request of each round; `prompts` [m] and `lengths` [m] the tokens of each request's prompt and answer."""

    logits: np.ndarray
    accepted: np.ndarray
    request: np.ndarray
    prompts: np.ndarray
    lengths: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.lengths) or len(np.unique(self.request)) != len(self.lengths):
            raise UserError("The traces name requests without a round, or no request at all; record them again.")


@dataclass(frozen=True)
class Prefill:
    """Seconds of a prefill by compiled width: of one prompt, and of one in every slot at once."""

    widths: tuple[int, ...]
    alone: tuple[float, ...]
    house: tuple[float, ...]

    def seconds(self, prompts: np.ndarray, slots: int) -> float:
        """Of prompts of these lengths that arrive together, grouped as `Engine.admit` does."""
        places = np.minimum(np.searchsorted(self.widths, prompts), len(self.widths) - 1)
        counts = np.bincount(places, minlength=len(self.widths))
        return sum(
            house if 2 * count > slots else count * alone
            for count, alone, house in zip(counts, self.alone, self.house, strict=True)
        )


NO_PREFILL = Prefill((1,), (0.0,), (0.0,))


@dataclass(frozen=True)
class SimulatedDevice:
    """`tables` the cost of rounds, `buckets` those of the verify pass; prefill with the drafter and, in plain decoding,
    without it; `dispatch_seconds` the overhead of a dispatch."""

    tables: ScheduleTables
    buckets: tuple[int, ...]
    prefill: Prefill = NO_PREFILL
    plain_prefill: Prefill = NO_PREFILL
    dispatch_seconds: float = 0.0
    rounds_per_dispatch: int = 16


@dataclass(frozen=True)
class LoadFigures:
    """Tokens a second over all users; tokens a second of each finished request; tokens verified, anchors included, per
    request and round; accepted length."""

    tokens_per_second: float
    user_speeds: tuple[float, ...]
    verify_budget: float
    tau: float


def simulate(
    policy: VerifyPolicy,
    cap: int,
    traces: Traces,
    device: SimulatedDevice,
    concurrency: int,
    requests: int,
    occupancy: Occupancy | None = None,
) -> LoadFigures:
    """A closed loop of `concurrency` users, each of whom sends the next request as soon as one is answered.

    Args:
        policy: the verify policy under study.
        cap: the most drafts verified for a request in a round (0: plain decoding).
        traces: recorded rounds to replay.
        device: its costs.
        concurrency: users, and slots.
        requests: sent by all users together; figures cover the time in which every slot is taken.
        occupancy: the load that the policy is given; None: as profiled.
    Raises:
        UserError: fewer requests than users.
    """
    if requests < concurrency:
        raise UserError(f"{requests} requests cannot keep {concurrency} users busy; simulate at least as many.")

    load = Occupancy.of() if occupancy is None else occupancy
    starts = np.searchsorted(traces.request, np.arange(len(traces.lengths) + 1))
    slots = _Slots(traces, starts, concurrency, cap, clipped=policy.needs_tables)
    fresh = policy.init(concurrency, traces.logits.shape[1])
    state = jax.tree.map(jnp.asarray, fresh)
    prefill = device.prefill if cap else device.plain_prefill
    clock, asked, speeds = 0.0, concurrency, []
    tokens, verified, rounds = 0, 0, 0

    while asked < requests:
        # A dispatch: rounds until a request ends.
        clock += device.dispatch_seconds
        for _ in range(device.rounds_per_dispatch):
            view = slots.view(load, device.tables)
            drafted, lengths, view, state = _schedule(policy, view, slots.proposals(), state)
            accepted, made = slots.advance(np.asarray(lengths))
            state = _learn(policy, view, lengths, jnp.asarray(accepted), state)
            passed = int(np.sum(np.asarray(lengths) + 1))
            clock += _round_seconds(device, load, view, passed, bool(jnp.any(drafted)))
            tokens, verified, rounds = tokens + made, verified + passed, rounds + concurrency
            if slots.ended.any():
                break

        # Between dispatches: ended requests leave their slots to the next ones, whose prompts are prefilled.
        ended = slots.ended
        entering = np.flatnonzero(ended)
        speeds += [slots.wanted[slot] / max(clock - slots.since[slot], 1e-9) for slot in entering]
        state = PolicyState(jax.tree.map(partial(_put, ended), state.slots, fresh.slots), state.shared)

        for slot in entering:
            slots.enter(int(slot), asked % len(traces.lengths), clock)
            asked += 1

        clock += prefill.seconds(traces.prompts[slots.source[entering]], concurrency)

    # The first token of every request comes with its prefill.
    rate = (tokens + asked) / max(clock, 1e-9)
    return LoadFigures(rate, tuple(speeds), verified / max(rounds, 1), tokens / max(rounds, 1))


class _Slots:
    """The progress of each slot's request; host arrays [R]."""

    def __init__(self, traces: Traces, starts: np.ndarray, concurrency: int, cap: int, clipped: bool):
        self.traces, self.starts, self.cap, self.clipped = traces, starts, cap, clipped
        shape = (concurrency,)
        self.source, self.place = np.zeros(shape, int), np.zeros(shape, int)
        self.made, self.wanted, self.since = np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape)
        for slot in range(concurrency):
            self.enter(slot, slot % len(traces.lengths), 0.0)

    def enter(self, slot: int, source: int, now: float) -> None:
        # One token comes with the prefill.
        self.source[slot], self.place[slot], self.made[slot] = source, 0, 1
        self.wanted[slot], self.since[slot] = max(self.traces.lengths[source], 2), now

    @property
    def rows(self) -> np.ndarray:
        counts = self.starts[self.source + 1] - self.starts[self.source]
        return self.starts[self.source] + self.place % counts

    @property
    def ended(self) -> np.ndarray:
        return self.made >= self.wanted

    def proposals(self) -> jax.Array:
        return jnp.asarray(self.traces.logits[self.rows], jnp.float32)

    def view(self, occupancy: Occupancy, tables: ScheduleTables) -> RoundView:
        most = self.wanted - self.made - 1 if self.clipped else self.cap  # as the loop asks adaptive policies
        left = np.broadcast_to(np.clip(most, 0, self.cap), self.made.shape).astype(np.int32)
        lengths = (self.traces.prompts[self.source] + self.made).astype(np.int32)
        active = jnp.ones(left.shape, bool)
        return RoundView(active, jnp.asarray(lengths), jnp.asarray(left), occupancy, tables)

    def advance(self, lengths: np.ndarray) -> tuple[np.ndarray, int]:
        """(drafts accepted [R], tokens made by all)."""
        accepted = np.minimum(self.traces.accepted[self.rows], lengths)
        made = np.minimum(accepted + 1, self.wanted - self.made)
        self.made += made
        self.place += 1
        return accepted.astype(np.int32), int(made.sum())


@partial(jax.jit, static_argnums=0)
def _schedule(
    policy: VerifyPolicy, view: RoundView, logits: jax.Array, state: PolicyState
) -> tuple[jax.Array, jax.Array, RoundView, PolicyState]:
    """(requests that drafted, verify lengths, the policy's view, its state), in the order of the compiled round."""
    drafted, state = policy.drafting(view, state)
    drafted &= view.caps > 0
    view = view._replace(drafted=drafted, caps=jnp.where(drafted, view.caps, 0), confidence=logits)
    lengths, new = policy(view, state)
    state = jax.tree.map(lambda a, b: jnp.where(jnp.any(drafted), a, b), new, state)

    return drafted, jnp.where(drafted, lengths, 0), view, state


@partial(jax.jit, static_argnums=0)
def _learn(
    policy: VerifyPolicy, view: RoundView, lengths: jax.Array, accepted: jax.Array, state: PolicyState
) -> PolicyState:
    return policy.observe(view, lengths, accepted, state)


def _round_seconds(device: SimulatedDevice, occupancy: Occupancy, view: RoundView, tokens: int, drafted: bool) -> float:
    costs = round_costs(device.tables.costs, occupancy, view.active, view.lengths)
    bucket = next((b for b in device.buckets if b >= tokens), device.buckets[-1])
    return float(costs.of(jnp.asarray(bucket)) + costs.drafting) if drafted else float(costs.plain)


def _put(ended: np.ndarray, leaf: jax.Array, fresh: jax.Array) -> jax.Array:
    mask = ended.reshape(ended.shape + (1,) * (leaf.ndim - 1))
    return jnp.where(mask, fresh, leaf)
