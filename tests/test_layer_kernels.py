"""A GPU's kernels between a layer's products, run as plain jax on a CPU, against the layers' own code."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, Mesh, use_abstract_mesh

from dspark_jax.decoding.prefill import admit
from dspark_jax.decoding.round import DecodeLoop, LoopParams
from dspark_jax.serving.assembly import make_loop
from dspark_jax.serving.chunks import blank_chunk
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.sharding import abstract_mesh, split, traced_over
from dspark_jax.targets import layers
from dspark_jax.targets.attention import CachedBlock, CausalRows, KeysValues
from dspark_jax.targets.between import Gating
from dspark_jax.targets.kernels import apart_gpu, forms, held_gpu, layer_gpu
from dspark_jax.targets.kernels.apart_gpu import parts_of
from dspark_jax.targets.kv_cache import append_rows, empty_cache
from tests.decoding_tiny import tiny_pair, tiny_target

# No size is a power of two where a kernel pads to one: rows of 192, and 3 queries of each kv head.
SIZES: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
# What takes no kernel of a GPU.
VIEWS = {"reshape", "squeeze", "broadcast_in_dim"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels in place of the layers' own code, as on a GPU."""
    monkeypatch.setattr(layer_gpu, "traced_platform", lambda: "gpu")
    for module, name in ((layer_gpu, "normed"), (layer_gpu, "heads"), (layer_gpu, "written"), (apart_gpu, "apart")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=True))


