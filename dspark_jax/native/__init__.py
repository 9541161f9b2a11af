"""Products of a few float32 rows on a CPU, by a kernel of this project's own (few_rows.cc).

XLA packs a weight anew in every product of two rows and more, so that a verify pass of five rows takes half as long
again as reading the weights does (docs/performance.md). The kernel reads each weight once, as it lies. The machine's
own C++ compiler builds it at its first use, into the user's cache; where that fails, and on other devices, XLA's
products are what they were.

Axes: N rows, I inputs of a weight, O its outputs.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
from jaxtyping import Array, Float

from dspark_jax.files import user_cache

SOURCE = Path(__file__).with_name("few_rows.cc")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
SWITCH = "DSPARK_JAX_NATIVE"
"""Environment variable; "off" leaves all products to XLA."""
LANES = 16
"""Numbers that the kernel takes at a time: an axis of a weight that it reads along is a multiple of it."""


@cache
def ready() -> bool:
    """Whether the kernel can be used in this process: it has one CPU device, and the kernel is built or can be."""
    # The partitioner cannot look into a kernel, so that several devices would each compute all of a product.
    if os.environ.get(SWITCH) == "off" or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False
    library = _library()
    if library is None:
        return False

    for name in ("FewRows", "FewRowsOfTable"):
        jax.ffi.register_ffi_target(_target(name), jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def times(x: Float[Array, "n i"], weight: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """x W, float32. A row's result does not depend on the other rows, nor on their number. `ready` must hold."""
    return _call("FewRows", x, weight, weight.shape[1])


def times_table(x: Float[Array, "n i"], table: Float[Array, "o i"]) -> Float[Array, "n o"]:
    """x W^T, as `times`, of a table that is stored row by row."""
    return _call("FewRowsOfTable", x, table, table.shape[0])


def _call(name: str, x: Array, weight: Array, outputs: int) -> Array:
    made = jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32)
    return jax.ffi.ffi_call(_target(name), made, vmap_method="sequential")(x, weight)


def _target(name: str) -> str:
    return f"dspark_jax_{name}"


def _library() -> ctypes.CDLL | None:
    """The built kernel, from the user's cache or from the compiler; None where neither gives one."""
    # Of this source, this jaxlib's interface and this kind of CPU, for which alone its instructions are right.
    facts = (SOURCE.read_text(), *FLAGS, jaxlib.__version__, platform.machine(), _cpu_features())
    name = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    built = user_cache() / "native" / f"few_rows-{name}.so"
    try:
        if not built.exists():
            _build(built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError):
        # No compiler, one that refuses the source, a cache that cannot be written: rounds are slower, and right.
        return None


def _build(built: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")

    built.parent.mkdir(parents=True, exist_ok=True)
    # In its place at once or not at all: other processes may build the same.
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        made = Path(folder) / built.name
        command = [compiler, *FLAGS, "-I", jax.ffi.include_dir(), str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        os.replace(made, built)


def _cpu_features() -> str:
    """The first processor's instruction sets; empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
