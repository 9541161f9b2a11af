"""JSONL and the turns in it: errors that name the line, and a writer that survives a kill at any byte."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dspark_jax.errors import UserError
from dspark_jax.files import lock_descriptor

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

Conversation = list[dict[str, Any]]
"""Turns with "role" and "content" (and any further key of the source turn)."""


def parse_conversation(record: Mapping[str, Any], where: str = "record") -> Conversation:
    """Turns of {"messages": [...]} or {"conversations": [...]}, each turn with role/content or ShareGPT's from/value.

    Raises:
        UserError: neither field, or a turn of another form; the message starts with `where`.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: found {_kind(record)}, expected an object with 'messages' or 'conversations'.")
    key = next((k for k in ("messages", "conversations") if k in record), None)
    if key is None:
        found = ", ".join(repr(k) for k in record) or "no fields"
        raise UserError(f"{where}: found {found}, expected the field 'messages' or 'conversations'.")
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: {key!r} is {_kind(turns)}, expected a list with at least one turn.")
    return [_parse_turn(turn, f"{where}, turn {index}") for index, turn in enumerate(turns)]


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Yields (1-based line number, value) for every non-empty line.

    Raises:
        UserError: the file cannot be opened, or a line is not UTF-8 JSON.
    """
    for number, line in read_lines(path):
        yield number, parse_line(line, f"{path} line {number}")


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Yields (1-based line number, bytes) for every non-empty line; UserError when the file cannot be opened."""
    try:
        handle = open(path, "rb")  # noqa: SIM115 (only the opening is in this try)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of a JSONL file.") from error
    with handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield number, line


def parse_line(line: bytes, where: str) -> Any:
    """The JSON value of a line; the UserError of a bad one starts with `where`."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start} is not UTF-8, expected one JSON object a line in UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        shown = line[:60].decode(errors="replace").strip()
        raise UserError(f"{where}: {error.msg} at column {error.colno}, expected one JSON object: {shown!r}") from error


class ResumableJsonl:
    """Append-only JSONL output: one object with an "id" a line, each batch on disk before `append` returns.

    Opening removes a last line torn by a kill (one without its newline), so the file always is a whole number of
    records and `finished` tells which are done. One process at a time holds the file; the lock goes with the process.

    Raises:
        UserError: the file is open in another process, or a complete line in it is not an object with an "id".
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = open(self.path, "a+b")  # noqa: SIM115 (held until close)
        try:
            lock_descriptor(self._handle.fileno(), self.path, "the conversations")
            self.finished: set[str] = self._recover()
        except BaseException:
            self._handle.close()
            raise

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the rows, then flushes and fsyncs once. A row without "id" or with a finished one is a ValueError."""
        rows = list(rows)
        names = [str(row["id"]) if "id" in row else "" for row in rows]
        if "" in names or len(set(names)) < len(names) or self.finished.intersection(names):
            raise ValueError(f"rows need ids that are new in {self.path}, got {names}")
        data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        self._handle.write(data)
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self.finished.update(names)

    def close(self) -> None:
        self._handle.close()

    def __enter__(self) -> "ResumableJsonl":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _recover(self) -> set[str]:
        self._handle.seek(0)
        finished: set[str] = set()
        good = 0
        for number, line in enumerate(self._handle, start=1):
            if not line.endswith(b"\n"):
                break
            where = f"{self.path} line {number}"
            record = parse_line(line, where)
            if not isinstance(record, dict) or "id" not in record:
                raise UserError(
                    f"{where}: found {_kind(record)} without 'id'; this is not an output to resume, move it away."
                )
            finished.add(str(record["id"]))
            good += len(line)
        self._handle.truncate(good)
        self._handle.seek(good)
        return finished


def _parse_turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: found {_kind(turn)}, expected an object with 'role' and 'content'.")
    if "role" in turn and "content" in turn:
        role, content = turn["role"], turn["content"]
        rest = {k: v for k, v in turn.items() if k not in ("role", "content")}
    elif "from" in turn and "value" in turn:
        if turn["from"] not in _SHAREGPT_ROLES:
            raise UserError(f"{where}: found 'from' {turn['from']!r}, expected one of {', '.join(_SHAREGPT_ROLES)}.")
        role, content, rest = _SHAREGPT_ROLES[turn["from"]], turn["value"], {}
    else:
        raise UserError(
            f"{where}: found the fields {', '.join(turn)}, expected 'role' and 'content' or 'from' and 'value'."
        )
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{where}: found role {_kind(role)} and content {_kind(content)}, expected text for both.")
    if any("\ud800" <= char <= "\udfff" for char in content):
        raise UserError(
            f"{where}: the content holds half of a UTF-16 surrogate pair, which no tokenizer takes; remove it."
        )
    if isinstance(rest.get("tool_calls"), str):
        rest["tool_calls"] = parse_line(rest["tool_calls"].encode(), f"{where}, 'tool_calls'")
    return {"role": role, "content": content, **rest}


def _kind(value: Any) -> str:
    if value is None or isinstance(value, dict | str):
        return "null" if value is None else ("text" if isinstance(value, str) else "an object")
    return f"a list of {len(value)}" if isinstance(value, list) else f"{type(value).__name__} {value!r}"
