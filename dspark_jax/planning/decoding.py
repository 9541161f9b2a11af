"""The decode loop from shapes alone: the memory of a device, before weights are fetched or hardware is rented.

Only config.json files are read; the targets that configs/ names need not even those. The program is the one that the
engine dispatches: all rounds, every verify bucket, the state donated. `infer.plan` prints it.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from dspark_jax.checkpoints.drafters import drafter_hf_config
from dspark_jax.checkpoints.huggingface import DTYPES, abstract_target
from dspark_jax.config.cli import load_config, mesh_settings
from dspark_jax.config.schema import DrafterSettings, MeshSettings, TrainConfig
from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.decoding.round import DecodeLoop, LoopParams
from dspark_jax.decoding.state import DecodeState
from dspark_jax.drafters.config import DSparkConfig, held_dtype
from dspark_jax.drafters.registry import Drafter, read_config, skeleton
from dspark_jax.errors import UserError
from dspark_jax.planning.compiled import (
    compiled,
    copies,
    figures,
    lowering_platform,
    memory_of,
    topology_mesh,
)
from dspark_jax.planning.gpus import READINGS
from dspark_jax.planning.kernels import round_kernels
from dspark_jax.planning.published_targets import planned_target, with_layers
from dspark_jax.planning.rounds import LoopText
from dspark_jax.planning.v4_costs import V4Costs
from dspark_jax.report import mebibytes
from dspark_jax.roofline.decoding import round_terms
from dspark_jax.roofline.hardware import Term
from dspark_jax.scheduling.costs import CostTable, Occupancy, ScheduleTables
from dspark_jax.serving.assembly import make_loop
from dspark_jax.serving.settings import DEFAULT_ENGINE, EngineConfig, PolicyName, check_engine, policy_named
from dspark_jax.sharding import AnyMesh, abstract_params, make_mesh, split
from dspark_jax.targets.deepseek_v4.config import V4Config
from dspark_jax.targets.pages import is_paged
from dspark_jax.targets.target import Target
from dspark_jax.training.spec import drafter_config


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan."""

    config: str = ""
    """Training configuration whose target and drafter are planned for."""
    target: str = ""
    """Folder or hub id of the target, in place of the configuration's."""
    drafter: str = ""
    """Folder or hub id of the drafter, in place of the configuration's; without either the loop decodes plainly."""
    slots: int = 8
    """Requests decoded at once."""
    longest: int = 4096
    """Positions that a request may take, prompt and new tokens."""
    context: int = 0
    """Positions cached of each request, for the floor; 0: half of the longest."""
    policy: PolicyName = "fixed"
    """How many drafts are verified; the load-adaptive policies bring their tables."""
    cache_pages: int = 0
    """Pages of one cache that all requests share; 0: every slot holds `longest`."""
    page: int = DEFAULT_ENGINE.page
    """Positions of a page."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    mesh: str = ""
    """Devices along the mesh axes, as in tensor=4; empty: one device, or with a topology all along tensor."""
    topology: str = ""
    """What to compile for: TPUs, as in v5e:2x2, of which a smaller mesh takes the first chips, or a GPU, H100 or H200.
    Empty: the devices here."""
    device: str = ""
    """Whose peaks the floor is for, a device kind; empty: the device that the loop is compiled for."""
    compile: bool = True
    """Compile the loop; without, only the floor is printed."""
    layers: int = 0
    """Decoder layers to plan the configuration's pair with, which compile much sooner; 0: all of them."""

    def __post_init__(self) -> None:
        if self.slots < 1 or self.longest < 2:
            raise UserError("A plan needs --slots of 1 or more and --longest of 2 or more.")
        if self.layers < 0 or (self.layers and self.drafter):
            raise UserError(
                f"--layers is {self.layers}; expected 1 or more layers of a --config or a --target alone, or 0 for all "
                "of them. A drafter in a folder has the layers that it has."
            )


