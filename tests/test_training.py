"""Training of drafters: anchors, blocks, chunks and micro-batches that change nothing, the step and its schedule."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.errors import UserError
from dspark_jax.sharding import traced_over
from dspark_jax.training.anchors import eligible_anchors, make_blocks, sample_anchors
from dspark_jax.training.objective import BlockObjective
from dspark_jax.training.placement import Placement
from dspark_jax.training.schedule import learning_rate_schedule, make_optimizer
from dspark_jax.training.states import StoredStates
from dspark_jax.training.step import TrainState, init_train_state, make_train_step
from dspark_jax.training.terms import LossOptions
from tests.drafters_tiny import tiny_batch, tiny_tables
from tests.drafters_tiny import tiny_drafter as drafter_of

OPTIONS = LossOptions(ce_alpha=0.1, l1_alpha=0.9, confidence_alpha=1.0, decay_gamma=4.0, anchor_chunk=3)


# One layer: what several layers do is the golden cases' to show, and a step compiles in half the time.
tiny_drafter = partial(drafter_of, num_layers=1)


@cache
def objective(dtype: Any = jnp.float32, **changes: Any) -> BlockObjective:
    drafter = tiny_drafter()
    return BlockObjective(drafter.graphdef, drafter.config, replace(OPTIONS, **changes), dtype)


@cache
def optimizer() -> tuple[Any, optax.GradientTransformation]:
    schedule = learning_rate_schedule(1e-2, total_steps=20, warmup_ratio=0.1)
    return schedule, make_optimizer(schedule, (0.9, 0.999), 1e-8, 0.0, 1.0)


def evaluation(task: BlockObjective, placement: Placement | None = None) -> Any:
    """jitted (params, shared, batch, key) -> the metrics of a batch with its states, without an update."""

    def evaluate(params: dict, shared: SharedTables, batch: Any, key: jax.Array) -> Any:
        batch = batch if placement is None else placement.rows(dict(batch))
        plan, states = task.plan(batch, key), StoredStates()
        given = states.read(states.stored(None, batch), batch)
        sums = task.sums(params, shared, given, plan.rows)
        return task.metrics(sums | plan.sums, batch["input_ids"].shape[1])

    return jax.jit(traced_over(None if placement is None else placement.mesh)(evaluate))


def close_trees(found: Any, expected: Any, **tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


# Anchors and blocks


def test_anchors_are_eligible_distinct_ascending_and_then_dummies() -> None:
    mask = np.array([[1] * 6 + [0, 1, 0, 1, 1, 0], [0] * 12, [0] * 10 + [1, 1], [1] * 12])
    eligible = np.asarray(eligible_anchors(jnp.asarray(mask)))
    np.testing.assert_array_equal(np.flatnonzero(eligible[0]), [0, 1, 2, 3, 4, 9])
    for seed in range(20):
        positions, keep = map(np.asarray, sample_anchors(jax.random.key(seed), jnp.asarray(mask, jnp.uint8), 5))
        assert positions.shape == keep.shape == (4, 5)
        np.testing.assert_array_equal(keep.sum(1), [5, 0, 1, 5])
        for row in range(4):
            chosen = positions[row][keep[row]]
            assert np.all(np.diff(chosen) > 0) and np.all(eligible[row][chosen])
            assert not np.any(positions[row][~keep[row]]) and np.all(np.diff(keep[row].astype(int)) <= 0)


def test_more_anchors_than_positions_and_every_subset_is_drawn() -> None:
    mask = jnp.ones((1, 4), jnp.uint8)
    positions, keep = sample_anchors(jax.random.key(0), mask, 6)
    np.testing.assert_array_equal(positions, [[0, 1, 2, 0, 0, 0]])
    np.testing.assert_array_equal(keep, [[True] * 3 + [False] * 3])
    drawn = {tuple(np.asarray(sample_anchors(jax.random.key(s), mask, 2)[0][0]).tolist()) for s in range(60)}
    assert drawn == {(0, 1), (0, 2), (1, 2)}


def test_a_rows_anchors_do_not_depend_on_the_others() -> None:
    mask = tiny_batch(rows=5)["loss_mask"]
    whole = sample_anchors(jax.random.key(1), mask, 4)
    fewer = sample_anchors(jax.random.key(1), mask.at[1:].set(0), 4)
    close_trees([x[0] for x in fewer], [x[0] for x in whole])


def test_blocks_label_what_follows_and_end_at_a_gap() -> None:
    tokens, mask = jnp.arange(10, 20)[None], jnp.array([[1, 1, 1, 1, 0, 1, 1, 1, 1, 1]])
    anchors, keep = jnp.array([[0, 2, 7, 0]]), jnp.array([[True, True, True, False]])
    blocks = make_blocks(tokens, mask, anchors, keep, 4, 2.0)
    np.testing.assert_array_equal(blocks.labels[0, :3], [[11, 12, 13, 14], [13, 14, 15, 16], [18, 19, 19, 19]])
    np.testing.assert_array_equal(blocks.previous[0, :3], [[10, 11, 12, 13], [12, 13, 14, 15], [17, 18, 19, 19]])
    np.testing.assert_array_equal(blocks.sources[0, :3], [[0, 1, 2, 3], [2, 3, 4, 5], [7, 8, 8, 8]])
    expected = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(blocks.supervised[0], expected)
    np.testing.assert_allclose(blocks.weights[0], expected * np.exp(-np.arange(4) / 2.0), rtol=1e-6)
    for gamma in (None, 0.0):
        np.testing.assert_array_equal(make_blocks(tokens, mask, anchors, keep, 4, gamma).weights[0], expected)


# Losses and gradients


@partial(jax.jit, static_argnums=0)
def _value_and_gradient(task: BlockObjective, params: dict, batch: dict) -> Any:
    plan = task.plan(batch, jax.random.key(5))

    def loss(params: dict) -> Any:
        sums = task.sums(params, tiny_tables(), batch, plan.rows)
        return task.loss(sums, plan.denominator), task.metrics(sums | plan.sums, batch["input_ids"].shape[1])

    return jax.value_and_grad(loss, has_aux=True)(params)


def test_chunks_of_anchors_change_nothing() -> None:
    params, batch = tiny_drafter().params, tiny_batch()
    whole = _value_and_gradient(objective(anchor_chunk=7), params, batch)
    # 7 anchors do not divide by 3, nor 61 ids by 16.
    for chunks in ({}, {"vocabulary_chunk": 16}):
        close_trees(_value_and_gradient(objective(**chunks), params, batch), whole, rtol=2e-4, atol=1e-6)


def test_logits_of_all_anchors_never_exist() -> None:
    """Neither forward nor kept for the backward pass: no array over the vocabulary is that large."""
    drafter, (rows, anchors) = tiny_drafter(num_anchors=64), (2, 64)
    vocab = drafter.config.backbone.vocab_size

    def largest(width: int, **chunks: int) -> int:
        task = BlockObjective(drafter.graphdef, drafter.config, replace(OPTIONS, **chunks))
        program = jax.make_jaxpr(partial(_value_and_gradient.__wrapped__, task))(drafter.params, tiny_batch(rows, 40))
        found = (x.size for x in _intermediates(program.jaxpr) if x.shape and x.shape[-1] == width)
        return max(found, default=0)

    slots = rows * anchors * drafter.config.block_size
    assert largest(vocab, anchor_chunk=64) == slots * vocab
    assert largest(vocab, anchor_chunk=4) == slots * vocab // 16
    # By chunks of the vocabulary no row is ever whole, not even one.
    assert largest(13, vocabulary_chunk=13) == slots * 13
    assert largest(vocab, vocabulary_chunk=13) < slots


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def _intermediates(jaxpr: Any) -> Iterator[Any]:
    """Shapes of everything the equations make, those of inner programs included."""
    for equation in equations(jaxpr):
        yield from (v.aval for v in equation.outvars if hasattr(v.aval, "size"))


def test_no_supervision_is_no_loss_and_no_gradient() -> None:
    batch = dict(tiny_batch(), loss_mask=jnp.zeros((4, 20), jnp.uint8))
    (loss, metrics), gradient = _value_and_gradient(objective(), tiny_drafter().params, batch)
    assert float(loss) == 0 and all(np.isfinite(x) for x in metrics.values())
    assert all(not np.any(x) for x in jax.tree.leaves(gradient))


def test_bfloat16_compute_sums_gradients_in_float32() -> None:
    params, batch = tiny_drafter().params, tiny_batch()
    (exact, _), expected = _value_and_gradient(objective(), params, batch)
    (loss, _), gradient = _value_and_gradient(objective(jnp.bfloat16), params, batch)
    assert loss.dtype == jnp.float32 and {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(loss, exact, rtol=2e-2)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (gradient, expected))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99


# The step


@cache
def step_of(accumulation: int) -> Any:
    schedule, adamw = optimizer()
    return make_train_step(objective(), adamw, schedule, accumulation_steps=accumulation)


def run_steps(count: int, accumulation: int = 1, state: TrainState | None = None) -> Any:
    state = state or init_train_state(tiny_drafter().hf_config, optimizer()[1], seed=0)
    metrics = {}
    for _ in range(count):
        state, metrics = step_of(accumulation)(state, tiny_tables(), tiny_batch(seed=int(state.step)))
    return state, metrics


def test_micro_batches_are_one_batch() -> None:
    whole, expected = run_steps(2)
    state, metrics = run_steps(2, accumulation=2)
    close_trees(metrics, expected, rtol=1e-4, atol=1e-6)
    close_trees(state.params, whole.params, atol=2e-4)  # 1 % of the two Adam steps of 1e-2


def test_continuing_is_running_on() -> None:
    straight, _ = run_steps(4)
    half, _ = run_steps(2)
    resumed, _ = run_steps(2, state=jax.tree.map(jnp.copy, half))
    jax.tree.map(np.testing.assert_array_equal, resumed.params, straight.params)
    assert int(resumed.step) == 4


def test_training_learns_and_reports() -> None:
    schedule, adamw = optimizer()
    batch, step, evaluate = tiny_batch(), step_of(1), evaluation(objective())
    state = init_train_state(tiny_drafter().hf_config, adamw, seed=0)
    before = evaluate(state.params, tiny_tables(), batch, jax.random.key(9))
    for i in range(12):
        state, metrics = step(state, tiny_tables(), batch)
        np.testing.assert_allclose(metrics["learning_rate"], schedule(i, np), rtol=1e-6)
    after = evaluate(state.params, tiny_tables(), batch, jax.random.key(9))
    assert step._cache_size() == 1
    assert after["loss"] < before["loss"] and after["tau_probabilistic"] > before["tau_probabilistic"]
    assert {"ce_loss", "l1_loss", "confidence_loss", "accept_rate@3", "grad_norm", "confidence_bias"} <= set(metrics)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}


def test_a_skipped_step_leaves_the_learning_rate_where_it_was() -> None:
    schedule, adamw = optimizer()
    state, batch, rates = init_train_state(tiny_drafter().hf_config, adamw, seed=0), tiny_batch(), []
    for factor in (1.0, jnp.nan, 1.0):
        given = batch | {"features": batch["features"] * factor}
        state, metrics = step_of(1)(state, tiny_tables(), given)
        rates.append(metrics["learning_rate"])
    np.testing.assert_allclose(rates, schedule(np.array([0, 1, 1]), np), rtol=1e-6)


def test_init_keeps_a_drafters_parameters_and_the_callers_arrays() -> None:
    drafter = tiny_drafter()
    _, adamw = optimizer()
    state = init_train_state(drafter.hf_config, adamw, seed=0, params=drafter.params)
    run_steps(1, state=state)
    assert not any(x.is_deleted() for x in jax.tree.leaves(drafter.params))


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="A batch of 4 rows does not divide into 3 micro-batches over 1 devices"):
        run_steps(1, accumulation=3)


def test_schedule_hands_over_as_the_reference_does() -> None:
    schedule = learning_rate_schedule(1.0, total_steps=40, warmup_ratio=0.25)
    rates = schedule(np.arange(41), np)
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] > 1.0 and rates[11] == 1.0 and rates[40] == 0.0 and np.all(np.diff(rates[10:]) < 0)
    np.testing.assert_allclose(jax.vmap(schedule)(np.arange(41)), rates, atol=1e-6)
    constant = learning_rate_schedule(1.0, 40, 0.25, "constant")
    np.testing.assert_allclose(constant(np.arange(9, 41), np), 1.0)
    assert np.isfinite(learning_rate_schedule(1.0, 1, 0.04)(0, np))


@pytest.mark.subprocesses
def test_eight_devices_are_one(tmp_path: Path) -> None:
    """Data 2 x fsdp 4 in a process of its own: same parameters as one device, masters split, one compilation."""
    program = Path(__file__).with_name("sharded_step.py")
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharded_step"], cwd=program.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
