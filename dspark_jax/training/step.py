"""The training state and the jitted step over it: sample anchors, gradients over micro-batches, AdamW.

Axes: B row of the global batch, A micro-batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array

from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.drafters.registry import new_params, skeleton
from dspark_jax.errors import UserError
from dspark_jax.sharding import (
    AnyMesh,
    ShardingRules,
    array_sharding,
    gathered,
    is_gathered,
    parameter_shardings,
    replicated,
    traced_over,
)
from dspark_jax.training.losses import Sums
from dspark_jax.training.objective import Batch, Objective, cast_params
from dspark_jax.training.schedule import updates_taken
from dspark_jax.training.states import States, StoredStates

TrainStep = jax.stages.Wrapped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a run continues from; the order of the data too is a function of `step`."""

    step: Any  # [] int32: optimizer steps taken
    params: dict  # float32 masters
    opt_state: Any
    key: Any  # [] typed PRNG key of the run; a step draws from fold_in(key, step)


@dataclass(frozen=True)
class Placement:
    """A mesh and the rules that lay arrays over it: masters and optimizer state by `rules`, rows over batch axes."""

    mesh: AnyMesh
    rules: ShardingRules

    @property
    def whole(self) -> NamedSharding:
        """The sharding of arrays that every device holds whole."""
        return replicated(self.mesh)

    def rows(self, tree: Any, leading: int = 0) -> Any:
        """Constrains the row dimension of every leaf, which follows `leading` others, to the batch axes."""

        def place(x: Array) -> Array:
            return jax.lax.with_sharding_constraint(x, self.rules.rows(self.mesh, x.ndim, leading))

        return jax.tree.map(place, tree)

    def tables(self, shared: SharedTables) -> SharedTables:
        """Shardings of the target's tables, as stored."""
        return jax.tree.map(lambda x: array_sharding(x.shape, ("vocab", "embed"), self.mesh, self.rules), shared)

    def gathered(self, tree: Any, shardings: Any) -> Any:
        """Constrains every leaf to its sharding in use: axes that are split for storage only are gathered."""
        return jax.tree.map(lambda x, s: jax.lax.with_sharding_constraint(x, gathered(s, self.rules)), tree, shardings)

    def gathered_as(self, params: dict, dtype: Any, abstract: dict) -> dict:
        """`gathered` parameters; those that computing casts to `dtype` travel, and lie, in it."""

        def place(x: Array, narrow: Array, like: Any) -> Array:
            if not is_gathered(x.shape, like.sharding, self.rules):
                return x
            # Cast where it is stored, or the partitioner might gather first.
            narrow = jax.lax.with_sharding_constraint(narrow, like.sharding)
            return jax.lax.with_sharding_constraint(narrow, gathered(like.sharding, self.rules))

        return jax.tree.map(place, params, cast_params(params, dtype), abstract)


def abstract_train_state(
    hf_config: Mapping[str, Any], optimizer: optax.GradientTransformation, placement: Placement | None = None
) -> TrainState:
    """ShapeDtypeStructs (with shardings, given a placement) of a run's state: for init, restore and lowering."""

    # The structure follows from the code that makes the state, so the two cannot differ.
    def build() -> TrainState:
        key = jax.random.key(0)
        params = new_params(hf_config, key)
        return TrainState(jnp.int32(0), params, optimizer.init(params), key)

    abstract = jax.eval_shape(build)
    if placement is None:
        return abstract

    # Moments lie as their parameters do; counters are on every device.
    # Shardings come from the axis names in the module, which a bare tree of shapes no longer has.
    over_mesh = parameter_shardings(skeleton(hf_config), placement.mesh, placement.rules)
    placed = TrainState(
        step=placement.whole,
        params=over_mesh,
        # A moment has the shape of its parameter, so it takes the same split; optax knows which leaves are moments.
        opt_state=optax.tree_utils.tree_map_params(
            optimizer, lambda _, s: s, abstract.opt_state, over_mesh, transform_non_params=lambda _: placement.whole
        ),
        key=placement.whole,
    )

    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed)


