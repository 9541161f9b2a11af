"""The native kernel of a CPU: few rows by a weight, and which products it computes."""

import shutil
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax import load_target, native
from dspark_jax.decoding import sampling
from dspark_jax.decoding.noise import Key
from dspark_jax.targets import between, products
from dspark_jax.targets.attention import CachedBlock, CausalRows
from dspark_jax.targets.layers import head_logits
from dspark_jax.targets.panels import Panels, PanelWeight, laid_out

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


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 70])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 288), (7, 48), (33, 70), (33, 20)])
def test_products_by_panels_are_those_of_numpy_whatever_the_rows_beside_them(rows, inputs, outputs) -> None:
    x, weight = arrays(rows, inputs, outputs)
    panels = PanelWeight(jnp.asarray(weight))[...]
    found = np.asarray(jax.jit(jnp.matmul)(x, weight)), np.asarray(jnp.asarray(x) @ panels)
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(found[1][-1:], jnp.asarray(x[-1:]) @ panels)


@pytest.mark.parametrize("rows", [1, 5, 9, 10])
def test_panels_of_16_bits_have_the_products_of_wide_ones(rows: int) -> None:
    """Taken where a weight is the float32 form of bfloat16 numbers, and for no other weight."""
    x, weight = arrays(rows, 33, 70)
    assert PanelWeight(jnp.asarray(weight))[...].panels.dtype == jnp.float32
    rounded = weight.astype(jnp.bfloat16).astype(np.float32)
    narrow = PanelWeight(jnp.asarray(rounded))[...]
    assert narrow.panels.dtype == jnp.bfloat16
    wide = Panels(jnp.asarray(laid_out(rounded)), narrow.outputs)
    assert wide.panels.dtype == jnp.float32
    np.testing.assert_array_equal(jnp.asarray(x) @ narrow, jnp.asarray(x) @ wide)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_16_bits_are_widened(dtype: type) -> None:
    """Those of a drafter in bfloat16, by the head of a target in float32."""
    x, weight = arrays(5, 33, 70)
    rows, panels = jnp.asarray(x, jnp.bfloat16), PanelWeight(jnp.asarray(weight.astype(dtype), jnp.float32))[...]
    made = jax.jit(lambda rows, panels: head_logits(rows, panels, None))(rows, panels)
    assert made.dtype == jnp.float32
    np.testing.assert_array_equal(made, rows.astype(jnp.float32) @ panels)


def test_shapes_alone_are_taken_for_the_checkpoints_dtype() -> None:
    """A program that is compiled ahead is the one that an engine runs."""
    target = load_target("embedded", dtype="float32", tokenizer=False)
    planned = replace(target, params=jax.eval_shape(lambda: target.params)).for_rounds
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), target.for_rounds.params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), planned.params) == shapes
    assert planned.graphdef == target.for_rounds.graphdef


def test_engines_read_the_large_matrices_of_a_model_in_panels() -> None:
    """Equal to the model as it was loaded, which stays as it is; a program for an accelerator holds no kernel."""
    target = load_target("embedded", dtype="float32", tokenizer=False)
    made = target.for_rounds
    assert made is target.for_rounds and made.for_rounds.graphdef == made.graphdef != target.graphdef
    shapes = {(x.shape[-1], x.dtype.name) for x in jax.tree.leaves(made.params) if x.ndim == 3}
    assert shapes == {(native.PANEL, "bfloat16")} and not any(x.ndim == 3 for x in jax.tree.leaves(target.params))

    tokens, positions = jnp.arange(7)[None], jnp.arange(7)[None]

    def logits(params, graphdef):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens, positions, CausalRows()).hidden)

    # The head too, which is the embedding in the model that was loaded.
    assert "head_weight_vd" in made.params and "head_weight_vd" not in target.params
    compiled = jax.jit(logits, static_argnums=1)
    traced = compiled.trace(made.params, made.graphdef)
    assert "dspark_jax_Panels" in traced.lower().as_text()
    assert "dspark_jax_Panels" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    expected = compiled(target.params, target.graphdef)
    np.testing.assert_allclose(compiled(made.params, made.graphdef), expected, atol=2e-4)


