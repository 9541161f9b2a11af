"""Every configuration's training step, lowered for TPUs that are not here, on each of the meshes.

    python -m tests.lowered [NAME ...] [--devices N ...]

Prints a line a program, and exits with 1 where one does not lower; the tests lower a configuration of each kind and
family.
"""

import argparse
import dataclasses
import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from dspark_jax.config.cli import config_names, load_config
from dspark_jax.config.schema import MeshSettings
from dspark_jax.errors import UserError
from dspark_jax.planning.training import AbstractRun
from dspark_jax.sharding import abstract_mesh

MESHES = {8: (2, 4, 1), 64: (16, 2, 2), 256: (32, 4, 2)}
# Without the experiments for two CPU cores, whose targets are not there before `make real-target` or
# train.embedded.v4_target.
NAMES = [name for name in config_names() if not load_config(name).target.startswith((".cache/", "runs/"))]


def planned(name: str, devices: int, **mesh: str) -> AbstractRun:
    """The run of a configuration on that many devices; batches that are smaller than the mesh grow to it."""
    data, fsdp, tensor = MESHES[devices]
    config = load_config(name)
    rows = max(config.data.global_batch, devices)
    changed = dataclasses.replace(config.data, global_batch=rows, accumulation_steps=0)
    settings = MeshSettings(data=data, fsdp=fsdp, tensor=tensor, **mesh)
    return AbstractRun.of(
        dataclasses.replace(config, data=changed, mesh=settings), abstract_mesh(devices, data, fsdp, tensor)
    )


def lowers(name: str, devices: int) -> bool:
    """Whether the step's text is laid over the mesh."""
    data, fsdp, tensor = MESHES[devices]
    text = planned(name, devices).lower("tpu").as_text()
    return f'"data"={data}, "fsdp"={fsdp}, "expert"=1, "tensor"={tensor}]>' in text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lowered", description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--devices", nargs="+", type=int, default=list(MESHES), choices=list(MESHES))
    options = parser.parse_args(argv)
    failed = 0
    for name in options.names:
        for devices in options.devices:
            try:
                said = "ok" if lowers(name, devices) else "FAIL: not laid over the mesh"
            except UserError as error:
                said = f"FAIL: {error}"
            failed += said != "ok"
            print(f"{name:32s} {devices:4d}  {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
