"""Sweeps: one base configuration and a difference for each point; differences combine by product, zip and chain.

    def get_sweep() -> Sweep:
        diffs = product(axis("drafter.num_layers", 1, 2), axis("seed", 0, 1, 2))
        return Sweep("depth", load_config("embedded_dspark"), diffs)

A point's name is its difference, `num_layers=2,seed=1`: the same file gives the same names in every job of an array.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dspark_jax.config.cli import from_file
from dspark_jax.config.schema import TrainConfig
from dspark_jax.config.serialise import from_json, to_json
from dspark_jax.errors import UserError
from dspark_jax.programs import ROOT

Diff = dict[str, Any]
Diffs = list[Diff]


def axis(field: str, *values: Any) -> Diffs:
    """One point for each value of a field, named with dots as in `TrainConfig`."""
    return [{field: value} for value in values]


def fixed(**fields: Any) -> Diffs:
    """One point of several fields; a dot is written as two underscores: `fixed(drafter__num_layers=2)`."""
    return [{name.replace("__", "."): value for name, value in fields.items()}]


def product(*parts: Diffs) -> Diffs:
    """Every combination; the last part runs fastest."""
    return [_join(diffs) for diffs in itertools.product(*parts)]


def zipped(*parts: Diffs) -> Diffs:
    """Point i joins the i-th points of all parts; UserError when their lengths differ."""
    if len({len(part) for part in parts}) > 1:
        raise UserError(f"zipped was given parts of {[len(part) for part in parts]} points; expected equal lengths.")
    return [_join(diffs) for diffs in zip(*parts, strict=True)]


def chain(*parts: Diffs) -> Diffs:
    """One part after the other; a repeated point is kept once."""
    points: Diffs = []
    for diff in itertools.chain(*parts):
        # Lists, since a difference may hold values that cannot be hashed.
        if diff not in points:
            points.append(diff)

    return points


def _join(diffs: Iterable[Diff]) -> Diff:
    joined: Diff = {}
    for diff in diffs:
        # The later value would win silently, and the point's name would not show it.
        twice = joined.keys() & diff.keys()
        if twice:
            raise UserError(f"A point of the sweep is given {min(twice)} twice; name a field in one part only.")
        joined |= diff

    return joined


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A base configuration and its points; `metric` is what the summary plots, a key of a run's metrics.json."""

    name: str
    base: TrainConfig
    diffs: Diffs
    metric: str = "tau_probabilistic"

    def points(self, base: TrainConfig | None = None) -> dict[str, TrainConfig]:
        """The points' configurations by name, in order; every field is checked.

        Args:
            base: replaces the sweep's own.
        Raises:
            UserError: no points, an unknown field, a value that does not fit, or two points of one name.
        """
        if not self.diffs:
            raise UserError(f"The sweep {self.name} has no points; give it at least one difference.")

        # A name is a folder: two points of one name would write to the same run.
        names = [run_name(diff) for diff in self.diffs]
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise UserError(f"The sweep {self.name} has {count} points named {name}; leave out the repeated ones.")

        # Every point before any is run: a mistake in the last one is found now.
        made = (apply_diff(base or self.base, diff) for diff in self.diffs)
        return dict(zip(names, made, strict=True))


def apply_diff(config: TrainConfig, diff: Diff) -> TrainConfig:
    """The configuration with the fields of `diff` replaced, checked as strictly as when it is read from JSON."""
    # Through JSON, so that every field is checked as in a file: a sweep cannot make a value that a run folder
    # refuses.
    values = to_json(config)
    for field, value in diff.items():
        *groups, leaf = field.split(".")
        place = values

        for depth, group in enumerate(groups):
            if not isinstance(place.get(group), dict):
                known = ", ".join(name for name, inner in place.items() if isinstance(inner, dict))
                raise UserError(f"Unknown field {'.'.join(groups[: depth + 1])} in a sweep; groups are {known}.")
            place = place[group]

        place[leaf] = value

    return from_json(TrainConfig, values)


def run_name(diff: Diff) -> str:
    """The difference as a folder's name, as in `num_layers=2,betas=0.9-0.95`; an ambiguous field keeps its group."""
    # `seed`, for one, is a field of the run and of its data.
    shared = {leaf for leaf, count in Counter(_leaves(TrainConfig)).items() if count > 1}

    parts = []

    for field, value in diff.items():
        leaf = field.rsplit(".", 1)[-1]
        parts.append(f"{field if leaf in shared else leaf}={_shown(value)}")

    return ",".join(parts) or "base"


def _leaves(cls: type) -> Iterable[str]:
    for field in dataclasses.fields(cls):
        # Fields of nested dataclasses only: the groups themselves are no values.
        inner = field.type if isinstance(field.type, type) and dataclasses.is_dataclass(field.type) else None
        if inner is None:
            yield field.name
        else:
            yield from _leaves(inner)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "-".join(map(_shown, value)) or "none"
    # Slashes and spaces have no place in a folder's name.
    return re.sub(r"[^\w.+-]", "_", f"{value:g}" if isinstance(value, float) else str(value))


def shipped_sweeps() -> dict[str, Path]:
    """The files of `configs/sweeps`, by name."""
    return {file.stem: file for file in sorted((ROOT / "configs" / "sweeps").glob("[!_]*.py"))}


def load_sweep(path: str) -> Sweep:
    """The sweep that `get_sweep()` of a Python file returns.

    Args:
        path: of the file, or the name of one in `configs/sweeps`.
    Raises:
        UserError: no such file, or no such function in it.
    """
    # Names of shipped sweeps win over files of the same name in the working folder.
    shipped = shipped_sweeps()
    file = shipped.get(path, Path(path))
    if not file.is_file():
        raise UserError(
            f"There is no sweep {path}; expected a Python file with a get_sweep(), or one of {', '.join(shipped)}."
        )

    return from_file(file, "get_sweep")


def part(points: Sequence[str], index: int | None, count: int) -> list[str]:
    """The points of job `index` of `count`: every count-th, from `index` on; all of them without an index.

    Raises:
        UserError: an index outside 0..count-1.
    """
    if count < 1 or (index is not None and not 0 <= index < count):
        raise UserError(f"--index {index} --count {count}: expected 0 <= index < count.")
    return list(points) if index is None else list(points[index::count])
