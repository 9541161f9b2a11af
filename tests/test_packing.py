"""Packed rows: who shares a row, and that a sequence trains the same beside others as alone."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.data.chat import Encoded
from dspark_jax.data.pipeline import Batches, pad_batch
from dspark_jax.data.records import Sample, TokenSample
from dspark_jax.data.tokenised import Tokenised
from dspark_jax.data.views import Packed, join, pack
from dspark_jax.targets.attention import segment_starts
from dspark_jax.training.anchors import make_blocks, sample_anchors
from dspark_jax.training.registry import make_objective
from dspark_jax.training.terms import LossOptions
from tests.drafters_tiny import HIDDEN, VOCAB, tiny_drafter, tiny_tables

SIZES = (11, 6, 9, 2, 7)
KINDS: dict[str, dict[str, Any]] = {
    "dspark": {"num_anchors": 24, "num_layers": 1},
    "mtp": {"num_anchors": 24, "num_layers": 1, "target_layer_ids": (3,)},
    "terms": {"kind": "dspark", "num_anchors": 24, "num_layers": 1},
    "eagle3": {"block_size": 3, "num_layers": 1, "target_layer_ids": (1, 2)},
}
OPTIONS = LossOptions(ce_alpha=0.1, l1_alpha=0.9, confidence_alpha=1.0, decay_gamma=4.0, anchor_chunk=16)
# Every term and every weighting that is computed from the laws.
ALL_TERMS = dataclasses.replace(
    OPTIONS,
    soft_ce_alpha=0.5,
    lk_alpha=1.0,
    lk_mixed_alpha=1.0,
    length_alpha=1.0,
    slot_weights="d_pace",
    confidence_weights="reach",
)


def samples(taps: int) -> list[Sample]:
    rng = np.random.default_rng(1)
    made = []
    for index, size in enumerate(SIZES):
        mask = (rng.random(size) > 0.2).astype(np.uint8)
        states = [rng.standard_normal((size, width * HIDDEN)).astype(np.float32) for width in (taps, 1)]
        made.append(Sample(index, rng.integers(1, VOCAB, size).astype(np.int32), mask, *states))
    return made


def on_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in batch.items() if name != "sample_ids"}


@cache
def figures(kind: str, packed: bool) -> tuple[Any, Any, Any]:
    """(sums, denominator, gradient of the loss times it; None but for dspark) of all samples, every anchor taken."""
    drafter = tiny_drafter(**{"kind": kind} | KINDS[kind])
    options = ALL_TERMS if kind == "terms" else OPTIONS
    objective = make_objective(drafter.hf_config, options, jnp.float32)
    alone = samples(len(KINDS[kind].get("target_layer_ids", (0, 0, 0))))
    rows = [join(0, alone[:3]), join(1, alone[3:])] if packed else alone
    batch = on_device(pad_batch(rows, 28 if packed else 13))
    plan = objective.plan(batch, jax.random.key(0))

    def total(params: dict) -> Any:
        sums = objective.sums(params, tiny_tables(), batch, plan.rows)
        return objective.loss(sums, jnp.float32(1.0)), sums

    if kind == "dspark":
        gradient, sums = jax.jit(jax.grad(total, has_aux=True))(drafter.params)
    else:  # compiles in a third of the time
        gradient, sums = None, jax.jit(total)(drafter.params)[1]
    return sums | plan.sums, plan.denominator, gradient


@pytest.mark.parametrize("kind", KINDS)
def test_packed_losses_and_gradients_are_those_of_sequences_alone(kind: str):
    sums, denominator, gradient = figures(kind, packed=True)
    expected, its_denominator, its_gradient = figures(kind, packed=False)
    depends_on_rows = {"rows", "positions", "slots_per_block"}
    for name in expected.keys() - depends_on_rows:
        np.testing.assert_allclose(sums[name], expected[name], rtol=2e-5, atol=1e-5, err_msg=name)
    assert float(expected["supervised"].sum()) > 15
    if "positions" not in expected:  # the rollout's divisor counts padding too
        np.testing.assert_allclose(denominator, its_denominator, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), gradient, its_gradient)


def test_no_anchor_and_no_block_crosses_a_boundary():
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
    mask, tokens = jnp.ones((1, 9), jnp.uint8).at[:, 7:].set(0), jnp.arange(9)[None]
    anchors, keep = sample_anchors(jax.random.key(0), mask, 9, segments)
    assert anchors[0][keep[0]].tolist() == [0, 1, 3, 4, 5]
    blocks = make_blocks(tokens, mask, anchors, keep, 3, None, segments)
    reached = [blocks.labels[0, n][blocks.supervised[0, n]].tolist() for n in range(5)]
    assert reached == [[1, 2], [2], [4, 5, 6], [5, 6], [6]]
    assert blocks.starts[0, :5].tolist() == [0, 0, 3, 3, 3]
    assert segment_starts(segments).tolist() == [[0, 0, 0, 3, 3, 3, 3, 7, 7]]


def source(sizes: np.ndarray) -> Tokenised:
    made = (Encoded(np.full(size, index, np.int32), np.ones(size, np.uint8)) for index, size in enumerate(sizes))
    return Tokenised.of(made, min_loss_tokens=3)


def test_rows_hold_every_sequence_once_and_are_full():
    sizes = np.random.default_rng(0).integers(1, 50, 300)
    rows = pack(sizes, 100)
    assert sorted(index for row in rows for index in row) == list(range(300))
    filled = [int(sizes[row].sum()) for row in rows]
    assert max(filled) <= 100 and np.mean(filled) > 97
    assert rows == pack(sizes, 100)
    with pytest.raises(ValueError, match="does not fit a row of 40"):
        pack(sizes, 40)


def test_batches_of_packed_rows():
    kept = source(np.random.default_rng(2).integers(1, 30, 60))
    packed = Packed(kept, 32)
    batches = Batches(packed, 4, seed=1, buckets=(32,))
    seen: list[int] = []
    for step in range(batches.steps_per_epoch):
        batch = batches.batch_at(step)
        seen += batch["sample_ids"].tolist()
        assert batch["segments"].dtype == np.int32
        for row in range(4):
            ids, segments, size = batch["input_ids"][row], batch["segments"][row], batch["lengths"][row]
            assert not segments[size:].any() and segments[:size].all()
            for number in range(1, segments.max() + 1):
                (name,) = set(ids[segments == number].tolist())
                assert np.sum(segments == number) == kept.lengths[kept.sample_ids == name][0]
    assert set(seen) == set(kept.sample_ids.tolist()) and len(kept) < 60
    assert len(seen) < len(kept) + 4 * 16


def test_a_sample_is_cut_in_all_its_arrays():
    sample = samples(2)[0]
    short = sample.cut(4)
    assert {name: len(array) for name, array in short.arrays().items()} == dict.fromkeys(sample.arrays(), 4)
    assert isinstance(dataclasses.replace(sample).cut(3), TokenSample)
