"""The devices of this process: the first line of every program's output, and the record beside every figure."""

import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import jax

GOOGLE = "0x1ae0"  # vendor of TPUs on the PCI bus


def announce(dtype: str | None = None) -> str | None:
    """Prints devices and dtype of a run on stderr, and a warning for an accelerator that this jax can't use.

    Starts jax's backend, so a process must have joined its job before; process 0 prints.

    Args:
        dtype: of weights and activations; None where none was chosen.
    Returns:
        The dtype to load models in: the given one, else `usual_dtype`.
    """
    dtype = dtype or usual_dtype()
    # One line for the job: its processes run on devices of one kind.
    if jax.process_index() == 0:
        print(device_line(dtype), file=sys.stderr)
        warning = unused_accelerator()
        if warning:
            print(f"Warning: {warning}", file=sys.stderr, flush=True)
    return dtype


def usual_dtype() -> str | None:
    """The dtype that models are decoded in where none is chosen: float32 on a CPU, elsewhere None, that of the model.

    XLA:CPU has no bfloat16 products for few rows and converts weights in every round: a plain round of one request
    then takes several times as long (`infer.studies.products`).
    """
    return "float32" if jax.default_backend() == "cpu" else None


def device_line(dtype: str | None = None) -> str:
    """A line such as `Device: 1 x cpu, float32, jax 0.10.2`."""
    # A machine may hold accelerators of several kinds.
    kinds: dict[str, int] = {}
    for device in jax.devices():
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1

    devices = " and ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return f"Device: {devices}, {dtype or 'dtype of the model'}, jax {jax.__version__}"


def host_memory() -> int:
    """Bytes that a process may still take of the host's memory and of its container's; all of the host's where the
    system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    try:
        # What is in use counts the container's file cache, too: less is taken than could be.
        group = Path("/sys/fs/cgroup")
        most, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if most == "max" else max(min(free, int(most) - int(used)), 0)
    except (OSError, ValueError):
        return free


def unused_accelerator(root: Path = Path("/")) -> str:
    """A sentence about an unused NVIDIA GPU or TPU of this machine, if jax runs on the CPU without being told to.

    Args:
        root: of the file system that is searched.
    Returns:
        The sentence, or "".
    """
    # JAX_PLATFORMS is a choice of the user, so the CPU is then no surprise.
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS"):
        return ""
    if any((root / "dev").glob("nvidia[0-9]*")):
        return (
            "this machine has an NVIDIA GPU that this jax can't use; install dspark-jax[cuda13], "
            "or dspark-jax[cuda12] for a driver older than 580."
        )
    # Older TPU virtual machines have accelerator nodes. Newer ones pass chips through VFIO, as is done with other
    # devices too, so the vendor decides.
    if any((root / "dev").glob("accel[0-9]*")) or _vendors(root) & {GOOGLE} and any((root / "dev/vfio").glob("[0-9]*")):
        return "this machine has a TPU that this jax can't use; install dspark-jax[tpu]."

    return ""


def _vendors(root: Path) -> set[str]:
    return {file.read_text().strip() for file in (root / "sys/bus/pci/devices").glob("*/vendor")}


def machine() -> dict[str, Any]:
    """The machine that figures were measured on: interpreter, jax, device, cores and their load."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        # A loaded machine explains figures that no device does.
        "load": statistics.fmean(os.getloadavg()),
    }