@dataclass(frozen=True)
class DecodePlan:
    """The loop that an engine would run, and ShapeDtypeStructs of its arguments.

    Attributes:
        target, drafter: with shapes in place of parameters; no drafter means plain decoding.
        loop: the static part of the program.
        params, state: its arguments.
        mesh: None for one attached device; a mesh of size 1 is one chip of a topology.
    """

    target: Target
    drafter: Drafter | None
    loop: DecodeLoop
    params: LoopParams
    state: DecodeState
    mesh: Mesh | None

    @classmethod
    def of(cls, options: PlanOptions) -> "DecodePlan":
        """The plan of some options; UserError for configurations that don't fit together, or a mesh that the devices
        cannot form."""
        # The mesh first: shapes on a device follow from it.
        mesh = plan_mesh(options)
        target, drafter = planned_pair(options, mesh)
        # An engine sizes this table by the target's stop tokens; a plan without them keeps one slot.
        stops = max(1, len(target.stop_tokens))
        policy = policy_named(options.policy)
        config = EngineConfig(
            options.slots, options.longest, stop_slots=stops, cache_pages=options.cache_pages, page=options.page
        )
        check_engine(config)
        loop = make_loop(target, drafter, config, policy)

        # Costs of any values will do: shapes do not depend on them.
        tables = None

        if drafter is not None and policy.needs_tables:
            costs = CostTable.of(loop.buckets, np.linspace(1.0, 2.0, len(loop.buckets)))
            tables = shapes_of(ScheduleTables.of(costs, (1.0,) * loop.block))

        params = LoopParams(target.params, {} if drafter is None else drafter.params, tables)
        return cls(target, drafter, loop, params, abstract_state(loop, params), mesh)

    @property
    def device_kind(self) -> str:
        """jax's name of the devices that the loop is compiled for."""
        return (jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]).device_kind

    @property
    def platform(self) -> str:
        """jax's name of the platform that the loop is compiled for."""
        return lowering_platform(jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0])

    def describe(self) -> dict[str, Any]:
        """The facts of the plan by the names that `infer.plan` prints; sizes are those on one device."""
        loop, mesh = self.loop, self.mesh
        return {
            "target": self.target.name,
            "drafter": "none" if self.drafter is None else self.drafter.name,
            "devices": f"{1 if mesh is None else mesh.size} x {self.device_kind}",
            "requests x positions": f"{loop.requests} x {loop.size}",
            "verify buckets": " ".join(map(str, loop.buckets)),
            "target's parameters a device": mebibytes(bytes_of(self.params.target)),
            "drafter's parameters a device": mebibytes(bytes_of(self.params.drafter)),
            "target's cache a device": mebibytes(bytes_of(self.state.target_cache)),
            "drafter's state a device": mebibytes(bytes_of(self.state.draft)),
        }

    def lower(self, platform: str) -> jax.stages.Lowered:
        """One dispatch, lowered for "cpu", "cuda" or "tpu", whatever is attached."""
        scalar = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), bool)
        # `rounds` and `until_free`, the last two arguments of a dispatch, are traced scalars.
        occupancy = shapes_of(Occupancy.of())
        # A GPU's kernels are lowered for a kind of device, which jax looks up in the mesh that they were traced over.
        known = nullcontext() if self.mesh is None else jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
        with known:
            traced = run_rounds.trace(self.loop, self.params, self.state, occupancy, *scalar)
            return traced.lower(lowering_platforms=(platform,))

    def compile(self) -> dict[str, Any]:
        """Figures of the compiled dispatch; UserError where it does not fit the device."""
        if self.platform == "cuda" and self.mesh is not None:
            return self._compile_readings()
        program = compiled(self.lower(self.platform), "The decode loop")
        text = program.as_text() or ""
        # The cache must be updated in place: a copy would move all of it in every round.
        found = figures(program, self.device_kind) | {"whole-cache copies": len(copies(text, self.cache_shapes()))}

        rounds = LoopText.of(text, self.target.config.hidden_size)
        found["copied at the entry, once a dispatch"] = mebibytes(rounds.entry_copies())
        if self.mesh is None or self.mesh.size == 1:
            return found

        greedy, sampled = rounds.round(greedy=True), rounds.round(greedy=False)
        return found | {
            "exchanged a round, layers' rows": mebibytes(greedy.rows),
            "exchanged a round beside them, greedy": mebibytes(greedy.others),
            "exchanged a round beside them, sampled": mebibytes(sampled.others),
        }

    def _compile_readings(self) -> dict[str, Any]:
        """Figures of the CUDA compiler's readings, each under its name (`planning/gpus`)."""
        lowered, found = self.lower(self.platform), dict[str, Any]()
        weights = [local_shape(x) for x in jax.tree.leaves((self.params.target, self.params.drafter))]

        for name, options in READINGS.items():
            started = time.perf_counter()
            program = compiled(lowered, "The decode loop", options)
            took, text = time.perf_counter() - started, program.as_text() or ""
            loop = LoopText.of(text, self.target.config.hidden_size)
            read, greedy = (round_kernels(loop, weights, greedy) for greedy in (False, True))
            rows = {
                "seconds to compile": took,
                "temporary": mebibytes(memory_of(program)["temporary"]),
                "kernels a greedy round": greedy.kernels,
                "kernels a sampled round": read.kernels,
                "weights joined a round": mebibytes(read.joined),
                "weights widened a round": mebibytes(read.widened),
                "weights laid out anew a round": mebibytes(read.laid_out),
                "copied at the entry, once a dispatch": mebibytes(loop.entry_copies()),
                "whole-cache copies": len(copies(text, self.cache_shapes())),
            }
            found |= {"arguments": mebibytes(memory_of(program)["arguments"])}
            found |= {f"{name}: {row}": value for row, value in rows.items()}
        return found

    def floor(self, context: int) -> list[Term] | None:
        """The terms of a round that verifies whole blocks, with `context` positions cached of each request; None for
        kinds of drafters that are not counted. DeepSeek-V4's weights count as they are published, others as held."""
        requests, config = self.loop.requests, self.target.config
        drafter = None if self.drafter is None else self.drafter.config
        if not isinstance(config, V4Config):
            held = jax.tree.leaves(self.params.target)[0].dtype.itemsize
            return round_terms(config, drafter, requests, context, held)

        # The two kinds of V4's own drafters; each is counted from the fields of the configuration that it shares.
        kind = None if drafter is None else "dspark" if isinstance(drafter, DSparkConfig) else "mtp"
        described = self.target.hf_config if self.drafter is None else self.drafter.hf_config
        costs = V4Costs.of(described, kind)
        return [*costs.verify(requests * self.loop.width, requests, context), *costs.draft(requests)]

    def cache_shapes(self) -> set[tuple[int, ...]]:
        """Shapes of cached keys and values as they lie on one device."""
        held = self.state.target_cache, self.state.draft
        pools = [node.layers for node in jax.tree.leaves(held, is_leaf=is_paged) if is_paged(node)]
        if pools:
            return {local_shape(x) for x in jax.tree.leaves(pools)}
        # Keys and values alone have four axes with the positions third; counters and lengths are left out.
        return {local_shape(x) for x in jax.tree.leaves(held) if x.ndim == 4 and x.shape[2] == self.loop.size}


