"""The command `dspark`: every program as a subcommand. `dspark fit ...` is `python -m train.fit ...`."""

import ast
import importlib
import sys
from collections.abc import Sequence

from dspark_jax.config.cli import did_you_mean, program
from dspark_jax.errors import UserError
from dspark_jax.programs import found_programs, module_name, source

# Title -> mark in the module's name; later marks are more specific.
GROUPS = {
    "Make data and train": "train.",
    "Decode, measure and exchange": "infer.",
    "Studies": ".studies.",
    "The pair in this package": ".embedded.",
}


@program
def main(argv: list[str]) -> int:
    """Runs the program that the first word names, with the remaining words as its options; returns its exit code."""
    # Found and not listed: a new program is a subcommand without a line here.
    programs = found_programs()
    if not argv or argv[0] in ("-h", "--help"):
        print(overview(programs))
        return 0

    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("dspark-jax"))
        return 0

    name = argv[0].replace("_", "-")
    if name not in programs:
        hint = did_you_mean(name, programs)
        raise UserError(f"dspark has no subcommand {argv[0]}{hint or '; dspark --help lists them.'}")

    return run(name, programs[name], argv[1:])


def run(name: str, module: str, argv: Sequence[str]) -> int:
    """Runs a program in this process and returns its exit code."""
    # tyro's usage lines show sys.argv[0], so they name the subcommand.
    sys.argv = [f"dspark {name}", *argv]
    path = source(module)
    # A package of a program keeps its main in __main__.
    imported = importlib.import_module(module_name(f"{module}.__main__" if path.stem == "__main__" else module))
    code = imported.main(list(argv))

    # Programs that return something else, or nothing, have succeeded.
    return code if isinstance(code, int) else 0


def overview(programs: dict[str, str]) -> str:
    """The text of --help: one line for each program, by group."""
    width = max(map(len, programs))
    lines = ["usage: dspark SUBCOMMAND [--option value ...]; dspark SUBCOMMAND --help lists the options."]

    for title, modules in grouped(programs).items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:<{width}}  {summary(module)}" for name, module in modules.items()]

    return "\n".join(lines)


def grouped(programs: dict[str, str]) -> dict[str, dict[str, str]]:
    """Programs by the title of their group; empty groups are left out.

    A program belongs to the last group whose mark is in its module's name: train.studies.x is a study.
    """
    groups: dict[str, dict[str, str]] = {title: {} for title in GROUPS}
    for name, module in programs.items():
        title = [title for title, mark in GROUPS.items() if mark in module][-1]
        groups[title][name] = module

    return {title: modules for title, modules in groups.items() if modules}


def summary(module: str) -> str:
    """The first sentence of a program's docstring, read without importing it."""
    # Importing every program for one page of help would load jax and take seconds.
    text = ast.get_docstring(ast.parse(source(module).read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).partition(". ")[0].partition("; ")[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
