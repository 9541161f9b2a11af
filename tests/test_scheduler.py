"""Policies as functions: what they may choose, what moves them, what they remember. The loop is in other tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_jax.errors import UserError
from dspark_jax.scheduling.calibration import Online, Static
from dspark_jax.scheduling.costs import (
    CostTable,
    LoadMeter,
    Occupancy,
    RoundCosts,
    ScheduleTables,
    below,
    round_costs,
)
from dspark_jax.scheduling.history import DraftGuard, History
from dspark_jax.scheduling.policies import Asynchronous, Causal, LookAhead, RoundView, Threshold
from dspark_jax.scheduling.ranking import rank, survival

R, K = 3, 4
POLICIES = [Causal(), LookAhead(), Asynchronous(), Causal(guard=None, min_gain=0.0)]
CHOOSE = [jax.jit(lambda view, state, policy=policy: policy(view, state)) for policy in POLICIES]
TOKENS = (3, 5, 8, 11, 15)

logits = st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.7, 2.0, 5.0]), min_size=R * K, max_size=R * K)
caps = st.lists(st.integers(0, K), min_size=R, max_size=R)
loads = st.sampled_from([0.5, 1.0, 2.0, 8.0])


def view(z: Any, cap: Any, load: float = 1.0, seconds: Any = (1.0, 1.2, 1.3, 1.9, 2.0)) -> RoundView:
    tables = ScheduleTables.of(CostTable.of(TOKENS, seconds, 0.1), [1.0] * K)
    active, cap = jnp.ones(R, bool), jnp.asarray(cap, jnp.int32)
    grid = jnp.asarray(z, jnp.float32).reshape(R, K)
    return RoundView(active, 9 * jnp.ones(R, jnp.int32), cap, Occupancy.of(load), tables, cap > 0, grid)


def lengths_of(index: int, shown: RoundView, rounds: int = 1) -> np.ndarray:
    state = POLICIES[index].init(R, K)
    for _ in range(rounds):
        lengths, state = CHOOSE[index](shown, state)
    return np.asarray(lengths)


# Properties


@settings(max_examples=60, deadline=None)
@given(logits, caps, loads, st.integers(0, len(POLICIES) - 1))
def test_lengths_are_the_best_prefixes_within_caps(z: Any, cap: Any, load: float, index: int) -> None:
    """Every length is within its cap, and nothing left out survives better than something let in."""
    shown = view(z, cap, load)
    lengths = lengths_of(index, shown, rounds=3)
    assert np.all((lengths >= 0) & (lengths <= cap))
    a = np.asarray(survival(jax.nn.sigmoid(shown.confidence)))
    inside = np.arange(K) < lengths[:, None]
    out = (np.arange(K) < np.asarray(cap)[:, None]) & ~inside
    assert not inside.any() or not out.any() or a[inside].min() >= a[out].max()


@settings(max_examples=40, deadline=None)
@given(logits, caps, loads)
def test_a_bucket_that_is_paid_for_is_full(z: Any, cap: Any, load: float) -> None:
    for index, policy in enumerate(POLICIES):
        if isinstance(policy, LookAhead | Asynchronous):
            lengths = lengths_of(index, view(z, cap, load), rounds=3)
            assert R + lengths.sum() in TOKENS or lengths.sum() == sum(cap)


@settings(max_examples=40, deadline=None)
@given(logits, caps, loads, st.permutations(range(R)), st.integers(0, len(POLICIES) - 1))
def test_slots_do_not_matter(z: Any, cap: Any, load: float, order: Any, index: int) -> None:
    """Requests in other slots get the same lengths; tied ones share the same total, but where a forecast of the drafts
    that remain depends on which of them was let in first."""
    grid = np.asarray(z).reshape(R, K) + 0.013 * np.arange(1, R + 1)[:, None]  # rows differ: no ties between requests
    one = lengths_of(index, view(grid, cap, load), rounds=3)
    other = lengths_of(index, view(grid[list(order)], np.asarray(cap)[list(order)], load), rounds=3)
    np.testing.assert_array_equal(other, one[list(order)])
    tied = np.tile(np.asarray(z[:K]), (R, 1))
    if not isinstance(POLICIES[index], LookAhead):
        totals = [lengths_of(index, view(tied, c, load), 3).sum() for c in (cap, np.asarray(cap)[list(order)])]
        assert totals[0] == totals[1]


@settings(max_examples=40, deadline=None)
@given(logits, caps, st.integers(0, R * K))
def test_ranked_drafts_are_prefixes_even_when_tied(z: Any, cap: Any, count: int) -> None:
    shown = view(z, cap)
    a = survival(jax.nn.sigmoid(shown.confidence))
    ranked = rank(a, shown.caps)
    assert int(ranked.valid.sum()) == sum(cap)
    lengths = np.asarray(ranked.lengths(jnp.minimum(count, int(ranked.valid.sum()))))
    assert lengths.sum() == min(count, sum(cap)) and np.all(lengths <= cap)
    chosen = np.sort(np.asarray(a)[np.arange(K) < lengths[:, None]])[::-1]
    np.testing.assert_array_equal(chosen, np.asarray(ranked.survival)[: lengths.sum()])


@settings(max_examples=30, deadline=None)
@given(logits, caps, st.integers(0, len(POLICIES) - 1))
def test_later_drafts_are_not_seen(z: Any, cap: Any, index: int) -> None:
    """Confidences behind the length that was chosen, and behind the next draft's, could be anything."""
    lengths = lengths_of(index, view(z, cap))
    hidden = np.arange(K) > lengths[:, None]  # c of the draft at the frontier is shown; those behind it are not
    other = np.where(hidden, -2.0, np.asarray(z).reshape(R, K))
    lower = lengths_of(index, view(other, cap))
    np.testing.assert_array_equal(lower, lengths)


