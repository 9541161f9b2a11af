"""The wheel as a stranger installs it: one package, one command, and the embedded pair, away from the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = """
import dspark_jax
from importlib.util import find_spec
print(dspark_jax.__file__, *map(find_spec, ("train", "infer", "configs")))
"""
RUN = """
import subprocess, sys
from dspark_jax.programs import program_command
sys.exit(subprocess.run(program_command("train.fit", "--help")).returncode)
"""

pytestmark = pytest.mark.subprocesses


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which sees this interpreter's other packages but not its .pth files."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    made = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    run([*pip, *made], folder)
    run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], folder)
    python = folder / "env" / "bin" / "python"
    packages = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wheel = next(folder.glob("*.whl"))
    run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], folder)
    return folder


def run(command: list[str], cwd: Path, expected: int = 0) -> str:
    """Output of a command that ends with the expected code; no module of the checkout is in reach."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout if expected == 0 else done.stderr


def test_the_wheel_has_one_package_and_its_files(installed: Path) -> None:
    python = str(installed / "env" / "bin" / "python")
    where, *others = run([python, "-c", PLACES], installed).split()
    assert where.startswith(str(installed)) and others == ["None"] * 3
    run([python, "-c", RUN], installed)
    assert (Path(where).parent / "serving" / "api" / "page" / "index.html").is_file()


def test_the_command_is_the_map(installed: Path) -> None:
    dspark = str(installed / "env" / "bin" / "dspark")
    overview = run([dspark, "--help"], installed)
    for name in ("generate", "fit", "calibrate", "build-cache", "sweep", "load"):
        assert f"\n  {name} " in overview
    assert "did you mean generate?" in run([dspark, "generte"], installed, expected=2)
    assert "kind=dspark,l1_alpha=0.9,num_layers=1" in run(
        [dspark, "sweep", "depth", "--list", "--data.cache", "x"], installed
    )


def test_the_embedded_pair_answers(installed: Path) -> None:
    dspark, output = str(installed / "env" / "bin" / "dspark"), installed / "answers.jsonl"
    words = ["--prompt", "What is 2 plus 3?", "--max-new-tokens", "16", "--slots", "1", "--output", str(output)]
    printed = run([dspark, "generate", *words], installed)
    assert "accepted length" in printed
    answer = json.loads(output.read_text())
    assert answer["text"] and len(answer["tokens"]) > answer["rounds"] > 0
