"""Kills a program with SIGKILL at random moments, runs it again until it is done, and compares with an undisturbed run.

    python -m tests.kill_resume {regenerate|cache|train|sweep} --times 10 [--target DIR] [--seed N] [--scratch DIR]

Kills are spread over the work by what stands on the disk, each at a random moment after its share; every fourth comes
at a random moment of the start-up, behind its imports. Prints a line a kill and a verdict; exits 1 when any compared
file differs.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dspark_jax.datagen import corpora
from tests.started import POLL_SECONDS, Started, start
from tests.tiny import write_tiny_target

PATIENCE_SECONDS = 300
EARLY = 4
"""Every so many kills one in the start-up."""


@dataclass(frozen=True)
class Task:
    """A resumable program.

    Attributes:
        command: module and options that write the run into a folder.
        progress: what of the work stands in that folder; grows while the program works, 0 before it does.
        results: files, as patterns below the folder, whose bytes must be those of an undisturbed run.
    """

    name: str
    command: Callable[[Path], list[str]]
    progress: Callable[[Path], int]
    results: tuple[str, ...]


def regenerate_task(target: Path, scratch: Path) -> Task:
    """train.prepare_data on the embedded prompts; every fifth conversation has a second turn."""
    prompts = scratch / "prompts.jsonl"
    _write_conversations(prompts, each=16, second_turn=5)
    options = f"--prompts {prompts} --max-new-tokens 32 --slots 4 --rounds-per-dispatch 4 --max-context 512"

    def command(folder: Path) -> list[str]:
        output = folder / "conversations.jsonl"
        return ["train.prepare_data", "--target", str(target), "--output", str(output), *options.split()]

    results = ("conversations.jsonl", "conversations.rejected.jsonl")
    return Task("regenerate", command, lambda folder: _size(folder, "conversations.jsonl"), results)


def cache_task(target: Path, scratch: Path) -> Task:
    """train.build_cache in shards of a few windows."""
    conversations = scratch / "conversations.jsonl"
    _write_conversations(conversations, each=40)
    options = "--layers 0 1 --max-length 192 --batch 4 --max-shard-mb 0.2"

    def command(folder: Path) -> list[str]:
        places = ["--conversations", str(conversations), "--output", str(folder)]
        return ["train.build_cache", "--target", str(target), *places, *options.split()]

    results = ("manifest.json", "samples.idx", "shard-*")
    return Task("cache", command, lambda folder: _size(folder, "shard-*"), results)


def train_task(target: Path, scratch: Path) -> Task:
    """train.fit on its own small records, with a checkpoint every other step."""
    options = "--config debug --max-steps 40 --epochs 40 --checkpoint.every-steps 2 --drafter.target-layer-ids 0 1"

    def command(folder: Path) -> list[str]:
        return ["train.fit", *options.split(), "--target", str(target), "--run-dir", str(folder)]

    def steps(folder: Path) -> int:
        log = folder / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    return Task("train", command, steps, ("drafter/config.json", "drafter/model.safetensors"))


def sweep_task(target: Path, scratch: Path) -> Task:
    """train.sweep of six short trainings; what a killed sweep had started lives on, and the next run waits for it."""
    (scratch / "six.py").write_text(SIX_POINTS, encoding="utf-8")

    def command(folder: Path) -> list[str]:
        return ["train.sweep", str(scratch / "six.py"), "--target", str(target), "--output", str(folder)]

    def points(folder: Path) -> int:
        return len(list(folder.glob("*/metrics.json")))

    return Task("sweep", command, points, ("*/drafter/config.json", "*/drafter/model.safetensors"))


SIX_POINTS = """
from dspark_jax.config.cli import load_config
from dspark_jax.config.sweep import Sweep, axis, fixed, product

def get_sweep():
    layers = fixed(drafter__target_layer_ids=(0, 1))
    return Sweep("six", load_config("debug"), product(layers, axis("drafter.block_size", 2, 3), axis("seed", 0, 1, 2)))