def test_a_verify_pass_has_the_bits_of_plain_rounds() -> None:
    """Whether a token is verified among the drafts of a request or decoded alone, its logits are the same numbers."""
    target = load_target("embedded", dtype="float32", tokenizer=False).for_rounds
    model = target.model(target.params)

    @jax.jit
    def logits(params, cache, length, tokens):
        made = target.model(params)
        out = made(tokens, length[:, None] + jnp.arange(tokens.shape[1]), CachedBlock(cache, length))
        return made.logits(out.hidden), made.append(cache, out.kv, length)

    # Positions on both sides of a chunk's end.
    tokens, held = RNG.integers(0, 500, (1, 5)), np.asarray([125])
    empty = model.empty_cache(1, 192, 5, jnp.float32)
    cache = jax.tree.map(lambda x: jnp.asarray(RNG.standard_normal(x.shape), jnp.float32), empty)
    block, _ = logits(target.params, cache, held, tokens)

    for i in range(5):
        alone, cache = logits(target.params, cache, held + i, tokens[:, i : i + 1])
        np.testing.assert_array_equal(np.asarray(alone)[0, 0], np.asarray(block)[0, i])


def calls(function, *operands) -> int:
    return str(jax.jit(function).lower(*operands).as_text()).count("dspark_jax_FewRows")


