"""Attention kernels against the einsum form, run as plain jax on a CPU, and lowered for the devices they are for."""

import shutil
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, PartitionSpec, use_abstract_mesh

from dspark_jax import native
from dspark_jax.errors import UserError
from dspark_jax.sharding import abstract_mesh, traced_over
from dspark_jax.targets.attention import KeysValues, block_attention, causal_block, lowest_seen, tree_block
from dspark_jax.targets.block_rows import TreeRows
from dspark_jax.targets.kernels import forms, held, held_gpu, held_tpu

COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler: XLA computes all")
KERNELS = [held_tpu.attend, held_gpu.attend, pytest.param(native.attend, marks=COMPILER)]
ACCELERATORS = KERNELS[:2]


def operands(
    width: int, shared: int, groups: int, size: int, held: list[int], span: int, dtype: Any = jnp.float32, own: int = 0
) -> tuple[Any, ...]:
    """Rows, the block's own K/V, cached K/V, and positions held."""
    rng = np.random.default_rng(0)

    def made(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    count = len(held)
    rows, own = made(count, width, groups * shared, size), own or width
    block = KeysValues(made(count, own, groups, size), made(count, own, groups, size))
    cache = KeysValues(made(count, groups, span, size), made(count, groups, span, size))
    return rows, block, cache, jnp.asarray(held)


@pytest.fixture(autouse=True, scope="module")
def built() -> None:
    """The CPU's kernel is registered at its first use."""
    assert native.ready() or shutil.which("c++") is None


# One program for each shape, which all kernels are held against, and one for each shape and kernel.
_EINSUM = jax.jit(partial(block_attention, scale=0.2))
_BY_KERNEL = jax.jit(partial(held._by_kernel, scale=0.2, interpret=True), static_argnames="attend")


def by_kernel(
    attend: Any, parts: tuple[Any, ...], lowest: Any = None, within: Any = None, tables: Any = None
) -> np.ndarray:
    q, block, cache, lengths = parts
    bound = None if lowest is None else lowest[:, 0]
    made = _BY_KERNEL(q, *block, *cache, lengths, bound, within, tables, attend=attend)
    assert made.dtype == q.dtype
    return np.asarray(made, np.float32)


def by_einsum(parts: tuple[Any, ...], lowest: Any = None, within: Any = None) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(forms.FORM, "einsum")
        return np.asarray(_EINSUM(*parts, lowest, within), np.float32)


def both(attend: Any, *given: Any) -> tuple[np.ndarray, np.ndarray]:
    """(a kernel's result, the einsum form's)."""
    return by_kernel(attend, *given), by_einsum(*given)


# Scores reach 12, of which float32 knows the sixth decimal alone: values of size 1 may differ by some 5e-6.
# Grouped heads 1 to 8, head sizes 64 to 256, blocks of 1 to 17 rows, lengths of 0, at blocks' edges and the whole span.
@pytest.mark.parametrize("attend", KERNELS)
@pytest.mark.parametrize(
    ("width", "shared", "groups", "size", "lengths", "span", "window"),
    [
        (1, 1, 3, 64, [0, 1, 64], 64, None),
        (1, 8, 2, 64, [0, 64, 65, 320], 320, 100),
        (17, 2, 1, 64, [255, 256, 257, 640], 640, None),
        (17, 2, 1, 64, [5, 256, 257, 640], 640, 20),
        (8, 4, 2, 128, [0, 300, 512], 512, 128),
        (3, 2, 2, 256, [0, 130], 192, None),
    ],
)
def test_kernels_give_what_einsum_gives(
    attend: Any, width: int, shared: int, groups: int, size: int, lengths: list[int], span: int, window: int | None
) -> None:
    parts = operands(width, shared, groups, size, lengths, span)
    lowest = lowest_seen(parts[3][:, None], width, window)
    made, wanted = both(attend, parts, lowest, causal_block(width, window)[None])
    np.testing.assert_allclose(made, wanted, rtol=2e-5, atol=5e-6)

    # The draft's block: every row sees all of it; and with another number of own keys than rows.
    made, wanted = both(attend, operands(width, shared, groups, size, lengths, span, own=width + 2), lowest)
    np.testing.assert_allclose(made, wanted, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("attend", ACCELERATORS)
def test_bfloat16_within_its_rounding(attend: Any) -> None:
    parts = operands(8, 4, 2, 128, [0, 200, 256], 256, jnp.bfloat16)
    made = by_kernel(attend, parts, None, causal_block(8)[None])
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32) if x.ndim > 1 else x, parts)
    wanted = by_einsum(wide, None, causal_block(8)[None])
    np.testing.assert_allclose(made, wanted, rtol=2e-2, atol=2e-2)


