"""The library's manners: imports run downwards only, and importing it changes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.subprocesses


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


def lint_imports(cwd: Path) -> subprocess.CompletedProcess[str]:
    # By module, since a virtual environment's scripts need not be on the PATH.
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return run(sys.executable, "-c", code, "--no-cache", cwd=cwd)


def test_imports_run_downwards() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("train/fit.py", "import infer.generate", "Imports run downwards"),
        ("dspark_jax/targets/qwen3.py", "import dspark_jax.drafters", "Imports run downwards"),
        ("dspark_jax/data/chat.py", "import dspark_jax.targets", "The data path knows no model"),
    ],
)
def test_contracts_notice_a_wrong_import(tmp_path: Path, module: str, line: str, contract: str) -> None:
    """The contracts bite: on a skeleton of the packages, one import upwards or sideways breaks the named one."""
    rooms = {path.parent.name for path in (ROOT / "dspark_jax").glob("*/__init__.py")}
    for folder in ["train", "infer", "configs", "dspark_jax", *(f"dspark_jax/{room}" for room in rooms)]:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "__init__.py").touch()
    for file in [*(f"dspark_jax/{path.name}" for path in (ROOT / "dspark_jax").glob("*.py")), "infer/generate.py"]:
        (tmp_path / file).touch()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    assert lint_imports(tmp_path).returncode == 0
    (tmp_path / module).write_text(line + "\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert f"{contract}" in done.stdout and "BROKEN" in done.stdout


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import jax, flax.nnx, optax, grain, safetensors
from orbax.checkpoint import v1
from jax._src import xla_bridge
before = dict(jax.config.values)
import dspark_jax
for module in pkgutil.walk_packages(dspark_jax.__path__, "dspark_jax."):
    importlib.import_module(module.name)
after = dict(jax.config.values)
changed = sorted(name for name in after if after[name] != before.get(name, after[name]))
assert not changed, f"importing dspark_jax changed jax.config: {changed}"
assert not xla_bridge.backends_are_initialized(), "importing dspark_jax initialised a backend"
"""


def test_importing_the_library_changes_nothing() -> None:
    done = run(sys.executable, "-c", IMPORT_EVERYTHING)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_configurations_load_without_jax() -> None:
    load = "[c.load_config(n) for n in c.config_names()]"
    code = f"import sys, dspark_jax.config.cli as c; {load}; sys.exit('jax' in sys.modules)"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
