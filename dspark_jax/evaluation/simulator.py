"""Simulates an engine under load from recorded proposals and a cost table, for accelerators and loads not at hand.

The policies are the real ones, run on recorded confidences; only drafting, verification and the clock are simulated. A
simulated request replays the proposals of a recorded one in order, whose whole blocks were verified.

Axes: n recorded rounds, m recorded requests, R request slots, K block position.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.errors import UserError
from dspark_jax.scheduling.costs import CostTable, Occupancy, ScheduleTables, round_costs
from dspark_jax.scheduling.policies import PolicyState, RoundView, VerifyPolicy


@dataclass(frozen=True)
class Traces:
    """Recorded rounds that verified the whole block, sorted by request.

    Attributes:
        logits: float32 [n, K], confidence logits.
        accepted: int32 [n], drafts accepted.
        request: int32 [n], the request of each round.
        prompts: int32 [m], tokens of each request's prompt.
        lengths: int32 [m], tokens of each request's answer.
    """

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
    """Seconds of a prefill by compiled width.

    Attributes:
        widths: padded prompt lengths, ascending.
        alone: seconds of one prompt.
        house: seconds of one prompt in every slot at once.
    """

    widths: tuple[int, ...]
    alone: tuple[float, ...]
    house: tuple[float, ...]

    def seconds(self, prompts: np.ndarray, slots: int) -> float:
        """Seconds for prompts of these lengths that arrive together, grouped as in `Engine.admit`."""
        # Prompts are padded to the next compiled width, and those of one width are admitted together.
        places = np.minimum(np.searchsorted(self.widths, prompts), len(self.widths) - 1)
        counts = np.bincount(places, minlength=len(self.widths))
        return sum(
            house if 2 * count > slots else count * alone
            for count, alone, house in zip(counts, self.alone, self.house, strict=True)
        )


NO_PREFILL = Prefill((1,), (0.0,), (0.0,))


@dataclass(frozen=True)
class SimulatedDevice:
    """Costs of a device.

    Attributes:
        tables: costs of rounds.
        buckets: compiled token counts of the verify pass, ascending.
        prefill: of target and drafter.
        plain_prefill: of the target alone, for plain decoding.
        dispatch_seconds: overhead of a dispatch.
        rounds_per_dispatch: rounds at most before the host looks at the slots.
    """

    tables: ScheduleTables
    buckets: tuple[int, ...]
    prefill: Prefill = NO_PREFILL
    plain_prefill: Prefill = NO_PREFILL
    dispatch_seconds: float = 0.0
    rounds_per_dispatch: int = 16


@dataclass(frozen=True)
class LoadFigures:
    """Figures of a run under load.

    Attributes:
        tokens_per_second: over all users.
        user_speeds: tokens a second of each finished request.
        verify_budget: tokens verified per request and round, anchors included.
        tau: accepted length.
    """

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
    """Simulates a closed loop of `concurrency` users, each of whom sends a request when the last one is answered.

    Args:
        policy: the verify policy under study.
        cap: the most drafts verified for a request in a round (0: plain decoding).
        traces: recorded rounds to replay.
        device: its costs.
        concurrency: users, and slots.
        requests: sent by all users together; figures cover the time in which every slot is taken.
        occupancy: the load that the policy sees; None: as profiled.

    Raises:
        UserError: fewer requests than users.
    """
    if requests < concurrency:
        raise UserError(f"{requests} requests cannot keep {concurrency} users busy; simulate at least as many.")

    load = Occupancy.of() if occupancy is None else occupancy
    # [m + 1]: the rounds of request i are starts[i] .. starts[i + 1].
    starts = np.searchsorted(traces.request, np.arange(len(traces.lengths) + 1))
    slots = _Slots(traces, starts, concurrency, cap, clipped=policy.needs_tables)
    fresh = policy.init(concurrency, traces.logits.shape[1])
    state = jax.tree.map(jnp.asarray, fresh)
    prefill = device.prefill if cap else device.plain_prefill
    run, asked, speeds = _Totals(), concurrency, []

    while asked < requests:
        state = _dispatch(policy, device, load, slots, state, run)

        # Between dispatches: ended requests leave their slots to the next ones, whose prompts are prefilled.
        ended = slots.ended
        entering = np.flatnonzero(ended)
        speeds += [slots.wanted[slot] / max(run.clock - slots.since[slot], 1e-9) for slot in entering]
        # A new request starts with fresh statistics; what the slots share stays.
        state = PolicyState(jax.tree.map(partial(_put, ended), state.slots, fresh.slots), state.shared)

        for slot in entering:
            # Recorded requests are replayed in order and over again: users may send more than were recorded.
            slots.enter(int(slot), asked % len(traces.lengths), run.clock)
            asked += 1

        run.clock += prefill.seconds(traces.prompts[slots.source[entering]], concurrency)

    # The first token of every request comes with its prefill.
    rate, rounds = (run.tokens + asked) / max(run.clock, 1e-9), max(run.rounds, 1)
    return LoadFigures(rate, tuple(speeds), run.verified / rounds, run.tokens / rounds)


@dataclass
class _Totals:
    """Simulated seconds, and sums over rounds and requests: tokens committed, rows verified, requests' rounds."""

    clock: float = 0.0
    tokens: int = 0
    verified: int = 0
    rounds: int = 0


