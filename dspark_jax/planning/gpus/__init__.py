"""GPUs that are not attached, for the CUDA compiler: the descriptions beside this file, and how to ask for one.

The compiler has two readings of a program. With Triton a product takes joins and conversions of its operands into
itself; with a library's products (cuBLAS) they are written out first. On a device the autotuner chooses between the two
product by product, so that a fault of either may be met.
"""

import importlib
import os
from pathlib import Path
from typing import Any

from dspark_jax.errors import UserError

GPUS = ("H100", "H200")
READINGS: dict[str, dict[str, Any]] = {
    "fused": {"xla_gpu_autotune_level": 0},
    "library": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
}
"""Options of the compiler by reading. Nothing is tuned: there is no device to try products on."""


def gpu_devices(kind: str, count: int = 1) -> list[Any]:
    """GPUs of one node and of one of the kinds in `GPUS`, for the compiler alone.

    Raises:
        UserError: the compiler's packages are not installed (extra `aot-cuda`).
    """
    _find_tools()
    from jax.experimental import topologies

    described = (Path(__file__).parent / f"{kind.lower()}.txtpb").read_text(encoding="utf-8")
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=described, topology=f"1x1x{count}")
    except Exception as error:  # the plugin's own types
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"No CUDA compiler for {kind} ({reason}). It comes with `pip install 'dspark-jax[aot-cuda]'` on Python "
            f'3.12 or newer; the counted floor needs none: --no-compile --device "NVIDIA {kind}".'
        ) from error
    return list(found.devices)


def _find_tools() -> None:
    """Puts the assembler and linker of NVIDIA's packages on the path, where the compiler looks for them."""
    try:
        packages = list(importlib.import_module("nvidia").__path__)
    except ImportError:
        return
    found = [str(folder) for package in packages for folder in Path(package).glob("*/bin")]
    os.environ["PATH"] = os.pathsep.join([*found, os.environ.get("PATH", "")])
