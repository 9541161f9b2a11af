"""Attention kernels over pages: run as plain jax on a CPU against the einsum form over a cache by slot, and lowered."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dspark_jax import native
from dspark_jax.sharding import Units, abstract_mesh, traced_over
from dspark_jax.targets.attention import KeysValues, block_attention, causal_block, lowest_seen
from dspark_jax.targets.kernels import forms, held, held_gpu, held_tpu
from dspark_jax.targets.pages import PagedLayer
from tests.test_attention_kernels import (
    ACCELERATORS,
    COMPILER,
    KERNELS,
    built,
    by_einsum,
    by_kernel,
    lowered,
    operands,
    tree_operands,
)

assert built  # a fixture, used by its name


def paged(cache: KeysValues, lengths: Any, page: int) -> PagedLayer:
    """The cache in pages in an order without any order. Those that are not held belong to nothing: NaN, as are the
    pool's own, and in the tables a number behind it."""
    requests, groups, span, size = cache.keys.shape
    count = -(-span // page)
    held_pages = np.arange(count) < -(-np.asarray(lengths)[:, None] // page)
    order = np.random.default_rng(5).permutation(requests * count + 1)[: requests * count].reshape(requests, count)
    pools = []
    for x in cache:
        padded = np.pad(np.asarray(x), ((0, 0), (0, 0), (0, count * page - span), (0, 0)))
        pages = padded.reshape(requests, groups, count, page, size).transpose(0, 2, 3, 1, 4)
        pool = np.full((requests * count + 1, page, groups * size), np.nan, padded.dtype)
        pool[order[held_pages]] = pages[held_pages].reshape(-1, page, groups * size)
        pools.append(jnp.asarray(pool))
    tables = np.where(held_pages, order, requests * count + 1).astype(np.int32)
    return PagedLayer(*pools, jnp.asarray(tables), groups)


def over_pages(attend: Any, parts: tuple[Any, ...], page: int, lowest: Any = None, within: Any = None) -> np.ndarray:
    q, block, cache, lengths = parts
    layer = paged(cache, lengths, page)
    pools = KeysValues(layer.keys, layer.values)
    return by_kernel(attend, (q, block, pools, lengths), lowest, within, layer.tables)


# Grouped heads 1 to 8, blocks of 1 to 17 rows, lengths of 0, at pages' edges and the whole span; pages smaller than
# what a step reads, as large, and larger.
@pytest.mark.parametrize("attend", KERNELS)
@pytest.mark.parametrize(
    ("width", "shared", "groups", "size", "lengths", "span", "window", "page"),
    [
        (1, 1, 3, 64, [0, 1, 64], 64, None, 16),
        (1, 8, 2, 64, [0, 64, 65, 320], 320, 100, 64),
        (17, 2, 1, 64, [5, 256, 257, 640], 640, 20, 128),
        (8, 4, 2, 128, [0, 300, 512], 512, 128, 64),
        (3, 2, 2, 256, [0, 130], 192, None, 512),
    ],
)
def test_pages_give_what_einsum_gives_by_slot(
    attend: Any, width: int, shared: int, groups: int, size: int, lengths: list[int], span: int, window: int | None,
    page: int,
) -> None:  # fmt: skip
    parts = operands(width, shared, groups, size, lengths, span)
    lowest = lowest_seen(parts[3][:, None], width, window)
    within = causal_block(width, window)[None]
    made = over_pages(attend, parts, page, lowest, within)
    np.testing.assert_allclose(made, by_einsum(parts, lowest, within), rtol=2e-5, atol=5e-6)
    # As many positions a step as by slot: the same sums in the same order.
    if page == 64 and span > 256:
        np.testing.assert_array_equal(made, by_kernel(attend, parts, lowest, within))

    # The draft's block: every row sees all of it; and with another number of own keys than rows.
    parts = operands(width, shared, groups, size, lengths, span, own=width + 2)
    made = over_pages(attend, parts, page, lowest)
    np.testing.assert_allclose(made, by_einsum(parts, lowest), rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("attend", ACCELERATORS)
@pytest.mark.parametrize("width", [3, 7, 16, 17])
def test_the_bits_of_a_cache_by_slot_in_bfloat16(attend: Any, width: int) -> None:
    lengths = [0, width, 63 + width, 128]
    parts = operands(width, 2, 1, 64, lengths, 192, jnp.bfloat16)
    lowest = lowest_seen(parts[3][:, None], width, 70)
    by_slot = by_kernel(attend, parts, lowest, causal_block(width, 70)[None])
    # Both read 192 positions in a step on the TPU, 64 on the GPU.
    np.testing.assert_array_equal(over_pages(attend, parts, 64, lowest, causal_block(width, 70)[None]), by_slot)


@pytest.mark.parametrize("attend", KERNELS)
def test_trees_have_masks_of_their_own(attend: Any) -> None:
    parts, lowest, within = tree_operands()
    made = over_pages(attend, parts, 32, lowest, within)
    np.testing.assert_allclose(made, by_einsum(parts, lowest, within), rtol=2e-5, atol=5e-6)


def text(platform: str, size: int, page: int, dtype: Any = jnp.bfloat16) -> str:
    q, block, cache, lengths = operands(2, 2, 2, size, [3, 64], 64, dtype)
    attend = jax.jit(partial(block_attention, lowest=None, within=None, scale=0.2))
    return lowered(attend, q, block, paged(cache, lengths, page), lengths, platform=platform)


def test_each_device_reads_pages_by_its_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tpu_custom_call" in text("tpu", 128, 64) and "triton" in text("cuda", 128, 64)
    assert ("dspark_jax_HeldRowsOfPages" in text("cpu", 128, 64, jnp.float32)) == native.ready()
    # A page of half a tile, and one of less than a tensor core's columns; heads of half a tile.
    assert "custom_call" not in text("tpu", 128, 8) and "triton" not in text("cuda", 128, 8)
    assert "custom_call" not in text("tpu", 64, 64) and "triton" in text("cuda", 64, 64)
    monkeypatch.setenv(forms.FORM, "einsum")
    assert all("custom_call" not in text(platform, 128, 64) for platform in ("tpu", "cuda", "cpu"))


@COMPILER
def test_pages_give_the_bits_of_a_cache_by_slot_on_a_cpu() -> None:
    q, block, cache, lengths = operands(3, 2, 2, 32, [0, 40, 96], 96)
    lowest = lowest_seen(lengths[:, None], 3, 30)
    attend = jax.jit(partial(block_attention, lowest=lowest, within=causal_block(3, 30)[None], scale=0.2))
    by_page = attend(q, block, paged(cache, lengths, 48), lengths)
    np.testing.assert_array_equal(by_page, attend(q, block, cache, lengths))


def test_a_mesh_splits_requests_and_heads_of_all_pages() -> None:
    q, block, cache, lengths = operands(2, 2, 4, 64, [3, 64], 64)
    mesh, seen = abstract_mesh(4, data=2, tensor=2), list[Any]()
    layer = paged(cache, lengths, 16)

    def kernel(q: jax.Array, keys: jax.Array, *others: Any, scale: float, interpret: bool) -> jax.Array:
        seen.append((q.shape, keys.shape, others[-1].shape))
        return q

    with traced_over(mesh):
        operand = layer.keys, layer.values, lengths, None, causal_block(2)[None], layer.tables
        jax.eval_shape(lambda: held._by_kernel(q, *block, *operand, 0.2, kernel))
    # One request of two, two kv heads of four, and every page.
    assert seen == [((1, 2, 2, 2, 64), (9, 16, 128), (1, 4))]
    odd = held._spec(layer.keys, (None, None, Units("kv_heads", 3)), 2, mesh)
    assert odd == PartitionSpec(None, None, None), "between heads, or not at all"


def test_kernels_refuse_no_head_count() -> None:
    """A step takes as many heads as fit: all, or a divisor of them."""
    parts = operands(2, 1, 12, 128, [100, 512], 512)
    for attend in (held_tpu.attend, held_gpu.attend):
        made = over_pages(attend, parts, 64, None, causal_block(2)[None])
        np.testing.assert_allclose(made, by_einsum(parts, None, causal_block(2)[None]), rtol=2e-5, atol=5e-6)
