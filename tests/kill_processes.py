"""Kills one of two processes of a training job with SIGKILL at random moments, starts the job again until it is done,
and compares its curve with an undisturbed job's.

    python -m tests.kill_processes --times 10 [--seed N] [--scratch DIR]

Kills are spread over the steps, each at a random moment after its share; every fourth comes at a random moment of the
start-up. The process that is left must end by itself, within a bound. Prints a line a kill and a verdict; exits 1 when
a curve differs, a record is missing or there twice, or a process that was left lived on.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.training.run_folder import read_records
from dspark_jax.training.synthetic_cache import write_synthetic_cache
from tests import jobs
from tests.tiny import write_tiny_target

STEPS, EVERY = 40, 2
PEER_SECONDS = 20
SURVIVAL_SECONDS = 5 * PEER_SECONDS
"""A process that lost the other may live so long; it notices after `PEER_SECONDS`, and the machine may be busy."""
PATIENCE_SECONDS = 300
RTOL = 1e-5


@dataclass
class Disturbed:
    """What came of the kills of one seed."""

    scratch: Path
    undisturbed: list[float]
    kills: int = 0
    runs: int = 0
    survived: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def compare(self, name: str) -> None:
        """Notes where a finished run's curve is not the undisturbed one."""
        records = read_records(self.scratch / name / "metrics.jsonl")
        if [record["step"] for record in records] != list(range(1, STEPS + 1)):
            self.wrong.append(f"{name} has records of the steps {[record['step'] for record in records]}")
            return
        found = np.array([record["loss"] for record in records])
        off = float(np.max(np.abs(found / self.undisturbed - 1)))
        print(f"{name}: ended; its losses are off by at most {off:.1e} of them", flush=True)
        if off > RTOL:
            self.wrong.append(f"{name} is off by {off:.1e}")


def arguments(scratch: Path, name: str) -> list[str]:
    """A run of the debug configuration on the tiny target, a record every step, a checkpoint every other."""
    drafter = "--drafter.target-layer-ids 0 1 --drafter.block-size 3 --drafter.num-anchors 4"
    data = (
        "--data.global-batch 8 --data.accumulation-steps 0 --data.max-length 32 --epochs 99 --mesh.data 1 --mesh.fsdp 4"
    )
    recipe = f"--max-steps {STEPS} --checkpoint.every-steps {EVERY}"
    places = ["--target", scratch / "target", "--data.cache", scratch / "cache", "--run-dir", scratch / name]
    return [str(word) for word in ("--config", "debug", *places, *drafter.split(), *data.split(), *recipe.split())]


def start(scratch: Path, name: str) -> list[jobs.Process]:
    return jobs.start(
        scratch, name, [["fit", *arguments(scratch, name)]], processes=2, devices=2, peer_seconds=PEER_SECONDS
    )


def finish(job: list[jobs.Process]) -> None:
    for process in job:
        code, errors = process.end(PATIENCE_SECONDS)
        if code != 0:
            raise SystemExit(f"A process of an undisturbed job ended with {code}:\n{errors[-2000:]}")


def steps(scratch: Path, name: str) -> int:
    log = scratch / name / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_one(found: Disturbed, name: str, times: int, rng: random.Random, start_up: float) -> bool:
    """Starts the job and kills one of its processes; False if it ended before. Waits for the other."""
    early, share = found.kills % 4 == 3, (found.kills + rng.random()) / times
    least = max(round(share * STEPS), steps(found.scratch, name) + 1)
    job, victim = start(found.scratch, name), rng.randrange(2)
    deadline = time.monotonic() + (rng.uniform(0.1, start_up) if early else PATIENCE_SECONDS)
    while time.monotonic() < deadline and all(process.popen.poll() is None for process in job):
        if not early and steps(found.scratch, name) >= least:
            time.sleep(rng.uniform(0, 0.1))
            break
        time.sleep(0.005)
    if any(process.popen.poll() is not None for process in job):
        finish(job)
        return False
    job[victim].popen.kill()
    job[victim].popen.wait()
    killed, done = time.monotonic(), steps(found.scratch, name)
    try:
        code = str(job[1 - victim].popen.wait(SURVIVAL_SECONDS))
    except subprocess.TimeoutExpired:
        job[1 - victim].popen.kill()
        code = "no end"
        found.wrong.append(f"kill {found.kills + 1}: process {1 - victim} lived on for {SURVIVAL_SECONDS} s")
    found.kills += 1
    found.survived.append(time.monotonic() - killed)
    moment = f"process {victim} in the start-up" if early else f"process {victim} at step {done}"
    print(f"kill {found.kills:2d}, {moment}: the other ended ({code}) after {found.survived[-1]:.1f} s", flush=True)
    return True


def kill_and_compare(scratch: Path, times: int, seed: int) -> Disturbed:
    """An undisturbed job, then jobs with so many kills between them."""
    write_tiny_target(scratch / "target", num_hidden_layers=3)
    target = describe_target(scratch / "target")
    write_synthetic_cache(scratch / "cache", target, (0, 1), records=64, length=32, seed=0)
    began = time.monotonic()
    job = start(scratch, "undisturbed")
    while steps(scratch, "undisturbed") == 0 and job[0].popen.poll() is None:
        time.sleep(0.005)
    start_up = time.monotonic() - began
    finish(job)
    print(f"undisturbed: {time.monotonic() - began:.1f} s, {start_up:.1f} s of them start-up", flush=True)
    losses = [record["loss"] for record in read_records(scratch / "undisturbed" / "metrics.jsonl")]
    found, rng = Disturbed(scratch, losses), random.Random(seed)
    while found.kills < times:  # a job that ends before its kill is compared too, and the next kills hit a new one
        name, found.runs = f"killed-{found.runs}", found.runs + 1
        while found.kills < times and kill_one(found, name, times, rng, start_up):
            pass
        finish(start(scratch, name))
        found.compare(name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="an empty folder to work in and keep; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        found = kill_and_compare(scratch.resolve(), options.times, options.seed)
    longest = f"the other ended after {max(found.survived):.1f} s at most"
    verdict = f"DIFFERENT: {'; '.join(found.wrong)}" if found.wrong else "the curve of an undisturbed run"
    print(f"{found.kills} kills, {found.runs} runs ended, {longest}: {verdict}", flush=True)
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