def plan_mesh(options: PlanOptions) -> Mesh | None:
    """The mesh of the options; None for one attached device."""
    if not options.topology:
        if not options.mesh:
            return None
        settings = mesh_settings(options.mesh, MeshSettings())
        mesh = make_mesh(*settings.sizes)
        return None if mesh.size == 1 else mesh

    # Decoding splits the work on each token, so all chips go to the tensor axis.
    settings = mesh_settings(options.mesh, MeshSettings()) if options.mesh else MeshSettings(data=1, tensor=-1)
    return topology_mesh(options.topology, *settings.sizes, part=True)


def planned_pair(
    options: PlanOptions, mesh: Mesh | None, describe: Callable[[str], Target] = planned_target
) -> tuple[Target, Drafter | None]:
    """Target and drafter with shapes in place of parameters, laid over the mesh as loading would lay them.

    Args:
        options: which they are, and their dtype.
        mesh: None: one device.
        describe: gives a target of that name without parameters.
    Raises:
        UserError: no target is named, the configuration is not one of training, or the two don't fit together.
    """
    config = load_config(options.config) if options.config else None
    if config is not None and not isinstance(config, TrainConfig):
        raise UserError(f"The configuration {options.config} is a {type(config).__name__}; name one of training.")

    name = options.target or (config.target if config is not None else "")
    if not name:
        raise UserError("There is nothing to plan: give --config NAME, or --target and --drafter.")

    # Published shapes are in the package, so that a plan needs no download.
    target = describe(name)
    if options.layers:
        target = with_layers(target, options.layers)
    target = dataclasses.replace(target, params=abstract_target(target.config, options.dtype, mesh)[1])

    # A drafter's own config.json wins over the configuration's description.
    hf_config = None

    if options.drafter:
        hf_config = drafter_hf_config(options.drafter, target.config)
    elif config is not None:
        settings = config.drafter
        if options.layers:
            settings = _with_layers(settings, target.config.num_layers)
        hf_config = drafter_config(settings, target, config.compute_dtype)

    if hf_config is None:
        return target, None

    # The same checks as loading: a plan of a pair that could not be loaded would be worth nothing.
    described = read_config(hf_config)
    described.check_target(target.config)
    module = skeleton(hf_config)
    params = abstract_drafter(module, mesh, DTYPES[options.dtype])

    return target, Drafter(options.drafter or options.config, described, split(module)[0], params, hf_config)


