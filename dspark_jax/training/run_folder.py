"""A run's folder: the configuration and inputs that it belongs to, its log, and its lock.

config.json      the resolved configuration, written once
inputs.json      hashes of the target's weights and of the data that the run was begun with
metrics.jsonl    one JSON object a record: step, losses, acceptance per position, speed
tensorboard/     the same for TensorBoard
checkpoints/     Orbax, by step; in a store as `object_checkpoints` has them
drafter/         the exported drafter (DeepSpec-native layout)
drafter_best/    with evaluations: the drafter of the checkpoint that accepted most
metrics.json     the last record and the run's totals; it is there exactly when the run is finished
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from dspark_jax.config.cli import from_json, to_json
from dspark_jax.config.schema import DataSettings, TrainConfig
from dspark_jax.data.manifest import MANIFEST, pulled
from dspark_jax.errors import UserError
from dspark_jax.files import file_hash, weights_hash, write_atomically, write_json
from dspark_jax.readers import check_fields, object_of, parse_json, read_object
from dspark_jax.storage import objects
from dspark_jax.storage.places import place_of
from dspark_jax.storage.replica import fetched_file

# None of these changes (but for rounding) the parameters that a run arrives at, so a resumed run may differ in them.
FREE_TO_CHANGE = ("run_dir", "mesh", "checkpoint", "evaluation")


def require_same_run(folder: Path, config: TrainConfig) -> None:
    """UserError when the folder belongs to a run of another configuration, or to something else altogether."""
    path = folder / "config.json"
    if not path.exists():
        # An empty folder is a new run; one with other files holds something else.
        others = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        # Left by a run that was killed before it had written its configuration.
        if [name for name in others if name != "config.json.tmp"]:
            raise UserError(
                f"{folder} is not a training run and not empty (it holds {others[0]}); "
                "give a new folder with --run-dir."
            )

        return

    stored = read_object(path, expected="the configuration of a run")
    try:
        # Compared as configurations: a field that is new since then has its default on both sides.
        found = from_json(TrainConfig, stored)
    except UserError as error:
        raise UserError(f"{path} is no configuration of a run: {error}") from None

    # One field is enough for the sentence.
    difference = _first_difference(found, config)
    if difference:
        name, theirs, ours = difference
        raise UserError(
            f"The run in {folder} has {name} = {theirs!r}, this command {ours!r}; continue it with the same "
            "configuration, or give a new folder with --run-dir."
        )


def write_config(folder: Path, config: TrainConfig) -> None:
    """Creates the run's folder and writes config.json, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", to_json(config))
    # In a store before anything else: the folder is recognised as this run's, whatever a kill leaves there.
    if (place := place_of(folder)) is not None:
        objects.upload(folder / "config.json", place / "config.json")


# -- Inputs of the run -----------------------------------------------------------------------------------------------


def input_hashes(target: Path, data: DataSettings, cache: Path) -> dict[str, str]:
    """Content hashes of a run's inputs, by name: the target's weights, and the cache or the conversations.

    A cache's manifest holds the hashes of its shards, so the manifest's own stands for all of them. A hybrid run writes
    its cache itself, and begins from conversations.
    """
    # By content: a folder keeps its name when its files are replaced.

    hashes = {"target weights": weights_hash(target)}
    if data.source == "offline":
        return hashes | {"target cache": file_hash(pulled(cache) / MANIFEST)}
    return hashes | {"conversations": file_hash(fetched_file(data.conversations))}


def require_same_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """UserError when an input differs from that which the folder's run was begun with; a new run has none recorded."""
    path = folder / "inputs.json"
    if not os.path.lexists(path):
        return

    recorded = read_object(path, expected="the hashes of a run's inputs")
    # Both directions: an input may be missing on either side.
    for name in [*inputs, *recorded]:
        if recorded.get(name) != inputs.get(name):
            raise UserError(
                f"The {name} of the run in {folder} changed since it was begun (hash {recorded.get(name)} then, "
                f"{inputs.get(name)} now); restore what it was begun with, or begin anew in another folder with "
                "--run-dir."
            )


