"""Chains with siblings under recursive rejection: the law by enumeration, wrong rules caught by it, decoding."""

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding.siblings import Outcome, judge_children
from dspark_jax.errors import UserError
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from tests.decoding_tiny import kind_pair, prompts
from tests.enumeration import world
from tests.test_lossless import SLOTS, p_value, samples
from tests.test_lossless import exact_law as exact_law_of

pytestmark = pytest.mark.lossless

EDGE = 1e-6
V, C = 3, 2


def chances(p: np.ndarray, q: np.ndarray, children: tuple[int, ...]) -> list[float]:
    """Acceptance probability of each child, given that those before it were rejected: the rule in float64."""
    p, q, made = p.copy(), q.copy(), []
    for x in children:
        made.append(min(1.0, p[x] / q[x]) if q[x] > 0 else 0.0)
        rest = np.maximum(p - q, 0)
        p = rest / rest.sum() if rest.sum() > 1e-12 else p
        q[x] = 0
        q = q / q.sum() if q.sum() > 0 else q
    return made


def level_law(p: np.ndarray, q: np.ndarray, judge: Callable[..., Outcome]) -> dict[tuple[int, int], float]:
    """{(accepted child, token): probability} of one level, over all draws without replacement and all uniforms. The
    child is C where none is accepted, and the token then of the residual."""
    cases, weights, uniforms = [], [], []
    for children in permutations(range(V), C):
        drawn, left = 1.0, 1.0
        for x in children:
            drawn, left = drawn * q[x] / left, left - q[x]
            if left < 1e-12:
                break
        edges = np.array(chances(p, q, children))
        for sides in product((False, True), repeat=C):
            cases.append(children)
            weights.append(drawn * np.prod(np.where(sides, 1 - edges, edges)))
            uniforms.append(np.clip(np.where(sides, edges + EDGE, edges - EDGE), 0, 1 - EDGE))

    count = len(cases)
    laws = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), (count, 1, V)) for x in (q, p))
    given = jnp.asarray(cases, jnp.int32)[:, None], *laws, jnp.asarray(uniforms, jnp.float32)[:, None]
    found = jax.device_get(jax.jit(judge)(*given, jnp.ones(count, bool)))
    made: dict[tuple[int, int], float] = {}
    for children, weight, child, residual in zip(cases, weights, found.child[:, 0], found.residual[:, 0], strict=True):
        for token in range(V):
            chance = weight * (residual[token] if child == C else float(children[min(child, C - 1)] == token))
            made[int(child), token] = made.get((int(child), token), 0.0) + chance
    return made


def round_law(anchor: int, judge: Callable[..., Outcome], levels: int = 2) -> np.ndarray:
    """[V, V, V] law of the next levels + 1 tokens of a round of 2 levels, the target going on alone behind it."""
    w, law = world(), np.zeros((V,) * (levels + 1))

    def go_on(committed: tuple[int, ...], weight: float) -> None:
        if len(committed) == levels + 1:
            law[committed] += weight
            return
        for token in range(V):
            go_on((*committed, token), weight * w.target[committed[-1]][token])

    def play(committed: tuple[int, ...], weight: float) -> None:
        before, level = committed[-1] if committed else anchor, len(committed)
        if level == levels:
            go_on(committed, weight)
            return
        for (child, token), chance in level_law(w.target[before], w.draft[level, before], judge).items():
            # Behind the chain's own child the next level is judged; behind a sibling or a residual the target goes on.
            (play if child == 0 else go_on)((*committed, token), weight * chance)

    play((), 1.0)
    return law


def exact_law(anchor: int) -> np.ndarray:
    return world().continuations(anchor).reshape(V, V, V, V).sum(-1)


def test_a_round_follows_the_targets_law() -> None:
    for anchor in range(V):
        assert np.abs(round_law(anchor, judge_children) - exact_law(anchor)).max() < 1e-6