@pytest.mark.parametrize(
    ("shape", "outputs", "dtype", "expected"),
    [
        ((1, 5, 128), 512, jnp.float32, 1),
        ((1, 1, 128), 512, jnp.float32, 1),
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

    found = jax.jit(jax.grad(loss(products.rows_times), (0, 1)))(x, weight)
    for a, b in zip(found, jax.jit(jax.grad(loss(jnp.matmul), (0, 1)))(x, weight), strict=True):
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

    # Asked anew, and the process's own answer left alone: kernels cannot be registered twice.
    monkeypatch.setattr(native, "ready", cache(native.ready.__wrapped__))
    assert not native.ready()
    assert calls(lambda x, weight: products.rows_times(x, weight), *arrays(5, 128, 512)) == 0
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(("rows", "size"), [(1, 576), (5, 48), (3, 16)])
def test_norms_of_few_rows_are_those_of_xla_whatever_the_rows_beside_them(rows: int, size: int) -> None:
    x, weight = 3 * arrays(rows, size, 1)[0], arrays(1, size, 1)[0][0]

    def loss(norm):
        return lambda x, weight: jnp.sum(jnp.sin(norm(x, weight, 1e-5)))

    plain = between._plain_norm
    normed = jax.jit(partial(between.normed, eps=1e-5))
    found = np.asarray(normed(x, weight))
    np.testing.assert_allclose(found, jax.jit(plain, static_argnums=2)(x, weight, 1e-5), atol=2e-6)
    np.testing.assert_array_equal(found[-1:], normed(x[-1:], weight))
    slopes = (jax.jit(jax.grad(loss(norm), (0, 1)))(x, weight) for norm in (between.normed, plain))
    for a, b in zip(*slopes, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("units", "width"), [(1, 64), (3, 16)])
def test_gates_of_few_rows_are_those_of_xla_whatever_the_rows_beside_them(units: int, width: int) -> None:
    gating = between.Gating(width, jax.nn.silu)
    # Gates on both sides of where an exponential of them would be 0 or infinite.
    x = 40 * arrays(5, 2 * units * width, 1)[0]
    gated = jax.jit(between.gated, static_argnums=1)
    found = np.asarray(gated(x, gating))
    np.testing.assert_allclose(found, jax.jit(gating)(x), rtol=1e-5, atol=1e-30)
    np.testing.assert_array_equal(found[-1:], gated(x[-1:], gating))
    found, expected = (
        jax.jit(jax.grad(lambda x, gate=gate: jnp.sum(jnp.sin(gate(x)))))(x / 40)
        for gate in (partial(between.gated, gating=gating), gating)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rotations_are_those_of_xla() -> None:
    positions, frequencies = (
        jnp.asarray([[0, 5], [77, 131071]]),
        jnp.asarray(10000.0 ** (-np.arange(32) / 32), jnp.float32),
    )
    for found, expected in zip(
        jax.jit(between.rotations)(positions, frequencies),
        jax.jit(between._plain_rotations)(positions, frequencies),
        strict=True,
    ):
        assert found.shape == (2, 2, 32)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_lies_between_products_is_of_kernels_in_rounds_alone() -> None:
    """Of a CPU's few float32 rows; in prompts, other dtypes and programs for accelerators it is XLA's."""

    def text(rows: int, dtype=jnp.float32, platform: str = "cpu") -> str:
        x, weight = jnp.ones((rows, 576), dtype), jnp.ones(576, dtype)
        traced = jax.jit(partial(between.normed, eps=1e-5)).trace(x, weight)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "dspark_jax_NormedRows" in text(5)
    assert not any("dspark_jax" in other for other in (text(512), text(5, jnp.bfloat16), text(5, platform="tpu")))


def awkward_rows() -> np.ndarray:
    """Rows [2, 4, 1500] of logits: with ties, -inf, NaN and inf among them; 1,500 is no multiple of the lanes."""
    rows = 4 * np.random.default_rng(0).standard_normal((2, 4, 1500)).astype(np.float32)
    rows[0, 1, [7, 1490]] = rows[0, 1].max() + 1
    rows[0, 2, ::2] = -np.inf
    rows[0, 3, 1497] = np.nan
    rows[1, 1] = -np.inf
    rows[1, 2, 3] = np.inf
    rows[1, 3, 1499] = 40.0
    return rows


def test_the_first_of_the_largest_is_that_of_plain_jax() -> None:
    rows = awkward_rows()
    made = jax.jit(sampling.first_argmax)
    assert "FirstLargest" in made.lower(rows).as_text()
    # XLA's own maximum of a row with a NaN is one or the other.
    sound = ~np.isnan(rows).any(axis=-1)
    found = np.asarray(made(rows))
    np.testing.assert_array_equal(found[sound], np.asarray(jax.jit(sampling._two_reductions)(rows))[sound])
    np.testing.assert_array_equal(found[0], [*np.argmax(rows[0, :3], axis=-1), 1499])


@pytest.mark.parametrize(
    ("temperatures", "min_p"), [((1.0, 0.7), (0.0, 0.0)), ((0.0, 1.3), (0.0, 0.01)), ((1.0, 0.0), (0.5, 0.1))]
)
def test_laws_are_those_of_plain_jax(temperatures: tuple[float, ...], min_p: tuple[float, ...]) -> None:
    rows, zeros = awkward_rows(), np.zeros(2, np.int32)
    params = sampling.SamplingArrays(np.float32(temperatures), zeros, np.ones(2, np.float32), np.float32(min_p))
    made = jax.jit(sampling.sampling_law)
    assert "dspark_jax_Laws" in made.lower(rows, params).as_text()
    wanted = np.asarray(jax.jit(partial(sampling._law_by_xla, cut=False))(params, rows))
    sound, found = ~np.isnan(rows).any(axis=-1), np.asarray(made(rows, params))
    np.testing.assert_allclose(found[sound], wanted[sound], rtol=3e-6, atol=1e-12)
    assert temperatures[0] == 0 or np.isnan(found[~sound]).all()
    # Rows whose numbers are finite have a law of mass 1.
    np.testing.assert_allclose(np.sum(found, axis=-1)[[0, 0, 1], [0, 1, 0]], 1.0, atol=2e-6)


def test_the_clocks_of_a_race_are_those_of_plain_jax() -> None:
    """49,152 words of each of six keys: the same random numbers, and their logarithms."""
    keys = Key.of(jax.random.key_data(jax.random.split(jax.random.key(3), (2, 3))))
    made = jax.jit(sampling._waits, static_argnums=1)
    assert "dspark_jax_Waits" in made.lower(keys, 49_157).as_text()
    uniforms = keys.uniform(49_157)
    np.testing.assert_array_equal(
        uniforms[1, 2], jax.random.uniform(jax.random.split(jax.random.key(3), (2, 3))[1, 2], (49_157,))
    )
    found = np.asarray(made(keys, 49_157))
    np.testing.assert_allclose(found, -np.log(np.asarray(uniforms, np.float64)), rtol=2.5e-7)
    assert (found > 0).all()
