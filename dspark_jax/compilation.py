"""Compiled programs: where jax stores them between processes, how many were compiled or read, and a TPU's size of them.

jax keeps nothing unless a folder is named. Every program of this project names one, so that a second start reads what
the first has compiled. The choice lives in jax's own environment variables: processes that a program starts, and jax
itself where it is imported later, follow it.
"""

import os
import re
import sys
import zlib
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dspark_jax.errors import UserError
from dspark_jax.files import user_cache

OPTION = "--compilation-cache"
HELP = (
    f"{OPTION} DIR|off: where compiled programs are kept for later starts; without it JAX_COMPILATION_CACHE_DIR, else "
    "compiled/ in the user's cache folder."
)
OFF = "off"
_FOLDER, _ENABLED = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"
# jax keeps only what took a second to compile; a start of this project meets dozens of programs that take less.
_THRESHOLDS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0, "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": 0}
TPU_FLAGS = "LIBTPU_INIT_ARGS"
# The TPU's compiler leaves equal parts of a program as functions, which it calls, in place of a copy for each.
_SHARED = "--xla_tpu_enable_deduplicated_calls"
_KNOWS_SHARED = (0, 0, 42)  # of libtpu; one that does not know a flag ends the process
_GIVEN = os.environ.get(TPU_FLAGS)  # before a program of this process sets its own
_ENTRY = "*-cache"  # jax's name of a stored program
_ZLIB = b"\x78"  # first byte of the compression that jax uses where no other is installed


def keep_compiled(choice: str | None) -> None:
    """Have jax keep compiled programs, in this process and in those that it starts.

    Args:
        choice: a folder, which is made with the first program, a URL that jax can write to, or "off". None: what the
            environment says, else the user's cache folder, where that can be written.
    Raises:
        UserError: a folder that cannot be made or written.
    """
    if choice is None and (_FOLDER in os.environ or _ENABLED in os.environ):
        folder = os.environ.get(_FOLDER, "")
    elif choice is None:
        # A machine without a home that can be written compiles anew at each start, as jax does without a folder.
        folder = str(user_cache() / "compiled")
        folder = "" if _obstacle(Path(folder)) else folder
    else:
        folder = "" if choice == OFF else choice
        # jax would say at each program, in a warning, that it could not be kept.
        if folder and "://" not in folder and (obstacle := _obstacle(Path(folder))):
            raise UserError(f"{OPTION} {folder} cannot be written ({obstacle}); name another folder, or off.")
        os.environ[_ENABLED] = str(bool(folder)).lower()

    if folder:
        # Absolute: a process that a program starts may work elsewhere.
        os.environ[_FOLDER] = folder if "://" in folder else os.path.abspath(folder)
        for name, least in _THRESHOLDS.items():
            os.environ.setdefault(name, str(least))
    _follow_environment()


def share_equal_parts() -> None:
    """Have the TPU's compiler, where it is installed, write what a program computes in each of its layers once.

    To be called before jax looks for devices. The environment's own word on it, in LIBTPU_INIT_ARGS, stands.
    """
    try:
        version = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        # Not set in vain: jax tells kept programs apart by these flags, a CPU's too.
        return

    flags = os.environ.get(TPU_FLAGS, "")
    # A compiler that is no release may know the flag or not, and one that does not would end every program.
    release = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(\.\d+)?", version)
    knows = release is not None and tuple(map(int, release.groups()[:3])) >= _KNOWS_SHARED
    if knows and _SHARED.removeprefix("--") not in flags:
        os.environ[TPU_FLAGS] = f"{flags} {_SHARED}=true".strip()


def checkout_environment(checkout: Path) -> dict[str, str]:
    """The environment of a process that runs what lies in a checkout of this repository, this one or an earlier.

    Its folder comes first on the path, and the TPU's compiler has the flags that this process was started with: each
    checkout has it work as its own programs have it.
    """
    paths = os.pathsep.join([str(checkout.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths}
    environment.pop(TPU_FLAGS, None)
    return environment | ({} if _GIVEN is None else {TPU_FLAGS: _GIVEN})


def _obstacle(folder: Path) -> str:
    """Why the folder could not be made or takes no files; empty if it does."""
    # Not made here: most programs that show their help, or refuse an option, compile nothing.
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{there} is no folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"no permission to write in {there}"


def _follow_environment() -> None:
    """Brings jax's configuration in line with the environment, where jax has read that already."""
    if "jax" not in sys.modules:
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    folder = os.environ.get(_FOLDER) or None
    wanted: dict[str, Any] = {"jax_compilation_cache_dir": folder, "jax_enable_compilation_cache": _enabled()}
    for name, least in _THRESHOLDS.items():
        if folder and name in os.environ:
            wanted[name.lower()] = type(least)(float(os.environ[name]))

    changed = {name: value for name, value in wanted.items() if getattr(jax.config, name) != value}
    for name, value in changed.items():
        jax.config.update(name, value)
    # jax looks at the folder once, with the first program; a later change needs a fresh look.
    if changed:
        compilation_cache.reset_cache()


def place_of_programs() -> str:
    """The folder or URL in which programs are kept; empty where none is."""
    return os.environ.get(_FOLDER, "") if _enabled() else ""


def _enabled() -> bool:
    return os.environ.get(_ENABLED, "true").lower() not in ("0", "false", "f", "n", "no", "off")


@dataclass
class Compilations:
    """Counts the programs that jax builds while it is open: `with Compilations() as seen: ...`.

    Attributes:
        compiled: by the compiler.
        read: taken from the folder of kept programs instead.
        seconds: that both took together, on all threads.
    """

    compiled: int = 0
    read: int = 0
    seconds: float = 0.0

    def __enter__(self) -> "Compilations":
        from jax import monitoring

        monitoring.register_event_listener(self._event)
        monitoring.register_event_duration_secs_listener(self._duration)
        return self

    def __exit__(self, *_: object) -> None:
        from jax import monitoring

        monitoring.unregister_event_listener(self._event)
        monitoring.unregister_event_duration_listener(self._duration)

    # Named as jax's listeners name them.

    def _event(self, event: str, **_: Any) -> None:
        # A program that is read counts among those that were built, too: see `_duration`.
        if event == "/jax/compilation_cache/cache_hits":
            self.read, self.compiled = self.read + 1, self.compiled - 1

    def _duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.compiled, self.seconds = self.compiled + 1, self.seconds + duration_secs


def kept_programs(folder: Path) -> dict[Path, int]:
    """The programs kept in a folder, with their bytes."""
    return {file: file.stat().st_size for file in sorted(folder.glob(_ENTRY))}


def drop_torn(folder: Path) -> list[Path]:
    """Removes programs of which only a part was stored, by a process that was killed or on a full disk.

    jax reads such a file with a warning, compiles the program anew, and never replaces the file. One that another
    process is just writing is removed as well, which costs that program's next compilation.

    Returns:
        The files that were removed.
    """
    torn = []
    for file in kept_programs(folder):
        with suppress(FileNotFoundError):
            content = file.read_bytes()
            if content[:1] not in (_ZLIB, b""):
                continue
            try:
                zlib.decompress(content)
            except zlib.error:
                file.unlink()
                torn.append(file)
    return torn
