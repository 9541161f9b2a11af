"""Equal steps that follow one another: written out one by one, or as a loop whose program has the step once.

A TPU's compiler takes seconds for what a step computes over a vocabulary, and its program megabytes. CPUs and GPUs
compile steps fast, and run them faster written out: nothing then stands between the kernels of two steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dspark_jax.sharding import traced_platform

LOOPED = ("tpu",)
"""Platforms that run equal steps as a loop."""


def in_turn(
    step: Callable[[Any, int | Int[Array, ""]], tuple[Any, Any]], carry: Any, count: int, axis: int = 0
) -> tuple[Any, Any]:
    """Run step(carry, k) -> (carry, output) for k = 0..count - 1, as the platform that is traced for does.

    Args:
        step: computes the same for a number k as for a traced scalar.
        carry: what step 0 takes.
        count: steps, 1 or more.
        axis: of the outputs' leaves, along which those of all steps are stacked.
    Returns:
        (the last carry, the outputs of all steps).
    """
    if count > 1 and traced_platform() in LOOPED:
        carry, made = jax.lax.scan(step, carry, jnp.arange(count, dtype=jnp.int32))
        return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), made)

    outputs = []
    for k in range(count):
        carry, output = step(carry, k)
        outputs.append(output)
    return carry, stacked(outputs, axis)


def stacked(outputs: Sequence[Any], axis: int) -> Any:
    """One tree from those of several steps."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=axis), *outputs)
