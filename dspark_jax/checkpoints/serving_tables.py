"""The two tables that SGLang reads beside a drafter: `sts.json` (temperatures) and `sps.json` (steps per second).

Axes: K block position. Both are plain JSON; a table that a server would refuse is refused here, with a sentence.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dspark_jax.checkpoints.tensors import write_json
from dspark_jax.errors import UserError
from dspark_jax.readers import Schema, check_fields, integer, list_of, number, read_object, text

STS_FILE, SPS_FILE = "sts.json", "sps.json"
OWN_FIELDS = ("valid_for", "profile")  # written by this project, ignored by servers


@dataclass(frozen=True)
class StsTable:
    """Sequential temperature scaling: the confidence of position k is sigmoid(logit_k / temperatures[k]) (rule 94 of
    docs/algorithm.md).

    A server refuses a vector whose length is not the drafter's block size. `ece_before` and `ece_after` are expected
    calibration errors of the cumulative product, by position; () where they were not measured.
    """

    temperatures: tuple[float, ...]
    dataset: str = ""
    num_samples: int = 0
    ece_before: tuple[float, ...] = ()
    ece_after: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        # A divisor of logits: below 0 it would reverse the order of confidences, and 0 gives no number.
        if not self.temperatures or any(not math.isfinite(t) or t <= 0 for t in self.temperatures):
            raise UserError(
                f"The STS temperatures are {list(self.temperatures)}; expected one finite number above 0 for every "
                "block position. Calibrate again."
            )

        # Optional, but by position where they are there: a shorter list would not say which positions it is of.
        for name in ("ece_before", "ece_after"):
            if getattr(self, name) and len(getattr(self, name)) != len(self.temperatures):
                raise UserError(
                    f"The STS table has {len(getattr(self, name))} values of {name} for {len(self.temperatures)} "
                    "temperatures; expected one for each, or none."
                )

    def check_block(self, block_size: int) -> None:
        """UserError unless there is one temperature for each of `block_size` positions."""
        if len(self.temperatures) != block_size:
            raise UserError(
                f"The STS table has {len(self.temperatures)} temperatures, the drafter's block {block_size} positions; "
                "give the table that was calibrated for this drafter."
            )


@dataclass(frozen=True)
class SpsTable:
    """Steps per second of the verify pass at measured batch sizes in tokens; between probes, the next smaller one's
    (docs/algorithm.md, rule 95)."""

    sample_batch_tokens: tuple[int, ...]
    sample_steps_per_sec: tuple[float, ...]
    max_batch_tokens: int

    def __post_init__(self) -> None:
        _check_probes("sample_batch_tokens", self.sample_batch_tokens, self.sample_steps_per_sec)

        if any(not math.isfinite(s) or s <= 0 for s in self.sample_steps_per_sec):
            raise UserError(
                f"The SPS table's sample_steps_per_sec are {list(self.sample_steps_per_sec)}; expected finite numbers "
                "above 0. Profile again."
            )

        # The largest batch that a server will verify; a probe above it could not have been measured.
        if self.max_batch_tokens < self.sample_batch_tokens[-1]:
            raise UserError(
                f"The SPS table's max_batch_tokens is {self.max_batch_tokens}, below its largest probe "
                f"{self.sample_batch_tokens[-1]}; expected that or more."
            )

    def steps_per_second(self, batch_tokens: int) -> float:
        """The value at the largest probe not above `batch_tokens`; below all probes, at the smallest."""
        # A floor lookup, as servers do it: no interpolation across a bucket's edge.
        below = sum(probe <= batch_tokens for probe in self.sample_batch_tokens)
        return self.sample_steps_per_sec[max(below - 1, 0)]


@dataclass(frozen=True)
class SpsAdditiveTable:
    """Step time in parts: bias + alpha(requests) + theta(requests + drafts), linear between probes and constant outside
    (docs/algorithm.md, rule 95)."""

    bias_seconds: float
    bs_probes: tuple[int, ...]
    alpha_seconds: tuple[float, ...]
    m_probes: tuple[int, ...]
    theta_seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_probes("bs_probes", self.bs_probes, self.alpha_seconds)
        _check_probes("m_probes", self.m_probes, self.theta_seconds)
        # Above 0: even a step without requests takes time, by which rates are divided.
        if not math.isfinite(self.bias_seconds) or self.bias_seconds <= 0:
            raise UserError(f"The SPS table's bias_seconds is {self.bias_seconds}; expected a number above 0.")

    def step_seconds(self, requests: int, drafts: int) -> float:
        """Seconds of a step that verifies `drafts` drafted tokens over `requests` requests."""
        alpha = _interpolate(self.bs_probes, self.alpha_seconds, requests)
        # Each request verifies its anchor besides its drafts, hence requests + drafts tokens.
        return self.bias_seconds + alpha + _interpolate(self.m_probes, self.theta_seconds, requests + drafts)


def write_sts(path: str | Path, table: StsTable) -> None:
    """Writes `sts.json`."""
    write_json(Path(path), _plain(table))


def read_sts(path: str | Path) -> StsTable:
    """Reads `sts.json`; UserError where it is missing, is not JSON or is a table that a server would refuse."""
    return _table(StsTable, read_object(Path(path)), Path(path))


def write_sps(path: str | Path, table: SpsTable | SpsAdditiveTable) -> None:
    """Writes `sps.json`, in the form of the table given."""
    write_json(Path(path), _plain(table))


def read_sps(path: str | Path) -> SpsTable | SpsAdditiveTable:
    """Reads `sps.json`: the additive form if it names `bias_seconds`, as SGLang decides; errors as in `read_sts`."""
    content = read_object(Path(path))
    # The two forms share no field, so one name tells them apart.
    return _table(SpsAdditiveTable if "bias_seconds" in content else SpsTable, content, Path(path))


def _plain(table: Any) -> dict[str, Any]:
    """A table as JSON holds it: tuples become lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(table).items()}