# What moves a policy


def test_algorithm_one_by_hand() -> None:
    """SPS falls by a fixed cost a token: admit while the survival is worth more than that."""
    tables = ScheduleTables.of(CostTable.of(range(1, 6), [1.0, 1.1, 1.2, 1.3, 1.4]), [1.0] * K)
    z = np.log(np.array([[0.9, 0.9, 0.1, 0.9]]) / (1 - np.array([[0.9, 0.9, 0.1, 0.9]])))
    one = jnp.ones(1, jnp.int32)
    shown = RoundView(one > 0, one, K * one, Occupancy.of(), tables, one > 0, jnp.asarray(z, jnp.float32))
    policy = Causal(guard=None, min_gain=0.0)
    # 1 -> 1.9/1.1 -> 2.71/1.2 -> 2.791/1.3: the third does not gain.
    assert policy(shown, policy.init(1, K))[0].tolist() == [2]
    busy = shown._replace(occupancy=Occupancy.of(9.0))  # a token costs 0.9: 1 -> 1.9/1.9 does not gain
    assert policy(busy, policy.init(1, K))[0].tolist() == [0]
    # With 0.2 of drafting, 1.8 under that load: 1/2.8 -> 1.9/3.7 -> 2.71/4.6 -> 2.791/5.5.
    drafting = CostTable.of(range(1, 6), [1.0, 1.1, 1.2, 1.3, 1.4], 0.2)
    shown = busy._replace(tables=ScheduleTables.of(drafting, [1.0] * K))
    assert policy(shown, policy.init(1, K))[0].tolist() == [2]


def test_look_ahead_crosses_edges_that_stop_algorithm_one() -> None:
    shown = view(np.full((R, K), 2.0), [K] * R, seconds=(1.0, 1.5, 1.52, 1.55, 1.6))
    assert lengths_of(0, shown).sum() == 0 and lengths_of(1, shown).tolist() == [K] * R
    never = view(np.full((R, K), -3.0), [K] * R, seconds=(1.0, 1.5, 1.52, 1.55, 1.6))
    assert lengths_of(1, never).sum() == 0


def test_capacity_of_asynchronous_is_two_rounds_old() -> None:
    """A change of confidences changes who is let in at once, and how many only from the second round on."""
    policy, choose = POLICIES[2], CHOOSE[2]
    good, bad = view(np.full((R, K), 3.0), [K] * R), view(np.full((R, K), -5.0), [K] * R)
    state, totals = policy.init(R, K), []
    for shown in (good, good, good, bad, bad, bad, bad):
        lengths, state = choose(shown, state)
        totals.append(int(lengths.sum()))
    assert totals == [12, 12, 12, 12, 12, 0, 0]


@pytest.mark.parametrize("factor", ["load", "signal"])
def test_every_part_of_occupancy_counts(factor: str) -> None:
    shown = view(np.full((R, K), 1.5), [K] * R)
    for index in (0, 1, 2):
        idle = lengths_of(index, shown, 3).sum()
        busy = lengths_of(index, shown._replace(occupancy=Occupancy.of(**{factor: 6.0})), 3).sum()
        assert busy < idle, POLICIES[index]


