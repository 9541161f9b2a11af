"""Matrices side by side in one: what a device's share holds, how files keep them, and that a pass multiplies once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.checkpoints.tensor_map import Layout, StoredApart
from dspark_jax.sharding import ShardingRules, abstract_mesh, parameter_shardings
from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.joined import Columns, apart, columns_of, together
from dspark_jax.targets.layers import Attention
from dspark_jax.targets.products import by_table, product
from dspark_jax.targets.registry import read_target_config
from tests.decoding_tiny import tiny_pair, tiny_target
from tests.families_tiny import FAMILIES
from tests.test_training import equations
from tests.tiny import random_params


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_apart_and_together(name: str) -> None:
    """By the names of its matrices, of which no group is left joined, and back to the same numbers."""
    config, params = read_target_config(FAMILIES[name]), random_params(FAMILIES[name])
    parts = apart(params, config)
    for made, layer in zip(parts["layers"].values(), config.layers, strict=True):
        assert {"q_weight_dp", "k_weight_dc", "o_weight_pd"} <= set(made["attention"])
        assert ("v_weight_dc" in made["attention"]) is not layer.values_are_keys
        assert made["attention"]["k_weight_dc"].shape[1] == layer.num_kv_heads * layer.head_dim
    jax.tree.map(np.testing.assert_array_equal, together(parts, config, params), params)


def test_a_devices_share_is_whole_heads() -> None:
    """Cut in as many pieces as there are kv heads, each has one head's queries, key and value, and no other's."""
    names, columns = columns_of("qkv_weight_dx", tiny_target().config, 0)
    assert names == ("q_weight_dp", "k_weight_dc", "v_weight_dc") and columns.units == 2
    labels = [np.repeat(np.arange(2), width)[None] for width in columns.widths]
    first, second = np.split(columns.join(labels), 2, axis=1)
    assert np.all(first == 0) and np.all(second == 1)


@pytest.mark.parametrize("layout", [Layout.LINEAR, Layout.SAME])
def test_any_share_is_read_from_the_files_tensors(layout: Layout) -> None:
    """A device reads its columns alone, whether or not they are whole units, and its rows of them."""
    columns, rng = Columns(3, (4, 2)), np.random.default_rng(0)
    shape = (5, 18) if layout is Layout.LINEAR else (18,)
    whole = rng.standard_normal(shape)
    source = StoredApart(("a", "b"), columns, layout)
    tensors = source.write(whole)
    assert [part.shape for part in tensors] == [part for _, part in source.parts(shape)]
    for lo in range(18):
        for hi in range(lo + 1, 19):
            index = (*(slice(1, 4) for _ in shape[1:]), slice(lo, hi))
            np.testing.assert_array_equal(source.read(tensors, shape, index), whole[index])


@pytest.mark.parametrize(("tensor", "cut"), [(2, True), (4, True), (8, True), (3, False)])
def test_a_mesh_holds_no_joined_weight_twice(tensor: int, cut: bool) -> None:
    """Also where it has more devices than there are kv heads: heads are then cut from their groups, but stay whole."""
    fields: dict[str, Any] = {"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 4}
    config = tiny_target(**fields).config
    module = nnx.eval_shape(lambda: Attention(config, 0, rngs=nnx.Rngs(0)))
    mesh = abstract_mesh(tensor, data=1, tensor=tensor)
    spec = parameter_shardings(module, mesh, ShardingRules())["qkv_weight_dx"].spec
    # 2 groups of 6 queries, a key and a value: 16 heads.
    assert (spec[1] == "tensor") is cut


def test_a_pass_multiplies_by_four_weights_a_layer() -> None:
    """Queries, keys and values in one product, gate and up in another: a compiler has nothing to join."""
    target, drafter = tiny_pair()
    rows = jnp.zeros((2, 5), jnp.int32)
    module = nnx.merge(target.graphdef, target.params)
    traced = jax.make_jaxpr(lambda rows: module(rows, rows, CausalRows()).hidden)(rows)
    weights = {x.shape for x in jax.tree.leaves(target.params["layers"]) if x.ndim == 2}
    met = [one for one in dots(traced) if one.invars[1].aval.shape in weights]
    assert len(met) == 4 * target.config.num_layers
    # A draft layer's context gives keys and values alone, and no weight is sliced for it.
    attention = drafter.params["backbone"]["layers"][0]["attention"]
    assert attention["kv_weight_dy"].shape[1] == 2 * attention["q_weight_dp"].shape[1] // 2
    taps = jnp.zeros((2, 5, attention["q_weight_dp"].shape[0] * len(drafter.config.target_layer_ids)))
    backbone = nnx.merge(drafter.graphdef, drafter.params).backbone
    context = jax.make_jaxpr(lambda taps: backbone.context(taps, rows))(taps)
    assert len(dots(context)) == 1 + drafter.config.backbone.num_layers


def dots(traced: Any) -> list[Any]:
    return [one for one in equations(traced.jaxpr) if one.primitive.name == "dot_general"]


def test_one_row_by_a_table_stays_a_product_of_matrices() -> None:
    """With a single row XLA multiplies and sums elements, in float32: on a GPU it first writes the whole table so."""
    table = jax.random.normal(jax.random.key(0), (7, 16), jnp.bfloat16)
    for shape in ((16,), (1, 16), (1, 1, 16), (3, 16)):
        rows = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
        made, expected = by_table(rows, table), product("...d,vd->...v", rows, table)
        assert made.dtype == jnp.float32 and made.shape == expected.shape
        np.testing.assert_allclose(made, expected, rtol=1e-6)
        (dot,) = dots(jax.make_jaxpr(by_table)(rows, table))
        assert [x.aval.dtype for x in dot.invars] == [jnp.bfloat16] * 2 and dot.outvars[0].aval.size > 7