def _dispatch(
    policy: VerifyPolicy,
    device: SimulatedDevice,
    load: Occupancy,
    slots: "_Slots",
    state: PolicyState,
    run: _Totals,
) -> PolicyState:
    """Plays rounds until a request ends, at most those of a dispatch, and adds them to `run`."""
    run.clock += device.dispatch_seconds
    for _ in range(device.rounds_per_dispatch):
        view = slots.view(load, device.tables)
        drafted, lengths, view, state = _schedule(policy, view, slots.proposals(), state)
        accepted, made = slots.advance(np.asarray(lengths))
        state = _learn(policy, view, lengths, jnp.asarray(accepted), state)

        # Every request's anchor goes through the target as well.
        passed = int(np.sum(np.asarray(lengths) + 1))
        run.clock += _round_seconds(device, load, view, passed, bool(np.any(np.asarray(drafted))))
        run.tokens += made
        run.verified += passed
        run.rounds += len(slots.made)

        if slots.ended.any():
            break

    return state


class _Slots:
    """Progress of the request in each slot, in host arrays [R]."""

    def __init__(self, traces: Traces, starts: np.ndarray, concurrency: int, cap: int, clipped: bool):
        self.traces, self.starts, self.cap, self.clipped = traces, starts, cap, clipped
        shape = (concurrency,)
        self.source, self.place = np.zeros(shape, int), np.zeros(shape, int)
        self.made, self.wanted, self.since = np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape)
        for slot in range(concurrency):
            self.enter(slot, slot % len(traces.lengths), 0.0)

    def enter(self, slot: int, source: int, now: float) -> None:
        # One token comes with the prefill; a request of one token would never see a round.
        self.source[slot], self.place[slot], self.made[slot] = source, 0, 1
        self.wanted[slot], self.since[slot] = max(self.traces.lengths[source], 2), now

    @property
    def rows(self) -> np.ndarray:
        # A policy that cuts blocks needs more rounds than were recorded: the recording starts again.
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
        """Plays one round; returns (drafts accepted [R], tokens made by all slots)."""
        # Whole blocks were recorded, so a shorter verify length accepts the same prefix, cut.
        accepted = np.minimum(self.traces.accepted[self.rows], lengths)
        made = np.minimum(accepted + 1, self.wanted - self.made)
        self.made += made
        self.place += 1
        return accepted.astype(np.int32), int(made.sum())


@partial(jax.jit, static_argnums=0)
def _schedule(
    policy: VerifyPolicy, view: RoundView, logits: jax.Array, state: PolicyState
) -> tuple[jax.Array, jax.Array, RoundView, PolicyState]:
    """(requests that drafted [R], verify lengths [R], the view, the state), in the compiled round's order of calls."""
    drafted, state = policy.drafting(view, state)
    drafted &= view.caps > 0
    view = view._replace(drafted=drafted, caps=jnp.where(drafted, view.caps, 0), confidence=logits)
    lengths, new = policy(view, state)
    # A round without drafts does not run the policy, so its state is left as it was.
    state = jax.tree.map(lambda a, b: jnp.where(jnp.any(drafted), a, b), new, state)

    return drafted, jnp.where(drafted, lengths, 0), view, state


@partial(jax.jit, static_argnums=0)
def _learn(
    policy: VerifyPolicy, view: RoundView, lengths: jax.Array, accepted: jax.Array, state: PolicyState
) -> PolicyState:
    return policy.observe(view, lengths, accepted, state)


def _round_seconds(device: SimulatedDevice, occupancy: Occupancy, view: RoundView, tokens: int, drafted: bool) -> float:
    # A pass costs as much as the bucket that its tokens are padded to.
    bucket = next((b for b in device.buckets if b >= tokens), device.buckets[-1])
    plain, whole = _seconds(device.tables.costs, occupancy, view.active, view.lengths, np.int32(bucket))
    return float(whole if drafted else plain)


@jax.jit
def _seconds(
    costs: CostTable, occupancy: Occupancy, active: jax.Array, lengths: jax.Array, bucket: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Seconds of a plain round, and of one that drafts and verifies a bucket, by the table at this round's contexts, as
    the compiled round reads it."""
    here = round_costs(costs, occupancy, active, lengths)
    return here.plain, here.of(bucket) + here.drafting


def _put(ended: np.ndarray, leaf: jax.Array, fresh: jax.Array) -> jax.Array:
    # [R] -> [R, 1, ...], against a leaf of any rank.
    mask = ended.reshape(ended.shape + (1,) * (leaf.ndim - 1))
    return jnp.where(mask, fresh, leaf)
