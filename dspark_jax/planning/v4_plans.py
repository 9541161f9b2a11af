"""Plans of DeepSeek-V4's published pairs on machines that are not here: memory of a chip, and the compiled decode loop.

Compiling 43 or 61 layers takes a compiler hours. Weights and state are counted at the whole depth; the loop is compiled
with the first layers, among which each kind is once, and with two more, a CSA and an HCA layer. The difference, times
the pairs that are missing, gives the temporaries, collectives and compile time of the whole depth.
"""

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
from dspark_jax.config.schema import MeshSettings, TrainConfig
from dspark_jax.decoding.round import LoopParams
from dspark_jax.drafters.deepseek_v4.config import native_config
from dspark_jax.drafters.registry import Drafter, read_config, skeleton
from dspark_jax.planning.compiled import collective_sums, compiled, copies, lowering_platform, memory_of, topology_mesh
from dspark_jax.planning.decoding import (
    DecodePlan,
    abstract_drafter,
    abstract_state,
    bytes_of,
    local_shape,
)
from dspark_jax.planning.gpus import READINGS
from dspark_jax.planning.published_targets import PUBLISHED
from dspark_jax.planning.training import AbstractRun
from dspark_jax.serving.assembly import make_loop
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.sharding import AnyMesh, abstract_mesh, abstract_params, split, traced_over
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.deepseek_v4.block import V4Block
from dspark_jax.targets.deepseek_v4.config import V4Config, v4_config
from dspark_jax.targets.deepseek_v4.experts import V4MoE
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
        topology: for the compiler, as `compiled.topology_devices` takes it.
        step_mesh: sizes of the axes for the training step, whose state fsdp splits too.
    """

    name: str
    chips: int
    memory_gib: int
    mesh: str
    topology: str
    step_mesh: str = ""

    @property
    def counted_mesh(self) -> AnyMesh:
        """The mesh of as many devices of no kind, over which arrays lie as on the machine."""
        return abstract_mesh(self.chips, *self.sizes)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sizes of the mesh's axes, in the order that meshes are made with."""
        return mesh_settings(self.mesh, MeshSettings()).sizes


# Heads split in whole output groups, 8 in Flash and 16 in Pro; the other chips get experts of their own. Over 16 chips
# an expert of Pro would be 192 wide: no multiple of a TPU's 128 lanes, so that its compiler lays all codes out anew.
MACHINES = {
    "Flash-DSpark": (
        Machine("v5p:2x2x1", 4, 95, "tensor=4", "v5p:2x2x1", "expert=4"),
        Machine("v6e:4x4", 16, 32, "expert=2,tensor=8", "v6e:4x4", "fsdp=2,expert=8"),
        Machine("v5e:8x8", 64, 16, "expert=8,tensor=8", "v5e:8x8", "fsdp=8,expert=8"),
        Machine("8 x H200", 8, 141, "tensor=8", "H200:8", "expert=8"),
    ),
    "Pro-DSpark": (
        Machine("v5p:4x4x2", 32, 95, "expert=4,tensor=8", "v5p:4x4x2", "fsdp=4,expert=8"),
        Machine("v5p:4x4x4", 64, 95, "expert=8,tensor=8", "v5p:4x4x4", "fsdp=8,expert=8"),
    ),
}
# A short depth with each kind of layer and all that choose experts by token id, and one pair of layers more.
DEPTHS = {"Flash-DSpark": (4, 6), "Pro-DSpark": (4, 6)}


def published(repository: str) -> dict[str, Any]:
    """config.json of a published repository, by what follows DeepSeek-V4 in its name."""
    return PUBLISHED[f"deepseek-ai/DeepSeek-V4-{repository}"]


def counted(repository: str, machine: Machine, slots: int, longest: int) -> dict[str, float]:
    """GiB of a chip for weights and state at the whole depth, from shapes and shardings alone."""
    hf_config, mesh = published(repository), machine.counted_mesh
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


def widened_experts(repository: str, machine: Machine) -> float:
    """GiB of a chip that the routed experts of one layer would take in bfloat16: temporaries below it show that no
    program holds them so."""
    experts, hidden = v4_config(published(repository)).experts, published(repository)["hidden_size"]
    assert experts is not None
    _, _, tensor, spread = machine.sizes
    return experts.count * 3 * hidden * experts.intermediate_size * 2 / (tensor * spread) / GIB


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
    config, mesh = v4_config(hf_config), topology_mesh(machine.topology, *machine.sizes)
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


def compiled_figures(repository: str, machine: Machine, slots: int, longest: int, layers: int) -> dict[str, Any]:
    """Figures of the decode loop, compiled with the first `layers` layers.

    Returns:
        GiB of temporaries, [number, MiB] of the collectives of each name, copies of whole rings or entries, and CPU
        seconds of tracing and compiling.
    Raises:
        UserError: there is no compiler for the machine, or the program does not fit it.
    """
    plan = plan_of(shallow(published(repository), layers), machine, slots, longest)
    began = time.process_time()
    program = compiled(plan.lower(plan.platform), "The decode loop", _options(plan.platform))
    seconds = time.process_time() - began

    text = program.as_text() or ""
    # Everything that a slot keeps for its positions: rings, raw rows and entries.
    kept = {local_shape(x) for x in jax.tree.leaves((plan.state.target_cache, plan.state.draft)) if x.ndim > 2}

    return {
        "temporary_gib": memory_of(program)["temporary"] / GIB,
        "collectives": _collectives(text),
        "copies": len(copies(text, kept)),
        "compile_cpu_seconds": seconds,
    }


