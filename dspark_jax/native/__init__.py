"""Products of float32 rows on a CPU, the attention of a few, and what lies between, by kernels of this project's own
(panels.cc, few_rows.cc, held_rows.cc, between.cc, laws.cc).

XLA packs a weight anew in every product of two rows and more, so that a verify pass of five rows takes half as long
again as reading the weights does (docs/performance.md). These read each weight once, as it lies or in panels that an
engine makes of it (targets/panels.py); attention's reads the positions that are held of a cache, of which XLA takes
copies first. The machine's own C++ compiler builds
them at their first use, into the user's cache; where that fails, and on other devices, XLA's products are what they
were.

Axes: N rows, I inputs of a weight, O its outputs; of attention as in targets/kernels/held.py.
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
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from dspark_jax.files import user_cache

SOURCES = {
    "few_rows.cc": ("FewRows", "FewRowsOfTable"),
    "held_rows.cc": ("HeldRows", "HeldRowsOfPages"),
    "panels.cc": ("Panels",),
    "between.cc": ("NormedRows", "GatedRows", "Rotations"),
    "laws.cc": ("FirstLargest", "Laws", "Waits"),
}
"""The kernels of each source."""
MOST_CHANNELS = 512
"""The largest head of the attention kernel."""
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
SWITCH = "DSPARK_JAX_NATIVE"
"""Environment variable; "off" leaves all products to XLA."""
PANEL = 48
"""Columns of a panel, a weight's form in targets/panels.py: whole vectors of sixteen, eight or four."""
LANES = 16
"""The most numbers that a kernel takes at a time (lanes.h): an axis of a weight that it reads along is a multiple."""


@cache
def ready() -> bool:
    """Whether the kernels can be used in this process: it has one CPU device, and they are built or can be."""
    # The partitioner cannot look into a kernel, so that several devices would each compute all of a product.
    if os.environ.get(SWITCH) == "off" or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False
    libraries = {source: _library(Path(__file__).with_name(source)) for source in SOURCES}
    if None in libraries.values():
        return False

    for source, names in SOURCES.items():
        for name in names:
            kernel = jax.ffi.pycapsule(getattr(libraries[source], name))
            jax.ffi.register_ffi_target(_target(name), kernel, platform="cpu")
    return True


