"""Runs a program on a disk that is too small, at random sizes; then makes room and continues to the end.

    python -m tests.kill_disk {regenerate|cache|train} --times 50 [--seed N] [--scratch DIR]

The disk is a tmpfs of a random size where this user may mount one, and a limit on the size of a file otherwise. A
stopped program must end with exit code 2 and a sentence, without a traceback, and continue to the files of an
undisturbed run once there is room. Prints a line a run and a verdict; exits 1 when one of them does not.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.kill_resume import PATIENCE_SECONDS, TASKS, Task, differences
from tests.started import start
from tests.tiny import write_tiny_target

TRACES = ("Traceback", "Exception in", "Exception ignored", "never retrieved", "Fatal", "core dumped", "[C]", ".cc:")
"""Names that stand in the trace of a thread or a library, and in no sentence."""


@dataclass
class Outcome:
    """Outcome of the runs: how many stopped for the disk, how many fitted, and what was wrong."""

    stopped: int = 0
    fitted: int = 0
    wrong: list[str] = field(default_factory=list)


def run(task: Task, folder: Path, scratch: Path, limit: int | None = None, fresh: bool = False) -> tuple[int, str]:
    """(exit code, stderr) of the program; `limit`: bytes that a file may have."""
    started = start(task.command(folder), scratch / "compiled", fresh=fresh, file_bytes=limit)
    return started.end(10 * PATIENCE_SECONDS)


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Callable[[], None]]:
    """A tmpfs of so many bytes at `place`; yields what makes room on it."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True, capture_output=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=2g", str(place)], check=True) and None
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def may_mount(scratch: Path) -> bool:
    try:
        with small_disk(scratch / "probe", 1 << 20):
            return True
    except (subprocess.CalledProcessError, OSError):
        shutil.rmtree(scratch / "probe", ignore_errors=True)
        return False


def fill_and_compare(task: Task, scratch: Path, times: int, seed: int = 0, mounted: bool | None = None) -> Outcome:
    """`times` runs on small disks, each continued with room; `mounted` False: limits on a file's size instead."""
    whole, found, rng = scratch / "undisturbed", Outcome(), random.Random(seed)
    code, said = run(task, whole, scratch, fresh=True)
    if code != 0:
        raise SystemExit(f"{task.name} ended with {code}:\n{said[-2000:]}")
    sizes = [path.stat().st_size for path in whole.rglob("*") if path.is_file()]
    mounted = may_mount(scratch) if mounted is None else mounted
    for number in range(times):
        if mounted:
            size = max(8 << 10, int(rng.uniform(0.05, 1.1) * sum(sizes)))
            with small_disk(scratch / f"disk-{number}", size) as make_room:
                folder = scratch / f"disk-{number}" / "run"
                first = run(task, folder, scratch)
                make_room()
                compare(task, whole, folder, scratch, found, first, f"a disk of {size:,} bytes")
        else:
            limit = max(1 << 10, int(rng.uniform(0.05, 1.1) * max(sizes)))
            folder = scratch / f"limited-{number}"
            first = run(task, folder, scratch, limit)
            compare(task, whole, folder, scratch, found, first, f"files of {limit:,} bytes")
            shutil.rmtree(folder)
    return found


def compare(
    task: Task, whole: Path, folder: Path, scratch: Path, found: Outcome, first: tuple[int, str], where: str
) -> None:
    """Judges how the confined run ended, continues it, and compares what it leaves."""
    code, said = first
    lines = [line for line in said.splitlines() if line.strip()]
    sentence = lines[-1][:160] if lines else ""
    if code == 0:
        found.fitted += 1
    else:
        found.stopped += 1
        if code != 2 or any(trace in said for trace in TRACES):
            found.wrong.append(f"{where}: exit code {code}, stderr:\n{said[-3000:]}")
        again, said = run(task, folder, scratch)
        if again != 0:
            found.wrong.append(f"{where}: continued with exit code {again}, {said.splitlines()[-1:]}")
    if differing := differences(task, whole, folder):
        found.wrong.append(f"{where}: {', '.join(differing)} differ")
    print(f"{where}: {'fitted' if code == 0 else sentence}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[name for name in TASKS if name != "sweep"])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="an empty folder to work in and keep; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        task = TASKS[options.task](write_tiny_target(scratch / "target", num_hidden_layers=3), scratch)
        found = fill_and_compare(task, scratch, options.times, options.seed)
    verdict = (
        f"WRONG: {'; '.join(found.wrong)}" if found.wrong else "each stopped with a sentence and went on to the end"
    )
    print(f"{task.name}: {found.stopped} stopped by the disk, {found.fitted} fitted: {verdict}", flush=True)
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
