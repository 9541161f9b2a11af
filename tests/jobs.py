"""Jobs of several processes on this machine, each with a few simulated devices.

`python -m tests.jobs RUNS.json` is what a process executes: it runs every program in the file, a module of train/ (or
one with a dot in its name) with its arguments, one after the other, whatever came of those before, and ends with the
last one's exit code; trainings of equal steps share one. {process} stands for its number. RUNS.json.INDEX gets all exit
codes.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.xla import xla_flags

ROOT = Path(__file__).parent.parent
PEER_SECONDS = 60
"""A machine that is busy with other tests may leave a process without a turn for long."""


@dataclass(frozen=True)
class Process:
    """One process of a job and the file that its stderr goes to."""

    popen: subprocess.Popen
    errors: Path

    def end(self, seconds: float = 500) -> tuple[int, str]:
        """(exit code, stderr) once it has ended."""
        code = self.popen.wait(seconds)
        return code, self.errors.read_text(errors="replace")


def start(
    scratch: Path,
    name: str,
    runs: Sequence[Sequence[object]],
    processes: int = 1,
    devices: int = 1,
    peer_seconds: int = PEER_SECONDS,
) -> list[Process]:
    """Starts the job; `processes` = 1 starts a process that knows of no job. Its files are scratch/name.*

    Each process keeps copies from object stores in a folder of its own, as machines do.
    """
    file = scratch / f"{name}.json"
    file.write_text(json.dumps([[str(word) for word in run] for run in runs]), encoding="utf-8")
    address, job = f"localhost:{free_port()}", []
    for index in range(processes):
        joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)}
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(devices),
            "DSPARK_PEER_SECONDS": str(peer_seconds),
            "DSPARK_STORES": str(scratch / f"stores-{index}"),
            **(joined if processes > 1 else {}),
        }
        errors = scratch / f"{name}.{index}.txt"
        with open(errors, "wb") as stderr:
            command = [sys.executable, "-m", "tests.jobs", str(file)]
            popen = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
        job.append(Process(popen, errors))
    return job


def run(scratch: Path, name: str, runs: Sequence[Sequence[object]], processes: int = 1, devices: int = 1) -> list[str]:
    """The whole job, and what its processes wrote to stderr; AssertionError with these words if the last run failed."""
    job = start(scratch, name, runs, processes, devices)
    ended = [process.end() for process in job]
    for code, errors in ended:
        assert code == 0, errors[-3000:]
    return [errors for _, errors in ended]


def exit_codes(scratch: Path, name: str, process: int = 0) -> list[int]:
    """The exit code of every run of a finished job."""
    return json.loads((scratch / f"{name}.json.{process}").read_text())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def main(file: Path) -> int:
    from tests.shared_steps import sharing  # what starts a process needs no jax

    index, codes = os.environ.get("JAX_PROCESS_ID", "0"), list[int]()
    for module, *arguments in json.loads(file.read_text(encoding="utf-8")):
        try:
            with sharing():
                importlib.import_module(module if "." in module else f"train.{module}").main(
                    [word.replace("{process}", index) for word in arguments]
                )
            codes.append(0)
        except SystemExit as stop:
            codes.append(int(stop.code or 0))
    file.with_name(f"{file.name}.{index}").write_text(json.dumps(codes))
    return codes[-1]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