def times(x: Float[Array, "n i"], weight: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """x W, float32. A row's result does not depend on the other rows, nor on their number. `ready` must hold."""
    return _call("FewRows", x, weight, weight.shape[1])


def times_table(x: Float[Array, "n i"], table: Float[Array, "o i"]) -> Float[Array, "n o"]:
    """x W^T, as `times`, of a table that is stored row by row."""
    return _call("FewRowsOfTable", x, table, table.shape[0])


def times_panels(x: Float[Array, "n i"], panels: Float[Array, "t i c"], outputs: int) -> Float[Array, "n o"]:
    """x W, as `times`, of any number of rows by a weight of so many outputs in panels."""
    return _call("Panels", x, panels, outputs)


def norm_rows(x: Float[Array, "n d"], weight: Float[Array, " d"], *, eps: float) -> Float[Array, "n d"]:
    """x / rms(x) * weight of float32 rows, D a multiple of the lanes. `ready` must hold, here and below."""
    made = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return jax.ffi.ffi_call(_target("NormedRows"), made, vmap_method="sequential")(x, weight, eps=np.float32(eps))


def gate_rows(x: Float[Array, "n u"], *, width: int) -> Float[Array, "n f"]:
    """silu(gate) * up of float32 rows in which blocks of `width` gates, a multiple of the lanes, and of as many numbers
    to be gated lie by turns."""
    made = jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // 2), jnp.float32)
    return jax.ffi.ffi_call(_target("GatedRows"), made, vmap_method="sequential")(x, width=np.int64(width))


def rotations(
    positions: Int[Array, " n"], frequencies: Float[Array, " h"]
) -> tuple[Float[Array, "n h"], Float[Array, "n h"]]:
    """Cosines and sines of positions (int32) times frequencies."""
    made = jax.ShapeDtypeStruct((positions.shape[0], frequencies.shape[0]), jnp.float32)
    cosines, sines = jax.ffi.ffi_call(_target("Rotations"), (made, made), vmap_method="sequential")(
        positions, frequencies
    )
    return cosines, sines


def first_largest(x: Float[Array, "n v"]) -> Int[Array, " n"]:
    """int32 place of the first of each row's largest numbers; the last one where a number is NaN."""
    made = jax.ShapeDtypeStruct(x.shape[:1], jnp.int32)
    return jax.ffi.ffi_call(_target("FirstLargest"), made, vmap_method="sequential")(x)


def laws(
    logits: Float[Array, "n v"],
    temperatures: Float[Array, " n"],
    floors: Float[Array, " n"],
    sampled: Bool[Array, " n"],
) -> Float[Array, "n v"]:
    """softmax(logits / temperature) of each row, of those whose log p / p_max is no less than the floor; one-hot at the
    first of the largest where the row is not sampled."""
    made = jax.ShapeDtypeStruct(logits.shape, jnp.float32)
    call = jax.ffi.ffi_call(_target("Laws"), made, vmap_method="sequential")
    return call(logits, temperatures, floors, sampled.astype(jnp.int32))


def waits(high: UInt32[Array, " n"], low: UInt32[Array, " n"], count: int) -> Float[Array, "n v"]:
    """-log of `count` uniform numbers of each Threefry key (decoding/noise.py), of 0 that of the smallest number."""
    made = jax.ShapeDtypeStruct((high.shape[0], count), jnp.float32)
    return jax.ffi.ffi_call(_target("Waits"), made, vmap_method="sequential")(high, low)


def attends(q: Array, keys: Array, tables: Array | None) -> bool:
    """Whether the attention kernel takes rows [R, W, Q, H] over such a cache; with tables, over pages [P, C, G * H]."""
    narrow = q.dtype == keys.dtype == jnp.float32 and (tables is None or keys.shape[1] % LANES == 0)
    return narrow and q.shape[-1] % LANES == 0 and q.shape[-1] <= MOST_CHANNELS and ready()


def attend(
    q: Float[Array, "r w g n h"],
    keys: Float[Array, "r g s h"],
    values: Float[Array, "r g s h"],
    lengths: Int[Array, " r"],
    own_keys: Float[Array, "r j g h"],
    own_values: Float[Array, "r j g h"],
    lowest: Int[Array, "r w"] | None,
    within: Float[Array, "#r w j"] | None,
    tables: Int[Array, "r n"] | None = None,
    *,
    scale: float,
    interpret: bool = False,
    apart: bool = False,
) -> Float[Array, "r w g n h"]:
    """Attention over positions `lowest`..`lengths` - 1 of a cache and the own block, as the kernels of accelerators
    compute it (targets/kernels/held_tpu.py); `attends` must hold. With `tables` keys and values are pages
    [P, C, G * H], of which each request has those in its row. `interpret` is the others' alone, and `apart` this one's:
    a row whose own key or value is not finite gives NaN, and the others see zeros there."""
    lowest = jnp.zeros(q.shape[:2], jnp.int32) if lowest is None else lowest
    within = jnp.zeros((1, q.shape[1], own_keys.shape[1]), jnp.float32) if within is None else within
    name, pages = ("HeldRows", ()) if tables is None else ("HeldRowsOfPages", (tables,))
    if tables is not None:
        keys, values = (x.reshape(*x.shape[:2], q.shape[2], q.shape[4]) for x in (keys, values))
    call = jax.ffi.ffi_call(_target(name), jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(
        q, keys, values, lengths, own_keys, own_values, lowest, within, *pages, scale=np.float32(scale), apart=apart
    )


def _call(name: str, x: Array, weight: Array, outputs: int) -> Array:
    made = jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32)
    return jax.ffi.ffi_call(_target(name), made, vmap_method="sequential")(x, weight)


def _target(name: str) -> str:
    return f"dspark_jax_{name}"


def _library(source: Path) -> ctypes.CDLL | None:
    """The built kernels of a source, from the user's cache or from the compiler; None where neither gives one."""
    # Of this source, this jaxlib's interface and this kind of CPU, for which alone its instructions are right.
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    facts = (*texts, *FLAGS, jaxlib.__version__, platform.machine(), _cpu_features())
    name = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    built = user_cache() / "native" / f"{source.stem}-{name}.so"
    try:
        if not built.exists():
            _build(source, built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError):
        # No compiler, one that refuses the source, a cache that cannot be written: rounds are slower, and right.
        return None


def _build(source: Path, built: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")

    built.parent.mkdir(parents=True, exist_ok=True)
    # In its place at once or not at all: other processes may build the same.
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        made = Path(folder) / built.name
        command = [compiler, *FLAGS, "-I", jax.ffi.include_dir(), str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        os.replace(made, built)


def _cpu_features() -> str:
    """The first processor's instruction sets; empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
