"""Program of test_scanned: a target's states on 4 simulated devices that store its layers in parts, by the loop over
stacked layers, and on one device without it; the collectives of its text. Exits non-zero where they differ."""

import os

from tests.xla import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(4)
os.environ["JAX_PLATFORMS"] = "cpu"

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.planning.compiled import collective_parts
from dspark_jax.planning.rounds import LoopText
from dspark_jax.sharding import ShardingRules, batch_shardings, gathered, make_mesh, parameter_shardings, split
from dspark_jax.targets.registry import read_target_config, target_module
from dspark_jax.targets.scanned import LayerLoop
from dspark_jax.training.states import TargetStates
from tests.drafters_tiny import target_hf_config
from tests.families_tiny import GEMMA
from tests.tiny import random_params

TYPES = ["sliding_attention", "full_attention"]
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # One kind of layer, an odd number of them; the embedding and the last layer are tapped.
    "qwen": (target_hf_config(num_hidden_layers=7), (-1, 0, 3, 6)),
    # Two kinds in turn.
    "gemma": (GEMMA | {"num_hidden_layers": 6, "layer_types": TYPES * 3}, (1, 2, 4)),
}


def check(name: str) -> None:
    hf_config, taps = CASES[name]
    config, params = read_target_config(hf_config), random_params(hf_config)
    module = target_module(config, rngs=nnx.Rngs(0))
    graphdef, rng = split(module)[0], np.random.default_rng(0)
    batch = {"input_ids": jnp.asarray(rng.integers(0, config.vocab_size, (4, 24)), jnp.int32)}
    # Packed rows, with padding at the end of one.
    batch["segments"] = jnp.asarray(np.sort(rng.integers(1, 4, (4, 24)), axis=1)).at[1, 20:].set(0)
    wanted = jax.jit(TargetStates(graphdef, taps).stored)(params, batch)

    mesh, rules = make_mesh(1, 4), ShardingRules()
    placed = jax.device_put(params, parameter_shardings(module, mesh, rules))
    whole = jax.tree.map(lambda x: gathered(x.sharding, rules), placed)
    loop = LayerLoop.of(config, placed, rules)
    assert loop is not None
    states = TargetStates(graphdef, taps, whole=whole, loop=loop)
    arranged = states.arranged(placed)
    rows = jax.device_put(batch, batch_shardings(batch, mesh, rules))
    step = jax.jit(states.stored).lower(arranged, rows).compile()
    # Gemma's scores are not scaled: half a unit of the weights' last place moves its states by 3e-4 on one device.
    atol = 1e-3 if name == "gemma" else 2e-5
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), step(arranged, rows), wanted)

    # Every gather of weights is of one layer: none has the stack's axis, and those of the loop are inside of it.
    text = LoopText.of(step.as_text(), config.hidden_size)
    entry = [line for line in text.computations[text.entry] if " all-gather(" in line]
    every = [line for lines in text.computations.values() for line in lines if " all-gather(" in line]
    inside = [line for line in every if line not in entry]
    stacks = {tuple(x.shape) for x in jax.tree.leaves(arranged["layers"])}
    assert inside and all(shape not in stacks for line in every for shape, _ in collective_parts(line))
    assert re.search(r" while\(", "\n".join(text.computations[text.entry]))
    print(name, len(entry), len(inside))


if __name__ == "__main__":
    for case in CASES:
        check(case)
