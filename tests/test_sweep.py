"""Sweeps: combinators and names, points that are killed, fail or run elsewhere, and the program from end to end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dspark_jax.config.cli import divide_options, load_config
from dspark_jax.config.sweep import Sweep, apply_diff, axis, chain, fixed, load_sweep, part, product, run_name, zipped
from dspark_jax.errors import UserError
from dspark_jax.training.point_processes import Runner
from dspark_jax.training.run_folder import read_records
from dspark_jax.training.sweep_report import summary_plot, summary_rows, summary_table
from tests.counting_point import counting, run_six
from tests.tiny import write_tiny_target
from train.sweep import SweepSettings
from train.sweep import main as sweep_main

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("[!_]*.py"))


def test_product_zip_and_chain():
    layers, seeds = axis("drafter.num_layers", 1, 2), axis("seed", 0, 1)
    assert [run_name(d) for d in product(layers, seeds)] == [
        "num_layers=1,seed=0",
        "num_layers=1,seed=1",
        "num_layers=2,seed=0",
        "num_layers=2,seed=1",
    ]
    assert zipped(layers, seeds) == [
        {"drafter.num_layers": 1, "seed": 0},
        {"drafter.num_layers": 2, "seed": 1},
    ]
    assert chain(layers, fixed(drafter__num_layers=2), seeds) == [*layers, *seeds]
    with pytest.raises(UserError, match=r"parts of \[2, 3\] points"):
        zipped(layers, axis("seed", 0, 1, 2))
    with pytest.raises(UserError, match="given seed twice"):
        product(seeds, seeds)


def test_a_point_is_its_configuration():
    base = load_config("debug")
    made = apply_diff(base, {"drafter.target_layer_ids": (2, 3), "optimizer.betas": (0.5, 0.75), "max_steps": None})
    assert (made.drafter.target_layer_ids, made.optimizer.betas, made.max_steps) == ((2, 3), (0.5, 0.75), None)
    assert made.drafter.block_size == base.drafter.block_size
    assert run_name({"optimizer.betas": (0.5, 0.75), "data.seed": 3, "seed": 4}) == "betas=0.5-0.75,data.seed=3,seed=4"
    assert run_name({"target": "a/b c"}) == "target=a_b_c" and run_name({}) == "base"


@pytest.mark.parametrize(
    ("diff", "said"),
    [
        ({"drafter.blok_size": 3}, "did you mean drafter.block_size"),
        ({"draft.block_size": 3}, "Unknown field draft in a sweep; groups are drafter"),
        ({"drafter.block_size": "3"}, "int was expected"),
        ({"drafter.block_size": 0}, "at least 1 was expected"),
    ],
)
def test_wrong_differences_get_one_sentence(diff: dict, said: str):
    with pytest.raises(UserError, match=said):
        apply_diff(load_config("debug"), diff)


def test_points_need_names_of_their_own():
    with pytest.raises(UserError, match="2 points named seed=1"):
        Sweep("twice", load_config("debug"), [*axis("seed", 1), *axis("seed", 1)]).points()
    with pytest.raises(UserError, match="no points"):
        Sweep("none", load_config("debug"), []).points()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_sweeps_have_sound_points(file: Path):
    sweep = load_sweep(str(file))
    assert sweep.name == file.stem and len(sweep.points()) >= 6
    assert f"configs/sweeps/{file.name}" in file.read_text().split('"""')[1]


def test_parts_cover_all_points_once():
    points = [str(i) for i in range(7)]
    parts = [part(points, i, 3) for i in range(3)]
    assert sorted(sum(parts, [])) == points and part(points, None, 1) == points
    with pytest.raises(UserError, match="0 <= index < count"):
        part(points, 3, 3)


def test_options_are_divided():
    argv = ["file.py", "--jobs", "2", "--drafter.target-layer-ids", "1", "2", "--index=1", "--seed", "-1"]
    mine, rest = divide_options(argv, SweepSettings)
    assert mine == ["--jobs", "2", "--index=1"]
    assert rest == ["file.py", "--drafter.target-layer-ids", "1", "2", "--seed", "-1"]


# The runner, on points that only count.