@pytest.mark.parametrize("index", range(len(POLICIES)))
def test_caps_alone_decide_while_rounds_are_profiled(index: int) -> None:
    """With confidences so low that survival underflows, drafts that are all rejected, and drafting that never pays."""
    policy, cap = POLICIES[index], jnp.asarray([4, 2, 3])
    costs = CostTable.of(TOKENS, (1.0, 1.2, 1.3, 1.9, 2.0), 50.0)
    shown = view(np.full((R, K), -60.0), cap)._replace(tables=ScheduleTables.of(costs, [1.0] * K, forced=True))
    state = policy.init(R, K)
    for _ in range(6):
        drafted, state = policy.drafting(shown, state)
        lengths, state = CHOOSE[index](shown._replace(drafted=drafted), state)
        assert drafted.all() and lengths.tolist() == [4, 2, 3]
        state = policy.observe(shown._replace(drafted=drafted), lengths, jnp.zeros_like(lengths), state)


def test_costs_follow_contexts_and_active_requests() -> None:
    table = CostTable.of((2, 4), [[1.0, 2.0], [3.0, 6.0]], [0.5, 0.7], (0.0, 100.0))
    active = jnp.asarray([True, True, False])
    costs = round_costs(table, Occupancy.of(), active, jnp.asarray([40, 60, 999]))
    np.testing.assert_allclose(costs.seconds, [2.0, 4.0], rtol=1e-6)
    assert float(costs.drafting) == pytest.approx(0.6) and int(costs.base) == 2
    assert float(costs.of(jnp.int32(3))) == pytest.approx(4.0)
    busy = round_costs(table, Occupancy.of(2.0, 1.5), active, jnp.asarray([40, 60, 999]))
    np.testing.assert_allclose(busy.seconds, [2.0, 2.0 + 3 * 2.0], rtol=1e-6)
    assert float(busy.drafting) == pytest.approx(3 * 0.6)
    far = round_costs(table, Occupancy.of(), active, jnp.asarray([500, 700, 0]))
    np.testing.assert_allclose(far.seconds, [3.0, 6.0], rtol=1e-6)


def test_bad_tables_and_factors_are_refused() -> None:
    for tokens, seconds in (((2, 2), [1.0, 2.0]), ((1, 2), [1.0]), ((1, 2), [1.0, -1.0]), ((), [])):
        with pytest.raises(UserError, match="cost table"):
            CostTable.of(tokens, seconds)
    with pytest.raises(UserError, match="signal is 0"):
        Occupancy.of(signal=0.0)
    with pytest.raises(UserError, match="needs measured costs"):
        Causal()(view(np.zeros((R, K)), [K] * R)._replace(tables=None), Causal().init(R, K))
    with pytest.raises(UserError, match="needs a drafter with a confidence head"):
        Threshold(0.5)(view(np.zeros((R, K)), [K] * R)._replace(confidence=None), Threshold(0.5).init(R, K))


def test_the_meter_averages_and_forgives_a_clock() -> None:
    meter = LoadMeter()
    assert meter.update(1.1, 1.0) == 1.0 and meter.update(0.0, 0.0) == 1.0
    # What slows all rounds alike is no load.
    assert [meter.update(1.4, 1.0) for _ in range(8)][-1] == 1.0
    meter = LoadMeter()
    loads = [meter.update(4.0, 1.0) for _ in range(2)]
    assert loads[0] == pytest.approx(2.5) and loads[1] == pytest.approx(3.25)
    for _ in range(8):
        load = meter.update(1.0, 1.0)
    assert load == 1.0 and LoadMeter().update(1e9, 1.0) <= 16.0


# What it remembers


def play(
    policy: Any, accepted: Any, rounds: int, drafting: float, state: Any = None, ending_every: int = 0
) -> tuple[list[np.ndarray], Any]:
    """Rounds in which request r gets accepted[r] drafts at most; who drafted in each. Every so many rounds
    (`ending_every`) all are at their last token, where no draft could be kept."""
    seconds = (1.0, 1.05, 1.1, 1.15, 1.2)
    tables = ScheduleTables.of(CostTable.of(TOKENS, seconds, drafting), [1.0] * K)
    shown = view(np.full((R, K), 3.0), [K] * R)._replace(tables=tables, drafted=None, confidence=None)
    state, drafted = policy.init(R, K) if state is None else state, []

    @jax.jit
    def one(state: Any, caps: Any) -> Any:
        flags, state = policy.drafting(shown._replace(caps=caps), state)
        seen = shown._replace(drafted=flags, caps=jnp.where(flags, caps, 0), confidence=jnp.full((R, K), 3.0))
        lengths, state = policy(seen, state)
        return flags, policy.observe(seen, lengths, jnp.minimum(lengths, jnp.asarray(accepted)), state)

    for i in range(rounds):
        ending = ending_every and i % ending_every == ending_every - 1
        flags, state = one(state, jnp.zeros_like(shown.caps) if ending else shown.caps)
        drafted.append(np.asarray(flags))
    return drafted, state


