"""Conversations from JSONL, JSON and Parquet files and from hub datasets: the only reader of data with turns.

A row is {"messages": [...]} or {"conversations": [...]}, its turns with role/content or ShareGPT's from/value. Readers
of prompts also take evaluation sets, {"turns": [...]}: user turns only. Those are not training data, and all other
readers refuse them.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark_jax.data.chat import ROLES, Message
from dspark_jax.data.jsonl import parse_line, read_lines
from dspark_jax.errors import UserError
from dspark_jax.readers import kind_of_value as kind
from dspark_jax.readers import reason_of
from dspark_jax.storage.replica import fetched_file

Row = tuple[str, Any]
"""(its place, for messages; its value). The value is a UserError where the row could not be decoded."""

Conversation = list[dict[str, Any]]
"""Turns with "role" and "content" (and any further key of the source turn)."""

Segments = tuple[tuple[Message, ...], ...]
"""The turns before each answer, without the answers: user turns, in the first segment the system message too."""

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


@dataclass(frozen=True)
class ConversationRecord:
    """One conversation of a file or dataset.

    Attributes:
        id: the row's "id" as text, or its 0-based position among the rows where it has none.
        where: file and line (or row), for messages.
        extra: the row's other fields (a domain, a source, ...).
        user_only: a row of an evaluation set, which has no answers.
    """

    id: str
    messages: Conversation
    where: str
    extra: dict[str, Any] = field(default_factory=dict)
    user_only: bool = False

    def segments(self) -> Segments:
        """The turns before each answer; UserError naming the place where there is no user turn."""
        # An evaluation set's every turn waits for an answer.
        if self.user_only:
            return tuple((message,) for message in self.messages)
        try:
            return prompt_segments(self.messages)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from error


@dataclass(frozen=True)
class BadRow:
    """A row that is not a conversation; `reason` is a sentence with the place, the finding and the expectation."""

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


def read_prompt_records(path: str | os.PathLike[str]) -> Iterator[ConversationRecord]:
    """Yields the conversations of a file, evaluation sets among them; a row without an id is named after the file.

    Raises:
        UserError: as `read_conversations`, but ids may repeat.
    """
    for number, (where, value) in enumerate(file_rows(path), start=1):
        if isinstance(value, UserError):
            raise value
        yield _record(value, where, f"{Path(path).stem}-{number}", evaluation_sets=True)


def parse_rows(rows: Iterable[Row]) -> Iterator[ConversationRecord | BadRow]:
    """Yields every row as a conversation or a `BadRow`; all ids differ, so that either can be recorded as done."""
    seen: set[str] = set()
    for position, (where, value) in enumerate(rows):
        # Ids make a run resumable, so every row needs one that no other has.
        name = _id_of(value, str(position))
        repeated = name in seen
        try:
            if repeated:
                raise UserError(f"{where}: the id {name!r} was used on an earlier line, expected every id once.")
            if isinstance(value, UserError):
                raise value
            record: ConversationRecord | BadRow = _record(value, where, str(position), evaluation_sets=False)
        except UserError as error:
            # The first row keeps the id; the bad one needs another to be recorded under.
            name = f"{name}#{position}" if repeated else name
            record = BadRow(name, where, str(error))

        seen.add(name)
        yield record


def parse_conversation(record: Mapping[str, Any], where: str = "record") -> Conversation:
    """Turns of {"messages": [...]} or {"conversations": [...]}, each turn with role/content or ShareGPT's from/value.

    Raises:
        UserError: neither field, or a turn of another form; the message starts with `where`.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: found {kind(record)}, expected an object with 'messages' or 'conversations'.")

    # A row with both is read by its first; hub datasets use either name.
    key = next((k for k in ("messages", "conversations") if k in record), None)
    if key is None:
        found = ", ".join(f"{k!r:.40}" for k in list(record)[:8]) or "no fields"
        raise UserError(f"{where}: found {found}, expected the field 'messages' or 'conversations'.")

    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: {key!r} is {kind(turns)}, expected a list with at least one turn.")

    return [_parse_turn(turn, f"{where}, turn {index}") for index, turn in enumerate(turns)]


