"""Plans of DeepSeek-V4's published pairs on machines that are not here: memory of a chip, and the compiled decode loop.

Compiling 43 or 61 layers takes a compiler hours. Weights and state are counted at the whole depth; the loop is compiled
with the first layers, among which each kind is once, and with two more, a CSA and an HCA layer. The difference, times
the pairs that are missing, gives the temporaries, collectives and compile time of the whole depth.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict

from dspark_jax.checkpoints.huggingface import abstract_target, parameter_dtypes
from dspark_jax.config.cli import mesh_settings
from dspark_jax.config.schema import MeshSettings
from dspark_jax.decoding.round import LoopParams
from dspark_jax.drafters.deepseek_v4.config import native_config
from dspark_jax.drafters.registry import Drafter, read_config, skeleton
from dspark_jax.planning.compiled import collective_parts, compiled, copies, memory_of, topology_mesh
from dspark_jax.planning.decoding import (
    DecodePlan,
    abstract_drafter,
    abstract_state,
    bytes_of,
    local_shape,
)
from dspark_jax.planning.published_targets import PUBLISHED
from dspark_jax.serving.assembly import make_loop
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.sharding import AnyMesh, abstract_mesh, abstract_params, split
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.deepseek_v4.block import V4Block
from dspark_jax.targets.deepseek_v4.config import V4Config, v4_config
from dspark_jax.targets.deepseek_v4.model import V4Model
from dspark_jax.targets.deepseek_v4.state import empty_state
from dspark_jax.targets.target import Target

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """Chips, and how a pair lies over them.

    Attributes:
        name: of the machine.
        chips: their number.
        memory_gib: of a chip.
        mesh: sizes of the axes, as `infer.plan --mesh` takes them.
        topology: for the TPU compiler; empty: nothing is compiled.
    """

    name: str
    chips: int
    memory_gib: int
    mesh: str
    topology: str = ""

    def planned_mesh(self) -> AnyMesh:
        """The mesh, of the topology's chips where there is one."""
        settings = mesh_settings(self.mesh, MeshSettings())
        if self.topology:
            return topology_mesh(self.topology, *settings.sizes)
        return abstract_mesh(self.chips, *settings.sizes)


# Heads split in whole output groups, 8 in Flash and 16 in Pro; the other chips get experts of their own.
MACHINES = {
    "Flash-DSpark": (
        Machine("v5p:2x2x1", 4, 95, "tensor=4", "v5p:2x2x1"),
        Machine("v6e:4x4", 16, 32, "expert=2,tensor=8", "v6e:4x4"),
        Machine("v5e:8x8", 64, 16, "expert=8,tensor=8", "v5e:8x8"),
        Machine("8 x H200", 8, 141, "tensor=8"),
    ),
    "Pro-DSpark": (Machine("v5p:4x4x2", 32, 95, "expert=2,tensor=16", "v5p:4x4x2"),),
}
# The shortest depth with each kind of layer.
DEPTHS = {"Flash-DSpark": 4, "Pro-DSpark": 3}


def counted(repository: str, machine: Machine, slots: int, longest: int) -> dict[str, float]:
    """GiB of a chip for weights and state at the whole depth, from shapes and shardings alone."""
    hf_config, mesh = PUBLISHED[f"deepseek-ai/DeepSeek-V4-{repository}"], machine.planned_mesh()
    config, native = v4_config(hf_config), native_config(hf_config, "dspark")

    # Layers of one kind are alike, and tracing dozens of them would take minutes.
    outer = replace(config, layers=())
    weights = _bytes(nnx.eval_shape(lambda: V4Model(outer, rngs=nnx.Rngs(0))), config, mesh)
    for layer in set(config.layers):
        block = nnx.eval_shape(lambda layer=layer: V4Block(config, layer, rngs=nnx.Rngs(0)))
        weights += config.layers.count(layer) * _bytes(block, config, mesh)

    stages = skeleton(native)
    drafter = bytes_of(abstract_drafter(stages, mesh, jnp.bfloat16))
    # Slots lie over data and fsdp alone; state has no head axis to split.
    width, size = hf_config["dspark_block_size"] + 1, longest + 64
    state = jax.eval_shape(lambda: empty_state(config, slots, size, width, jnp.bfloat16))

    found = {"target": weights, "drafter": drafter, "state": bytes_of(state)}
    return {name: size / GIB for name, size in found.items()}


