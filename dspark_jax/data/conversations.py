"""Conversations from JSONL, JSON and Parquet files and from hub datasets, each row's place kept for messages."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark_jax.data.jsonl import Conversation, parse_conversation, parse_line, read_lines
from dspark_jax.errors import UserError

Row = tuple[str, Any]
"""(where it stands, its value); the value is a UserError where the row could not be decoded."""


@dataclass(frozen=True)
class ConversationRecord:
    """One row.

    Attributes:
        id: the row's "id" as text, or its 0-based position among the rows where it has none.
        where: file and line (or row), for messages.
        extra: the row's other fields (a domain, a source, ...).
    """

    id: str
    messages: Conversation
    where: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadRow:
    """A row that is no conversation; `reason` is a sentence that names the place and what was expected there."""

    id: str
    where: str
    reason: str


def read_conversations(path: str | os.PathLike[str]) -> Iterator[ConversationRecord]:
    """Yields the conversations of a file in order; only the ids stay in memory.

    Raises:
        UserError: a missing file, a row that cannot be decoded or has another form, an id used twice.
    """
    for record in parse_rows(file_rows(path)):
        if isinstance(record, BadRow):
            raise UserError(record.reason)
        yield record


def parse_rows(rows: Iterable[Row]) -> Iterator[ConversationRecord | BadRow]:
    """Every row as a conversation, or as what is wrong with it; all ids differ."""
    seen: set[str] = set()
    for position, (where, value) in enumerate(rows):
        named = value.get("id") if isinstance(value, dict) else None
        name = str(position) if named is None else str(named)
        repeated = name in seen
        try:
            if repeated:
                raise UserError(f"{where}: the id {name!r} was used on an earlier line, expected every id once.")
            if isinstance(value, UserError):
                raise value
            messages = parse_conversation(value, where)
        except UserError as error:
            name = f"{name}#{position}" if repeated else name
            seen.add(name)
            yield BadRow(name, where, str(error))
            continue
        seen.add(name)
        extra = {k: v for k, v in value.items() if k not in ("id", "messages", "conversations")}
        yield ConversationRecord(name, messages, where, extra)


def file_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Rows of a .parquet file, of a .json file (a list of objects, or JSONL under that name), else of JSONL.

    Raises:
        UserError: the file cannot be opened, or is not what its name says.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(Path(path))
    return _json_rows(Path(path)) if suffix == ".json" else _jsonl_rows(Path(path))


def hub_rows(name: str, split: str, config: str | None = None) -> Iterator[Row]:
    """Rows of a dataset by hub id, or of a local folder in the hub's layout. `split` may be a slice (`train[:1%]`).

    Raises:
        UserError: no such dataset, configuration or split, or files that do not decode.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, config, split=split)
    except Exception as error:  # datasets raises many unrelated types
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        which = f"split {split!r}" + (f", configuration {config!r}" if config else "")
        raise UserError(f"No dataset could be loaded from {name} ({which}): {reason}") from error
    return ((f"{name} {split} row {number}", _plain(row)) for number, row in enumerate(dataset, start=1))


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in read_lines(path):
        where = f"{path} line {number}"
        try:
            yield where, parse_line(line, where)
        except UserError as error:
            yield where, error


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of a JSON file.") from error
    except ValueError:
        yield from _jsonl_rows(path)  # whose messages name the line
        return
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield f"{path} item {number}", row


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", _plain(row)
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as Parquet ({reason}); expected a whole Parquet file.") from error


def _plain(value: Any) -> Any:
    """A column's value as JSON has it. Columns give every turn every field that any turn has; those that are null were
    absent. Dates and the like become their text."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)
