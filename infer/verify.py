"""Identifies any folder or file of this project, shows its origin, and checks whether it is whole.

    python -m infer.verify runs/demo/fit assets/embedded_drafter assets/embedded_target

It covers targets, drafters in every layout, target caches, runs, conversations (JSONL), calibrations and profiles, and
reads everything: hashes, counts, sizes, and weights, for values that are not finite.
Exit code 0: all are whole; 1: one is not; 2: one is of an unknown kind.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from dspark_jax.config.cli import parse, program
from dspark_jax.errors import UserError
from dspark_jax.integrity import Finding, examine
from dspark_jax.report import listing


@dataclass(frozen=True)
class VerifySettings:
    """Checks files and folders."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Folders or files."""


@program
def main(argv: list[str]) -> int:
    settings = parse(VerifySettings, argv, description=__doc__)
    code = 0
    for path in settings.paths:
        try:
            # Each path is judged, whatever came of those before: a list of damage is worth more than its first entry.
            findings = examine(path)
        except UserError as error:
            print(error, file=sys.stderr)
            code = 2
            continue
        for finding in findings:
            print(described(finding), end="\n\n")
        # 2 outranks 1: a path that cannot be judged is worse than one that is judged damaged.
        if code != 2 and any(finding.fault for finding in findings):
            code = 1

    return code


def described(finding: Finding) -> str:
    """Text of a finding: a heading, the facts, and the fault if there is one."""
    verdict = "NOT WHOLE" if finding.fault else "whole"
    lines = [f"{finding.path}: {finding.kind}, {verdict}"]
    if finding.facts:
        shown = {name.replace("_", " "): value for name, value in finding.facts.items()}
        lines += [f"  {line}" for line in listing(shown).splitlines()]
    return "\n".join([*lines, *([f"  {finding.fault}"] if finding.fault else [])])


if __name__ == "__main__":
    sys.exit(main())