def tree_operands() -> tuple[tuple[Any, ...], jax.Array, jax.Array]:
    """Operands whose rows form trees, the lowest positions that they see under a window, and their masks."""
    rng = np.random.default_rng(1)
    seen = jnp.asarray(rng.random((3, 4, 4)) < 0.5) | jnp.eye(4, dtype=bool)
    tree = TreeRows(jnp.asarray([[0, 1, 1, 2]] * 3), seen)
    parts = operands(4, 2, 2, 64, [0, 40, 128], 128)
    lowest = lowest_seen(parts[3][:, None], 4, 20, offsets=tree.offsets[:, None])
    assert lowest is not None
    return parts, lowest, tree_block(tree, 20)


@pytest.mark.parametrize("attend", KERNELS)
def test_rows_that_form_trees_have_masks_of_their_own(attend: Any) -> None:
    np.testing.assert_allclose(*both(attend, *tree_operands()), rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("attend", KERNELS)
def test_blocks_that_are_not_held_are_not_read(attend: Any) -> None:
    q, block, cache, lengths = operands(2, 2, 1, 64, [0, 64, 256], 640)
    wanted = by_kernel(attend, (q, block, cache, lengths))
    # Blocks of 256 positions on the TPU, of 64 on the GPU: NaN in all that lie behind a request's last one.
    step = {held_tpu.attend: held_tpu.BLOCK, held_gpu.attend: held_gpu.BLOCK, native.attend: 1}[attend]
    behind = np.arange(640) >= np.maximum(-(-np.asarray(lengths) // step), attend is held_tpu.attend)[:, None] * step
    cache = KeysValues(*(np.where(behind[:, None, :, None], np.float32(np.nan), x) for x in cache))
    np.testing.assert_array_equal(by_kernel(attend, (q, block, cache, lengths)), wanted)


@pytest.mark.parametrize("form", ["einsum", "kernel", pytest.param("auto", marks=COMPILER)])
@pytest.mark.parametrize("bad", ["keys", "values"])
def test_a_row_that_is_not_finite_is_kept_apart(form: str, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even rows behind it, which see it, are failed by it: they see zeros; other requests see nothing of it."""
    monkeypatch.setenv(forms.FORM, form)
    q, block, cache, lengths = operands(4, 2, 2, 64, [3, 40, 64], 64)
    attend = jax.jit(partial(block_attention, lowest=None, within=causal_block(4)[None], scale=0.2, apart=True))
    failed = {name: getattr(block, name).at[1, 1, 1, 5].set(jnp.inf if bad == "keys" else jnp.nan) for name in [bad]}
    zeros = KeysValues(*(x.at[1, 1].set(0.0) for x in block))

    made = np.array(attend(q, block._replace(**failed), cache, lengths))
    wanted = np.array(attend(q, zeros, cache, lengths))
    assert np.isnan(made[1, 1]).all()
    made[1, 1] = wanted[1, 1] = 0.0
    np.testing.assert_array_equal(made, wanted)


@COMPILER
@pytest.mark.parametrize("window", [None, 140])
def test_a_request_has_the_same_bits_alone_and_beside_others(window: int | None) -> None:
    """Alone its keys are divided between threads; of many requests, each has one thread."""
    q, block, cache, lengths = operands(5, 3, 3, 64, [300, *range(0, 512, 16)], 512)
    lowest = lowest_seen(lengths[:, None], 5, window)
    attend = jax.jit(partial(block_attention, within=causal_block(5, window)[None], scale=0.2))

    every = attend(q, block, cache, lengths, lowest=lowest)
    alone = attend(
        *jax.tree.map(lambda x: x[:1], (q, block, cache, lengths)), lowest=None if lowest is None else lowest[:1]
    )
    np.testing.assert_array_equal(every[:1], alone)


def test_a_span_that_is_no_multiple_of_a_block() -> None:
    """What lies behind the array's end is NaN in a kernel run as plain jax."""
    np.testing.assert_allclose(
        *both(held_tpu.attend, operands(2, 2, 1, 64, [0, 257, 300], 300), None, causal_block(2)[None]), rtol=2e-5,
        atol=2e-6,
    )  # fmt: skip


def lowered(attend: Any, *operands: Any, platform: str) -> str:
    """The text for a platform; a GPU's kernels are lowered for a kind of GPU, which jax 0.11 wants named."""
    mesh = abstract_mesh(1).update(abstract_device=AbstractDevice("NVIDIA H200", None, "gpu"))
    with use_abstract_mesh(mesh) if platform == "cuda" else nullcontext():
        return attend.trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def test_the_form_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    q, block, cache, lengths = operands(2, 2, 1, 128, [3, 64], 64)

    def text(platform: str) -> str:
        attend = jax.jit(partial(block_attention, lowest=None, within=None, scale=0.2))
        return lowered(attend, q, block, cache, lengths, platform=platform)

    # Each device's own form.
    assert "tpu_custom_call" in text("tpu") and "triton" in text("cuda")
    assert ("dspark_jax_HeldRows" in text("cpu")) == native.ready()
    monkeypatch.setenv(forms.FORM, "einsum")
    assert all("custom_call" not in text(platform) for platform in ("tpu", "cuda", "cpu"))
    monkeypatch.setenv(forms.FORM, "kernel")
    assert "while" in text("cpu")
    monkeypatch.setenv(forms.FORM, "flash")
    with pytest.raises(UserError, match="DSPARK_ATTENTION is 'flash'; expected one of auto, einsum, kernel"):
        text("cpu")


# False: the compiler requests more shared memory than the 232,448 bytes there are, or was not asked.
@pytest.mark.parametrize(("width", "shared", "size", "dtype", "taken"), [
    (32, 8, 128, jnp.bfloat16, True),
    (64, 8, 128, jnp.bfloat16, False),  # 262,144
    (16, 8, 256, jnp.bfloat16, True),
    (128, 1, 256, jnp.bfloat16, False),  # 327,680, most of it of the own block
    (16, 8, 128, jnp.float32, True),
    (32, 8, 128, jnp.float32, False),
])  # fmt: skip
def test_a_gpu_takes_rows_that_fit_beside_the_blocks_on_their_way(
    width: int, shared: int, size: int, dtype: Any, taken: bool
) -> None:
    q, block, cache, lengths = operands(width, shared, 1, size, [3, 64], 64, dtype)
    attend = jax.jit(partial(block_attention, lowest=None, within=None, scale=0.2))
    assert ("triton" in lowered(attend, q, block, cache, lengths, platform="cuda")) is taken


def test_a_mesh_splits_requests_and_kv_heads() -> None:
    q, block, cache, lengths = operands(2, 2, 4, 64, [3, 64], 64)
    mesh = abstract_mesh(4, data=2, tensor=2)
    seen: list[tuple[int, ...]] = []

    def kernel(q: jax.Array, keys: jax.Array, *others: Any, scale: float, interpret: bool) -> jax.Array:
        seen.append((q.shape, keys.shape))
        return q

    with traced_over(mesh):
        jax.eval_shape(
            lambda: held._by_kernel(q, *block, *cache, lengths, None, causal_block(2)[None], None, 0.2, kernel)
        )
    # One request of two, two kv heads of four.
    assert seen == [((1, 2, 2, 2, 64), (1, 2, 64, 64))]
    assert held._spec(q, ("batch", None, "kv_heads"), 2, mesh) == PartitionSpec(("data", "fsdp"), None, "tensor", None)
