"""Memory of a training step on one device, by component, from shapes alone."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding

from dspark_jax.checkpoints.huggingface import DTYPES
from dspark_jax.planning.liveness import peak_bytes
from dspark_jax.planning.training import AbstractRun
from dspark_jax.report import gibibytes
from dspark_jax.sharding import gathered, is_gathered
from dspark_jax.training.accumulation import summed_once
from dspark_jax.training.objective import cast_params
from dspark_jax.training.states import TargetStates


def describe(run: AbstractRun) -> dict[str, Any]:
    """The facts that an estimate depends on: configuration, target, mesh, micro-batches."""
    mesh = run.placement.mesh
    parameters = sum(x.size for x in jax.tree.leaves(run.state.params))

    return {
        "configuration": run.name,
        "target": run.target.name,
        "drafter parameters": parameters,
        "mesh": " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "tokens a step": run.data.global_batch * run.batch["input_ids"].shape[1],
        "micro-batches": run.micro_batches,
        "sequences a device": run.rows_a_device,
        # Read ahead by the hosts that hold its rows, within $DSPARK_READ_AHEAD_GB of each.
        "a batch, on all hosts": gibibytes(_whole(run.batch)),
        "a checkpoint, of all hosts": gibibytes(_whole((run.state.params, run.state.opt_state))),
    }


def _whole(tree: Any) -> int:
    """Bytes of a pytree on all devices, each number once."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def estimate(run: AbstractRun, activations: int | None = None) -> dict[str, int]:
    """Bytes on one device by component, and their total: the peak, which occurs in the gradient of a micro-batch.

    Stored arrays are exact. Activations are `liveness.peak_bytes` of the traced gradient, an estimate.

    Args:
        run: the plan.
        activations: of `activation_bytes`, where they are known; None: they are traced for.
    Returns:
        Bytes by name; the last is `total`.
    """
    rules = run.placement.rules

    def stored(tree: Any) -> int:
        return sum(shard_bytes(x, x.sharding) for x in jax.tree.leaves(tree))

    def whole(tree: Any) -> int:
        return sum(shard_bytes(x, gathered(x.sharding, rules)) for x in jax.tree.leaves(tree))

    def copies(tree: Any) -> int:
        # A leaf that nothing splits for storage is used where it lies, without a copy.
        return sum(whole(x) for x in jax.tree.leaves(tree) if whole(x) != stored(x))

    online = run.target_params is not None

    layers = (run.target_params or {}).get("layers", {})
    # Stacked layers are gathered one at a time.
    stacks = run.target.config.num_layers // max(len(layers), 1)

    gradients = whole(run.state.params)
    # The running sum, held while the next micro-batch's gradient is computed.
    once = summed_once(run.placement.mesh, rules, run.micro_batches)
    running = 0 if run.micro_batches == 1 else gradients if once else stored(run.state.params)
    # Gathered copies exist beside the stored parts for the length of a step.
    parts = {
        "parameters": stored(run.state.params),
        "optimizer": stored(run.state.opt_state),
        "parameters, gathered for a step": copies(in_compute_dtype(run)),
        "gradients": gradients + running,
        "target's embedding and head": stored(run.shared) - tied_bytes(run),
        "embedding and head, gathered": copies(run.shared) // (2 if run.shared.tied else 1),
        "batch": stored(run.batch),
        "target's other parameters": stored(run.target_params) - stored(run.shared) + tied_bytes(run) if online else 0,
        # The layer in use, and the next one, whose gather overlaps with it.
        "target's layers, gathered": 2 * max(map(copies, layers.values()), default=0) // stacks,
        # The traced gradient counts its own result, which has a line above.
        "activations": (activation_bytes(run) if activations is None else activations) - gradients,
    }

    return parts | {"total": sum(parts.values())}


def activation_bytes(run: AbstractRun) -> int:
    """Peak bytes of the gradient of one micro-batch's rows on one device, the gradient itself included."""
    objective, rows = run.spec.objective(), run.rows_a_device
    # Traced without a mesh: sharding constraints have no meaning for one device's rows.
    states = run.states
    if isinstance(states, TargetStates):
        loop = states.loop and dataclasses.replace(states.loop, whole=None)
        states = dataclasses.replace(states, whole=None, loop=loop)
    batch = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in run.batch.items()}

    def gradient(params: Any, shared: Any, batch: Any, key: Any, target: Any) -> Any:
        # The gradient of one micro-batch, without the update: its peak lies in the backward pass.
        planned = objective.plan(batch, key)
        read = states.read(states.stored(target, batch), batch)

        def mean(params: Any) -> Any:
            return objective.loss(objective.sums(params, shared, read, planned.rows), planned.denominator)

        return jax.grad(mean)(params)

    # Shapes without shardings: the function is traced as one device would run it.
    params, tables, target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (run.state.params, run.shared, run.target_params)
    )

    key = jax.eval_shape(lambda: jax.random.key(0))
    vocabulary, ways = run.target.config.vocab_size, run.placement.mesh.shape["tensor"]

    # A tensor axis splits whatever has the vocabulary among its axes.
    def size(aval: Any) -> int:
        whole = value_bytes(aval)
        return whole // ways if vocabulary in getattr(aval, "shape", ()) and vocabulary % ways == 0 else whole

    return peak_bytes(jax.make_jaxpr(gradient)(params, tables, batch, key, target), size)


def in_compute_dtype(run: AbstractRun) -> dict:
    """The drafter's parameters as shapes, with their shardings, in the dtypes that they are gathered in."""
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), run.state.params)
    narrow = jax.eval_shape(lambda params: cast_params(params, DTYPES[run.spec.dtype].dtype), bare)
    return jax.tree.map(
        lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding), narrow, run.state.params
    )


def tied_bytes(run: AbstractRun) -> int:
    """Bytes of the head where it is tied to the embedding: one array that the step takes twice; otherwise 0."""
    # Two arguments of the step share this array; its bytes are counted with both.
    head: Any = run.shared.head
    return shard_bytes(head, head.sharding) if run.target.config.tie_word_embeddings else 0


def passed_twice(run: AbstractRun) -> int:
    """Bytes that a compiled step's arguments count twice: of a tied table that is used as it lies. Of one that is
    gathered the step reads one argument alone."""
    head: Any = run.shared.head
    return 0 if is_gathered(head.shape, head.sharding, run.placement.rules) else tied_bytes(run)


def value_bytes(value: Any) -> int:
    """Bytes of an abstract value; 0 for effects and tokens, which have no shape."""
    return math.prod(value.shape) * value.dtype.itemsize if hasattr(value, "shape") else 0


def shard_bytes(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> int:
    """Bytes of an array on one device under a sharding."""
    return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
