"""Peak bytes of a traced function besides its arguments: an estimate from its jaxpr, without compilation.

Equations run in their order; a value lives from its equation to its last use. What XLA fuses into its only consumers
(elementwise arithmetic, casts, broadcasts, reshapes) takes no memory of its own, but keeps its operands alive.
"""

from collections.abc import Callable, Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

Bytes = Callable[[Any], int]
"""Bytes of an abstract value on one device."""

_FUSED = frozenset([
    "abs", "add", "add_any", "and", "broadcast_in_dim", "ceil", "clamp", "convert_element_type", "copy", "cos", "div",
    "eq", "erf", "exp", "exp2", "expand_dims", "expm1", "floor", "ge", "gt", "integer_pow", "iota", "is_finite", "le",
    "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rem", "reshape", "round",
    "rsqrt", "select_n", "sharding_constraint", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign",
    "sin", "slice", "sqrt", "square", "squeeze", "stop_gradient", "sub", "tanh", "transpose", "xor",
])  # fmt: skip
_REDUCTIONS = frozenset(["reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin"])


def peak_bytes(closed: ClosedJaxpr, size: Bytes) -> int:
    """Largest number of bytes alive at once inside a function, counting its results and not its arguments."""
    return _peak(closed.jaxpr, size)


def _peak(jaxpr: Jaxpr, size: Bytes) -> int:
    # The last use of every stored value, directly or through a value fused from it.
    made_of = _origins(jaxpr)
    ends: dict[Any, int] = {}

    for index, equation in enumerate(jaxpr.eqns):
        for var in _variables(equation.invars):
            for origin in made_of.get(var, ()):
                ends[origin] = index

    # Results live to the end.
    for var in _variables(jaxpr.outvars):
        for origin in made_of.get(var, ()):
            ends[origin] = len(jaxpr.eqns)

    # By the equation after which a value is dead, so that one pass frees as it goes.
    dying: dict[int, list[Any]] = {}
    for var, end in ends.items():
        dying.setdefault(end, []).append(var)

    live = peak = 0
    for index, equation in enumerate(jaxpr.eqns):
        # Fused values have other origins than themselves, and take no memory.
        made = [var for var in equation.outvars if made_of.get(var) == {var}]
        own = sum(size(var.aval) for var in made)
        # The branches of a `cond` share their memory: the largest counts.
        inside = max((_peak(inner, size) for inner in _inner(equation)), default=0)
        # A loop holds its results beside its body; a call's results are its body's.
        peak = max(peak, live + (own + inside if equation.primitive.name in ("scan", "while") else max(own, inside)))
        # A value that is never used is not in `ends`, and is not kept either.
        live += sum(size(var.aval) for var in made if var in ends)
        live -= sum(size(var.aval) for var in dying.get(index, ()))

    return peak


def _origins(jaxpr: Jaxpr) -> dict[Any, set[Any]]:
    """For every value of a jaxpr, the stored values behind it: itself, or those that it is fused from.

    Arguments have none, since their bytes are the caller's.
    """
    # Fused values are passed through to what they were made of, since those must stay alive for them.
    stored = _read_whole(jaxpr)
    origins: dict[Any, set[Any]] = {}

    for equation in jaxpr.eqns:
        fused = equation.primitive.name in _FUSED
        for var in equation.outvars:
            if fused and var not in stored:
                origins[var] = {o for operand in _variables(equation.invars) for o in origins.get(operand, ())}
            else:
                origins[var] = {var}

    return origins


def _read_whole(jaxpr: Jaxpr) -> set[Any]:
    """Values that some reader needs whole in memory: products, gathers, loops and the function's results.

    Elementwise readers and reductions can be fused with the producer instead.
    """
    # Results are written whatever made them.
    whole = set(_variables(jaxpr.outvars))
    for equation in jaxpr.eqns:
        if equation.primitive.name not in _FUSED | _REDUCTIONS:
            whole.update(_variables(equation.invars))

    return whole


def _inner(equation: Any) -> Iterator[Jaxpr]:
    for value in equation.params.values():
        # `cond` holds a tuple of branches, `scan` one jaxpr.
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part


def _variables(atoms: Any) -> Iterator[Any]:
    # Literals are part of the program and take no memory.
    return (atom for atom in atoms if not isinstance(atom, Literal))
