"""Backward products: at the rate of bfloat16 where the operands are, and the plain einsum's own in float32."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.targets.products import product
from dspark_jax.training.objective import BlockObjective
from tests.drafters_tiny import tiny_batch, tiny_tables
from tests.test_training import OPTIONS, equations, tiny_drafter

# Every form in use: heads and biases, a selector's pairs, attention over prefix and block.
FORMS = {
    "...d,vd->...v": ((2, 3, 8), (5, 8)),
    "vd,nd->vn": ((5, 8), (3, 8)),
    "...r,...cr->...c": ((2, 3, 8), (2, 3, 4, 8)),
    "...r,...r->...": ((2, 3, 8), (2, 3, 8)),
    "bgmh,bgth->bgmt": ((1, 2, 3, 8), (1, 2, 5, 8)),
    "bgmt,bgth->bgmh": ((1, 2, 3, 5), (1, 2, 5, 8)),
    "bgnrkh,bnjgh->bgnrkj": ((1, 2, 3, 2, 4, 8), (1, 3, 4, 2, 8)),
    "bgnrkj,bnjgh->bgnrkh": ((1, 2, 3, 2, 4, 4), (1, 3, 4, 2, 8)),
    "...wqh,...th->...wqt": ((2, 3, 4, 8), (2, 5, 8)),
}


def plain(equation: str, a: Any, b: Any) -> Any:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def operands(equation: str, dtype: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in FORMS[equation])
    return a, b


@pytest.mark.parametrize("equation", FORMS)
def test_gradients_are_the_plain_einsums(equation: str) -> None:
    """Of the cotangent as it is rounded; in float32, of the cotangent itself, bit for bit."""

    @partial(jax.jit, static_argnums=0)
    def both(compute: Any, a: Any, b: Any, cotangent: Any) -> Any:
        made, pull = jax.vjp(partial(compute, equation), a, b)
        return made, pull(cotangent)

    for dtype, tolerance in ((jnp.float32, 0.0), (jnp.bfloat16, 2.0**-7)):
        a, b = operands(equation, dtype)
        shape = jax.eval_shape(partial(plain, equation), a, b).shape
        cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)

        made, found = both(product, a, b, cotangent)
        expected, gradients = both(plain, a, b, cotangent.astype(dtype).astype(jnp.float32))
        np.testing.assert_array_equal(made, expected)
        for ours, theirs in zip(found, gradients, strict=True):
            assert ours.dtype == dtype
            np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=tolerance)


def test_nothing_is_multiplied_for_a_frozen_operand_and_transformations_compose() -> None:
    equation = "...d,vd->...v"
    rows, head = operands(equation, jnp.bfloat16)

    def loss(rows: Any, head: Any) -> Any:
        # A scan over rematerialised chunks, as losses are taken, each a map over rows.
        chunk = jax.checkpoint(jax.vmap(lambda row: jnp.sum(jnp.sin(product(equation, row, head)))))
        return jax.lax.scan(lambda total, part: (total + jnp.sum(chunk(part)), None), 0.0, rows)[0]

    def directly(rows: Any, head: Any) -> Any:
        return jnp.sum(jnp.sin(product(equation, rows, head)))

    gradient, expected = jax.jit(jax.grad(loss))(rows, head), jax.jit(jax.grad(directly))(rows, head)
    np.testing.assert_array_equal(gradient.astype(np.float32), expected.astype(np.float32))

    # Forward and its derivative by the rows: no [V, D] gradient is made and thrown away.
    program = jax.make_jaxpr(jax.grad(directly))(rows, head)
    assert sum(e.primitive.name == "dot_general" for e in equations(program.jaxpr)) == 2


@pytest.mark.parametrize("head", ["vanilla", "selector"])
def test_a_step_in_bfloat16_multiplies_float32_in_the_confidence_head_alone(head: str) -> None:
    selector = head == "selector"
    drafter = tiny_drafter(markov_head_type=head, **({"selector_top_k": 5} if selector else {}))
    options = replace(OPTIONS, selector_alpha=float(selector))
    task = BlockObjective(drafter.graphdef, drafter.config, options, jnp.bfloat16)
    batch = tiny_batch()
    plan = task.plan(batch, jax.random.key(5))

    def loss(params: dict, shared: Any) -> Any:
        return task.loss(task.sums(params, shared, batch, plan.rows), plan.denominator)

    # Embedding and head in the compute dtype, as a run keeps them.
    shared = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_tables())
    program = jax.make_jaxpr(jax.grad(loss))(drafter.params, shared)
    products = [e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    wide = [e for e in products if any(v.aval.dtype == jnp.float32 for v in e.invars)]

    # Its logits are taken at the highest precision on purpose; it is one vector (docs/algorithm.md, rule 35). They are
    # taken once, and have a derivative by the rows and one by the vector.
    assert all(jax.lax.Precision.HIGHEST in (e.params["precision"] or ()) for e in wide)
    assert len(products) > 40 and len(wide) == 3
