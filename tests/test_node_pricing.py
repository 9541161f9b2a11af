"""Trees priced by node: exact under enumeration, more nodes where rows are cheap, chosen by `auto` where they pay."""

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding.round import LoopParams
from dspark_jax.decoding.sampling import SamplingArrays
from dspark_jax.decoding.trees import NodeRanking, walk
from dspark_jax.decoding.verifiers import Coupled, Draws
from dspark_jax.drafters.trees import TreeShape, grow
from dspark_jax.errors import UserError
from dspark_jax.scheduling.costs import CostTable, Occupancy, ScheduleTables
from dspark_jax.scheduling.history import DraftGuard, History
from dspark_jax.scheduling.nodes import BestNodes
from dspark_jax.scheduling.policies import LookAhead, NodeView, PolicyState, RoundView
from dspark_jax.serving import assembly
from dspark_jax.serving.acceptance import Accepted, load_or_ask
from dspark_jax.serving.assembly import make_loop
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.profiling import Effort, measure_profile, profile_key
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.serving.worth import Worth
from tests.decoding_tiny import kind_pair
from tests.enumeration import World, world
from tests.test_coupled import SLOTS, asked, check
from tests.test_scheduled_loop import pair

HOT = SamplingParams(12, 1.0, mode="coupled")
LEVELS, SHAPE = 2, TreeShape(6, 2)
QUICK = {"guard": DraftGuard(probe_at_most=8), "history": History(slot_decay=0.6, probe_after=2)}


# The law, over every combination of a few clocks


def costs(requests: int) -> CostTable:
    tokens = tuple(requests * n for n in (1, 2, 4, 7))
    return CostTable.of(tokens, (1.0, 1.3, 1.45, 1.75), 0.1)


@partial(jax.jit, static_argnums=(0, 1))
def tree_round(w: "Laws", policy: BestNodes, anchors: Any, noise: Any, state: PolicyState) -> Any:
    """(committed tokens [R, P] behind the anchor, how many, nodes verified, state) as `judge_tree` has it."""
    requests, verifier = anchors.shape[0], Coupled()
    keys = jnp.zeros((requests, 2), jnp.uint32)
    sampling = SamplingArrays(*(jnp.full((requests,), x) for x in (1.0, 0, 1.0, 0.0)))
    draws = Draws(keys, jnp.zeros(requests, jnp.int32), sampling)

    def expand(level: int, tokens: Any, seen: Any) -> Any:
        return verifier.children(jnp.log(w.draft[level][tokens]), level, noise, draws), seen

    tree = grow(anchors, LEVELS, SHAPE, expand, jnp.zeros((requests, 1)))
    ranking = NodeRanking.of(tree, tree.depths[:, 1:] <= LEVELS)
    active, ones = jnp.ones(requests, bool), jnp.ones(requests, jnp.int32)
    view = RoundView(
        active, ones, ranking.counts, Occupancy.of(), ScheduleTables.of(costs(requests), [1.0] * LEVELS),
        nodes=NodeView(ranking.scores),
    )  # fmt: skip
    drafted, state = policy.drafting(view, state)
    view = view._replace(drafted=drafted, caps=jnp.where(drafted, view.caps, 0))
    counts, state = policy(view, state)

    wanted = ranking.first(counts)
    won = verifier.choices(tree, jnp.log(w.target[tree.tokens]), noise, draws)
    path = walk(tree, won, wanted, jnp.ones_like(wanted), LEVELS)
    view = view._replace(
        nodes=NodeView(ranking.scores, ranking.ordered(wanted), ranking.ordered(path.holds(won.shape[1])))
    )
    closed = jnp.all(jnp.take_along_axis(wanted, tree.parents, axis=1) | ~wanted)
    state = policy.observe(view, counts, path.accepted, state)
    drafts = path.along(tree.tokens)[:, 1:]
    made = jnp.where(jnp.arange(LEVELS) < path.accepted[:, None], drafts, path.next_token[:, None])
    made = jnp.concatenate([made, path.next_token[:, None]], axis=1)
    return made, path.accepted + 1, counts, closed, state


