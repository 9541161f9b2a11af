"""Configurations as JSON and back, strict both ways: a saved configuration is exactly the one that ran."""

import dataclasses
import difflib
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dspark_jax.errors import UserError

C = TypeVar("C")


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass, nested ones included, as a dict that `json.dumps` writes and `from_json` reads back equal."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_json(cls: type[C], values: dict[str, Any], where: str = "") -> C:
    """Builds a dataclass from what `to_json` returned; absent fields keep their defaults, so older files still load.

    Args:
        cls: the dataclass.
        values: a JSON object of its fields.
        where: dotted prefix of the fields' names in errors.
    Raises:
        UserError: an unknown field (with the nearest known one), a missing one without a default, or a value of
            another type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where or cls.__name__} is {values!r}; a JSON object of its fields was expected.")

    hints, fields = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]

    prefix = f"{where}." if where else ""

    # Strict: an unknown field would otherwise be ignored, and the run would not be the one asked for.
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known fields: {', '.join(fields)}."
            raise UserError(f"Unknown field {prefix}{name}: {hint}")

    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"Field {prefix}{missing[0]} is missing: it has no default, so give it a value.")

    return cls(**{name: _typed(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as an instance of the annotation: tuples from lists, floats from integers, nothing else converted."""
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]

    # The annotations of the schema are few, so each is handled by itself and everything else is refused.
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple and isinstance(value, list | tuple):
        # `tuple[int, ...]` takes any length, `tuple[float, float]` exactly two.
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) == len(value):
            return tuple(_typed(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value)))
    elif origin is Literal and value in arguments:
        return value
    elif origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        rest = [a for a in arguments if a is not type(None)]
        # Of unions only `X | None` occurs in the schema; any other is refused below.
        if len(rest) == 1:
            return _typed(rest[0], value, where)
    # JSON writes 1.0 as 1 in other hands. A bool is an int to Python, and no number here.
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value

    expected = hint.__name__ if isinstance(hint, type) and origin is None else str(hint).replace("typing.", "")
    raise UserError(f"Field {where} is {value!r}; {expected} was expected.")
