"""The training state and the jitted step over it: sample anchors, gradients over micro-batches, AdamW.

Axes: B row of the global batch, A micro-batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.drafters.registry import new_params, skeleton
from dspark_jax.sharding import AnyMesh, parameter_shardings, traced_over
from dspark_jax.training.accumulation import Differentiated, MicroBatches, adding
from dspark_jax.training.losses import Sums
from dspark_jax.training.objective import Batch, Objective
from dspark_jax.training.placement import Placement, in_use
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
    source, differentiated = states or StoredStates(), _differentiated(objective)
    stored_params = None if abstract is None else abstract.params
    devices = adding(placement, stored_params, accumulation_steps)

    def step(state: TrainState, shared: SharedTables, batch: Batch, target: Any = None) -> tuple:
        batch = batch if placement is None else placement.rows(dict(batch))

        # Drawn for the global batch from (key, step): neither micro-batches nor a resumed run change the anchors.
        plan = objective.plan(batch, jax.random.fold_in(state.key, state.step))
        params, shared = in_use(state.params, shared, placement, stored_params, objective.compute_dtype)
        # The target's table is gathered already, for the drafter.
        target = None if target is None else target | {"embed_weight_vd": shared.embed}

        def gradient(batch: Batch, rows: Any) -> tuple[Any, dict[str, Array]]:
            # The loss sees states decoded from what is stored, so online and cached training agree.
            stored = source.stored(target, batch)
            micro = source.read(stored, batch), rows
            return devices.part(differentiated, (params, shared, plan.denominator), micro), stored if record else {}

        # Sums and gradients add up over micro-batches because each part is divided by the same global denominator.
        total, stored = MicroBatches(accumulation_steps, placement).total(gradient, devices.placed, batch, plan.rows)
        grads, sums = devices.whole(total)
        verdict = _Verdict.of(grads, objective.loss(sums, plan.denominator), plan.supervised)

        metrics = _metrics(objective, sums | plan.sums, verdict, batch)
        metrics["learning_rate"] = _applied_rate(schedule, state)
        new = _updated(state, grads, optimizer, verdict.good)
        return (new, metrics, stored) if record else (new, metrics)

    return _compiled(traced_over(_mesh(placement))(step), placement, abstract, record)


def _differentiated(objective: Objective) -> Differentiated:
    """Gradients and sums of a micro-batch and the blocks drawn from it; the constants are the parameters, the target's
    tables and the denominator of the whole batch."""

    def of(constants: Any, micro: tuple[Batch, Any]) -> tuple[dict, Sums]:
        (params, shared, denominator), (batch, rows) = constants, micro

        def loss(params: dict) -> tuple[Array, Sums]:
            # Differentiated by `params` alone: the target's tables are frozen (docs/algorithm.md, rule 18).
            sums = objective.sums(params, shared, batch, rows)
            return objective.loss(sums, denominator), sums

        # By the masters' dtype, whatever parameters travelled in, so that gradients add up in float32.
        return jax.grad(loss, has_aux=True)(jax.tree.map(lambda x: x.astype(jnp.float32), params))

    return of


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


def _updated(state: TrainState, grads: Any, optimizer: optax.GradientTransformation, good: Array) -> TrainState:
    """The state after a step; parameters and optimizer are those of before where the step is not `good`."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updated = optax.apply_updates(state.params, updates), opt_state

    # Selected leaf by leaf on the device: a branch would need the host, or a conditional that copies the state.
    kept = state.params, state.opt_state
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), updated, kept)

    # A skipped step counts all the same, since the data order is a function of `step`.
    return TrainState(state.step + 1, params, opt_state, state.key)
