"""Where the programs, the experiments and the shipped pair are.

A checkout has them beside the package, in `train/`, `infer/`, `configs/` and `assets/`. In a wheel the same folders lie
inside this package, so that an installation has a single top-level name; siblings import each other relatively, which
works in both places.
"""

import sys
from pathlib import Path

from dspark_jax.errors import UserError

HERE = Path(__file__).parent
# The folder that holds train/, infer/, configs/ and assets/, and the package that it is.
ROOT, PACKAGE = (HERE, __name__) if (HERE / "infer").is_dir() else (HERE.parent.parent, "")
WINGS = ("train", "infer")
EMBEDDED = "embedded"
MAIN = 'if __name__ == "__main__":'


def module_name(name: str) -> str:
    """The importable name of `train.fit`, `configs` and the like; other modules keep theirs."""
    return f"{PACKAGE}.{name}" if PACKAGE and name.split(".")[0] in (*WINGS, "configs") else name


def program_command(program: str, *words: object) -> list[str]:
    """The command line that runs a program such as `train.fit` in a process of its own, with this interpreter."""
    return [sys.executable, "-m", module_name(program), *map(str, words)]


def earlier_checkout(path: str) -> Path:
    """The folder of an earlier checkout, which a study compares with this one.

    Raises:
        UserError: the folder holds no checkout.
    """
    if not (Path(path) / "dspark_jax").is_dir():
        raise UserError(f"--before is {path}; a checkout of this repository was expected.")
    return Path(path)


def asset(name: str) -> Path:
    """A file or folder of `assets/`."""
    return ROOT / "assets" / name


def found_programs() -> dict[str, str]:
    """Every program by the name it has as a subcommand of `dspark`: {"fit": "train.fit", ...}.

    A name is the file's, after its folder's unless that is a wing or `studies`. Where both wings have a program of one
    name, that of `infer/` keeps it and the other is `train-NAME`; a study of a program's name is `NAME-study`.
    """
    programs: dict[str, str] = {}
    for wing in WINGS:
        for file in sorted((ROOT / wing).rglob("*.py")):
            if file.name == "__init__.py" or MAIN not in file.read_text(encoding="utf-8"):
                continue
            parts = file.relative_to(ROOT / wing).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__main__" else parts
            name = "-".join(part for part in parts if part != "studies").replace("_", "-")
            if name in programs and "studies" in parts:
                name = f"{name}-study"
            elif name in programs:
                programs[f"{WINGS[0]}-{name}"] = programs[name]
            programs[name] = ".".join((wing, *parts))
    return programs


def source(program: str) -> Path:
    """The file of a program."""
    path = ROOT.joinpath(*program.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
