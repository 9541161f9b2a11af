"""The XLA flags of tests: what they run is small, and most of their time is the compiler's."""

FAST_COMPILER = "--xla_backend_optimization_level=0"
"""Machine code as LLVM first writes it, in about half the time; the programs before it are those that users run."""


def xla_flags(devices: int = 1) -> str:
    """Of a process with so many simulated devices; in its environment before it imports jax."""
    return f"--xla_force_host_platform_device_count={devices} {FAST_COMPILER}"
