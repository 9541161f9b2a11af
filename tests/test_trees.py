"""Draft trees: their growth by brute force, and the text of plain decoding through the compiled loop."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.decoding.trees import walk
from dspark_jax.drafters.trees import DraftTree, TreeShape, grow, pool_size
from dspark_jax.errors import UserError
from dspark_jax.evaluation.timing import differences
from dspark_jax.scheduling.policies import LookAhead
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.prompts import EncodedPrompt
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from tests.decoding_tiny import kind_pair, prompts
from tests.test_coupled import NEAR_TIE, SLOTS, asked, plain
from tests.test_scheduled_loop import pair

VOCAB, DEPTH = 6, 3


def values() -> np.ndarray:
    """[D, V, V] by level and the token before."""
    return np.random.default_rng(0).normal(size=(DEPTH, VOCAB, VOCAB)).astype(np.float32)


def grown(anchors: list[int], shape: TreeShape, table: np.ndarray) -> DraftTree:
    def expand(level: int, tokens: jax.Array, seen: jax.Array) -> Any:
        # The state is the sum of the tokens before: it has to follow each path.
        return jnp.asarray(table)[level][tokens] + 0.3 * seen[..., None], seen + tokens

    made = jax.jit(lambda a: grow(a, DEPTH, shape, expand, jnp.zeros((len(anchors), 1))))(jnp.asarray(anchors))
    return jax.device_get(made)


def by_brute_force(anchor: int, shape: TreeShape, table: np.ndarray) -> set[tuple[int, ...]]:
    """The paths of the kept nodes: a beam of C parents a level, then the N best of all that it saw."""
    logs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    beam, pool = [((), 0.0)], []
    for level in range(DEPTH):
        made = []
        for path, score in beam:
            row = logs[level, path[-1] if path else anchor]
            made += [((*path, int(t)), score + row[t]) for t in np.argsort(-row)[: shape.branching]]
        pool += made
        beam = sorted(made, key=lambda node: -node[1])[: shape.branching]
    return {path for path, _ in sorted(pool, key=lambda node: -node[1])[: shape.nodes]}


def paths(tree: DraftTree, row: int) -> list[tuple[int, ...]]:
    made: list[tuple[int, ...]] = [()]
    for node in range(1, tree.tokens.shape[1]):
        assert tree.parents[row, node] < node, "parents come before their children"
        made.append((*made[tree.parents[row, node]], int(tree.tokens[row, node])))
        assert tree.depths[row, node] == len(made[-1])
    return made


@pytest.mark.parametrize(("nodes", "branching"), [(3, 1), (5, 2), (8, 3), (21, 3), (pool_size(DEPTH, 2), 2)])
def test_a_tree_holds_the_best_paths_of_the_beam(nodes: int, branching: int) -> None:
    shape, anchors = TreeShape(nodes, branching), [0, 3, 5]
    tree = grown(anchors, shape, values())
    seen = np.asarray(tree.ancestors(DEPTH))
    for row, anchor in enumerate(anchors):
        found = paths(tree, row)
        assert set(found[1:]) == by_brute_force(anchor, shape, values()) and len(set(found)) == nodes + 1
        for i, j in np.ndindex(nodes + 1, nodes + 1):
            assert seen[row, i, j] == (found[i][: len(found[j])] == found[j])


def test_broken_values_leave_a_tree() -> None:
    table = values()
    table[1, 2:] = np.nan
    table[0, 3] = -np.inf
    table[2, :, 1] = np.inf
    tree = grown([0, 3, 5], TreeShape(12, 3), table)
    for row in range(3):
        assert len(set(paths(tree, row))) == 13


def test_the_walk_follows_the_targets_choices_and_stops_where_there_is_no_law() -> None:
    #      0 anchor; 1 and 2 its children, 3 and 4 those of 2, 5 that of 4
    tree = DraftTree(*(jnp.asarray([row]) for row in ([9, 7, 8, 1, 2, 3], [0, 0, 0, 2, 2, 4], [0, 1, 1, 2, 2, 3])))
    won = jnp.asarray([[8, 1, 2, 0, 3, 6]])
    every = jnp.ones((1, 6), bool)
    for usable, sound, expected in (
        (every, every, ([0, 2, 4, 5], 3, 6, False)),
        (every & (tree.depths < 3), every, ([0, 2, 4, 4], 2, 3, False)),
        (every, every.at[0, 2].set(False), ([0, 2, 2, 2], 1, 2, True)),
        (every, every.at[0, 0].set(False), ([0, 0, 0, 0], 0, 8, True)),
    ):
        path = walk(tree, won, usable, sound, DEPTH)
        assert (
            path.nodes[0].tolist(),
            int(path.accepted[0]),
            int(path.next_token[0]),
            bool(path.failed[0]),
        ) == expected


@pytest.mark.lossless
def test_the_text_is_that_of_plain_decoding(record_property: Any) -> None:
    """200 seeds, greedy requests among them; a wrong mask, position or row of K/V would change the text."""
    target, drafter = pair()
    config = EngineConfig(SLOTS, policy="fixed")
    chain = generate(target, drafter, asked(), engine=config)
    found = generate(target, drafter, asked(), engine=replace(config, tree=16))
    given = [EncodedPrompt(str(i), "tree", tuple(r.prompt)) for i, r in enumerate(asked())]
    parted = differences(target, given, plain(), found, [r.sampling for r in asked()])
    accepted = [sum(sum(g.accepted_at) for g in made) / sum(g.rounds for g in made) for made in (chain, found)]
    line = (
        f"tree of 16: {200 - len(parted)}/200 texts identical; "
        f"accepted a round {accepted[1]:.2f}, by a chain {accepted[0]:.2f}"
    )
    print(line)
    record_property("trees", line)
    assert all(d.gap < NEAR_TIE for d in parted) and len(parted) <= 2, line
    assert accepted[1] > 1.15 * accepted[0], line


@pytest.mark.lossless
def test_windows_packed_rows_and_penalties_see_paths() -> None:
    """Sliding layers, trees cut at a depth (so that rows are packed), and penalties, which count a path's tokens."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 5}
    target, drafter = kind_pair.__wrapped__("dspark", **layers)
    assert [layer.window for layer in target.config.layers] == [5, None]
    given = prompts(16, 6, seed=3)
    for law in ({"verify_length": 2}, {"frequency_penalty": 0.6, "repetition_penalty": 1.3, "logit_bias": {2: 1.0}}):
        sampling = SamplingParams(20, 1.0, seed=5, mode="coupled", stop_tokens=(), **law)
        config = EngineConfig(4, 64, "fixed", buckets=(12, 52))
        alone, drafted = (
            generate(target, d, given, sampling, c) for d, c in ((None, config), (drafter, replace(config, tree=12)))
        )
        assert sum(a.tokens != b.tokens for a, b in zip(alone, drafted, strict=True)) <= 1
        assert sum(sum(g.accepted_at) for g in drafted) > 100


