"""The XLA flags of tests: what they run is small, and most of their time is the compiler's."""

from importlib.metadata import version

# XLA's older emitters are quicker compilers, and jax 0.11 does not have them any more.
HAS_OLD_EMITTERS = version("jaxlib").startswith("0.10.")

FAST_COMPILER = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
"""Machine code as LLVM first writes it, in one piece: a round compiles in about a third of users' time.
The programs before it are those that users run."""
if HAS_OLD_EMITTERS:
    FAST_COMPILER += " --xla_cpu_use_fusion_emitters=false"

FAST_PROGRAM: dict[str, str | bool | int] = {"xla_backend_optimization_level": 1}
if HAS_OLD_EMITTERS:
    FAST_PROGRAM["xla_cpu_use_fusion_emitters"] = True
"""`compiler_options` of a program that runs for longer than it compiles."""


def xla_flags(devices: int = 1) -> str:
    """Flags of a process with so many simulated devices; in its environment before it imports jax."""
    return f"--xla_force_host_platform_device_count={devices} {FAST_COMPILER}"