"""

TASKS = {"regenerate": regenerate_task, "cache": cache_task, "train": train_task, "sweep": sweep_task}


def kill_and_compare(task: Task, scratch: Path, times: int, seed: int = 0) -> list[str]:
    """Runs `task` undisturbed, then with `times` kills; the relative paths that differ, [] when all is the same."""
    whole, began, compiled = scratch / "undisturbed", time.monotonic(), scratch / "compiled"
    undisturbed = start(task.command(whole), compiled, fresh=True)
    _finish(undisturbed, task)
    seconds = time.monotonic() - began

    total = task.progress(whole)
    print(f"{task.name}: {seconds:.1f} s undisturbed", flush=True)
    rng, differing, start_up = random.Random(seed), set[str](), 0.0
    if times >= EARLY:
        # Timed once more by fork, as the kills are, on compiled programs.
        began, again = time.monotonic(), scratch / "again"
        process = start(task.command(again), compiled)
        start_up = _wait(process, lambda: task.progress(again) > 0)
        _finish(process, task)
        differing |= set(differences(task, whole, again))
        print(f"forked {time.monotonic() - began:.1f} s, {start_up:.1f} s of them start-up", flush=True)

    kills = runs = 0
    while kills < times:  # a run that ends before its kill is compared too, and the next kills hit a new one
        folder, runs, ended = scratch / f"killed-{runs}", runs + 1, False
        while kills < times and not ended:
            early, share = kills % EARLY == EARLY - 1, (kills + rng.random()) / times
            process = start(task.command(folder), compiled)
            if early:
                seconds = _wait(process, lambda: False, rng.uniform(0.0, start_up))
            else:
                seconds = _wait_for_work(process, task, folder, round(share * total), rng.uniform(0, 0.05))
            ended = process.code is not None
            process.kill()
            if not ended:
                kills += 1
                moment = "start-up" if early else "work"
                done = f"{task.progress(folder):,} of {total:,} on disk"
                print(f"kill {kills:2d} after {seconds:5.1f} s, in the {moment}: {done}", flush=True)
            else:
                print(f"        ended after {seconds:5.1f} s, before its kill; the next one hits a new run", flush=True)
            if "Traceback" in process.said():
                raise SystemExit(f"{task.name} printed\n{process.said()[-2000:]}")
        _finish(start(task.command(folder), compiled), task)
        differing |= set(differences(task, whole, folder))
    verdict = f"DIFFERENT: {', '.join(sorted(differing))}" if differing else "identical"
    print(f"{task.name}: {kills} kills, {runs} runs ended: {verdict}", flush=True)
    return sorted(differing)


def _wait_for_work(process: Started, task: Task, folder: Path, least: int, more: float) -> float:
    """Seconds until `least` stands on the disk and something new as well, and `more` seconds after."""
    least = max(least, task.progress(folder) + 1)
    return _wait(process, lambda: task.progress(folder) >= least) + _wait(process, lambda: False, more)


def differences(task: Task, one: Path, other: Path) -> list[str]:
    """Relative paths of results that are not in both folders, or not with the same bytes."""
    names = {p.relative_to(f).as_posix() for f in (one, other) for pattern in task.results for p in f.glob(pattern)}
    if not names:
        return ["nothing was written"]
    return [name for name in sorted(names) if _read(one / name) is None or _read(one / name) != _read(other / name)]


def _wait(process: Started, ready: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> float:
    """Seconds until `ready()`, the process's end or the time limit."""
    began = time.monotonic()
    while not ready() and process.code is None and time.monotonic() - began < seconds:
        time.sleep(POLL_SECONDS)
    return time.monotonic() - began


def _finish(process: Started, task: Task) -> None:
    code, said = process.end(PATIENCE_SECONDS)
    if code != 0 or "Traceback" in said:
        raise SystemExit(f"{task.name} ended with {code}:\n{said[-2000:]}")


def _write_conversations(path: Path, each: int, second_turn: int = 0) -> None:
    """`each` conversations a domain; with `second_turn` every n-th asks once more."""
    rows = [item for domain in corpora.DOMAINS for item in corpora.conversations(domain, "train", each)]
    for row in rows[::second_turn] if second_turn else []:
        row["messages"].append({"role": "user", "content": "Say it again, shorter."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _size(folder: Path, pattern: str) -> int:
    total = 0
    for path in folder.glob(pattern):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # renamed while we looked
            continue
    return total


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--target", type=Path, help="default: a tiny random target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="an empty folder to work in and keep; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        target = options.target or write_tiny_target(scratch / "target", num_hidden_layers=3)
        task = TASKS[options.task](target.resolve(), scratch.resolve())
        return 1 if kill_and_compare(task, scratch.resolve(), options.times, options.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