class Laws:
    """A world's laws on the device; static, by identity."""

    def __init__(self, w: World) -> None:
        self.target, self.draft = jnp.asarray(w.target), jnp.asarray(w.draft)


@pytest.mark.lossless
@pytest.mark.parametrize("requests", [1, 2])
@pytest.mark.parametrize("guard", [None, "quick"])
def test_priced_trees_give_the_text_of_the_noise(requests: int, guard: str | None) -> None:
    """Vocabulary of three, trees of two levels; all clocks of a round, and the states that they lead to."""
    w, rng = world(), np.random.default_rng(3)
    laws = Laws(w)
    policy = BestNodes(nodes=SHAPE.nodes, **(QUICK if guard else {"guard": None}))
    atoms = rng.exponential(size=(4, w.vocab))
    rows = list(product(range(len(atoms)), repeat=LEVELS + 1))
    chosen = np.array(rows)[:, None] if requests == 1 else rng.integers(0, 4, (96, requests, LEVELS + 1))
    later = rng.integers(0, len(atoms), (*chosen.shape[:2], 3 * (LEVELS + 1)))
    waits = atoms[np.concatenate([chosen, later], axis=2)]

    step = jax.jit(jax.vmap(partial(tree_round, laws, policy)))
    anchors = np.arange(len(waits) * requests).reshape(len(waits), requests) % w.vocab
    text, positions = [anchors], waits.shape[2]
    for at in range(positions):
        text.append(np.argmax(w.target[text[-1]] / waits[:, :, at], axis=-1))
    text = np.stack(text, axis=2)

    done, made, seen = np.zeros_like(anchors), np.full_like(text, -1), set()
    made[:, :, 0] = anchors
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(waits), *x.shape)), policy.init(requests, LEVELS))
    for _ in range(3):
        window = done[:, :, None] + np.arange(LEVELS + 1)
        noise = jnp.asarray(np.take_along_axis(waits, window[..., None], axis=2), jnp.float32)
        last = np.take_along_axis(made, done[:, :, None], axis=2)[:, :, 0]
        found, counts, nodes, closed, states = step(jnp.asarray(last, jnp.int32), noise, states)
        assert np.all(closed), "a node is verified with its parent"
        seen |= set(np.asarray(nodes).ravel().tolist())
        for g, r in np.ndindex(*done.shape):
            n = int(counts[g, r])
            made[g, r, done[g, r] + 1 : done[g, r] + 1 + n] = np.asarray(found)[g, r, :n]
            done[g, r] += n
    np.testing.assert_array_equal(np.where(made >= 0, text, -1), made)
    assert done.max() > 4 and len(seen) >= 2, "the policy is to choose in this world"


@pytest.mark.lossless
@pytest.mark.long
def test_the_text_is_that_of_plain_decoding(record_property: Any) -> None:
    """200 seeds through the loop, with costs under which trees are cut to what is worth its rows."""
    target, drafter = pair()
    config = EngineConfig(SLOTS, 64, "retrospective", tree=16, buckets=(4, 12, 28, 68))
    seconds = CostTable.of(config.buckets, (1.0, 1.2, 1.6, 2.4), 0.1, plain=1.0)
    tables = ScheduleTables.of(seconds, [1.0] * drafter.config.block_size)
    engine = Engine(target, drafter, config, SamplingParams(mode="coupled"), tables=tables)
    assert isinstance(engine.loop.policy, BestNodes)
    for i, request in enumerate(asked()):
        engine.submit(i, request)
    done: dict[int, Any] = {}
    while not engine.idle:
        done |= {p.index: p.generation for p in engine.step() if p.generation is not None}
    check([done[i] for i in range(200)], "trees by node", record_property)


# Prices


