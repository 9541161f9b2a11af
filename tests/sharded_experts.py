"""Program of test_v4_mesh: mixtures of experts over 8 simulated devices (data, expert, tensor), against one device.

python -m tests.sharded_experts
"""

import os

from tests.xla import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ["JAX_PLATFORMS"] = "cpu"

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from dspark_jax.checkpoints.deepseek_v4_published import save_v4_drafter, save_v4_target
from dspark_jax.checkpoints.drafters import load_drafter, shared_tables
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.drafters.registry import drafter_hf_config, new_drafter
from dspark_jax.serving.generate import drain, engine_for
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.sharding import ShardingRules, batch_shardings, make_mesh, parameter_shardings, traced_over
from dspark_jax.targets.moe import ExpertStack, mix_experts
from dspark_jax.training.losses import LossOptions
from dspark_jax.training.objective import BlockObjective
from dspark_jax.training.placement import Placement
from dspark_jax.training.schedule import learning_rate_schedule, make_optimizer
from dspark_jax.training.states import TargetStates
from dspark_jax.training.step import abstract_train_state, init_train_state, make_train_step
from tests.decoding_tiny import prompts
from tests.v4_tiny import v4_pair, v4_target

AXES = {"data": 2, "expert": 2, "tensor": 2}
# Widths whose fp4 groups of 32 the tensor axis can share; a CSA and an HCA layer, the first of them hashed.
WIDE = {"hidden_size": 64, "moe_intermediate_size": 64, "dspark_markov_rank": 64, "num_hidden_layers": 2}
WIDE |= {"dspark_target_layer_ids": (0, 1)}


def check_layers() -> None:
    """Values and gradients of a float mixture, whichever part of its experts a device has; no stack is gathered."""
    mesh, rng = make_mesh(**AXES), np.random.default_rng(0)
    stack = ExpertStack(
        *(jnp.asarray(rng.normal(size=s) / 4, jnp.float32) for s in ((8, 16, 12), (8, 16, 12), (8, 12, 16)))
    )
    rows, weights = jnp.asarray(rng.normal(size=(6, 16)), jnp.float32), jnp.asarray(rng.random((6, 3)), jnp.float32)
    chosen = jnp.asarray(np.stack([rng.permutation(8)[:3] for _ in range(6)]), jnp.int32)

    def loss(stack: ExpertStack, rows: jax.Array, weights: jax.Array) -> jax.Array:
        out = mix_experts(rows, weights, chosen, stack, lambda gate, up: jax.nn.silu(gate) * up)
        return jnp.sum(out**2)

    run = jax.value_and_grad(loss, (0, 1, 2))
    expected = jax.jit(run)(stack, rows, weights)
    split = parameter_specs(mesh)
    program = jax.jit(traced_over(mesh)(run), in_shardings=(split, None, None))
    found = program(jax.device_put(stack, split), rows, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected)
    text = program.lower(stack, rows, weights).compile().as_text()
    assert not re.search(r"f32\[8,1[26],1[26]\]", text), "a device holds the whole stack"


def parameter_specs(mesh: Any) -> ExpertStack:
    axes = ("experts", "embed", "mlp"), ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
    return ExpertStack(*(jax.sharding.NamedSharding(mesh, ShardingRules().spec(names)) for names in axes))


def check_decode(folder: Path) -> None:
    """A V4 pair in the published form, its codes over the mesh: the tokens and accepted drafts of one device."""
    target, drafter = v4_pair("dspark", compress_ratios=(4, 8, 0), **WIDE)
    published = {"quantization_config": {"quant_method": "fp8"}, "expert_dtype": "fp4"}
    save_v4_target(folder / "target", {**target.hf_config, **published}, target.params, "published")
    save_v4_drafter(folder / "drafter", _with(drafter, published), "published")
    config = EngineConfig(4, 40, "fixed", rounds_per_dispatch=4, buckets=(16,), smallest_prompt_bucket=32)
    found = {}
    for name, mesh in {"one": None, "eight": make_mesh(**AXES)}.items():
        loaded = load_target(folder / "target", dtype="float32", mesh=mesh)
        pair = loaded, load_drafter(folder / "drafter", loaded, dtype="float32", mesh=mesh)
        engine = engine_for(*pair, prompts(4, 6, seed=3, longest=12), SamplingParams(12, stop_tokens=()), config)
        assert engine is not None
        made = {p.index: p.generation for p in drain(engine) if p.generation is not None}
        found[name] = {index: (g.tokens, g.accepted_at) for index, g in made.items()}
    assert found["one"] == found["eight"] and len(found["one"]) == 4
    leaf = flatten_dict(loaded.params)["layers", 0, "mlp", "gate_weight_edf", "codes"]
    assert leaf.dtype == jnp.int8 and leaf.addressable_shards[0].data.nbytes * 4 == leaf.nbytes
    assert jax.tree.leaves(engine.state.target_cache)[0].addressable_shards[0].data.shape[0] == 2


def _with(drafter: Any, fields: dict[str, Any]) -> Any:
    return replace(drafter, hf_config={**drafter.hf_config, **fields})


def check_train() -> None:
    """Two online steps: the frozen target and the stages over the mesh, their experts apart."""
    target = v4_target(3, 0.3, compress_ratios=(4, 8), **WIDE)
    native = drafter_hf_config(
        target.hf_config, kind="dspark", num_layers=1, target_layer_ids=(0, 1), block_size=3, markov_rank=8,
        num_anchors=8, mask_token_id=5, dtype="float32",
    )  # fmt: skip
    mesh, rows = make_mesh(**AXES), jnp.asarray(np.random.default_rng(1).integers(0, 6, (4, 16)), jnp.int32)
    batch = {"input_ids": rows, "loss_mask": jnp.ones_like(rows, jnp.uint8), "lengths": jnp.full((4,), 16)}
    schedule = learning_rate_schedule(2e-2, total_steps=4, warmup_ratio=0.0)
    # A large epsilon: Adam would turn the rounding of gradients near zero into whole steps.
    optimizer = make_optimizer(schedule, (0.9, 0.999), 1e-2, 0.0, 1.0)
    found = []
    for placement in (None, Placement(mesh, ShardingRules())):
        state = init_train_state(native, optimizer, seed=0, placement=placement)
        params, shared, given = target.params, shared_tables(target), batch
        abstract = None
        if placement is not None:
            abstract = abstract_train_state(native, optimizer, placement)
            params = jax.device_put(params, parameter_shardings(target.model(target.params), mesh, ShardingRules()))
            shared = jax.device_put(shared, placement.whole)
            given = jax.device_put(batch, batch_shardings(batch, mesh, placement.rules))
        drafter = new_drafter("fresh", native, jax.random.key(0))
        objective = BlockObjective(drafter.graphdef, drafter.config, LossOptions(anchor_chunk=8))
        states = TargetStates(target.graphdef, (0, 1))
        step = make_train_step(objective, optimizer, schedule, placement=placement, abstract=abstract, states=states)
        for _ in range(2):
            state, metrics = step(state, shared, given, params)
        found.append((jax.device_get(metrics), jax.device_get(state.params)))
    for name, value in found[0][0].items():
        np.testing.assert_allclose(found[1][0][name], value, rtol=2e-4, atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4), found[1][1], found[0][1])
    leaf = state.params["stages"][0]["mlp"]["gate_weight_edf"]
    assert leaf.addressable_shards[0].data.size * 4 == leaf.size


if __name__ == "__main__":
    assert jax.device_count() == 8
    check_layers()
    check_train()
    with tempfile.TemporaryDirectory() as name:
        check_decode(Path(name))