def init_train_state(
    hf_config: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    seed: int,
    placement: Placement | None = None,
    params: dict | None = None,
) -> TrainState:
    """The state at step 0, each device making its own part; `params` (of any dtype) replace fresh parameters."""

    def build(given: dict | None) -> TrainState:
        key = jax.random.key(seed)

        # Copies: the step donates its state, and must not delete the caller's arrays.
        start = (
            new_params(hf_config, jax.random.fold_in(key, 0x1717))
            if given is None
            else jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), given)
        )
        return TrainState(jnp.int32(0), start, optimizer.init(start), key)

    if placement is None:
        return build(params)

    # Jitted with the shardings of its results: each device makes its own part, and no array is whole on any of them.
    abstract = abstract_train_state(hf_config, optimizer, placement)
    return jax.jit(build, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(params)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    *,
    accumulation_steps: int = 1,
    placement: Placement | None = None,
    abstract: TrainState | None = None,
    states: States | None = None,
    record: bool = False,
) -> TrainStep:
    """The jitted step (state, shared, batch[, target]) -> (state, metrics[, stored]); the state is donated.

    A step whose loss or gradient is not finite, or whose batch has nothing supervised, leaves parameters and optimizer
    unchanged: its metrics have `skipped` = 1, and in the second case `unsupervised` = 1. Denominators are those of the
    global batch, so micro-batches change memory and nothing else (docs/algorithm.md, rule 44).

    Args:
        objective: the loss of the drafter's kind.
        optimizer: its updates are added to the float32 masters.
        schedule: the learning rate by updates taken, reported only; the optimizer has its own.
        accumulation_steps: micro-batches of a step.
        placement: the mesh; None on a single device.
        abstract: with a placement, of `abstract_train_state`: pins the new state where the old one lies.
        states: source of the target's states, with `target` as its parameters; None: float32 ones in the batch.
        record: adds the states, as a cache stores them, to the results.
    Raises:
        UserError: at the first call, if the batch's rows do not divide over micro-batches and devices.
    """
    source = states or StoredStates()

    def step(state: TrainState, shared: SharedTables, batch: Batch, target: Any = None) -> tuple:
        batch = batch if placement is None else placement.rows(dict(batch))

        # Drawn for the global batch from (key, step): neither micro-batches nor a resumed run change the anchors.
        plan = objective.plan(batch, jax.random.fold_in(state.key, state.step))
        params, shared = _in_use(state.params, shared, placement, abstract, objective.compute_dtype)
        # The target's table is gathered already, for the drafter.
        target = None if target is None else target | {"embed_weight_vd": shared.embed}

        def loss(params: dict, batch: Batch, rows: Any) -> tuple[Array, Sums]:
            # Differentiated by `params` alone: the target's tables are frozen (docs/algorithm.md, rule 18).
            sums = objective.sums(params, shared, batch, rows)
            return objective.loss(sums, plan.denominator), sums

        def gradient(batch: Batch, rows: Any) -> tuple[Any, dict[str, Array]]:
            # The loss sees states decoded from what is stored, so online and cached training agree.
            stored = source.stored(target, batch)
            # By float32 parameters, whatever they travelled in, so that gradients add up in float32.
            wide = jax.tree.map(lambda x, like: x.astype(like.dtype), params, state.params)
            grads, sums = jax.grad(loss, has_aux=True)(wide, source.read(stored, batch), rows)
            return (_scattered(grads, placement, abstract), sums), stored if record else {}

        # Sums and gradients add up over micro-batches because each part is divided by the same global denominator.
        (grads, sums), stored = _over_micro_batches(gradient, batch, plan.rows, accumulation_steps, placement)
        verdict = _Verdict.of(grads, objective.loss(sums, plan.denominator), plan.supervised)

        metrics = _metrics(objective, sums | plan.sums, verdict, batch)
        metrics["learning_rate"] = _applied_rate(schedule, state)
        new = _updated(state, grads, optimizer, verdict.good)
        return (new, metrics, stored) if record else (new, metrics)

    return _compiled(traced_over(_mesh(placement))(step), placement, abstract, record)


def _mesh(placement: Placement | None) -> AnyMesh | None:
    return None if placement is None else placement.mesh


class _Verdict(NamedTuple):
    """Whether a step may change the parameters; scalars on the device, so that the host never waits for them."""

    norm: Array  # [] float32, of the whole gradient
    supervised: Array  # [] bool: the batch has a supervised token
    good: Array  # [] bool: the update is applied

    @classmethod
    def of(cls, grads: Any, loss: Array, supervised: Array) -> "_Verdict":
        """The verdict on summed gradients, the loss and the summed weight of supervised slots."""
        # One NaN or infinity anywhere in the gradient makes its norm non-finite.
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)

        # Without a supervised token the gradient is 0, and AdamW would move by its momentum and its decay alone.
        some = supervised > 0
        return cls(norm, some, finite & some)


def _metrics(objective: Objective, sums: Sums, verdict: _Verdict, batch: Batch) -> dict[str, Array]:
    """The objective's figures, the gradient's norm, 1 for a step without update, and the part of rows in use."""
    length = batch["input_ids"].shape[1]
    metrics = objective.metrics(sums, length) | {
        "grad_norm": verdict.norm,
        "skipped": 1 - verdict.good.astype(jnp.int32),
        "unsupervised": 1 - verdict.supervised.astype(jnp.int32),
    }

    # Of all hosts' rows, which none of them knows alone.
    if "lengths" in batch:
        metrics["utilisation"] = jnp.mean(batch["lengths"]) / length
    return metrics