def start_six(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.counting_point", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)


def starts(folder: Path) -> list[str]:
    return [line for file in folder.glob("*.started") for line in file.read_text().split()]


def test_killed_twice_and_restarted_every_point_is_run_once(tmp_path: Path):
    """The runner dies by SIGKILL, its points live on: the next runner waits for them."""
    rng = random.Random(0)
    for kill in (1, 2):
        process = start_six(tmp_path)
        while len(starts(tmp_path)) < 2 * kill - 1:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(list(tmp_path.glob("*.json"))) < 6
    assert run_six(tmp_path) == {}
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted(result["name"] for result in results) == sorted(f"p{i}" for i in range(6))
    assert sorted(starts(tmp_path)) == sorted(f"p{i}" for i in range(6))


def test_a_killed_point_is_run_again(tmp_path: Path):
    process = start_six(tmp_path)
    while len(starts(tmp_path)) < 2:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the runner and the point that it runs
    process.wait()
    done = len(list(tmp_path.glob("*.json")))
    assert done < 6 and run_six(tmp_path) == {}
    assert len(list(tmp_path.glob("*.json"))) == 6 and len(starts(tmp_path)) == 7


def test_a_failing_point_is_tried_twice_and_named(tmp_path: Path):
    good, bad = counting(tmp_path, ["good", "fail"], 0.0)
    failed = Runner(tmp_path / "logs", jobs=2).run([good, bad])
    assert good.done and set(failed) == {"fail"} and "told to fail (exit code 3)" in failed["fail"]
    assert sorted(starts(tmp_path)) == ["fail", "fail", "good"]
    (flaky,) = counting(tmp_path, ["flaky"], 0.0)
    assert Runner(tmp_path / "logs").run([flaky]) == {} and starts(tmp_path).count("flaky") == 2


def test_sigterm_stops_the_points_too(tmp_path: Path):
    process = start_six(tmp_path)
    while not starts(tmp_path):
        time.sleep(0.01)
    process.terminate()
    assert process.wait(20) != 0
    time.sleep(0.6)  # longer than a point takes
    assert not list(tmp_path.glob("*.json")) and len(starts(tmp_path)) == 1


# The program.


def test_the_summary_compares_what_varies(tmp_path: Path):
    copies = axis("drafter.init_target_layers", (8,), (8, 9))
    diffs = product(zipped(axis("drafter.num_layers", 1, 2), copies), axis("drafter.markov_rank", 0, 8))
    sweep = Sweep("s", load_config("debug"), diffs)
    results = {run_name(d): {"tau_probabilistic": 1.5 + i, "loss": 1.0} for i, d in enumerate(diffs[:3])}
    rows = summary_rows(sweep, results)
    assert [row["values"]["drafter.markov_rank"] for row in rows] == [0, 8, 0]
    assert "3 of 4 points are finished" in summary_table(sweep, rows, 4) and "3.500" in summary_table(sweep, rows, 4)
    summary_plot(tmp_path / "s.png", sweep, rows)
    assert (tmp_path / "s.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The command of a sweep of two tiny trainings, run as part 0 of 2 and then whole."""
    folder = tmp_path_factory.mktemp("sweep")
    target = write_tiny_target(folder / "target", num_hidden_layers=3)
    (folder / "tiny.py").write_text(
        "from dspark_jax.config.cli import load_config\nfrom dspark_jax.config.sweep import Sweep, axis\n"
        "def get_sweep():\n    return Sweep('tiny', load_config('debug'), axis('seed', 0, 1))\n"
    )
    options = "--max-steps 2 --data.max-length 24 --drafter.num-anchors 4 --drafter.target-layer-ids 0 1"
    places = ["--target", str(target), "--output", str(folder / "out")]
    command = [str(folder / "tiny.py"), *places, *options.split()]
    sweep_main([*command, "--index", "0", "--count", "2"])
    assert [row["name"] for row in summary(folder / "out")] == ["seed=0"]
    sweep_main([*command, "--jobs", "2"])
    return command, folder / "out"


def summary(folder: Path) -> list[dict]:
    return json.loads((folder / "summary.json").read_text())["points"]


def test_a_sweep_of_real_runs(swept: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]):
    command, folder = swept
    assert [row["name"] for row in summary(folder)] == ["seed=0", "seed=1"]
    assert len({row["loss"] for row in summary(folder)}) == 2
    assert (folder / "summary.png").exists() and (folder / "seed=1" / "drafter").exists()
    times = [path.stat().st_mtime_ns for path in sorted(folder.glob("*/metrics.json"))]
    sweep_main(command)
    assert "2 of 2 points are finished" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*/metrics.json"))] == times
    assert [r["step"] for r in read_records(folder / "seed=1" / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--max-steps", "3"], 2, "max_steps = 2, this command 3"),
        (["--run-dir", "x"], 2, "name the folder of them all with --output"),
        (["--jobs", "0"], 2, "--jobs is 0"),
        (["--point", "seed=9"], 2, "no point 'seed=9'; its points are seed=0, seed=1"),
    ],
)
def test_sweep_refusals(
    swept: tuple[list[str], Path], more: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sweep_main([*swept[0], *more])
    assert stop.value.code == code and said in capsys.readouterr().err


def test_a_missing_sweep_file_names_the_shipped_ones(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        sweep_main(["configs/sweeps/dept.py"])
    assert "one of block_length, depth, head_type, loss_weights" in capsys.readouterr().err
