"""Programs of this project in processes of their own, which other tests kill or confine.

A start by fork takes milliseconds instead of the seconds of all imports: multiprocessing's fork server has imported the
programs, and no backend yet. A fresh start is an interpreter of its own, with its own hash seed.
"""

import importlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parent.parent
PRELOADED = ("train.prepare_data", "train.build_cache", "train.fit", "train.sweep", "tests.started")
POLL_SECONDS = 0.002

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(list(PRELOADED))


class _Process(Protocol):
    def kill(self) -> None: ...


class Started:
    """A process that was started, and what it has written to stderr."""

    def __init__(self, process: _Process, stderr: int):
        self._process, self._said = process, bytearray()
        self._reader = threading.Thread(target=self._collect, args=(stderr,), daemon=True)
        self._reader.start()

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode  # type: ignore[attr-defined]

    def kill(self) -> None:
        """SIGKILL; returns once it has ended."""
        self._process.kill()
        while self.code is None:
            time.sleep(POLL_SECONDS)

    def end(self, seconds: float) -> tuple[int, str]:
        """(exit code, stderr) once it has ended by itself; TimeoutError, and a SIGKILL, where it takes longer."""
        deadline = time.monotonic() + seconds
        while (code := self.code) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"no end within {seconds:g} seconds; stderr: {self.said()[-2000:]}")
            time.sleep(POLL_SECONDS)
        return code, self.said()

    def said(self) -> str:
        """What it wrote to stderr, all of it once it has ended."""
        if self.code is not None:
            self._reader.join(5)  # what it started may live on and hold the pipe open
        return self._said.decode(errors="replace")

    def _collect(self, stderr: int) -> None:
        while part := os.read(stderr, 1 << 16):
            self._said += part
        os.close(stderr)


def start(
    command: Sequence[str],
    compiled: Path,
    *,
    fresh: bool = False,
    file_bytes: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> Started:
    """Starts a program.

    Args:
        command: its module, and arguments.
        compiled: folder of compiled programs, where the environment names none.
        fresh: a new interpreter instead of a fork.
        file_bytes: the most bytes that a file may have.
        variables: of its environment, beside those of this process.
    """
    variables = dict(variables or {})
    reads, writes = _FORKS.Pipe(duplex=False)
    module, *arguments = map(str, command)
    if fresh:
        confine = None if file_bytes is None else lambda: _confine(file_bytes)
        process: _Process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT, env=_cache_variables(compiled) | os.environ | variables, stdout=subprocess.DEVNULL,
            stderr=writes.fileno(), preexec_fn=confine,
        )  # fmt: skip
    else:
        forked = _FORKS.Process(target=_execute, args=(module, arguments, str(compiled), file_bytes, variables, writes))
        forked.start()
        process = forked
    writes.close()
    stderr = os.dup(reads.fileno())
    reads.close()
    return Started(process, stderr)


def _cache_variables(compiled: Path) -> dict[str, str]:
    return {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def _confine(file_bytes: int) -> None:
    # Ignored, the signal becomes an error of the write.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))


def _execute(
    module: str,
    arguments: list[str],
    compiled: str,
    file_bytes: int | None,
    variables: dict[str, str],
    stderr: Connection,
) -> None:
    """The program in the forked process."""
    import jax  # the fork server has it; whoever starts programs need not

    os.environ.update(variables)
    os.dup2(stderr.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    stderr.close()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        for name, value in _cache_variables(Path(compiled)).items():
            jax.config.update(name.lower(), value if name.endswith("DIR") else int(value))
    if file_bytes is not None:
        _confine(file_bytes)
    importlib.import_module(module).main(arguments)
