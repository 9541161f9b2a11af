"""Attention over ranges of keys, forward and backward, against plain softmax: kernels run as plain jax on a CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.errors import UserError
from dspark_jax.targets.attention import CausalRows, KeysValues, lowest_seen, prefix_mask
from dspark_jax.targets.blocks_attention import blocks_attention
from dspark_jax.targets.context_attention import context_attention
from dspark_jax.targets.kernels import forms, ranges, ranges_gpu
from dspark_jax.targets.kernels.causal import causal_attention
from dspark_jax.targets.kernels.ranges import Ranges, Spans, ranged_attention

SCALE = 0.3


def plain(q: Any, keys: Any, values: Any, seen: Ranges) -> tuple[jax.Array, jax.Array]:
    """The same by all scores at once; rows without keys give 0."""
    places = jnp.arange(keys.shape[2])
    allowed = (places >= seen.low[..., None]) & (places < seen.high[..., None])
    scores = jnp.where(allowed[:, None], jnp.einsum("bgmh,bgth->bgmt", q, keys) * SCALE, -1e30)
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), -5e29)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bgmt,bgth->bgmh", weights / safe, values), (top + jnp.log(safe))[..., 0]


def case(dtype: Any, keys: int = 256) -> tuple[Any, ...]:
    """700 rows in ascending order of their ranges, some of them dummies at the end, and others that see nothing."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 2, n, 64)), dtype) for n in (700, keys, keys))
    high = np.sort(rng.integers(0, keys + 1, (2, 700)), axis=1)
    low = np.where(rng.random((2, 700)) < 0.5, 0, high // 2)
    # One conversation's rows never come near the first block of keys.
    low[1, 600:] = np.minimum(200, high[1, 600:])
    high[0, 650:] = 0
    return q, k, v, Ranges(jnp.asarray(low), jnp.asarray(high))


@pytest.mark.parametrize("platform", list(ranges.KERNELS))
def test_results_and_gradients(platform: str) -> None:
    q, k, v, seen = case(jnp.float32)
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.normal(size=q.shape), jnp.float32), jnp.asarray(rng.normal(size=q.shape[:3]), jnp.float32)

    def loss(attend: Any, q: Any, k: Any, v: Any) -> Any:
        out, log_sum = attend(q, k, v)
        # Rows without keys: their log-sum is a floor that nothing is joined to.
        log_sum = jnp.where((seen.high > seen.low)[:, None], log_sum, 0.0)
        return jnp.sum(out * weights[0]) + jnp.sum(log_sum * weights[1]), (out, log_sum)

    def kernel(*x: Any) -> Any:
        return ranged_attention(*x, seen, SCALE, platform, True)

    def run(attend: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda *x: loss(attend, *x), argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, made), gradients = run(kernel)
    (_, wanted), right = run(lambda *x: plain(*x, seen))
    for mine, theirs in zip((*made, *gradients), (*wanted, *right), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("platform", list(ranges.KERNELS))
def test_bfloat16_within_its_rounding(platform: str) -> None:
    q, k, v, seen = case(jnp.bfloat16, 128)

    def run(attend: Any, *x: Any) -> Any:
        return jax.jit(jax.grad(lambda *x: jnp.sum(attend(*x)[0].astype(jnp.float32) ** 2), argnums=(0, 1, 2)))(*x)

    made = run(lambda *x: ranged_attention(*x, seen, SCALE, platform, True), q, k, v)
    wanted = run(lambda *x: plain(*x, seen), *(x.astype(jnp.float32) for x in (q, k, v)))
    for mine, theirs in zip(made, wanted, strict=True):
        assert mine.dtype == jnp.bfloat16
        scale = float(jnp.max(jnp.abs(theirs)))
        np.testing.assert_allclose(np.asarray(mine, np.float32) / scale, theirs / scale, atol=2e-2)


def test_blocks_without_a_visible_key_are_left_out() -> None:
    # Four rows in blocks of two, eight keys in blocks of two.
    seen = Ranges(jnp.array([[0, 0, 0, 4]]), jnp.array([[0, 2, 3, 6]]))
    spans = Spans.of(seen, 2, 2, 8)
    np.testing.assert_array_equal(spans.key_first, [[0, 0]])
    np.testing.assert_array_equal(spans.key_count, [[1, 3]])
    np.testing.assert_array_equal(spans.row_first, [[0, 1, 1, 0]])
    np.testing.assert_array_equal(spans.row_count, [[2, 1, 1, 0]])


def test_training_refuses_an_unknown_form_as_decoding_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forms.FORM, "flash")
    with pytest.raises(UserError, match="DSPARK_ATTENTION is 'flash'"):
        ranges.platform_with_kernels(jnp.zeros((1, 1, 128, 64)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", ranges_gpu.HEAD_SIZES)
def test_a_gpus_blocks_fit_its_shared_memory(size: int, dtype: Any) -> None:
    """Rows and their cotangents, and two blocks of keys and of values; an H100 has 227 KiB."""
    keys = jax.ShapeDtypeStruct((1, 1, 64, size), dtype)
    rows, columns = ranges_gpu.blocks(keys)
    assert ranges_gpu.LEAST_KEYS % columns == 0
    assert 2 * (rows + 2 * columns) * size * keys.dtype.itemsize <= 225 * 2**10


@pytest.mark.parametrize("platform", list(ranges.KERNELS))
def test_training_blocks_by_kernels_are_those_without(platform: str) -> None:
    rng = np.random.default_rng(2)

    def made(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    # Ascending anchors and a dummy; the second row's conversations begin at 30.
    anchors, starts = jnp.array([[3, 40, 100, 0], [31, 70, 127, 128]]), jnp.array([[0] * 4, [30] * 4])
    q, block = made(2, 4, 3, 4, 64), KeysValues(made(2, 4, 3, 2, 64), made(2, 4, 3, 2, 64))
    prefix, weights = KeysValues(made(2, 2, 128, 64), made(2, 2, 128, 64)), made(*q.shape)
    allowed, lowest = prefix_mask(anchors, 128, 3, 50, starts), lowest_seen(anchors, 3, 50, starts)

    def kernels(q: Any, block: Any, prefix: Any) -> Any:
        return context_attention(
            q, block, prefix, anchors, lowest, scale=SCALE, platform=platform, interpret=True
        )  # fmt: skip

    def without(q: Any, block: Any, prefix: Any) -> Any:
        return blocks_attention(q, block, prefix, allowed, scale=SCALE)

    def run(attend: Any) -> Any:
        loss = jax.value_and_grad(lambda *x: jnp.sum(attend(*x) * weights), argnums=(0, 1, 2))
        return jax.tree.leaves(jax.jit(loss)(q, block, prefix))

    for mine, theirs in zip(run(kernels), run(without), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("platform", list(ranges.KERNELS))
def test_causal_rows_by_kernels_are_those_without(platform: str, window: int | None) -> None:
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 128, n, 64)), jnp.float32) for n in (4, 2, 2))
    # Three conversations in a row, then padding; a whole row of one.
    segments = jnp.asarray([[1] * 50 + [2] * 40 + [3] * 20 + [0] * 18, [1] * 128])
    rows = CausalRows(segments)

    def kernels(q: Any, k: Any, v: Any) -> Any:
        keys, values, lowest = k.swapaxes(1, 2), v.swapaxes(1, 2), rows.lowest(128, window)
        return causal_attention(q, keys, values, lowest, scale=SCALE, platform=platform, interpret=True)

    def both(attend: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), argnums=(0, 1, 2)))(q, k, v)

    made, wanted = both(kernels), both(lambda q, k, v: rows(0, q, k, v, scale=SCALE, window=window))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), made, wanted)
