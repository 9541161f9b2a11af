"""A point of tests/test_sweep.py: notes that it started, takes its time, writes its result; fails if its name says so.

With one argument: a runner of six such points in that folder.
"""

import json
import sys
import time
from pathlib import Path

from dspark_jax.training.point_processes import Point, Runner


def main(result: Path, seconds: float) -> None:
    with open(result.with_suffix(".started"), "a") as file:
        file.write(f"{result.stem}\n")
    starts = result.with_suffix(".started").read_text().count("\n")
    if result.stem == "fail" or (result.stem == "flaky" and starts == 1):
        print("told to fail", file=sys.stderr)
        raise SystemExit(3)
    time.sleep(seconds)
    temporary = result.with_suffix(".tmp")
    temporary.write_text(json.dumps({"name": result.stem}))
    temporary.replace(result)


def counting(folder: Path, names: list[str], seconds: float) -> list[Point]:
    results = [folder / f"{name}.json" for name in names]
    return [Point(r.stem, ("tests.counting_point", str(r), str(seconds)), r) for r in results]


def run_six(folder: Path) -> dict[str, str]:
    return Runner(folder / "logs").run(counting(folder, [f"p{i}" for i in range(6)], 0.4))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        run_six(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), float(sys.argv[2]))