def test_three_ids_have_at_most_three_children() -> None:
    target, drafter = kind_pair.__wrapped__("dspark", vocab_size=3)
    hot, config = SamplingParams(temperature=1.0, mode="coupled"), EngineConfig(2, 32, "fixed", tree=12)
    assert Engine(target, drafter, config, hot).loop.tree == TreeShape(12, 3)
    with pytest.raises(UserError, match="drafts trees of at most 21 nodes"):
        Engine(target, drafter, replace(config, tree=22), hot)
    with pytest.raises(UserError, match="chooses among 3 candidates there, so at most 9 was expected"):
        Engine(target, drafter, config, SamplingParams())


def test_trees_that_are_not_exact_are_refused() -> None:
    target, drafter = kind_pair("dspark")
    hot = SamplingParams(temperature=1.0, mode="coupled")
    config = EngineConfig(2, 32, "fixed", tree=8)
    with pytest.raises(UserError, match="node by node in mode = 'coupled'; found Independent"):
        Engine(target, drafter, config, SamplingParams(mode="block"))
    with pytest.raises(UserError, match="a multiple of 3, from 6 on"):
        Engine(target, drafter, config, SamplingParams())
    with pytest.raises(UserError, match="found Coupled and the policy LookAhead"):
        Engine(target, drafter, config, hot, strategy=LookAhead())
    with pytest.raises(UserError, match="drafts trees of at most 36 nodes"):
        Engine(target, drafter, replace(config, tree=64), hot)
    with pytest.raises(UserError, match="eagle3 drafts no trees"):
        Engine(*kind_pair("eagle3"), config, hot)