def test_wrong_orders_and_residuals_are_caught() -> None:
    """Siblings sorted by the drafter's law, and a residual of the first rejection alone."""

    def by_law(children: Any, q: Any, p: Any, u: Any, stochastic: Any) -> Outcome:
        order = jnp.argsort(-jnp.take_along_axis(q, children, axis=-1), axis=-1)
        found = judge_children(jnp.take_along_axis(children, order, axis=-1), q, p, u, stochastic)
        own = jnp.take_along_axis(order, jnp.minimum(found.child, C - 1)[..., None], axis=-1)[..., 0]
        return Outcome(jnp.where(found.child < C, own, C), found.residual)

    def first_alone(children: Any, q: Any, p: Any, u: Any, stochastic: Any) -> Outcome:
        found = judge_children(children, q, p, u, stochastic)
        rest = jnp.maximum(p - q, 0)
        return Outcome(found.child, rest / rest.sum(-1, keepdims=True))

    for wrong in (by_law, first_alone):
        assert max(np.abs(round_law(a, wrong) - exact_law(a)).max() for a in range(V)) > 1e-3


def admitting(allows: Callable[[Any], Any]) -> Callable[..., Outcome]:
    """A judge that leaves the second child out of the round where `allows(children)` is false."""

    def judge(children: Any, q: Any, p: Any, u: Any, stochastic: Any) -> Outcome:
        both = judge_children(children, q, p, u, stochastic)
        first = judge_children(children[..., :1], q, p, u[..., :1], stochastic)
        alone = jnp.where(first.child == 0, 0, C)
        allowed = allows(children)
        return Outcome(
            jnp.where(allowed, both.child, alone), jnp.where(allowed[..., None], both.residual, first.residual)
        )

    return judge


def test_a_child_may_be_admitted_by_what_was_drawn_before_it_and_not_by_itself() -> None:
    by_the_first = admitting(lambda children: children[..., 0] == 1)
    by_itself = admitting(lambda children: children[..., 1] == 1)
    for anchor in range(V):
        assert np.abs(round_law(anchor, by_the_first) - exact_law(anchor)).max() < 1e-6
    assert max(np.abs(round_law(a, by_itself) - exact_law(a)).max() for a in range(V)) > 1e-3


def test_decoding_with_siblings() -> None:
    """Greedy texts are plain decoding's, and a round accepts more than a chain."""
    target, drafter = kind_pair("dspark", spread=0.8)
    given, plain = prompts(8, 6, seed=3, longest=6), EngineConfig(4, 64, "fixed")
    siblings = replace(plain, tree=9)
    greedy, hot = SamplingParams(16), SamplingParams(24, 1.0, seed=5)
    alone = generate(target, None, given, greedy, plain)
    assert [g.tokens for g in generate(target, drafter, given, greedy, siblings)] == [g.tokens for g in alone]
    rates = []
    for config in (plain, siblings):
        made = generate(target, drafter, given, hot, config)
        rates.append(sum(sum(g.accepted_at) for g in made) / sum(g.rounds for g in made))
    assert rates[1] > 1.1 * rates[0]


def test_no_more_children_than_candidates() -> None:
    pair = kind_pair("dspark", head="selector", options=(("selector_top_k", 2),))
    with pytest.raises(UserError, match="tree = 9, 3 children at every level; dspark chooses among 2 .* at most 6 was"):
        Engine(*pair, EngineConfig(4, 20, "fixed", tree=9))


def test_samples_follow_the_targets_law() -> None:
    """Through the loop: which node's row gives the next token, and a drafter that hands over candidates."""
    target, drafter = kind_pair("dspark", head="selector", spread=0.8, options=(("selector_top_k", 4),))
    engine = Engine(target, drafter, EngineConfig(SLOTS, 20, "fixed", tree=9, buckets=(SLOTS * 10,)))
    tokens, accepted = samples(engine.loop, engine.params, 3, batches=40)
    exact = exact_law_of(target)
    assert accepted > 0.3
    assert p_value(tokens[:, :3], exact.sum(3)) > 1e-3
    assert p_value(tokens[:, 1:], exact.sum(0)) > 1e-3
