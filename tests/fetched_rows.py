"""A program for jobs: rows that all processes' devices hold together, brought to the first process five at a time."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.distributed import fetch_rows, initialize_from_environment, is_first
from dspark_jax.sharding import ShardingRules, make_mesh

DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")  # those that caches store


def main(argv: list[str]) -> None:
    """argv: the folder of the results, a file a layout."""
    initialize_from_environment()
    for name, mesh in {"rows": make_mesh(), "both": make_mesh(data=jax.device_count() // 2, tensor=2)}.items():
        found = {dtype: gathered(mesh, dtype) for dtype in DTYPES}
        if is_first():
            np.savez(Path(argv[0]) / f"fetched-{name}.npz", **found)
        elif any(rows.size for rows in found.values()):
            raise SystemExit(3)


def gathered(mesh: jax.sharding.Mesh, dtype: str) -> np.ndarray:
    """0, 1, ... 71 as rows of 3, of which every process makes its own."""
    whole = np.arange(72).reshape(24, 3).astype(jnp.dtype(dtype))
    x = jax.make_array_from_callback(whole.shape, ShardingRules().rows(mesh, 2), lambda index: whole[index])
    with jax.transfer_guard("disallow"):
        rows = fetch_rows(x, most_bytes=5 * whole[0].nbytes)
    assert rows.dtype == whole.dtype
    return rows.astype(np.float32)