def write_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Writes inputs.json, atomically."""
    write_json(folder / "inputs.json", inputs)


def require_built_with(cache: Path, target: Path) -> None:
    """UserError when a cache was built with other weights than the target has now; a cache without a note passes."""
    path = pulled(cache) / "build.json"
    if not path.exists():  # a cache of another program
        return

    stored = read_object(path, expected="the settings of a cache")
    check_fields(stored, {"settings": object_of()}, str(path), required=("settings",), cure="build the cache again")
    # Absent in caches that other programs made; those are trusted by their configuration's hash alone.
    built = stored["settings"].get("weights_xxh3")
    if built is not None and built != weights_hash(target):
        raise UserError(
            f"The cache in {cache} holds the states of other weights than those in {target} (hash {built}, found "
            f"{weights_hash(target)}); give the target that it was built with, or build the cache again."
        )


def _first_difference(found: Any, wanted: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    for field in fields(found):
        name, theirs, ours = prefix + field.name, getattr(found, field.name), getattr(wanted, field.name)
        # By its whole dotted name: `mesh` is free as a whole, and so are its fields.
        if theirs == ours or name in FREE_TO_CHANGE:
            continue
        return _first_difference(theirs, ours, f"{name}.") if is_dataclass(theirs) else (name, theirs, ours)

    return None


# -- The log ---------------------------------------------------------------------------------------------------------


class NoLog:
    """The log of the processes of a job that don't write it."""

    # The interface of MetricsLog, so that the loop has no branch for it.
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: Mapping[str, Any]) -> None:
        pass

    def digest(self) -> str:
        return ""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class MetricsLog:
    """metrics.jsonl and TensorBoard, continued from a step: later records are dropped, so that none appears twice.

    Both are written in the caller's thread, so a full disk ends the run here, with one sentence.
    """

    def __init__(self, folder: Path, step: int, digest: str = ""):
        """Reads the log and drops what is past `step`.

        Args:
            folder: of the run.
            step: where the run continues.
            digest: `digest()` at that step, from the checkpoint; "" if unknown.
        """
        self.path = folder / "metrics.jsonl"
        with self._reported():
            self.records = [record for record in read_records(self.path) if record["step"] <= step]
            # A warning and no error: nothing that is trained depends on the log.
            if digest and self.digest() != digest:
                print(
                    f"{self.path} is not what the run had written up to step {step}: records are missing or changed. "
                    "What is trained does not depend on them.",
                    file=sys.stderr,
                )

            # Rewritten without the dropped records, then appended to.
            write_atomically(self.path, _lines(self.records))
            # Unbuffered: a record is in the file when `write` returns.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (held for the run)
            self._board = ScalarBoard(folder / "tensorboard", step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record of scalars; None (unknown on this machine) goes to the file and not to TensorBoard.

        Raises:
            UserError: the disk is full; the records before this one are whole.
        """
        with self._reported():
            line = json.dumps(record).encode() + b"\n"
            while line:  # a disk that is nearly full takes a part, and refuses the next
                line = line[self._file.write(line) :]
            # TensorBoard has no null.
            known = {name: value for name, value in record.items() if name != "step" and value is not None}
            self._board.write(record["step"], known)

        self.records.append(dict(record))

    def digest(self) -> str:
        """Hash of all records so far, for the checkpoint that is saved with them."""
        return xxh3_64_hexdigest(_lines(self.records).encode())

    def close(self) -> None:
        """Closes both files; UserError if the disk refuses."""
        self._file.close()
        with self._reported():
            self._board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with suppress(UserError) if kind else nullcontext():  # the first error is the one to report
            self.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"The run's log {error.filename or self.path} cannot be written ({error.strerror}); make room on the "
                "disk and give the same command again: the run continues from its latest checkpoint."
            ) from error


class ScalarBoard:
    """TensorBoard's event file, written in this thread.

    The usual writers pass events to a thread through a queue; when a full disk ends that thread, the queue fills up and
    every later call waits forever.
    """

    def __init__(self, folder: Path, step: int):
        """Opens a new event file; TensorBoard drops what an earlier process had written after `step`."""
        # Imported late: where PyTorch is installed, tensorboardX imports all of it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        if step:
            # A session start at step s + 1 makes TensorBoard discard events from there on.
            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds the scalars of a step and hands them to the disk; OSError when it refuses."""
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            self._add(step, summary=scalar(name, value))
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()

    def _add(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(step=step, wall_time=time.time(), **what))


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; [] without the file.

    A last line without its newline, left by a kill, is skipped. So is any other line that is no record of a step, or of
    one that has a record already, with a warning on stderr; the records around it belong to other steps and are kept.
    """
    # The part after the last newline is a torn line or empty.
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]

    records, wrong, steps = [], [], set[int]()

    for number, line in enumerate(lines[:-1], 1):
        record = _record(line)
        if record is None or record["step"] in steps:
            wrong.append(number)
        else:
            records.append(record)
            steps.add(record["step"])

    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        print(f"{path}:{wrong[0]}{more}: no record of a step of its own; passed over.", file=sys.stderr)

    return records


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line, "a record")
    except UserError:
        return None

    # `True` is an int to Python, and no step.
    whole = isinstance(record, dict) and type(record.get("step")) is int and 0 < record["step"] < 2**63
    return record if whole else None
