"""The programs that an engine meets, from shapes alone, so that they can be compiled before it starts.

Nothing is run and no weight is read. Each program is traced as the engine's own call traces it: jax keeps programs by
their text, and one that differed in a shape would be compiled again. `infer.compile` fills a folder with them.

Axes: R request slots, A prompts of a prefill, T width of a chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from dspark_jax.checkpoints.huggingface import Weights
from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.decoding.dispatch import record_rounds, run_rounds
from dspark_jax.decoding.prefill import admit, retire
from dspark_jax.decoding.prefixes import keep_chunk, restore_chunk
from dspark_jax.decoding.round import DecodeLoop, LoopParams, init_state
from dspark_jax.decoding.state import DecodeState
from dspark_jax.drafters.registry import Drafter
from dspark_jax.drafters.vocabulary import rows_of, sampled_rows
from dspark_jax.planning.decoding import PlanOptions, abstract_state, plan_mesh, planned_pair, shapes_of
from dspark_jax.scheduling.costs import Occupancy, ScheduleTables
from dspark_jax.scheduling.policies import PolicyState
from dspark_jax.serving.assembly import costs_of, make_loop
from dspark_jax.serving.chunks import blank_chunk, chunk_widths
from dspark_jax.serving.prefixes import shares_pages
from dspark_jax.serving.profiling import CONTEXTS, draft_passes, flat_tables
from dspark_jax.serving.sampling import Mode
from dspark_jax.serving.settings import EngineConfig, check_engine, policy_named, verifier_of
from dspark_jax.targets.eight_bits import Bits, coded, coded_shapes, in_eight_bits
from dspark_jax.targets.target import Target

Model = TypeVar("Model", Target, Drafter)
Traced = Callable[[], Any]
"""Traces a program: a jax.stages.Traced."""


@dataclass(frozen=True)
class EnginePrograms:
    """What an engine of these settings may call.

    Attributes:
        target, drafter: with shapes in place of parameters.
        config: of the engine; `longest` is set.
        mode: of every request.
        device: a chip that is not attached, to compile for; None: the device here, or those of a mesh.
        bits: of the matrices that loading turns into codes; None: none.
        rounded: their shapes.
    """

    target: Target
    drafter: Drafter | None
    config: EngineConfig
    mode: Mode
    device: Any | None
    bits: Bits | None = None
    rounded: tuple[jax.ShapeDtypeStruct, ...] = ()

    @classmethod
    def of(
        cls, options: PlanOptions, config: EngineConfig, mode: Mode, weights: Weights = "stored"
    ) -> "EnginePrograms":
        """The programs of an engine.

        Args:
            options: target, drafter, dtype, mesh and topology; the other fields are not read.
            config: of the engine, with `longest`.
            mode: of every request.
            weights: of both models, as `load_target` takes them.
        Raises:
            UserError: folders that can't be read or don't fit together, or settings that no engine can run with.
        """
        check_engine(config)
        mesh = plan_mesh(options)
        # One chip of a topology is no mesh to an engine: its parameters lie on a device and not over an axis.
        chip = None if mesh is None or mesh.size > 1 else _first(mesh)
        # The folder's own files, also of published targets: the number of known tokens is part of the program.
        target, drafter = planned_pair(options, None if chip is not None else mesh, describe_target)
        bits: Bits | None = None if weights == "stored" else weights
        rounded = set[jax.ShapeDtypeStruct]()
        if bits is not None:
            rounded = coded_shapes(target.graphdef, target.params)
            target = _in_eight_bits(target, bits)
            if drafter is not None:
                rounded |= coded_shapes(drafter.graphdef, drafter.params)
                drafter = _in_eight_bits(drafter, bits)

        # An engine's own form of them, on the device that it starts on; beside codes, heads and tables have one too.
        if chip is None and mesh is None:
            target, drafter = target.for_rounds, None if drafter is None else drafter.for_rounds
        return cls(target, drafter, config, mode, chip, bits, tuple(sorted(rounded, key=lambda x: x.shape)))

    def all(self) -> Iterator[tuple[str, Traced]]:
        """(what it is, its trace) of each program, in the order in which a start meets them."""
        yield from self._loading()
        for name, loop, tables in self._loops():
            params = LoopParams(self.target.params, {} if loop.block == 0 else self.drafter.params, tables)  # type: ignore[union-attr]
            for what, trace in self._of_loop(loop, self._placed(params)):
                yield f"{name}: {what}", trace

    def platform(self) -> str:
        """jax's name of the platform that the programs are for."""
        if self.device is not None:
            return self.device.platform
        mesh = make_loop(self.target, None, replace(self.config, buckets=None)).mesh
        return jax.default_backend() if mesh is None else _first(mesh).platform

    def _loading(self) -> Iterator[tuple[str, Traced]]:
        for matrix in self.rounded:
            yield f"loading: {matrix.shape} in {self.bits}", partial(coded.trace, self._placed(matrix), bits=self.bits)
        if self.drafter is None:
            return
        # A drafter's frozen copies are compared with the target's tables, in some rows.
        # Of both by the embedding's shape: rounds may read the head in another form.
        table = self.target.params["embed_weight_vd"]
        for name in ("embedding",) if self.target.config.tie_word_embeddings else ("embedding", "head"):
            rows = shapes_of(sampled_rows(table.shape[0]))
            yield f"loading: rows of the {name}", partial(rows_of.trace, self._placed(table), rows)

    def _loops(self) -> Iterator[tuple[str, DecodeLoop, ScheduleTables | None]]:
        """The loops by name, with the tables that they read. "auto" may find at its start that drafting cannot pay."""
        config, verifier = self.config, verifier_of(self.mode)
        if self.drafter is not None and config.policy != "plain":
            # "auto" compares trees with chains before it starts.
            both = config.policy == "auto" and config.tree > 0
            for made in (config, replace(config, tree=0)) if both else (config,):
                policy = policy_named(made.policy, made.threshold, made.tree)
                loop, tables = make_loop(self.target, self.drafter, made, policy, verifier), None
                if policy.needs_tables:
                    tables = flat_tables(loop, len(CONTEXTS))
                    if made.sps is not None:
                        tables = tables._replace(costs=costs_of(made.sps, made.slots, loop.buckets))
                name = f"{made.policy}, trees" if made.tree else made.policy
                yield name, loop, None if tables is None else shapes_of(tables)
        if self.drafter is None or config.policy in ("auto", "plain"):
            yield "plain", make_loop(self.target, None, replace(config, buckets=None), verifier=verifier), None

    def _of_loop(self, loop: DecodeLoop, params: LoopParams) -> Iterator[tuple[str, Traced]]:
        """The programs of one loop, those of recorded rounds too, which a server needs."""
        config, state = self.config, self._placed(abstract_state(loop, params))
        # A dispatch's last arguments are traced scalars: the rounds, and whether to stop at a free slot.
        occupancy, limits = shapes_of(Occupancy.of()), (_scalar(jnp.int32), _scalar(bool))
        yield "an empty state", partial(init_state.trace, loop, params)
        if params.tables is not None and config.sps is None:
            yield "draft passes alone, for the profile", partial(draft_passes.trace, loop, params, state, limits[0])
        yield "rounds", partial(run_rounds.trace, loop, params, state, occupancy, *limits)
        # Timed for the profile, and run while more requests decode than drafting pays for, or none wants drafts.
        bare, apart = LoopParams(params.target, {}), replace(state, draft=(), policy=PolicyState())
        if loop.drafter is not None:
            yield "rounds without the drafter", partial(run_rounds.trace, loop.alone, bare, apart, occupancy, *limits)
        slots = jax.ShapeDtypeStruct((config.slots,), bool)
        yield "slots emptied", partial(retire.trace, loop, state, slots)

        first, later = (sorted(widths) for widths in chunk_widths(config, loop.size, (config.longest or 1) - 1))
        for fresh, width, rows in (
            *((True, width, 1) for width in first),
            *((True, width, config.slots) for width in first if config.slots > 1),
            *((False, width, 1) for width in later),
        ):
            # One prompt, or as many rows as slots; a prompt's later chunks always come alone.
            batch = shapes_of(blank_chunk(loop, rows, width))
            name = f"{'first' if fresh else 'later'} chunks of prompts, {rows} x {width}"
            yield name, partial(admit.trace, loop, params, state, batch, fresh)

        if config.prefix_cache and loop.mesh is None and later:
            yield from self._prefixes(loop, state)
        rounds = config.rounds_per_dispatch
        yield "recorded rounds", partial(record_rounds.trace, loop, params, state, occupancy, rounds)
        # "auto" leaves crowds without drafts, and so may the rounds be that are recorded.
        if loop.drafter is not None and (loop.policy.always_drafts or config.policy == "auto"):
            name = "recorded rounds without the drafter"
            yield name, partial(record_rounds.trace, loop.alone, bare, apart, occupancy, rounds)

    def _prefixes(self, loop: DecodeLoop, state: DecodeState) -> Iterator[tuple[str, Traced]]:
        at, width = (_scalar(jnp.int32), _scalar(jnp.int32)), self.config.prefill_chunk
        shared = shares_pages(self.config, None if loop.drafter is None else self.drafter)
        yield "a chunk kept", partial(keep_chunk.trace, loop, state, *at, width, shared)
        kept = self._placed(jax.eval_shape(lambda s, *a: keep_chunk(loop, s, *a, width, shared), state, *at))
        yield "a chunk restored", partial(restore_chunk.trace, loop, state, kept, *at)

    def _placed(self, tree: Any) -> Any:
        """The shapes on the chip that the programs are for, where that is not attached."""
        if self.device is None:
            return tree
        on = SingleDeviceSharding(self.device)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), tree)


def _in_eight_bits(model: Model, bits: Bits) -> Model:
    graphdef, params = in_eight_bits(model.graphdef, model.params, model.name, bits)
    return replace(model, graphdef=graphdef, params=params)


def _first(mesh: Mesh) -> Any:
    return mesh.devices.flat[0]


def _scalar(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), np.dtype(dtype))
