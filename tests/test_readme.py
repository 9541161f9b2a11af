"""The README: its Python runs, its programs, options and make targets exist, and its tree is the tree.

tests/test_wheel.py runs its first command.
"""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dspark_jax.config.sweep import shipped_sweeps
from dspark_jax.programs import found_programs, module_name, source

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands(first: str) -> list[list[str]]:
    """Lines of the bash blocks that begin with a word, as argument lists; continued lines are joined."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] == first]


def program_commands() -> list[list[str]]:
    return [line[1:] for line in commands("dspark") if not line[1].startswith("-")]


@pytest.mark.parametrize("words", program_commands(), ids=lambda words: words[0])
def test_programs_have_the_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    name, *argv = words
    module = found_programs()[name]
    imported = importlib.import_module(
        module_name(f"{module}.__main__" if source(module).stem == "__main__" else module)
    )
    config = argv[argv.index("--config") :][:2] if "--config" in argv else []
    with pytest.raises(SystemExit) as stop:
        imported.main([*config, "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code in (0, None)
    missing = {word for word in argv if word.startswith("--") and word not in printed} - {"--config"}
    assert not missing, f"{name} has no {missing}"


@pytest.mark.long
def test_the_python_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    text, accepted = capsys.readouterr().out.rsplit(maxsplit=1)
    assert text and float(accepted) >= 1


def test_make_targets_exist() -> None:
    targets = {line[1] for line in commands("make")} | set(re.findall(r"`make ([a-z-]+)", TEXT))
    assert {"demo", "quick", "test", "env", "check"} <= targets
    for target in targets:
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0, target


def test_the_tree_has_every_room() -> None:
    tree = TEXT[TEXT.index("```\ndspark_jax/") :].split("```")[1]
    library = tree[: tree.index("\ntrain/")]
    named = {line.split()[0].rstrip("/") for line in library.splitlines() if line.startswith("  ")}
    rooms = {file.parent.name for file in (ROOT / "dspark_jax").glob("*/__init__.py")}
    files = {file.name for file in (ROOT / "dspark_jax").glob("*.py")} - {"__init__.py"}
    assert named == rooms | files
    for wing in ("train", "infer"):
        programs = {name for name in found_programs().values() if name.startswith(f"{wing}.")}
        listed = tree[tree.index(f"\n{wing}/") :].split("\nconfigs/")[0]
        missing = [name for name in programs if not re.search(rf"\b{name.split('.')[-1]}\b", listed)]
        assert not missing


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_pages_name_what_exists(page: Path) -> None:
    """Links, modules run with -m, subcommands, and paths of the tree."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for module in re.findall(r"python -m ((?:train|infer|tests)\.[\w.]*\w)", text):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name} runs {module}"
    for name in re.findall(r"`dspark ([a-z][a-z-]*)", text):
        assert name in found_programs(), f"{page.name} runs dspark {name}"
    for sweep in re.findall(r"configs/sweeps/(\w+)\.py", text):
        assert sweep in shipped_sweeps()