def expert_figures(repository: str, machine: Machine, rows: int) -> dict[str, Any]:
    """Figures of one layer's experts alone, router and shared one with them, on `rows` rows in each round of a loop.

    Returns:
        GiB of a chip for weights, as they are stored, and for temporaries, and CPU seconds of tracing and compiling.
    Raises:
        UserError: as `compiled_figures`.
    """
    config, mesh = v4_config(published(repository)), topology_mesh(machine.topology, *machine.sizes)
    module = nnx.eval_shape(lambda: V4MoE(config, False, rngs=nnx.Rngs(0)))
    graphdef, abstract = split(module)
    dtypes = parameter_dtypes(config, flatten_dict(abstract), jnp.bfloat16)
    params = abstract_params(module, mesh, dtypes.__getitem__)

    def rounds(params: dict, x: jax.Array, tokens: jax.Array) -> jax.Array:
        layer: Any = nnx.merge(graphdef, params)
        # In a loop as in decoding, where a compiler may move work on weights in front of it.
        return jax.lax.fori_loop(0, 8, lambda _, x: layer(x, tokens)[0], x)

    began = time.process_time()
    given = jax.ShapeDtypeStruct((rows, config.hidden_size), jnp.bfloat16), jax.ShapeDtypeStruct((rows,), jnp.int32)
    platform = lowering_platform(mesh.devices.flat[0])
    lowered = jax.jit(traced_over(mesh)(rounds)).trace(params, *given).lower(lowering_platforms=(platform,))
    program = compiled(lowered, "The layer of experts", _options(platform))

    return {
        "weights_gib": bytes_of(params) / GIB,
        "temporary_gib": memory_of(program)["temporary"] / GIB,
        "compile_cpu_seconds": time.process_time() - began,
    }


def carried_on(made: Mapping[str, Mapping[str, Any]], whole: int) -> dict[str, Any]:
    """The figures at depth `whole`, on the line through those of the two depths that were compiled; of copies, which
    are none or a fault, the larger number that was found. No size and no time is below the larger of the two: where
    the deeper program took less, as compilers that share their cores may, the line leads nowhere."""
    (first, least), (second, more) = sorted((int(depth), figures) for depth, figures in made.items())

    def along(a: float, b: float) -> float:
        return a + (whole - first) / (second - first) * (b - a)

    other = "collectives", "copies"
    names = sorted({*least["collectives"], *more["collectives"]})
    sums = {name: [found["collectives"].get(name, [0, 0.0]) for found in (least, more)] for name in names}
    return {
        **{name: max(along(least[name], more[name]), least[name], more[name]) for name in least if name not in other},
        "collectives": {name: [round(along(*of)) for of in zip(*both, strict=True)] for name, both in sums.items()},
        **({"copies": max(least["copies"], more["copies"])} if "copies" in least else {}),
    }


STAGES = (1, 2)
"""Stages of the drafters whose training steps are compiled; a published module has three."""


def step_arguments(config: TrainConfig, machine: Machine) -> float:
    """GiB of a chip for the state, the tables and the batch of a configuration's training step, on target states from
    a cache, from shapes and shardings alone."""
    config = _cached(config, machine)
    run = AbstractRun.of(config, abstract_mesh(machine.chips, *config.mesh.sizes))
    return bytes_of((run.state, run.shared, run.batch)) / GIB


def step_figures(config: TrainConfig, machine: Machine, stages: int) -> dict[str, Any]:
    """Figures of the training step of a configuration with so many stages, on target states from a cache.

    Returns:
        GiB of a chip for the state and the batch and for temporaries, [number, MiB] of the collectives of each name,
        and CPU seconds of tracing and compiling.
    Raises:
        UserError: as `compiled_figures`.
    """
    config = _cached(replace(config, drafter=replace(config.drafter, num_layers=stages)), machine)
    mesh = topology_mesh(machine.topology, *config.mesh.sizes)
    run, began = AbstractRun.of(config, mesh), time.process_time()
    platform = lowering_platform(mesh.devices.flat[0])
    program = compiled(run.lower(platform), "The step", _options(platform))
    seconds, memory = time.process_time() - began, memory_of(program)

    return {
        "arguments_gib": memory["arguments"] / GIB,
        "temporary_gib": memory["temporary"] / GIB,
        "collectives": _collectives(program.as_text() or ""),
        "compile_cpu_seconds": seconds,
    }


def _cached(config: TrainConfig, machine: Machine) -> TrainConfig:
    """The configuration on the machine's mesh for steps, with the target's states from a cache."""
    mesh = mesh_settings(machine.step_mesh, config.mesh)
    return replace(config, data=replace(config.data, source="offline", cache="planned"), mesh=mesh)


def _options(platform: str) -> dict[str, Any] | None:
    """The compiler's options, without which CUDA's would ask for a device to try products on."""
    return READINGS["fused"] if platform == "cuda" else None


def _collectives(text: str) -> dict[str, list[float]]:
    """[number, MiB] of the collectives of each name."""
    return {name: [number, size / 2**20] for name, (number, size) in collective_sums(text).items()}
