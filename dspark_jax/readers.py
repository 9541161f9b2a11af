"""Strict readers of external input: JSON files, JSON lines, and typed fields of objects.

Every fault is a `UserError` of one sentence: the file, the field, what was found, what was expected, what to do. A
value is returned whole or not at all.
"""

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from dspark_jax.errors import UserError

MAX_JSON_BYTES = 64 << 20
MAX_DEPTH = 64
INT32_MAX = 2**31 - 1
COPY_AGAIN = "correct the file or copy it again"

Object = dict[str, Any]


# ---- files and JSON values


def read_bytes(path: str | Path, *, limit: int = MAX_JSON_BYTES, expected: str = "a JSON file") -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        UserError: the file is missing, unreadable, no regular file (a folder, pipe or device), a loop of links, or
            larger than `limit`.
    """
    with opened(Path(path), expected) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > limit:
            raise UserError(f"{path} has {size:,} bytes; expected {expected} of at most {limit:,}.")
        return handle.read(limit)


@contextmanager
def opened(path: Path, expected: str) -> Iterator[BinaryIO]:
    """A regular file for reading; UserError for anything else, and where a read fails."""
    try:
        # O_NONBLOCK: opening a pipe would otherwise wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected {expected} there.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); give {expected} that can.") from None

    # Of the open descriptor, not of the path: between two looks at a path another file may have taken its place.
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise UserError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; expected {expected}.")
    with open(descriptor, "rb") as handle:
        try:
            yield handle
        except OSError as error:
            raise UserError(f"{path} cannot be read ({reason_of(error)}); copy it again.") from None


def parse_json(data: bytes, where: str, *, expected: str = "one JSON value in UTF-8") -> Any:
    """The JSON value in `data`, strictly by RFC 8259; the UserError of a bad one starts with `where`.

    Refused beside what is no JSON: other encodings than UTF-8, a byte order mark, NaN and Infinity, numbers that
    overflow, halves of surrogate pairs, a name that stands twice in one object, and nesting beyond `MAX_DEPTH`.
    """

    def fail(found: str) -> UserError:
        return UserError(f"{where}: {found}; expected {expected}.")

    if data.startswith(b"\xef\xbb\xbf"):
        raise fail("found a byte order mark at the start")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise fail(f"byte {error.start} is not UTF-8") from None
    try:
        # Python's parser is lenient where RFC 8259 is not, so each leniency is taken back by a hook.
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_int=_integer_of,
            parse_float=_number_of,
            object_pairs_hook=_object_of,
        )
    except json.JSONDecodeError as error:
        shown = " ".join(text[max(error.pos - 20, 0) : error.pos + 20].split())
        raise fail(f"not JSON, {error.msg} at line {error.lineno} column {error.colno} near {shown!r}") from None
    except _Refused as error:
        raise fail(str(error)) from None
    except RecursionError:
        raise fail(f"nested deeper than {MAX_DEPTH} levels") from None

    # Afterwards, over the whole tree: the parser's hooks see values one by one, and no depth.
    _check_tree(value, fail)
    return value


def read_object(path: str | Path, *, expected: str = "a JSON object", limit: int = MAX_JSON_BYTES) -> Object:
    """The JSON object in a file.

    Raises:
        UserError: as `read_bytes` and `parse_json`, and where the file holds another JSON value than an object.
    """
    value = parse_json(read_bytes(path, limit=limit, expected=expected), str(path), expected=expected)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {kind_of_value(value)}; expected {expected}; {COPY_AGAIN}.")
    return value


def read_records(path: str | Path, *, limit: int = 1 << 30) -> list[Object]:
    """The objects of a JSON-lines file; [] where there is no file. A last line without its newline, which a kill left
    torn, is dropped.

    Raises:
        UserError: the file is unreadable, or a whole line is no JSON object; names the line.
    """
    if not os.path.lexists(path):
        return []
    # The part behind the last newline is what a kill left of a record.
    *lines, _torn = read_bytes(path, limit=limit, expected="a JSON-lines file").split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        value = parse_json(line, where, expected="one JSON object a line")
        if not isinstance(value, dict):
            raise UserError(f"{where}: found {kind_of_value(value)}; expected one JSON object a line.")
        records.append(value)
    return records


class _Refused(Exception):
    """Raised by hooks of the JSON parser, which don't know the file's path."""


def _refuse_constant(name: str) -> Any:
    raise _Refused(f"found {name}, which JSON does not have")


def _integer_of(digits: str) -> int:
    # Python refuses longer numbers with an error of its own, and takes time quadratic in their length.
    if len(digits) > 400:
        raise _Refused(f"found a whole number of {len(digits)} digits")
    return int(digits)


def _number_of(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Refused(f"found {shown(digits)}, which no float64 holds")
    return value


def _object_of(pairs: list[tuple[str, Any]]) -> Object:
    # A name that stands twice would lose its first value without a word.
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _Refused(f"the name {shown(twice)} stands twice in one object")
    return value


def _check_tree(value: Any, fail: Callable[[str], UserError]) -> None:
    """Depth and text of a parsed value, without recursion: copies and encoders recurse, so depth is bounded here."""
    # Level by level, so that the depth of a value costs no stack.
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH + 1:
            raise fail(f"nested deeper than {MAX_DEPTH} levels")
        following: list[Any] = []
        for item in level:
            if isinstance(item, str):
                # An escape can make half of a surrogate pair, which no UTF-8 can hold and no later writer can write.
                if not item.isascii() and any("\ud800" <= char <= "\udfff" for char in item):
                    raise fail(f"{shown(item)} holds half of a UTF-16 surrogate pair")
            elif isinstance(item, dict):
                following += [*item, *item.values()]
            elif isinstance(item, list):
                following += item
        level = following


# ---- typed fields


@dataclass(frozen=True)
class Check:
    """A condition on a field's value: `holds(value)` decides, `expected` describes the values in a sentence."""

    expected: str
    holds: Callable[[Any], bool]