def test_drafting_stops_where_it_does_not_pay_and_is_tried_again() -> None:
    """Nothing is accepted: off within some rounds, then probes ever further apart, all requests in the same round."""
    drafted, state = play(LookAhead(), [0, 0, 0], 400, 0.5)
    rounds = np.array(drafted)
    assert rounds[0].all() and not rounds[20].any() and np.all(rounds.all(axis=1) == rounds.any(axis=1))
    probes = np.flatnonzero(rounds[40:].all(axis=1)) + 40
    gaps = np.diff(probes)
    assert len(probes) >= 2 and np.all(gaps[1:] > gaps[:-1]) and rounds.sum() < 0.15 * rounds.size
    again, _ = play(LookAhead(), [4, 4, 4], 600, 0.5, state)
    assert np.array(again)[-50:].all(), "it comes back once drafts are accepted again"


def test_the_wait_for_a_probe_outlives_the_request() -> None:
    """Requests of 40 rounds one after the other: probes stay as rare as in one long request."""
    long, short = (np.array(play(LookAhead(), [0, 0, 0], 600, 0.5, ending_every=n)[0])[40:, 0] for n in (0, 40))
    assert 2 <= short.sum() <= long.sum() + 1


def test_one_bad_request_is_set_aside_alone() -> None:
    drafted, _ = play(LookAhead(), [4, 0, 4], 80, 0.05)
    # Its memory starts at the others' mean and fades over some twenty rounds.
    rounds = np.array(drafted)[40:]
    assert rounds[:, 0].all() and rounds[:, 2].all() and rounds[:, 1].mean() < 0.2


def test_drafting_goes_on_where_it_pays() -> None:
    assert np.array(play(LookAhead(), [4, 4, 4], 100, 0.5)[0]).all()
    assert np.array(play(LookAhead(guard=None), [0, 0, 0], 50, 5.0)[0]).all()


def test_history_counts_by_position() -> None:
    history = History(slot_decay=1.0, shared_decay=1.0, prior_rounds=1.0)
    slots, shared = history.init_slots(2), history.init_shared(3)
    before = np.asarray(history.conditional(shared))
    drafted = jnp.asarray([True, False])
    slots, shared = history.learn(slots, shared, drafted, jnp.asarray([3, 3]), jnp.asarray([1, 3]))
    assert shared.hits.tolist() == [1, 0, 0] and shared.tries.tolist() == [1, 1, 0]
    after = np.asarray(history.conditional(shared))
    assert after[0] > before[0] and after[1] < before[1] and after[2] == before[2]
    assert slots.rounds.tolist() == [1, 0] and slots.accepted.tolist() == [1, 0]
    mine, other = np.asarray(history.expected(slots, shared)[0])
    assert mine < other


def test_guard_without_drafters_says_so() -> None:
    """No request able to draft: none does, and none counts as disabled."""
    history, table = History(), CostTable.of(TOKENS, [1.0] * 5, 0.1)
    slots, shared = history.init_slots(R), history.init_shared(K)
    costs = round_costs(table, Occupancy.of(), jnp.ones(R, bool), jnp.ones(R, jnp.int32))
    drafts, slots, shared = DraftGuard()(history, costs, jnp.zeros(R, bool), slots, shared)
    assert not drafts.any() and not slots.off.any() and int(shared.since) == 0


@pytest.mark.parametrize(("accepted", "doubt", "drafts"), [(0.47, 0.5, True), (0.47, 0.0, False), (0.4, 0.5, False)])
def test_means_near_the_break_even_are_doubted(accepted: float, doubt: float, drafts: bool) -> None:
    """A draft pass costs half a token of each request; twenty rounds tell its worth to a tenth or two."""
    history, table = History(), CostTable.of(TOKENS, [1.0] * 5, 0.5)
    slots, shared = history.init_slots(R), history.init_shared(K)
    full = jnp.full(R, 1 / (1 - history.slot_decay), jnp.float32)
    slots = slots._replace(rounds=full, accepted=accepted * full, verified=full)
    costs = round_costs(table, Occupancy.of(), jnp.ones(R, bool), jnp.ones(R, jnp.int32))
    found, _, _ = DraftGuard(doubt=doubt)(history, costs, jnp.ones(R, bool), slots, shared)
    assert found.tolist() == [drafts] * R


