"""Results of a sweep: rows, a table, a plot."""

from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from dspark_jax.config.serialise import to_json
from dspark_jax.config.sweep import Sweep, run_name
from dspark_jax.report import pyplot, save, table

Row = dict[str, Any]
MEASURED = ("loss", "tau_probabilistic", "eval_tau", "seconds")


def summary_rows(sweep: Sweep, results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row per finished point, in the sweep's order: its name, the values of all varied fields, and what was
    measured."""
    rows = []
    for diff in sweep.diffs:
        name = run_name(diff)
        if name not in results:
            continue
        # A field that another point varies has the base's value here.
        values = {field: diff.get(field, _value(sweep, field)) for field in varied(sweep)}
        # Runs differ in what they record: those without evaluations have no eval_tau.
        measured = {key: results[name].get(key) for key in {*MEASURED, sweep.metric, "steps", "accept_rate"}}
        rows.append({"name": name, "values": values, **measured})

    return rows


def varied(sweep: Sweep) -> list[str]:
    """Dotted names of the fields that some point varies, in order of appearance."""
    return list(dict.fromkeys(field for diff in sweep.diffs for field in diff))


def _value(sweep: Sweep, field: str) -> Any:
    value: Any = to_json(sweep.base)
    for word in field.split("."):
        value = value[word]
    return value


def summary_table(sweep: Sweep, rows: list[Row], total: int) -> str:
    """Finished points as a text table, with the measured figures that exist; `total`: points of the sweep."""
    shown = [key for key in dict.fromkeys((*MEASURED, sweep.metric)) if any(row[key] is not None for row in rows)]
    body = [[row["name"], *("" if row[key] is None else f"{row[key]:.3f}" for key in shown)] for row in rows]
    return f"{table(['point', *shown], body)}\n{len(rows)} of {total} points are finished."


def summary_plot(path: Path, sweep: Sweep, rows: list[Row]) -> None:
    """Plots the metric over the numeric field with the most values, one line for each combination of the others; over
    the points' names if no varied field is a number. Nothing is written without a measured point."""
    rows = [row for row in rows if row[sweep.metric] is not None]
    if not rows:
        return

    figure, panel = pyplot().subplots(figsize=(6.5, 4))
    field = _abscissa(sweep, rows)
    if field is None:
        # Reversed: bars are drawn from the bottom up.
        panel.barh([row["name"] for row in rows][::-1], [row[sweep.metric] for row in rows][::-1])
        panel.set_xlabel(sweep.metric)
    else:
        for label, line in _lines(sweep, rows, field).items():
            panel.plot(*zip(*sorted(line), strict=True), marker="o", label=label)
        panel.set_xlabel(field)
        panel.set_ylabel(sweep.metric)
        panel.legend(fontsize=7)

    panel.set_title(sweep.name)
    panel.grid(alpha=0.3)
    save(figure, path)


def _abscissa(sweep: Sweep, rows: list[Row]) -> str | None:
    # Numeric fields that take more than one value, with the number of these.
    counts = {}
    for field in varied(sweep):
        values = [row["values"][field] for row in rows]
        # True and False are numbers to Python, and no axis.
        if all(isinstance(value, Real) and not isinstance(value, bool) for value in values) and len(set(values)) > 1:
            counts[field] = len(set(values))

    return max(counts, key=lambda field: counts[field]) if counts else None


def _lines(sweep: Sweep, rows: list[Row], field: str) -> dict[str, list[tuple[float, float]]]:
    """The points of each line; a field in one-to-one relation with the abscissa (copies with a depth) makes no line."""
    other = [name for name in varied(sweep) if name != field and not _follows(rows, name, field)]
    lines: dict[str, list[tuple[float, float]]] = {}

    for row in rows:
        # Lines are told apart by the other fields, by the names that the points' folders have too.
        label = run_name({name: row["values"][name] for name in other}) if other else sweep.metric
        # Points that agree in all other fields share a line.
        lines.setdefault(label, []).append((row["values"][field], row[sweep.metric]))

    return lines


def _follows(rows: list[Row], field: str, leader: str) -> bool:
    # One to one: no value of either field is paired with two of the other.
    pairs = {(str(row["values"][leader]), str(row["values"][field])) for row in rows}
    return len(pairs) == len({leading for leading, _ in pairs}) and len(pairs) == len({value for _, value in pairs})
