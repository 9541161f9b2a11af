"""JSON Lines: reading with errors that name the line, and an append-only writer that survives a kill at any byte."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dspark_jax.errors import UserError
from dspark_jax.files import lock_descriptor
from dspark_jax.readers import MAX_JSON_BYTES, kind_of_value, parse_json, reason_of


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Yields (1-based line number, bytes) for every non-empty line; UserError when the file cannot be opened, or a line
    has more than `MAX_JSON_BYTES`."""
    try:
        handle = open(path, "rb")  # noqa: SIM115 (only the opening is in this try)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise UserError(f"{path} cannot be read ({reason_of(error)}); give the path of a JSONL file.") from error

    with handle:
        # Read with a bound: a file without line breaks would be one line.
        for number, line in enumerate(iter(lambda: handle.readline(MAX_JSON_BYTES + 1), b""), start=1):
            if len(line) > MAX_JSON_BYTES:
                raise UserError(f"{path} line {number} has more than {MAX_JSON_BYTES:,} bytes; expected JSON Lines.")
            if line.strip():
                yield number, line


def parse_line(data: bytes, where: str) -> Any:
    """The JSON value of a line, parsed strictly; UserError, starting with `where`, for a bad one."""
    return parse_json(data, where, expected="one JSON object in UTF-8")


class ResumableJsonl:
    """Append-only JSONL output: one object with an "id" per line, each batch on disk before `append` returns.

    Opening removes a last line torn by a kill (one without its newline), so the file is always a whole number of
    records; `finished` holds their ids. One process at a time holds the file; its lock ends with the process.

    Raises:
        UserError: the file is open in another process, or a complete line in it is not an object with an "id".
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Append mode: whatever the position, no write can overwrite a finished record.
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
        # Checked before anything is written: a batch is recorded whole or refused whole.
        names = [str(row["id"]) if "id" in row else "" for row in rows]
        if "" in names or len(set(names)) < len(names) or self.finished.intersection(names):
            raise ValueError(f"rows need ids that are new in {self.path}, got {names}")

        # One write and one fsync a batch; `finished` grows only after the bytes are on disk.
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
            # Only the last line can lack its newline; the record is done again.
            if not line.endswith(b"\n"):
                break

            where = f"{self.path} line {number}"
            record = parse_line(line, where)
            if not isinstance(record, dict) or "id" not in record:
                raise UserError(
                    f"{where}: found {kind_of_value(record)} without 'id'; this is not an output to resume, move it "
                    "away."
                )

            finished.add(str(record["id"]))
            good += len(line)

        # What follows the last whole line is a torn record; cut off, or the next one would be glued to it.
        self._handle.truncate(good)
        self._handle.seek(good)
        return finished
