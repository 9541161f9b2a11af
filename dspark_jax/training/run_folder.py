"""A run's folder: whose it is, and what has been recorded in it.

config.json      the resolved configuration, written once
metrics.jsonl    one JSON object a record: step, losses, acceptance per position, speed
tensorboard/     the same for TensorBoard
checkpoints/     Orbax, by step
drafter/         the exported drafter (DeepSpec-native layout)
drafter_best/    with evaluations: the drafter of the checkpoint that accepted most
metrics.json     the last record and the run's totals; it is there exactly when the run is finished
"""

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from dspark_jax.config.cli import from_json, to_json
from dspark_jax.config.schema import TrainConfig
from dspark_jax.errors import UserError
from dspark_jax.files import write_json

# A run may be laid out on other devices, saved more often or watched otherwise after a stop.
FREE_TO_CHANGE = ("run_dir", "mesh", "checkpoint", "evaluation")


def require_same_run(folder: Path, config: TrainConfig) -> None:
    """UserError when the folder belongs to a run of another configuration, or to something else altogether."""
    path = folder / "config.json"
    if not path.exists():
        others = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        # Left by a run that was killed before it had written its configuration.
        if [name for name in others if name != "config.json.tmp"]:
            raise UserError(
                f"{folder} is not a training run and not empty (it holds {others[0]}); "
                "give a new folder with --run-dir."
            )
        return
    try:
        found = from_json(TrainConfig, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it or give a new folder with --run-dir.") from error
    difference = _first_difference(found, config)
    if difference:
        name, theirs, ours = difference
        raise UserError(
            f"The run in {folder} has {name} = {theirs!r}, this command {ours!r}; continue it with the same "
            "configuration, or give a new folder with --run-dir."
        )


def write_config(folder: Path, config: TrainConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", to_json(config))


def _first_difference(found: Any, wanted: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    for field in fields(found):
        name, theirs, ours = prefix + field.name, getattr(found, field.name), getattr(wanted, field.name)
        if theirs == ours or name in FREE_TO_CHANGE:
            continue
        return _first_difference(theirs, ours, f"{name}.") if is_dataclass(theirs) else (name, theirs, ours)
    return None


class NoLog:
    """What the processes of a job have that don't write its log."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: Mapping[str, Any]) -> None:
        pass

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class MetricsLog:
    """metrics.jsonl and TensorBoard, continued from a step: records after it go, so that none appears twice."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl"
        self.records = [record for record in read_records(self.path) if record["step"] <= step]
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(lines, encoding="utf-8")
        temporary.replace(self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (held for the run)
        # TensorBoard drops what an earlier process had written from this step on.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record of scalars; None (not known on this machine) goes to the file and not to TensorBoard."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.records.append(dict(record))
        for name, value in record.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl up to the first line that a kill left torn; [] without the file."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
