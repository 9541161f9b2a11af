"""The runs of a load study: their figures, and the log from which a stopped study continues."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dspark_jax.errors import UserError
from dspark_jax.evaluation.simulator import LoadFigures
from dspark_jax.files import write_atomically
from dspark_jax.readers import Schema, check_fields, either, list_of, number, object_of, optional, read_records, text

RUN: Schema = {"key": list_of(either(text(), number()), least=5, most=5), "figures": object_of(optional(number()))}
"""A line of runs.jsonl behind the first."""


class Load(NamedTuple):
    """The load of a run. Slots are a part of it: the same arrivals on fewer slots wait longer.

    Attributes:
        mode: "closed" or "poisson".
        amount: users of a closed loop, or requests a second.
        slots: of the engine.
    """

    mode: str
    amount: float
    slots: int


class RunLog:
    """runs.jsonl: settings, then one finished run per line, so that a stopped study loses one run at most."""

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        """Opens the log, or continues it.

        Args:
            path: of the file.
            identity: the study's settings that decide its figures.
        Raises:
            UserError: the file holds runs of other settings.
        """
        self.path = path
        # Through JSON, as the header is read back: paths become text, tuples lists.
        self.header = json.loads(json.dumps(identity, default=str))
        header, *self.rows = read_records(self.path) or [self.header]  # a torn last line is left out
        if header != self.header:
            raise UserError(f"{self.path} holds runs of other settings; give another --output or those settings.")

        for line, row in enumerate(self.rows, start=2):
            check_fields(row, RUN, f"{self.path} line {line}", required=RUN, cure="remove the line")
        # Written back without the torn line, or the next run would be appended to it.
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in [header, *self.rows]))

    def has(self, load: Load, strategy: str, repeat: int) -> bool:
        """Whether this run is in the log."""
        return any(row["key"] == [*load, strategy, repeat] for row in self.rows)

    def add(self, load: Load, strategy: str, repeat: int, figures: LoadFigures) -> None:
        """Appends a finished run."""
        figured = {name: None if np.isnan(value) else value for name, value in summarise(figures).items()}
        # Figures alone, no settings: those stand in the header, once.
        row = {"key": [*load, strategy, repeat], "figures": figured}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def medians(self, load: Load, strategy: str) -> dict[str, float]:
        """By figure; NaN where a run has none, such as the speed of users none of whom finished."""
        # By load and strategy, over all repeats.
        rows = [row["figures"] for row in self.rows if row["key"][:-1] == [*load, strategy]]
        columns = {name: [row.get(name) for row in rows] for name in rows[0]}
        return {
            name: float(np.median([np.nan if v is None else v for v in column])) for name, column in columns.items()
        }


def summarise(figures: LoadFigures) -> dict[str, float]:
    """Figures of one run; `user_p95` is the speed reached by 95 % of the requests."""
    # No request may have ended; the row is written all the same.
    speeds = figures.user_speeds or (float("nan"),)
    row = {
        "tokens_per_second": figures.tokens_per_second,
        "user_median": float(np.median(speeds)),
        # Speeds from below, times from above: each is what all but one user in twenty get at least.
        "user_p95": float(np.percentile(speeds, 5)),
        "verify_budget": figures.verify_budget,
        "tau": figures.tau,
    }

    for name in ("first_token_seconds", "queued_seconds"):
        if hasattr(figures, name):
            row[f"{name}_median"] = float(np.median(getattr(figures, name)))
            row[f"{name}_p95"] = float(np.percentile(getattr(figures, name), 95))

    return row