def admitted(scores: Any, seconds: Any, load: float = 1.0, state: Any = None, **law: Any) -> list[int]:
    """Nodes of each request that are verified at these costs of 2, 4, 8 and 14 rows."""
    policy = BestNodes(nodes=6, guard=None, **law)
    scores = jnp.asarray(scores, jnp.float32)
    requests = len(scores)
    table = ScheduleTables.of(CostTable.of((2, 4, 8, 14), seconds, 0.1), [1.0] * LEVELS)
    active, ones = jnp.ones(requests, bool), jnp.ones(requests, jnp.int32)
    view = RoundView(active, ones, 6 * ones, Occupancy.of(load), table, active, nodes=NodeView(scores))
    return policy(view, policy.init(requests, LEVELS) if state is None else state)[0].tolist()


SURE, UNSURE = np.log([0.9, 0.8, 0.1, 0.05, 0.01, 0.01]), np.log([0.5, 0.4, 0.3, 0.3, 0.2, 0.2])


def test_nodes_are_verified_as_far_as_they_pay() -> None:
    assert admitted([UNSURE, UNSURE], (1.0, 1.0, 1.0, 1.0)) == [6, 6], "rows cost nothing"
    assert admitted([UNSURE, UNSURE], (1.0, 3.0, 9.0, 20.0)) == [0, 0], "rows cost more than they bring"
    # A bucket of eight rows: six nodes, of which the sure request has its two good ones and the other the rest.
    assert admitted([SURE, UNSURE], (1.0, 1.1, 1.5, 4.0)) == [2, 4]
    assert admitted([SURE, UNSURE], (1.0, 1.1, 1.5, 4.0), load=2.0) == [2, 0], "under load rows are dearer"


def test_values_are_held_against_what_was_accepted() -> None:
    """Paths that the drafter thinks likely and the target never goes: their rows are given up."""
    policy = BestNodes(nodes=6, guard=None)
    state, seconds = policy.init(2, LEVELS), (1.0, 1.3, 1.5, 1.8)
    assert admitted([UNSURE, UNSURE], seconds, state=state) == [6, 6]
    scores = jnp.asarray([UNSURE, UNSURE], jnp.float32)
    every, none = jnp.ones((2, 6), bool), jnp.zeros((2, 6), bool)
    ones = jnp.ones(2, jnp.int32)
    view = RoundView(ones > 0, ones, 6 * ones, Occupancy.of(), None, ones > 0, nodes=NodeView(scores, every, none))
    for _ in range(60):
        state = policy.observe(view, 2 * ones, 0 * ones, state)
    assert admitted([UNSURE, UNSURE], seconds, state=state) == [0, 0]
    memory = state.shared.own
    assert memory.rounds == 120 and not memory.reached.any()
    assert state.slots.verified[0] == pytest.approx(
        6 * sum(policy.history.slot_decay**i for i in range(60)), rel=1e-3
    ), "six rows a round"


# What `auto` chooses


def measured(monkeypatch: pytest.MonkeyPatch, step: float, chain: Accepted, tree: Accepted) -> None:
    """Profiles of one second and `step` a rung, a draft of 0.1; the acceptance of either shape."""

    def profile(loop: Any, *_: Any) -> Any:
        rounds = [1.0 + step * (tokens - loop.buckets[0]) / loop.requests for tokens in loop.buckets]
        made = CostTable.of(loop.buckets, rounds, 0.1, plain=1.0, dispatch=0.0, alone=1.0)
        return SimpleNamespace(cost_table=lambda: made)

    monkeypatch.setattr(assembly, "load_or_measure", profile)
    monkeypatch.setattr(assembly, "load_or_ask", lambda *given: chain if given[2].tree is None else tree)


