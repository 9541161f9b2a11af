"""A program for jobs: rows that all processes' devices hold together, brought to the first process five at a time."""

from pathlib import Path

import jax
import numpy as np

from dspark_jax.sharding import ShardingRules, make_mesh
from train.distributed import fetch_rows, initialize_from_environment, is_first


def main(argv: list[str]) -> None:
    """argv: the folder of the results, a file a layout."""
    initialize_from_environment()
    whole = np.arange(24 * 3, dtype=np.float32).reshape(24, 3)
    for name, mesh in {"rows": make_mesh(), "both": make_mesh(data=4, tensor=2)}.items():
        x = jax.make_array_from_callback(whole.shape, ShardingRules().rows(mesh, 2), lambda index: whole[index])
        with jax.transfer_guard("disallow"):
            found = fetch_rows(x, most_bytes=5 * whole[0].nbytes)
        if is_first():
            np.save(Path(argv[0]) / f"fetched-{name}.npy", found)
        elif found.shape != (0, 3):
            raise SystemExit(3)