def prompt_segments(messages: Sequence[Message]) -> Segments:
    """The turns before each answer, the answers themselves dropped.

    Raises:
        UserError: no user turn, or tool turns, whose place depends on the answers that are dropped.
    """
    segments: list[list[Message]] = [[]]
    for message in messages:
        if message["role"] == "tool" or message.get("tool_calls"):
            raise UserError("it uses tools, whose calls depend on the answers that are generated anew.")
        if message["role"] != "assistant":
            segments[-1].append(message)
        # Two answers in a row, or one at the start, make no empty segment.
        elif segments[-1]:
            segments.append([])

    # The conversation ended with an answer, which opened a segment that got no turns.
    if not segments[-1]:
        segments.pop()
    if not any(message["role"] == "user" for segment in segments for message in segment):
        raise UserError("it has no user turn to answer.")

    return tuple(map(tuple, segments))


def file_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Rows of a .parquet file, of a .json file (a list of objects, or JSONL under that name), else of JSONL.

    Raises:
        UserError: the file cannot be opened, or is not what its name says.
    """
    file = fetched_file(path)
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(file)
    return _json_rows(file) if suffix == ".json" else _jsonl_rows(file)


def hub_rows(name: str, split: str, config: str | None = None) -> Iterator[Row]:
    """Rows of a dataset by hub id, or of a local folder in the hub's layout. `split` may be a slice (`train[:1%]`).

    Raises:
        UserError: no such dataset, configuration or split, or files that do not decode.
    """
    # Imported here: it is slow to import and most runs read files.
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
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise UserError(f"{path} cannot be read ({reason_of(error)}); give the path of a JSON file.") from error

    try:
        # A file that ends in .json may hold JSON lines, which the hub's tools write under that name.
        value = parse_line(data, str(path))
    except UserError:
        yield from _jsonl_rows(path)  # its errors name the line
        return

    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield f"{path} item {number}", row


def _parquet_rows(path: Path) -> Iterator[Row]:
    # Imported here, as only Parquet needs it.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        # By batches: a file may be larger than memory.
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", _plain(row)
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # text that is not UTF-8, dates beyond range
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as Parquet ({reason}); expected a whole Parquet file.") from error


def _plain(value: Any) -> Any:
    """A column's value in JSON's types. A column gives every turn the fields of all turns, so null fields are
    dropped as absent. NaN and infinity, which JSON lacks, are null. Dates and the like become text."""
    if isinstance(value, dict):
        return {k: plain for k, v in value.items() if (plain := _plain(v)) is not None}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _record(value: Any, where: str, position: str, evaluation_sets: bool) -> ConversationRecord:
    # An evaluation set's row has user turns alone: it is prompted turn by turn, and never trained on.
    user_only = evaluation_sets and isinstance(value, Mapping) and "turns" in value
    messages = _user_turns(value["turns"], where) if user_only else parse_conversation(value, where)
    read = ("id", "turns") if user_only else ("id", "messages", "conversations")
    extra = {k: v for k, v in value.items() if k not in read}
    return ConversationRecord(_id_of(value, position), messages, where, extra, user_only)


def _id_of(value: Any, position: str) -> str:
    named = value.get("id") if isinstance(value, Mapping) else None
    return position if named is None or named == "" else str(named)


def _user_turns(turns: Any, where: str) -> Conversation:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise UserError(f"{where}: its turns are {turns!r:.60}; expected a list of texts.")
    return [{"role": "user", "content": turn} for turn in turns]


def _parse_turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: found {kind(turn)}, expected an object with 'role' and 'content'.")

    if "role" in turn and "content" in turn:
        role, content = turn["role"], turn["content"]
        rest = {k: v for k, v in turn.items() if k not in ("role", "content")}
    elif "from" in turn and "value" in turn:
        # Names of roles vary between ShareGPT exports; an unhashable one would fail in the look-up.
        role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise UserError(f"{where}: found 'from' {turn['from']!r:.60}, expected one of {known}.")
        content, rest = turn["value"], {}
    else:
        found = ", ".join(list(turn)[:8])
        raise UserError(f"{where}: found the fields {found:.200}, expected 'role' and 'content' or 'from' and 'value'.")

    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{where}: found role {kind(role)} and content {kind(content)}, expected text for both.")
    if role not in ROLES:
        raise UserError(f"{where}: found the role {role!r:.60}, expected one of {', '.join(ROLES)}.")
    # Tables often keep calls as JSON text, since their arguments share no columns.
    if isinstance(rest.get("tool_calls"), str):
        rest["tool_calls"] = parse_line(rest["tool_calls"].encode(), f"{where}, 'tool_calls'")

    return {"role": role, "content": content, **rest}
