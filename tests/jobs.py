"""Jobs of several processes on this machine, each with a few simulated devices.

`python -m tests.jobs RUNS.json` is what a process executes: it runs train.fit on every list of arguments in the file.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PEER_SECONDS = 10


@dataclass(frozen=True)
class Process:
    """One process of a job and the file that its stderr goes to."""

    popen: subprocess.Popen
    errors: Path

    def end(self, seconds: float = 240) -> tuple[int, str]:
        """(exit code, stderr) once it has ended."""
        code = self.popen.wait(seconds)
        return code, self.errors.read_text(errors="replace")


def start(
    scratch: Path, name: str, runs: Sequence[Sequence[object]], processes: int = 1, devices: int = 1
) -> list[Process]:
    """Starts the job; `processes` = 1 starts a process that knows of no job. Its files are scratch/name.*"""
    file = scratch / f"{name}.json"
    file.write_text(json.dumps([[str(word) for word in run] for run in runs]), encoding="utf-8")
    address, job = f"localhost:{free_port()}", []
    for index in range(processes):
        joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)}
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "DSPARK_PEER_SECONDS": str(PEER_SECONDS),
            **(joined if processes > 1 else {}),
        }
        errors = scratch / f"{name}.{index}.txt"
        with open(errors, "wb") as stderr:
            command = [sys.executable, "-m", "tests.jobs", str(file)]
            popen = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
        job.append(Process(popen, errors))
    return job


def run(scratch: Path, name: str, runs: Sequence[Sequence[object]], processes: int = 1, devices: int = 1) -> None:
    """The whole job; AssertionError with the words of a process that failed."""
    for process in start(scratch, name, runs, processes, devices):
        code, errors = process.end()
        assert code == 0, errors[-3000:]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def main(file: Path) -> None:
    from train import fit

    for arguments in json.loads(file.read_text(encoding="utf-8")):
        fit.main(arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