_SECONDS = list_of(number(0), least=1)
_FIELDS: Schema = {
    "temperatures": list_of(number(above=0), least=1),
    "dataset": text(),
    "num_samples": integer(),
    "ece_before": list_of(number(0)),
    "ece_after": list_of(number(0)),
    "sample_batch_tokens": list_of(integer(1), least=1),
    "sample_steps_per_sec": list_of(number(above=0), least=1),
    "max_batch_tokens": integer(1),
    "bias_seconds": number(above=0),
    "bs_probes": list_of(integer(), least=1),
    "alpha_seconds": _SECONDS,
    "m_probes": list_of(integer(), least=1),
    "theta_seconds": _SECONDS,
}


def _table(kind: type, content: Mapping[str, Any], path: Path) -> Any:
    """The table of this kind in `content`; UserError for unknown, missing or mistyped fields."""
    content = {name: value for name, value in content.items() if name not in OWN_FIELDS}
    names = {field.name for field in fields(kind)}

    # A misspelt optional field would silently mean its default.
    unknown = sorted(set(content) - names)
    if unknown:
        raise UserError(f"{path} has the field {unknown[0]!r}; expected {', '.join(sorted(names))}.")

    # Required are the fields without a default, so the dataclass states it once.
    needed = [field.name for field in fields(kind) if field.default is MISSING]
    check_fields(content, _FIELDS, str(path), required=needed)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})


def _check_probes(name: str, probes: Sequence[int], values: Sequence[float]) -> None:
    """UserError unless probes increase strictly and each has a value."""
    if not probes or list(probes) != sorted(set(probes)) or len(probes) != len(values):
        raise UserError(
            f"The SPS table's {name} are {list(probes)} with {len(values)} values; expected increasing probes, one or "
            "more, and a value for each."
        )


def _interpolate(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    """Linear between the points (xs, ys), constant outside; xs increase strictly."""
    # No extrapolation: outside the probes a line through the last two may well fall below 0.
    if x <= xs[0]:
        return ys[0]
    for (x0, y0), (x1, y1) in zip(zip(xs, ys, strict=True), list(zip(xs, ys, strict=True))[1:], strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1]
