"""Kills programs whose files are in an object store, and compares with an undisturbed run on a disk.

    python -m tests.kill_stores {regenerate|cache|train} --times 10 [--seed N] [--every 4] [--scratch DIR]

The store is moto's S3 server on this machine; every `--every`-th request is slow and fails with 503, before its work or
after it. After each kill the run continues, in turn on the same machine and on one that has nothing of it. Prints a
line a kill and a verdict; exits 1 when any compared file differs.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dspark_jax.errors import UserError
from dspark_jax.storage import objects
from dspark_jax.storage.places import Place
from tests.kill_resume import PATIENCE_SECONDS, TASKS, Task
from tests.started import Started, start
from tests.stores import BUCKET, S3Server, on_this_machine
from tests.tiny import write_tiny_target

POLL_SECONDS = 0.05


def kill_and_compare(
    task: Task, scratch: Path, server: S3Server, times: int, seed: int = 0, every: int = 4
) -> list[str]:
    """Runs `task` on a disk, then in the store with `times` kills; the names that differ, [] when all is the same.

    The environment of this process must be one that finds the server.
    """
    whole, compiled, rng = scratch / "undisturbed", scratch / "compiled", random.Random(seed)
    _finish(start(task.command(whole), compiled))
    names = [path.relative_to(whole).as_posix() for pattern in task.results for path in whole.glob(pattern)]

    kills = runs = machines = 0
    differing: set[str] = set()
    while kills < times:  # a run that ends before its kill is compared too, and the next kills hit a new one
        place, ended = Place("s3", BUCKET, f"{task.name}-{runs}"), False
        machines, runs = machines + 1, runs + 1
        while kills < times and not ended:
            process = _begin(task, place, scratch, server, machines, compiled, every)
            seen = _things(place)
            ended = _wait(process, lambda place=place, seen=seen: _things(place) > seen)
            ended = ended or _wait(process, lambda: False, rng.uniform(0, 1.5))
            process.kill()
            if not ended:
                kills += 1
                print(f"kill {kills:2d} on machine {machines}, {_things(place)} objects in {place}", flush=True)
                machines += kills % 2
            if "Traceback" in process.said():
                raise SystemExit(f"{task.name} printed\n{process.said()[-2000:]}")
        _finish(_begin(task, place, scratch, server, machines, compiled, every))
        server.faults()
        differing |= {name for name in names if objects.read(place / name) != (whole / name).read_bytes()}
    verdict = f"DIFFERENT: {', '.join(sorted(differing))}" if differing or not names else "identical"
    print(f"{task.name}: {kills} kills, {runs} runs ended, {server.requests()} requests: {verdict}", flush=True)
    return sorted(differing) if names else ["nothing was written"]


def _begin(
    task: Task, place: Place, scratch: Path, server: S3Server, machine: int, compiled: Path, every: int
) -> Started:
    server.faults(every=every, status=503, seconds=0.02)
    # The command's folder becomes the place: pathlib keeps one slash, which programs read as well.
    command = task.command(Path(str(place)))
    return start(command, compiled, variables=on_this_machine(server, scratch / f"machine-{machine}"))


def _things(place: Place) -> int:
    """Objects of the run, but for those that its writers renew."""
    try:
        return sum(1 for name in objects.listing(place) if "/." not in f"/{name}")
    except UserError:
        return 0


def _wait(process: Started, ready: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> bool:
    """Waits for `ready()` or the time limit; whether the process has ended."""
    deadline = time.monotonic() + seconds
    while not ready() and process.code is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return process.code is not None


def _finish(process: Started) -> None:
    code, said = process.end(PATIENCE_SECONDS)
    if code != 0 or "Traceback" in said:
        raise SystemExit(f"the program ended with {code}:\n{said[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS.keys() - {"sweep"}))
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=4, help="of so many requests one fails; 0: none")
    parser.add_argument("--scratch", type=Path, help="an empty folder to work in and keep; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, S3Server() as server:
        scratch = (options.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        server.become(scratch / "here")
        task = TASKS[options.task](write_tiny_target(scratch / "target", num_hidden_layers=3), scratch)
        return 1 if kill_and_compare(task, scratch, server, options.times, options.seed, options.every) else 0


if __name__ == "__main__":
    sys.exit(main())
