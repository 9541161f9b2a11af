"""The counted floor of a planned step on one device."""

import jax

from dspark_jax.checkpoints.huggingface import DTYPES
from dspark_jax.planning.training import AbstractRun
from dspark_jax.roofline.hardware import Term
from dspark_jax.roofline.prefill import prefill_terms
from dspark_jax.roofline.training import step_terms


def step_floor(run: AbstractRun) -> list[Term] | None:
    """The floor's terms of one optimizer step on one device: its sequences, the target's pass where it runs in the
    step, and the whole update. A tensor axis is taken to divide all of it evenly, which is a little less than it does.

    None for kinds of drafters, and of targets in the step, that are not counted.
    """
    itemsize = DTYPES[run.spec.dtype].dtype.itemsize
    rows, length, steps = run.rows_a_device, run.batch["input_ids"].shape[1], run.micro_batches
    parameters = sum(x.size for x in jax.tree.leaves(run.state.params))

    terms = step_terms(run.spec.drafter, rows, length, parameters, itemsize, steps)
    if terms is not None and run.target_params is not None:
        passed = prefill_terms(run.target.config, rows, length, itemsize)
        terms = None if passed is None else [term.times(steps) for term in passed] + terms
    ways = run.placement.mesh.shape["tensor"]
    return None if terms is None else [term.times(1 / ways) for term in terms]
