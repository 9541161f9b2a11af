"""The command line of every program: named configurations, typed overrides, and one-sentence errors.

A program in train/ or infer/ reads

    @program
    def main(argv: list[str]) -> None:
        config = parse_named(argv, description=__doc__)

    if __name__ == "__main__":
        main()

and is run as `python -m train.fit --config debug --drafter.block-size 16`.
"""

import contextlib
import dataclasses
import difflib
import errno
import functools
import importlib
import importlib.util
import io
import os
import pkgutil
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints, overload

import tyro

from dspark_jax.compilation import HELP, OPTION, keep_compiled, share_equal_parts
from dspark_jax.config.schema import MeshSettings, TrainConfig
from dspark_jax.config.serialise import from_json, to_json
from dspark_jax.errors import UserError
from dspark_jax.programs import module_name

__all__ = [
    "config_names",
    "did_you_mean",
    "divide_options",
    "from_file",
    "from_json",
    "load_config",
    "mesh_settings",
    "parse",
    "parse_named",
    "parse_training",
    "program",
    "take_option",
    "to_json",
]

C = TypeVar("C")
FLAT = tyro.conf.arg(name="")
"""`settings: Annotated[SomeSettings, FLAT]`: a nested dataclass whose options have no prefix."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
NOT_EXPERIMENTS = {"recipe", "sweeps"}


def program(main: Callable[[list[str]], Any]) -> Callable[..., Any]:
    """Wraps a program's `main(argv)`, so that errors of the user end in one sentence on stderr and no traceback.

    Every program also takes `--compilation-cache DIR|off`, and keeps what it compiles (dspark_jax/compilation.py).

    Exit codes: 2 for a `UserError`, a full disk or an impossible path, 130 for an interrupt, 141 where the reader of
    stdout has left.

    Args:
        main: takes the arguments without the program's name.
    Returns:
        The wrapped main; it takes argv (None: the process's own) and returns what `main` returned.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> Any:
        # A terminal of another encoding than UTF-8 shows escapes for what it lacks.
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")
        words = list(sys.argv[1:] if argv is None else argv)
        try:
            # Before the program's own options are read, which do not have it.
            choice, words = take_option(words, OPTION)
            keep_compiled(choice)
            share_equal_parts()
            returned = main(words)
            # A full disk behind stdout shows here, not when the interpreter ends.
            sys.stdout.flush()
            return returned
        except SystemExit as stop:
            if not stop.code and {"-h", "--help"} & set(words):
                print(f"\n{HELP}")
            raise
        except BrokenPipeError:
            _drop_output()
            raise SystemExit(128 + signal.SIGPIPE) from None
        except UserError as error:
            print(" ".join(str(error).split()), file=sys.stderr)
            raise SystemExit(2) from None
        except OSError as error:
            # A full disk can show at any write, and a path that none can be at any look at it. Any other OSError is a
            # fault of the program and keeps its traceback.
            if error.errno in NO_PATH:
                print(f"{error.filename} cannot be used ({error.strerror}); give another path.", file=sys.stderr)
                raise SystemExit(2) from None
            if error.errno not in FULL_DISK:
                raise
            what = f" {error.filename}" if error.filename else ""
            print(f"The disk takes no more ({error.strerror}{what}): make room and run again.", file=sys.stderr)
            _drop_output()
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            raise SystemExit(130) from None

    return run


def _drop_output() -> None:
    """Points stdout elsewhere where it takes no more: the interpreter flushes it once again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def experiments() -> ModuleType:
    """The package of experiments, `configs/`. Imported by name, because the library must not depend on it."""
    return importlib.import_module(module_name("configs"))


def config_names() -> list[str]:
    """Names that `load_config` knows, sorted."""
    # Listed, not imported: a configuration may be expensive to build, or broken.
    files = (module.name for module in pkgutil.iter_modules(experiments().__path__))
    return sorted({*files, *table_of_experiments()} - NOT_EXPERIMENTS)


def table_of_experiments() -> Mapping[str, Callable[[], Any]]:
    """The experiments of `configs/recipe.py`, which differ by a target and a kind and have no file each."""
    return importlib.import_module(f"{experiments().__name__}.recipe").EXPERIMENTS


def load_config(name: str) -> Any:
    """Loads a configuration.

    Args:
        name: `configs/NAME.py`, an entry of `configs/recipe.py`, or the path of a Python file with a `get_config()`.
    Returns:
        What `get_config()`, or the entry, returns.
    Raises:
        UserError: no such configuration or file, or a file without the function.
    """
    if name.endswith(".py"):
        return from_file(Path(name), "get_config")

    known = config_names()
    stem = name.replace("-", "_")
    if stem not in known:
        hint = did_you_mean(stem, known)
        raise UserError(f"Unknown configuration {name}{hint} (known: {', '.join(known)}; or a path that ends in .py).")

    # A table's entry is called only now: each builds its own configuration.
    if stem in table_of_experiments():
        return table_of_experiments()[stem]()

    module = importlib.import_module(f"{experiments().__name__}.{stem}")
    if not hasattr(module, "get_config"):
        raise UserError(f"configs/{stem}.py has no get_config(): add one that returns the configuration.")

    return module.get_config()


def from_file(path: Path, function: str) -> Any:
    """Calls a function of a Python file; UserError when there is no such file or function."""
    # The module is not put in sys.modules, so two files of one name don't meet.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"There is no Python file {path}; give the path of one that has a {function}().")

    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise UserError(f"{path} has no {function}(); add one, as the files in configs/ have it.")

    return getattr(module, function)()


def parse_named(argv: Sequence[str], default: str | None = None, description: str | None = None) -> Any:
    """Reads `--config NAME` (or `default`) and applies the remaining options to that configuration.

    `--help` without a name prints the known names; with one, every option and its value in that configuration.

    Raises:
        UserError: no name, an unknown one, or options that `parse` refuses.
    """
    # Before tyro runs: the configuration's own values are the defaults that it needs.
    name, rest = take_option(list(argv), "--config")
    if name is None and default is None:
        names = ", ".join(config_names())
        if {"-h", "--help"} & set(rest):
            print(f"{description or ''}\n\n--config NAME [--option value ...], NAME one of: {names}".strip())
            print("--config NAME --help shows the options and their values in that configuration.")
            raise SystemExit(0)
        raise UserError(f"No configuration was named: pass --config NAME, one of {names}.")

    return parse(load_config(name or default or ""), rest, description=description)


def parse_training(argv: Sequence[str], module: str, description: str | None = None) -> TrainConfig:
    """`parse_named` for training runs; UserError, naming the program `module`, for another kind of configuration."""
    config = parse_named(argv, description=description)
    if not isinstance(config, TrainConfig):
        raise UserError(f"The configuration is a {type(config).__name__}; {module} takes those of training.")
    return config


@overload
def parse(config: type[C], argv: Sequence[str], description: str | None = None) -> C: ...


@overload
def parse(config: C, argv: Sequence[str], description: str | None = None) -> C: ...


def parse(config: Any, argv: Sequence[str], description: str | None = None) -> Any:
    """Builds a dataclass from options such as `--drafter.block-size 16`.

    Args:
        config: an instance, whose values are the defaults, or a class, whose fields without a default are required.
        argv: options without the program's name.
        description: text of `--help`; without one the class's docstring is shown.
    Raises:
        UserError: an option that does not exist, or a value that does not fit, in one sentence.
    """
    cls = config if isinstance(config, type) else type(config)
    # Checked before tyro does: its suggestions span a screen.
    _refuse_unknown(argv, _flags(cls))

    # tyro draws its complaints as a box; capture it and keep the first paragraph. `--help` (exit code 0) is passed on.
    complaints = io.StringIO()

    try:
        with contextlib.redirect_stderr(complaints):
            if isinstance(config, type):
                return tyro.cli(cls, args=list(argv), description=description)
            return tyro.cli(cls, default=config, args=list(argv), description=description)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_first_paragraph(complaints.getvalue())) from None


def divide_options(argv: Sequence[str], cls: type) -> tuple[list[str], list[str]]:
    """Splits argv into (the options of the dataclass `cls` with their values, everything else), orders kept."""
    flags = _flags(cls)

    mine: list[str] = []
    rest: list[str] = []
    taken = rest

    for word in argv:
        if word.startswith("--") and len(word) > 2:
            # Words up to the next option are the values of this one.
            taken = mine if word.split("=", 1)[0].replace("_", "-") in flags else rest
        taken.append(word)

    return mine, rest


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The clause `": did you mean A or B?"` of known words close to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f": did you mean {' or '.join(close)}?" if close else ""


def mesh_settings(text: str, base: MeshSettings) -> MeshSettings:
    """The mesh of a text such as `data=16,fsdp=4`; axes that it leaves out have size 1. UserError for other texts."""
    # The short form of a plan's mesh; a run has the options --mesh.data and so on.
    words = [word.partition("=") for word in text.split(",")]
    names = {name for name, _, _ in words}
    if names - {"data", "fsdp", "tensor", "expert"} or not all(size.lstrip("-").isdigit() for _, _, size in words):
        raise UserError(
            f"--mesh is {text!r}; sizes of data, fsdp, tensor and expert were expected, as in data=16,fsdp=4."
        )

    sizes = {"data": 1} | {name: int(size) for name, _, size in words}
    return MeshSettings(**sizes, markov_tables=base.markov_tables)


def take_option(argv: list[str], option: str) -> tuple[str | None, list[str]]:
    """Removes `option VALUE` or `option=VALUE` from argv.

    Returns:
        (value, the other words); of several values the last, as for every other option, None without one.
    """
    value, rest = None, []
    words = iter(argv)

    for word in words:
        if word == option:
            # The next word, whatever it looks like: a path may begin with a dash.
            value = next(words, None)
            if value is None:
                raise UserError(f"{option} needs a value.")
        elif word.startswith(f"{option}="):
            value = word.split("=", 1)[1]
        else:
            rest.append(word)

    return value, rest


def _flags(cls: type, prefix: str = "--") -> list[str]:
    """The options of a dataclass, nested ones with dots, in tyro's spelling (hyphens; `--no-` for booleans)."""
    hints, annotated = get_type_hints(cls), get_type_hints(cls, include_extras=True)

    flags = []

    for field in dataclasses.fields(cls):
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            # `get_type_hints` drops `Annotated` unless asked to keep it, hence the two sets of hints.
            is_flat = FLAT in getattr(annotated[field.name], "__metadata__", ())
            flags += _flags(hints[field.name], prefix if is_flat else f"{prefix}{name}.")
        else:
            flags += [f"{prefix}{name}"] + ([f"{prefix}no-{name}"] if hints[field.name] is bool else [])

    return flags


def _refuse_unknown(argv: Sequence[str], flags: list[str]) -> None:
    # Values that begin with one hyphen, such as -1, are not options.
    for word in argv:
        flag = word.split("=", 1)[0]
        if flag.startswith("--") and flag != "--help" and flag.replace("_", "-") not in flags:
            raise UserError(f"Unknown option {flag}{_closest_flag(flag, flags) or '; --help lists the options.'}")


def _closest_flag(flag: str, flags: list[str]) -> str:
    """Suggestions: options with the same last part, for one given without its group, or else similar whole names."""
    # A tail that fits exactly is a better guess than a name that is merely similar.
    whole = did_you_mean(flag.replace("_", "-"), flags)
    tail = flag.replace("_", "-").lstrip("-").rsplit(".", 1)[-1]
    same_tail = [f for f in flags if f.lstrip("-").rsplit(".", 1)[-1] == tail]
    return f": did you mean {' or '.join(same_tail[:2])}?" if same_tail else whole


def _first_paragraph(box: str) -> str:
    """The text in tyro's box as one line, without its title, which is in the frame or, in ASCII, above a rule."""
    framed = "╭" in box
    lines = [line.strip(" │|") for line in box.splitlines() if not line.startswith(("╭", "╰"))]

    parts = re.split(r"\n[─-]{5,}(?:\n|$)", "\n".join(lines))
    sentence = " ".join(parts[0 if framed else min(1, len(parts) - 1)].split()) or "The options could not be read"

    return sentence if sentence.endswith((".", "?")) else f"{sentence}."