def test_trees_are_taken_where_the_profile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = kind_pair("dspark")  # blocks of 3
    chain = Accepted((10, 5, 2), (5, 2, 1))
    tree = Accepted((10,) * 8, (5, 3, 2, 2, 1, 1, 1, 1), tree=True)
    assert tree.expected == pytest.approx([1, 1.5, 1.8, 2.0, 2.2, 2.3, 2.4, 2.5, 2.6])
    config = EngineConfig(2, 32, tree=8)

    measured(monkeypatch, 0.02, chain, tree)
    engine = Engine(target, drafter, config, HOT)
    assert isinstance(engine.loop.policy, BestNodes) and engine.loop.tree == TreeShape(8)
    assert engine.why.startswith("trees, node by node: drafts where that pays; a round of whole trees of 8 nodes")
    assert "trees of 8 nodes 2.13 and chains 1.57 times as fast as plain decoding" in engine.why

    # The same acceptance where rows are dear: a chain's few are worth more.
    measured(monkeypatch, 0.2, chain, tree)
    engine = Engine(target, drafter, config, HOT)
    assert isinstance(engine.loop.policy, LookAhead) and engine.loop.tree is None
    measured(monkeypatch, 5.0, chain, tree)
    assert Engine(target, drafter, replace(config, slots=1), HOT).drafter is None, (
        "one slot: every draft opens a bucket"
    )


def test_what_cannot_be_compared_is_refused() -> None:
    target, drafter = kind_pair("dspark")
    config = EngineConfig(2, 32, tree=9)
    with pytest.raises(UserError, match="leave sps and buckets out"):
        Engine(target, drafter, replace(config, sps=Path("sps.json")), HOT)
    with pytest.raises(UserError, match="BestNodes looks at the tokens whose verification it decides"):
        Engine(target, drafter, config, SamplingParams(temperature=1.0))
    with pytest.raises(UserError, match="chooses among 8 nodes of draft trees; found trees of 9 nodes"):
        Engine(target, drafter, config, HOT, strategy=BestNodes(nodes=8))
    with pytest.raises(UserError, match="found chains"):
        Engine(target, drafter, EngineConfig(2, 32), HOT, strategy=BestNodes(nodes=8))


@pytest.mark.long
def test_a_tree_has_costs_and_an_acceptance_of_its_own(tmp_path: Path) -> None:
    """Rounds are timed at every bucket of nodes; the pair is asked how often each rank is on the accepted path."""
    target, drafter = kind_pair("dspark")
    config = EngineConfig(2, 64, tree=8, buckets=(2, 8, 18))
    loop = make_loop(target, drafter, config, BestNodes(nodes=8), Coupled())
    chains = make_loop(target, drafter, replace(config, tree=0, buckets=(2, 8)), LookAhead(), Coupled())
    params = LoopParams(target.params, drafter.params)
    assert profile_key(loop, params, 1.0)["tree"] == "TreeShape(nodes=8, branching=4)"
    assert "tree" not in profile_key(chains, params, 1.0)
    profile = measure_profile(loop, params, 1.0, (0.5,), Effort(1, 1))
    assert profile.tokens == (2, 8, 18) and len(profile.rounds[0]) == 3

    tables = ScheduleTables.of(profile.cost_table(), [1.0] * 3)
    found = load_or_ask(target, drafter, loop, params._replace(tables=tables), config, HOT, tmp_path)
    assert found.tree and len(found.judged) == 8 and found.judged[0] > 50
    assert found.accepted[0] > found.accepted[-1] and 1.0 < found.expected[-1] <= 4.0
    assert load_or_ask(target, drafter, loop, params._replace(tables=tables), config, HOT, tmp_path) == found
    bound = Worth.of(tables.costs, loop, None)
    assert bound.tokens == 4.0, "no path is longer than three drafts"


@pytest.mark.long
def test_a_cut_tree_keeps_its_best_nodes() -> None:
    """`verify_length` counts nodes: two of them are the best path or the two best children."""
    target, drafter = pair()
    given = asked()[:24]
    cut = [replace(r, sampling=replace(r.sampling, verify_length=2)) for r in given]
    config = EngineConfig(SLOTS, 64, "fixed", tree=16)
    whole, few = (generate(target, drafter, requests, engine=config) for requests in (given, cut))
    assert sum(a.tokens != b.tokens for a, b in zip(whole, few, strict=True)) <= 1
    accepted = [sum(sum(g.accepted_at) for g in made) for made in (whole, few)]
    assert 0 < accepted[1] < accepted[0] and not any(sum(g.accepted_at[2:]) for g in few)