def drawn(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def held(a: Any, b: Any, dtype: Any = jnp.float32) -> None:
    """Equal but for the order of sums, and in bfloat16 for its last bit, of the largest values: rows cancel."""
    bound = 2**-7 if dtype == jnp.bfloat16 else 1e-5
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        wanted = np.asarray(y, np.float32)
        size = max(1.0, float(np.max(np.abs(wanted))))
        np.testing.assert_allclose(np.asarray(x, np.float32), wanted, rtol=bound, atol=bound * size)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("parts", [0, 1, 8])
def test_a_sum_and_its_norm(parts: int, dtype: Any) -> None:
    norm = layers.RMSNorm(192, 1e-6)
    weight = drawn(192, seed=1, dtype=dtype)
    x = drawn(3, 2, 192, dtype=dtype)
    added = drawn(parts, 3, 2, 192, seed=2, dtype=dtype if parts == 1 else jnp.float32) if parts else None
    norm.weight.set_value(weight)
    held(layer_gpu.normed(x, weight, added, eps=1e-6, interpret=True), jax.jit(norm.of_sum)(x, added), dtype)


def test_heads_of_a_batch_that_has_its_positions_in_common() -> None:
    made, rope = drawn(2, 3, 2, 4, 64), layers.Rope(drawn(1, 3, 32, seed=1), drawn(1, 3, 32, seed=2))
    plain = jax.jit(layers._heads, static_argnums=0)(1e-6, made, *rope, None, None)
    held(layer_gpu.heads(made, *rope, None, None, eps=1e-6, interpret=True), plain)


@pytest.mark.parametrize(("rows", "dtype"), [(1, jnp.bfloat16), (20, jnp.float32)])
def test_a_product_in_parts(rows: int, dtype: Any) -> None:
    x, weight = drawn(rows, 512, dtype=dtype), drawn(512, 192, seed=1, dtype=dtype)
    assert parts_of(x, weight, None) == 0  # on this CPU
    for gating in (None, Gating(128, jax.nn.silu)):
        matrix = weight if gating is None else weight[:256]
        inputs = x if gating is None else gating(x)
        # One part of few inputs, blocks of gate and up, and parts of a block.
        for parts in (2, 4):
            made = apart_gpu.apart(x, matrix, parts=parts, gating=gating, interpret=True)
            assert made.shape == (parts, rows, 192) and made.dtype == jnp.float32
            np.testing.assert_allclose(
                np.asarray(jnp.sum(made, axis=0)), np.asarray(inputs, np.float32) @ np.asarray(matrix, np.float32),
                rtol=2e-2 if dtype == jnp.bfloat16 else 1e-5, atol=0.3 if dtype == jnp.bfloat16 else 1e-4,
            )  # fmt: skip


@pytest.mark.parametrize(("rows", "inputs", "outputs", "width", "parts"), [
    (1, 4096, 2560, 0, 8), (8, 9728, 2560, 2432, 8), (64, 9728, 2560, 2432, 4), (65, 4096, 2560, 0, 0),
    (1, 4096, 2568, 0, 0), (1, 4100, 2560, 0, 0), (1, 9728, 2560, 608, 0),
])  # fmt: skip
def test_parts_fit_rows_columns_and_blocks(
    rows: int, inputs: int, outputs: int, width: int, parts: int, gpu: None
) -> None:
    gating = Gating(width, jax.nn.silu) if width else None
    x = jnp.zeros((rows, inputs * (2 if width else 1)), jnp.bfloat16)
    assert parts_of(x, jnp.zeros((inputs, outputs), jnp.bfloat16), gating) == parts


@pytest.mark.parametrize("width", [1, 3])
def test_rows_are_written_to_every_cache_and_no_nan_with_them(width: int, gpu: None) -> None:
    """Of two shapes, as Gemma's layers have; requests at lengths of their own, the last with too little room."""
    shapes = [(2, 64), (1, 128), (2, 64)]
    cache = jax.tree.map(lambda x: x + 7, empty_cache(shapes, 3, 16, jnp.bfloat16))
    rows = tuple(
        KeysValues(*(drawn(3, width, *shape, seed=i + 9 * k) for k in (0, 1))) for i, shape in enumerate(shapes)
    )
    broken = (rows[0]._replace(keys=rows[0].keys.at[1, 0, 0, 5].set(jnp.nan).at[2, 0, 1, 3].set(-jnp.inf)), *rows[1:])
    starts = jnp.array([0, 5, 15])

    # A function of its own each time, as forms are chosen while one is traced; compiled whole, as loops have it.
    made = jax.jit(lambda *given: append_rows(*given))(cache, broken, starts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(forms.FORM, "einsum")
        plain = jax.jit(lambda *given: append_rows(*given))(cache, broken, starts)
    jax.tree.map(np.testing.assert_array_equal, made, plain)
    assert float(made[0].keys[1, 0, 5, 5]) == 0.0 and float(made[0].keys[0, 0, width, 0]) == 7.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_pass_has_the_same_values(dtype: str, qk_norm: bool, gpu: None) -> None:
    target = tiny_target(dtype=dtype, **SIZES, **({} if qk_norm else {"model_type": "llama", "attention_bias": False}))
    module = nnx.merge(target.graphdef, target.params)
    cache = jax.tree.map(lambda x: drawn(*x.shape, dtype=x.dtype), module.empty_cache(2, 64, 1, dtype))
    tokens, starts = jnp.array([[5], [9]]), jnp.array([40, 3])

    def run(wide: bool = False) -> Any:
        @jax.jit
        def once(params: Any, held: Any) -> Any:
            model = nnx.merge(target.graphdef, params)
            out = model(tokens, starts[:, None], CachedBlock(held, starts), (0,))
            return out, model.append(held, out.kv, starts)

        given = target.params, cache
        return once(*(jax.tree.map(lambda x: np.asarray(x, np.float32), given) if wide else given))

    made = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(forms.FORM, "einsum")
        plain = run()
        if dtype == "float32":
            held(made, plain)
            return
        # Layers carry each rounding on: both are as far from float32 as bfloat16 is.
        wide = run(wide=True)
    for x, y, exact in zip(*map(jax.tree.leaves, (made, plain, wide)), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        errors = [float(np.linalg.norm(np.asarray(value, np.float32) - np.asarray(exact))) for value in (x, y)]
        assert errors[0] <= 1.25 * errors[1] + 1e-6


def test_several_gpus_take_none_in_an_admission(gpu: None) -> None:
    """Neither in the target's pass nor where the drafter's context is made of it."""
    target, drafter = tiny_pair(**SIZES)
    params = LoopParams(target.params, drafter.params)
    loop = make_loop(target, drafter, EngineConfig(2, 60, "fixed"))

    def taken(loop: DecodeLoop) -> set[str]:
        state, new = jax.eval_shape(loop.init_state, params), blank_chunk(loop, 1, 16)
        return {"normed", "heads", "written"} & set(kernels(admit.trace(loop, params, state, new, True).jaxpr.jaxpr))

    assert taken(loop) == {"normed", "heads"}
    over = cast(Mesh, abstract_mesh(2, data=1, tensor=2))
    assert not taken(replace(loop, mesh=over))


def test_few_rows_can_be_trained(gpu: None) -> None:
    target = tiny_target(**SIZES)
    module, x, tokens = nnx.merge(target.graphdef, target.params), drawn(1, 3, 192), jnp.arange(3)[None]
    graph, params = split(module.layers[0])
    (rope, *_) = layers.layer_ropes(target.config, tokens)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        layer = nnx.merge(graph, params)
        return jnp.sum(jnp.sin(layer.before(module.final_norm, x, layer.input_norm(x), rope, CausalRows())[1]))

    made = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(forms.FORM, "einsum")
        held(made, jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x))


# The program


def kernels(jaxpr: Any, fixed: frozenset = frozenset()) -> Iterator[str]:
    """What a traced program runs in kernels, by name: kernels of our own, and operations that are neither views nor,
    like masks, made of constants alone. `fixed`: the variables that hold constants."""
    known = set(fixed)
    for one in jaxpr.eqns:
        given = [hasattr(x, "val") or x in known for x in one.invars]
        name, inner = one.primitive.name, None
        if all(given):
            known |= set(one.outvars)
        elif name == "pallas_call":
            yield str(one.params["name_and_src_info"]).split()[0] if "name" not in one.params else one.params["name"]
        elif name == "cond":
            # Of a choice by platform the GPU's comes first where heads are too small for a TPU.
            inner, given = one.params["branches"][0].jaxpr, given[1:]
        elif name == "custom_jvp_call":
            inner = one.params["call_jaxpr"].jaxpr
        elif name in ("jit", "pjit"):
            inner = one.params["jaxpr"].jaxpr
        elif name not in VIEWS:
            yield name
        if inner is not None:
            yield from kernels(inner, frozenset(v for v, is_fixed in zip(inner.invars, given, strict=True) if is_fixed))


def test_a_layer_of_a_plain_round_is_nine_kernels() -> None:
    """Two products, two norms, heads, attention and its join, and two products in parts; the writes are one for all
    layers."""
    mesh = abstract_mesh(1).update(abstract_device=AbstractDevice("NVIDIA H200", None, "gpu"))

    def counted(count: int) -> Counter:
        target = tiny_target(dtype="bfloat16", **SIZES | {"num_hidden_layers": count})
        module = nnx.merge(target.graphdef, target.params)
        cache, at = module.empty_cache(2, 64, 1, jnp.bfloat16), jnp.array([40, 3])

        def run(tokens: jax.Array, starts: jax.Array) -> Any:
            out = module(tokens, starts[:, None], CachedBlock(cache, starts))
            return out.hidden, module.append(cache, out.kv, starts)

        with use_abstract_mesh(mesh), traced_over(None):
            return Counter(kernels(jax.make_jaxpr(run)(at[:, None], at).jaxpr))

    one, two = counted(1), counted(2)
    assert two - one == {"dot_general": 2, "normed": 2, "heads": 1, "held_attention": 1, "joined": 1, "apart": 2}
    assert one["written"] == two["written"] == 1
    assert held_gpu.takes(jnp.zeros((2, 1, 6, 64)), jnp.zeros((2, 2, 64, 64)), jnp.zeros((2, 1, 2, 64)), None)
