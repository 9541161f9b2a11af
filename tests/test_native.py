"""The native kernel of a CPU: few rows by a weight, and which products it computes."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import native
from dspark_jax.targets import products

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler: XLA computes all")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def built() -> None:
    assert native.ready()


def arrays(rows: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(RNG.standard_normal(shape).astype(np.float32) for shape in ((rows, inputs), (inputs, outputs)))


@pytest.mark.parametrize("rows", [1, 5, 10, 11, 23])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 272), (6, 16), (33, 528)])
def test_products_are_those_of_numpy_whatever_the_rows_beside_them(rows: int, inputs: int, outputs: int) -> None:
    x, weight = arrays(rows, inputs, outputs)
    found = np.asarray(native.times(x, weight))
    np.testing.assert_allclose(found, x @ weight, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(found[-1:], native.times(x[-1:], weight))

    if inputs % native.LANES == 0:
        table = np.ascontiguousarray(weight.T)
        of_table = np.asarray(native.times_table(x, table))
        np.testing.assert_allclose(of_table, x @ weight, rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(of_table[-1:], native.times_table(x[-1:], table))


def calls(function, *operands) -> int:
    return str(jax.jit(function).lower(*operands).as_text()).count("dspark_jax_FewRows")


@pytest.mark.parametrize(
    ("shape", "outputs", "dtype", "expected"),
    [
        ((1, 5, 128), 512, jnp.float32, 1),
        ((1, 1, 128), 512, jnp.float32, 0),  # one row: XLA reads the weight as it lies too
        ((64, 128), 512, jnp.float32, 0),  # a prefill
        ((5, 128), 256, jnp.float32, 0),  # a small weight
        ((5, 128), 513, jnp.float32, 0),  # no multiple of the lanes
        ((5, 128), 512, jnp.bfloat16, 0),
    ],
)
def test_the_kernel_takes_few_float32_rows_by_large_weights(shape, outputs, dtype, expected) -> None:
    assert calls(products.rows_times, jnp.ones(shape, dtype), jnp.ones((128, outputs), dtype)) == expected


def test_it_has_the_derivatives_of_a_product() -> None:
    x, weight = arrays(3, 128, 512)

    def loss(function):
        return lambda x, weight: jnp.sum(jnp.sin(function(x, weight)))

    found = jax.grad(loss(products.rows_times), (0, 1))(x, weight)
    for a, b in zip(found, jax.grad(loss(jnp.matmul), (0, 1))(x, weight), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_programs_for_accelerators_do_not_hold_it() -> None:
    x, weight = arrays(3, 128, 512)
    traced = jax.jit(products.rows_times).trace(x, weight)
    assert "dspark_jax_FewRows" in traced.lower().as_text()
    assert "dspark_jax_FewRows" not in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("obstacle", ["switched off", "no compiler", "a compiler that fails"])
def test_without_it_products_are_those_of_xla(obstacle: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DSPARK_JAX_CACHE", str(tmp_path))
    if obstacle == "switched off":
        monkeypatch.setenv(native.SWITCH, "off")
    else:
        monkeypatch.setattr(native, "COMPILERS", () if obstacle == "no compiler" else ("false",))

    native.ready.cache_clear()
    try:
        assert not native.ready()
        assert calls(lambda x, weight: products.rows_times(x, weight), *arrays(5, 128, 512)) == 0
    finally:
        native.ready.cache_clear()
    assert not list(tmp_path.rglob("*.so"))