def _applied_rate(schedule: Callable[[Any], Any], state: TrainState) -> Array:
    """[] float32: the learning rate that the optimizer applies next."""
    # By its own count, which leaves skipped steps out, and not by `state.step`.
    return jnp.asarray(schedule(updates_taken(state.opt_state)), jnp.float32)


def _compiled(
    step: Callable[..., tuple], placement: Placement | None, abstract: TrainState | None, record: bool
) -> TrainStep:
    """The jitted step; the new state lies where the donated one did."""
    if placement is None:
        return jax.jit(step, donate_argnums=0)
    if abstract is None:
        raise ValueError("a placement needs the abstract state that was laid over it")

    # Pinned: otherwise the next call would meet another layout and recompile.
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    recorded = (placement.rules.rows(placement.mesh, 3),) if record else ()

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, placement.whole, *recorded))


def _in_use(
    params: dict, shared: SharedTables, placement: Placement | None, abstract: TrainState | None, dtype: Any
) -> tuple[dict, SharedTables]:
    """Parameters and the target's tables as a step uses them: gathered from the devices that store their parts."""
    if placement is None or abstract is None:
        return params, shared

    # Gathered once per step: the partitioner alone would gather parameters again for every chunk of anchors.
    params = placement.gathered_as(params, dtype, abstract.params)
    tables: Any = placement.tables(shared)
    if shared.tied and is_gathered(shared.embed.shape, tables.embed, placement.rules):
        # One array, although the step takes it twice.
        embed = placement.gathered(shared.embed, tables.embed)
        return params, replace(shared, embed=embed, head=embed)
    return params, placement.gathered(shared, tables)


def _scattered(grads: dict, placement: Placement | None, abstract: TrainState | None) -> dict:
    """Gradients of which each device keeps the part that it stores: sums over devices are scattered, and none holds one
    whole."""
    if placement is None or abstract is None:
        return grads
    return jax.tree.map(lambda x, like: jax.lax.with_sharding_constraint(x, like.sharding), grads, abstract.params)


def _updated(state: TrainState, grads: Any, optimizer: optax.GradientTransformation, good: Array) -> TrainState:
    """The state after a step; parameters and optimizer are those of before where the step is not `good`."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updated = optax.apply_updates(state.params, updates), opt_state

    # Selected leaf by leaf on the device: a branch would need the host, or a conditional that copies the state.
    kept = state.params, state.opt_state
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), updated, kept)

    # A skipped step counts all the same, since the data order is a function of `step`.
    return TrainState(state.step + 1, params, opt_state, state.key)


def _over_micro_batches(
    gradient: Callable[[Batch, Any], tuple[Any, dict[str, Array]]],
    batch: Batch,
    rows: Any,
    steps: int,
    placement: Placement | None,
) -> tuple[Any, dict[str, Array]]:
    """(summed gradients and sums, stored rows in the batch's order) over sequential micro-batches."""
    # Shapes are static, so a bad batch is refused while the step is traced.
    _check_rows(batch["input_ids"].shape[0], steps, placement)
    if steps == 1:
        return gradient(batch, rows)

    # [B, ...] -> [A, B / A, ...] for the batch and for the blocks drawn from it, which belong together row by row.
    micro = jax.tree.map(lambda x: _split_rows(x, steps), (dict(batch), rows))
    if placement is not None:
        micro = placement.rows(micro, leading=1)

    def add(total: Any, part: Any) -> tuple[Any, dict[str, Array]]:
        made, stored = gradient(*part)
        return jax.tree.map(jnp.add, total, made), stored

    gradient = jax.jit(gradient)  # traced once for its shapes and for the loop
    shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], micro))[0]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    # One micro-batch after the other, so that the activations of one alone are in memory.
    total, stored = jax.lax.scan(add, zeros, micro)

    return total, jax.tree.map(_join_rows, stored)


def _split_rows(x: Array, steps: int) -> Array:
    """[B, ...] -> [A, B / A, ...], every A-th row to a micro-batch: contiguous device shards stay where they are."""
    # Row r goes to micro-batch r mod A.
    return jnp.moveaxis(x.reshape(-1, steps, *x.shape[1:]), 1, 0)


def _join_rows(x: Array) -> Array:
    """The inverse of `_split_rows`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def _check_rows(rows: int, steps: int, placement: Placement | None) -> None:
    # Each group of devices takes the same number of rows of every micro-batch.
    groups = 1 if placement is None else placement.rules.row_groups(placement.mesh)
    if rows % (steps * groups):
        raise UserError(
            f"A batch of {rows} rows does not divide into {steps} micro-batches over {groups} devices; make the global "
            f"batch a multiple of {steps * groups}."
        )
