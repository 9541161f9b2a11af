"""Program of test_training: two steps on 8 simulated devices and on one, and losses with every term on 1, 2 and 4,
the last by chunks of the vocabulary, compared. Exits non-zero where they differ."""

import os

from tests.xla import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses
from typing import Any

import jax
import numpy as np

from dspark_jax.planning.compiled import collective_parts
from dspark_jax.planning.rounds import LoopText, opcode
from dspark_jax.sharding import ShardingRules, batch_shardings, make_mesh
from dspark_jax.training.objective import BlockObjective
from dspark_jax.training.placement import Placement
from dspark_jax.training.step import (
    abstract_train_state,
    init_train_state,
    make_train_step,
)
from tests.drafters_tiny import tiny_batch, tiny_tables
from tests.test_packing import ALL_TERMS
from tests.test_training import evaluation, objective, optimizer, tiny_drafter


def train(placement: Placement | None, accumulation: int) -> tuple[Any, Any]:
    schedule, adamw = optimizer()
    hf_config, shared = tiny_drafter().hf_config, tiny_tables()
    abstract = abstract_train_state(hf_config, adamw, placement) if placement else None
    state = init_train_state(hf_config, adamw, seed=0, placement=placement)
    step = make_train_step(
        objective(), adamw, schedule, accumulation_steps=accumulation, placement=placement, abstract=abstract
    )
    if placement is not None:
        shared = jax.device_put(shared, placement.whole)
    for number in range(2):
        batch = tiny_batch(rows=16, seed=number)
        if placement is not None:
            batch = jax.device_put(batch, batch_shardings(batch, placement.mesh, placement.rules))
        state, metrics = step(state, shared, batch)
    assert step._cache_size() == 1, "the second step compiled again"
    if placement is not None:
        _meets_outside_of_its_loops(step.lower(state, shared, batch).compile().as_text(), state.params)
        jax.tree.map(_same_place, state, abstract)
        split = state.params["backbone"]["layers"][0]["mlp"]["gate_up_weight_du"]
        assert split.addressable_shards[0].data.size * placement.mesh.shape["fsdp"] == split.size
    return state, metrics


def evaluate(devices: int, chunk: int = 0) -> Any:
    """The figures of a batch with all terms and weightings; its rows differ in what they supervise. `chunk`: of the
    vocabulary."""
    options = dataclasses.replace(ALL_TERMS, vocabulary_chunk=chunk)
    task = BlockObjective(objective().graphdef, objective().config, options)
    placement = Placement(make_mesh(data=devices, devices=jax.devices()[:devices]), ShardingRules())
    batch, place = tiny_batch(rows=8, seed=3), placement.whole
    params, shared = jax.device_put((tiny_drafter().params, tiny_tables()), place)
    batch = jax.device_put(batch, batch_shardings(batch, placement.mesh, placement.rules))
    return evaluation(task, placement)(params, shared, batch, jax.device_put(jax.random.key(0), place))


def _meets_outside_of_its_loops(program: str, params: Any) -> None:
    """Whatever the number of micro-batches, devices exchange parameters once a step before them, and gradients once
    behind."""
    text = LoopText.of(program, 0)
    met = {
        name: [(opcode(line), shape) for line in lines for shape, _ in collective_parts(line)]
        for name, lines in text.computations.items()
    }
    entry = met.pop(text.entry)
    split = [x for x in jax.tree.leaves(params) if x.sharding.shard_shape(x.shape) != x.shape]
    assert {x.shape for x in split} <= {shape for kind, shape in entry if kind == "all-gather"}
    parts = sorted(x.sharding.shard_shape(x.shape) for x in split)
    assert sorted(shape for kind, shape in entry if kind == "reduce-scatter") == parts
    assert not any(met.values()), f"a loop exchanges {met}"


def _same_place(x: jax.Array, expected: jax.ShapeDtypeStruct) -> None:
    assert x.sharding.is_equivalent_to(expected.sharding, x.ndim), (x.sharding, expected.sharding)


def main() -> None:
    assert jax.device_count() == 8
    placement = Placement(make_mesh(data=2, fsdp=4), ShardingRules())
    expected, figures = train(None, 1)
    state, metrics = train(placement, 2)
    for name in figures:
        np.testing.assert_allclose(metrics[name], figures[name], rtol=1e-4, atol=1e-6, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), jax.device_get(state.params), expected.params
    )

    alone = evaluate(1)
    assert {"lk_loss", "soft_ce_loss", "lk_mixed_loss"} <= alone.keys()
    for devices, chunk in ((2, 0), (4, 16)):
        for name, figure in evaluate(devices, chunk).items():
            np.testing.assert_allclose(figure, alone[name], rtol=1e-5, atol=1e-6, err_msg=f"{name} on {devices}")


if __name__ == "__main__":
    main()
