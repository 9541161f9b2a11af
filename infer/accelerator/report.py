"""The file of figures: written anew, whole, after every figure, and read again by a run that continues."""

import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark_jax.errors import UserError
from dspark_jax.files import write_json
from dspark_jax.readers import read_object


class OtherMachine(UserError):
    """The file has figures of another machine than this one."""


@dataclass
class Report:
    """Figures by part.

    Attributes:
        path: of the JSON file.
        parts: figures by the part's name; a part that did not end has "failed", one for which no time was left
            "left_out", each with a sentence.
        about: machine and settings.
        deadline: on `time.monotonic`'s clock, after which nothing further is begun.
    """

    path: Path
    about: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    deadline: float = float("inf")

    @classmethod
    def continued(cls, path: Path, seconds: float) -> "Report":
        """The report of that file, or an empty one, with so many seconds from now."""
        content: dict[str, Any] = {}
        if path.exists():
            # A file of something else is not overwritten.
            content = read_object(path, expected="the report of an earlier run of infer.accelerator")
            if not isinstance(content.get("parts"), dict):
                raise UserError(f"{path} is no report of infer.accelerator; give another --output.")
        return cls(path, content.get("about", {}), content.get("parts", {}), time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def out_of_time(self, part: str) -> bool:
        """Whether the time is up, which is then said of the part."""
        if self.left < 0:
            self.add(part, unfinished="The time was up; the same command goes on from here.")
        return self.left < 0

    def done(self, part: str) -> bool:
        """Whether the part has ended, in this run or an earlier one."""
        found = self.parts.get(part)
        return found is not None and not {"failed", "left_out", "unfinished"} & set(found)

    def measured_on(self, here: dict[str, Any]) -> None:
        """Note the machine, or compare it with the noted one: figures of two in one table would be taken for one's.

        Args:
            here: as `devices.machine` describes this one.
        Raises:
            OtherMachine: earlier figures are of another device, number of cores, or version of Python or jax.
        """
        known = self.about.setdefault("machine", here)
        # The load passes.
        differing = [name for name in here if name != "load" and known.get(name) != here[name]]
        if differing:
            named = ", ".join(f"{name} {known.get(name)}, here {here[name]}" for name in differing)
            raise OtherMachine(f"The figures in the file are of another machine ({named}); give another --output.")

    def add(self, part: str, **figures: Any) -> None:
        """Add figures to a part, and write the file."""
        self.parts.setdefault(part, {}).update(figures)
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, {"about": self.about, "parts": self.parts})

    def take(self, path: Path) -> None:
        """Take over the parts of another report's file, as far as it was written."""
        with suppress(OSError, json.JSONDecodeError):
            content = json.loads(path.read_text(encoding="utf-8"))
            self.parts |= content["parts"]
            self.about |= {"machine": content["about"]["machine"]} if "machine" in content["about"] else {}
        self.save()


def by_requests(report: Report, part: str, numbers: Sequence[int], measured: Callable[[int], dict[str, Any]]) -> None:
    """Add the figures of each number of requests as "R=n", until the time is up. A failure is a sentence among the
    figures; where memory is short, half as many requests are tried, and none that are more."""
    too_many = math.inf
    for number in numbers:
        # Numbers that an earlier run has measured are kept.
        while number >= 1 and not _measured(report, part, number):
            if report.out_of_time(part):
                return
            short = number >= too_many
            if not short:
                try:
                    figures = measured(number)
                except Exception as error:
                    short, figures = "RESOURCE_EXHAUSTED" in str(error), {"failed": sentence(error)}
                report.add(part, **{f"R={number}": figures})
                # What a failed attempt held must be free for the next one.
                gc.collect()
            too_many = min(too_many, number) if short else too_many
            number = number // 2 if short else 0


def _measured(report: Report, part: str, number: int) -> bool:
    found = report.parts.get(part, {}).get(f"R={number}")
    return found is not None and "failed" not in found


def sentence(error: BaseException) -> str:
    """An error in one line: its kind and the beginning of its message."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__