def _bytes(module: nnx.Module, config: V4Config, mesh: AnyMesh) -> int:
    """Bytes on one device of a module's parameters, codes as they are stored and the rest in bfloat16."""
    leaves = flatten_dict(split(module)[1])
    return bytes_of(abstract_params(module, mesh, parameter_dtypes(config, leaves, jnp.bfloat16).__getitem__))


def shallow(hf_config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config.json of the first `layers` layers, with the drafter's blocks and as many taps as before."""
    ratios, whole = hf_config["compress_ratios"], hf_config["num_hidden_layers"]
    taps = len(hf_config["dspark_target_layer_ids"])
    return {
        **hf_config,
        "num_hidden_layers": layers,
        "compress_ratios": [*ratios[:layers], *ratios[whole:]],
        "num_hash_layers": min(hf_config["num_hash_layers"], layers - 1),
        "dspark_target_layer_ids": list(range(layers - taps, layers)),
    }


def plan_of(hf_config: Mapping[str, Any], machine: Machine, slots: int, longest: int) -> DecodePlan:
    """The decode loop of this pair on the machine, verifying whole blocks, from shapes alone."""
    settings, config = mesh_settings(machine.mesh, MeshSettings()), v4_config(hf_config)
    mesh = topology_mesh(machine.topology, *settings.sizes)
    graphdef, params = abstract_target(config, "bfloat16", mesh)
    target = Target("planned", config, graphdef, params, hf_config, config_sha256(hf_config))

    native = native_config(hf_config, "dspark")
    stages = skeleton(native)
    drafted = abstract_drafter(stages, mesh, jnp.bfloat16)
    drafter = Drafter("planned", read_config(native), split(stages)[0], drafted, native)
    # One verify bucket: each would be another copy of all layers in the program.
    buckets = (slots * (drafter.config.block_size + 1),)
    loop = make_loop(target, drafter, EngineConfig(slots, longest, buckets=buckets))
    held = LoopParams(target.params, drafter.params)

    return DecodePlan(target, drafter, loop, held, abstract_state(loop, held), mesh)


def program_figures(plan: DecodePlan) -> dict[str, float]:
    """Memory, collectives, copies of whole rings or entries, and CPU seconds of tracing and compiling."""
    began = time.process_time()
    program = compiled(plan.lower(plan.platform), "The decode loop")
    seconds = time.process_time() - began

    text = program.as_text() or ""
    exchanged = [parts for line in text.splitlines() if (parts := collective_parts(line))]
    # Everything that a slot keeps for its positions: rings, raw rows and entries.
    kept = {local_shape(x) for x in jax.tree.leaves((plan.state.target_cache, plan.state.draft)) if x.ndim > 2}

    return {
        "temporary": memory_of(program)["temporary"] / GIB,
        "collectives": len(exchanged),
        "collective_mib": sum(size for parts in exchanged for _, size in parts) / 2**20,
        "copies": len(copies(text, kept)),
        "compile_cpu_seconds": seconds,
    }


def compiled_plan(repository: str, machine: Machine, slots: int, longest: int) -> dict[str, Any]:
    """The loop compiled at two depths, and their difference carried on to the whole one."""
    hf_config, least = PUBLISHED[f"deepseek-ai/DeepSeek-V4-{repository}"], DEPTHS[repository]
    made = {
        layers: program_figures(plan_of(shallow(hf_config, layers), machine, slots, longest))
        for layers in (least, least + 2)
    }
    first, second = made.values()
    pairs = (hf_config["num_hidden_layers"] - least) / 2

    whole = {name: first[name] + pairs * (second[name] - first[name]) for name in first}
    # An odd layer is half a pair here, and counts are whole.
    whole["collectives"] = math.ceil(whole["collectives"])
    return {"by_layers": {str(layers): figures for layers, figures in made.items()}, "whole_depth": whole}