@pytest.mark.parametrize(("requests", "told", "drafts"), [(R, 8.0, True), (R, 150.0, False), (1, 150.0, True)])
def test_requests_together_are_doubted_by_the_rounds_of_all(requests: int, told: float, drafts: bool) -> None:
    """New requests of 0.38 accepted drafts where 0.5 would pay: 150 rounds of others leave no doubt of it. One alone is
    doubted as before: earlier requests may have been of another kind."""
    history, table = History(), CostTable.of(TOKENS, [1.0] * 5, 0.5)
    slots, shared = history.init_slots(R), history.init_shared(K)
    shared = shared._replace(
        rounds=jnp.float32(told), accepted=jnp.float32(0.38 * told), verified=jnp.float32(told), off=jnp.asarray(False)
    )
    active = jnp.arange(R) < requests
    costs = round_costs(table, Occupancy.of(), active, jnp.ones(R, jnp.int32))
    found, _, _ = DraftGuard()(history, costs, active, slots, shared)
    assert found.tolist() == [drafts] * requests + [False] * (R - requests)


def test_drafting_that_pays_shortens_the_wait_for_a_probe_little_by_little() -> None:
    history, table = History(), CostTable.of(TOKENS, [1.0] * 5, 0.1)
    costs = round_costs(table, Occupancy.of(), jnp.ones(R, bool), jnp.ones(R, jnp.int32))
    slots, shared = history.init_slots(R), history.init_shared(K)
    shared, waits = shared._replace(interval=jnp.asarray(256, jnp.int32)), []
    for _ in range(30):
        drafts, slots, shared = DraftGuard()(history, costs, jnp.ones(R, bool), slots, shared)
        assert drafts.all()
        waits.append(int(shared.interval))
    assert waits[:3] == [224, 196, 172] and waits[-1] == history.probe_after


# Calibration in the loop


def test_online_temperatures_find_the_truth() -> None:
    """Over-confident by a factor of 2.5 and a shift, under-confident at the next position: both are learnt from what
    was verified, and positions that never are keep what they have."""
    rng, online = np.random.default_rng(0), Online()
    state, t = online.init(3), jnp.ones(3)
    truth = np.array([1 / 2.5, 1.6, 1.0])
    observe = jax.jit(online.observe)
    for _ in range(300):
        z = rng.normal(0.5, 2.0, (16, 3)).astype(np.float32)
        hit = rng.random((16, 3)) < 1 / (1 + np.exp(-z * truth - [-0.8, 0.0, 0.0]))
        accepted = np.cumprod(hit, axis=1).sum(axis=1)
        state = observe(z, t, jnp.full(16, 2), np.minimum(accepted, 2), state)
    np.testing.assert_allclose(np.asarray(state.scale), [truth[0], truth[1], 1.0], rtol=0.15)
    np.testing.assert_allclose(np.asarray(state.shift), [-0.8, 0.0, 0.0], atol=0.15)
    assert state.scale[2] == 1.0 and state.shift[2] == 0.0
    got = online(jnp.ones((1, 3)), 2 * t, state)
    np.testing.assert_allclose(got, jax.nn.sigmoid(state.scale / 2 + state.shift)[None], rtol=1e-6)


def test_static_temperatures_divide() -> None:
    z, t = jnp.asarray([[1.0, -2.0]]), jnp.asarray([2.0, 0.5])
    np.testing.assert_allclose(Static()(z, t, ()), jax.nn.sigmoid(jnp.asarray([[0.5, -4.0]])))


def test_without_a_confidence_head_history_stands_in() -> None:
    policy = LookAhead(guard=None)
    shown = view(np.zeros((R, K)), [K] * R)._replace(confidence=None)
    state = policy.init(R, K)
    hopeful = policy(shown, state)[0].sum()
    for _ in range(60):
        lengths, state = policy(shown, state)
        state = policy.observe(shown, lengths, jnp.zeros(R, jnp.int32), state)
    assert policy(shown, state)[0].sum() < hopeful


@pytest.mark.parametrize("rungs", [[3], [1, 5], [1, 5, 8]])
def test_tables_are_searched_as_numpy_searches(rungs: list[int]) -> None:
    values = np.linspace(0, 10, 41)
    np.testing.assert_array_equal(below(jnp.asarray(rungs), jnp.asarray(values)), np.searchsorted(rungs, values))
    seconds = np.asarray(rungs, np.float32) ** 1.5
    zero = jnp.zeros(())
    costs = RoundCosts(jnp.asarray(rungs), jnp.asarray(seconds), zero, jnp.int32(1), zero)
    found = [float(costs.between(jnp.float32(value))) for value in values]
    np.testing.assert_allclose(found, np.interp(values, rungs, seconds), rtol=1e-6)
