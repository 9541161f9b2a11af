"""Program of test_programs: answers and target cache made with a target over 4 simulated devices, against one device.

python -m tests.sharded_data FOLDER 4: writes FOLDER/4 from FOLDER/target and FOLDER/prompts.jsonl
"""

import os
import sys

from tests.xla import xla_flags

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = xla_flags(int(sys.argv[2]))
    os.environ["JAX_PLATFORMS"] = "cpu"

from pathlib import Path

import jax
import pytest

from dspark_jax.datagen import cache_builder, preparation
from dspark_jax.sharding import parameter_mesh
from train import build_cache, prepare_data


def main(folder: Path, devices: int) -> None:
    assert jax.device_count() == devices
    meshes = []
    with pytest.MonkeyPatch.context() as patch:
        for library in (preparation, cache_builder):

            def watched(*words, load=library.load_target, **options):
                target = load(*words, **options)
                meshes.append(parameter_mesh(target.params))
                return target

            patch.setattr(library, "load_target", watched)
        run(folder, folder / str(devices))
    assert [mesh is not None and mesh.size for mesh in meshes] == [devices > 1 and devices] * 2


def run(folder: Path, output: Path) -> None:
    """Both programs."""
    answers = ["--prompts", folder / "prompts.jsonl", "--output", output / "c.jsonl", "--temperature", "0"]
    answers += ["--max-new-tokens", "8", "--slots", "4", "--rounds-per-dispatch", "4"]
    prepare_data.main([str(word) for word in ("--target", folder / "target", *answers)])
    cache = ["--conversations", output / "c.jsonl", "--output", output / "cache", "--layers", "0", "1", "--batch", "4"]
    cache += ["--max-length", "64", "--codec", "float32"]
    build_cache.main([str(word) for word in ("--target", folder / "target", *cache)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