Schema = Mapping[str, Check]


def integer(low: int = 0, high: int = INT32_MAX) -> Check:
    """A whole number from `low` to `high`; neither true nor 2.0 is one."""
    return Check(f"a whole number from {low} to {high}", lambda value: _is_integer(value) and low <= value <= high)


def number(low: float | None = None, high: float | None = None, *, above: float | None = None) -> Check:
    """A finite number, at least `low`, at most `high`, greater than `above`."""
    bounds = [
        *([f"of at least {low:g}"] if low is not None else []),
        *([f"above {above:g}"] if above is not None else []),
        *([f"of at most {high:g}"] if high is not None else []),
    ]

    def holds(value: Any) -> bool:
        if not (_is_integer(value) or isinstance(value, float)):
            return False
        try:
            # An integer may be too large for a float, which `isfinite` would make of it.
            finite = math.isfinite(value)
        except OverflowError:
            return False
        within = (low is None or value >= low) and (high is None or value <= high)
        return finite and within and (above is None or value > above)

    return Check(" ".join(["a number", " and ".join(bounds)]).strip(), holds)


def text(*, empty: bool = True) -> Check:
    expected = "text" if empty else "text that is not empty"
    return Check(expected, lambda value: isinstance(value, str) and (empty or bool(value)))


def flag() -> Check:
    return Check("true or false", lambda value: isinstance(value, bool))


def one_of(*values: Any) -> Check:
    shown_values = ", ".join(json.dumps(value) for value in values)
    return Check(f"one of {shown_values}", lambda value: any(value == v and type(value) is type(v) for v in values))


def list_of(item: Check, *, least: int = 0, most: int = 1_000_000) -> Check:
    """A list of `least` to `most` items that `item` accepts."""
    amount = f"{least} or more, each " if least else "each "
    return Check(
        f"a list of values, {amount}{item.expected}",
        lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(item.holds, value)),
    )


def object_of(item: Check | None = None) -> Check:
    """An object, whose values `item` accepts where it is given."""
    each = "" if item is None else f" whose values are each {item.expected}"
    return Check(
        f"an object{each}",
        lambda value: isinstance(value, Mapping) and (item is None or all(map(item.holds, value.values()))),
    )


def either(*checks: Check) -> Check:
    return Check(" or ".join(check.expected for check in checks), lambda value: any(c.holds(value) for c in checks))


def optional(check: Check) -> Check:
    return Check(f"{check.expected}, or null", lambda value: value is None or check.holds(value))


def check_fields(
    values: Mapping[str, Any], schema: Schema, where: str, *, required: Iterable[str] = (), cure: str = COPY_AGAIN
) -> None:
    """Checks the fields of an object that `schema` names; others pass.

    Raises:
        UserError: a field of `required` is missing, or one holds another value than its check accepts.
    """
    for name in required:
        if name not in values:
            raise UserError(f"{where} has no field {name!r}; expected {schema[name].expected}; {cure}.")

    # Unknown fields pass: published files have many that nothing here reads.
    for name, check in schema.items():
        if name in values and not check.holds(values[name]):
            raise UserError(f"{where} has {name} = {shown(values[name])}; expected {check.expected}; {cure}.")


def require_object(value: Any, where: str, *, cure: str = COPY_AGAIN) -> Mapping[str, Any]:
    """`value` if it is an object; UserError otherwise."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {kind_of_value(value)}; expected an object; {cure}.")
    return value


def shown(value: Any, most: int = 60) -> str:
    """A value as JSON for a sentence, cut to `most` characters."""
    if isinstance(value, list | dict) and len(value) > most:
        return kind_of_value(value)
    # Control characters must not reach a terminal from a damaged file.
    found = ascii(value) if isinstance(value, str) and not value.isprintable() else _encoded(value)
    return found if len(found) <= most else found[: most - 3] + "..."


def kind_of_value(value: Any) -> str:
    """The kind of a JSON value, for a sentence: `null`, `text`, `a list of 3`, `an object`."""
    if value is None or isinstance(value, bool):
        return _encoded(value)
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "an object"
    return "text" if isinstance(value, str) else f"the number {shown(value)}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _encoded(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return repr(value)


def reason_of(error: Exception) -> str:
    """The system's reason for a failed file operation, without path and number."""
    return getattr(error, "strerror", None) or str(error)


# ---- seals

SEAL = "xxh3"


def sealed(content: Mapping[str, Any]) -> Object:
    """The object with the hash of its other fields, as `check_seal` compares."""
    # As the file will hold it, since that is what will be hashed again.
    plain = json.loads(json.dumps(content, default=str))
    return {**plain, SEAL: _digest(plain)}


def check_seal(content: Mapping[str, Any], where: str, *, cure: str = COPY_AGAIN) -> None:
    """UserError where an object carries a hash of its fields that is not theirs; one without a hash passes."""
    if SEAL in content and content[SEAL] != _digest({name: v for name, v in content.items() if name != SEAL}):
        raise UserError(f"{where} does not have the content that its own hash says: it was changed or damaged; {cure}.")


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