def _with_layers(settings: DrafterSettings, count: int) -> DrafterSettings:
    """The settings of a drafter for a target of `count` layers: at most as many layers, and as many taps as fit."""
    # The last layer is no tap of the block drafters, and the only one of MTP.
    free = (count - 1,) if settings.kind == "mtp" else tuple(range(count - 1)) or (-1,)
    taps = free[-len(settings.target_layer_ids) :]
    return dataclasses.replace(settings, num_layers=min(settings.num_layers, count), target_layer_ids=taps)


def abstract_drafter(module: Any, mesh: AnyMesh | None, storage: Any) -> dict:
    """`abstract_params` of a drafter that is decoded with in the dtype `storage`, but for what `held_dtype` excepts."""
    leaves = flatten_dict(split(module)[1])
    return abstract_params(module, mesh, lambda path: held_dtype(path, leaves[path].dtype, storage))


def abstract_state(loop: DecodeLoop, params: LoopParams) -> DecodeState:
    """The empty state as shapes, with the shardings that the loop gives it on its mesh."""
    if loop.mesh is None:
        return jax.eval_shape(loop.init_state, params)

    platform = lowering_platform(loop.mesh.devices.flat[0])

    # The loop leaves the state's layout to the compiler, so the compiler is asked for it.
    made = jax.jit(loop.init_state).trace(params).lower(lowering_platforms=(platform,))
    shapes, placed = made.out_info, made.compile().output_shardings

    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)


def shapes_of(tree: Any) -> Any:
    """ShapeDtypeStructs in place of a pytree's arrays, without shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def local_shape(x: Any) -> tuple[int, ...]:
    """The shape of an array's part on one device."""
    # What one device holds: the memory that a plan is about.
    return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)


def bytes_of(tree: Any) -> int:
    """Bytes of a pytree on one device."""
    return sum(math.prod(local_shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
