"""Paths that cannot be read or written, in every loader and writer: one sentence each, and nothing hangs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.huggingface import load_target, save_target
from dspark_jax.checkpoints.serving_tables import StsTable, read_sts, write_sts
from dspark_jax.data.conversations import read_conversations
from dspark_jax.data.pipeline import open_cache
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.files import check_new_folder, make_output
from dspark_jax.integrity import examine
from dspark_jax.targets.target import Target
from tests.drafters_tiny import write_pair

Pair = tuple[Target, Drafter]
UNREADABLE = ["loop", "loop/x", "file", "file/x", "pipe", "x" * 5000, "a\0b"]
UNWRITABLE = ["loop/x", "file/x", "x" * 5000, "a\0b"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair") / "target")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def sentence(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", UNREADABLE)
def test_nothing_unreadable_is_a_traceback(pair: Pair, folder: Path, name: str) -> None:
    path = folder / name
    readers = [load_target, lambda p: load_drafter(p, pair[0]), open_cache, read_sts, examine]
    if name != "pipe":  # conversations may come through one, as in `<(zcat FILE)`
        readers.append(lambda p: list(read_conversations(p)))
    for read in readers:
        sentence(lambda read=read: read(path))  # type: ignore[misc]


@pytest.mark.parametrize("name", UNWRITABLE)
def test_nothing_unwritable_is_a_traceback(pair: Pair, folder: Path, name: str) -> None:
    target, drafter = pair
    path = folder / name
    sentence(lambda: save_drafter(path, drafter, target))
    sentence(lambda: save_target(path, target.hf_config, target.params))
    sentence(lambda: write_sts(path, StsTable((1.0,))))
    sentence(lambda: make_output(path))
    if len(name) > 1000:
        assert "name too long" in sentence(lambda: check_new_folder(path))


WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "loop": (lambda path: path.symlink_to(path), "cannot be read"),
    "pipe": (os.mkfifo, "is no regular file"),
    "folder": (Path.mkdir, "is a folder"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
    "empty": (Path.touch, "not a whole safetensors file"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_files_that_are_none(pair: Pair, tmp_path: Path, case: str, name: str) -> None:
    target, drafter = pair
    spoil, message = WEIGHTS[case]
    shutil.copytree(target.name, tmp_path / "target")
    save_drafter(tmp_path / "drafter", drafter, target)
    for model in ("target", "drafter"):
        (tmp_path / model / name).unlink()
        spoil(tmp_path / model / name)
    for load in (load_target, lambda path: load_drafter(path, target)):
        folder = tmp_path / ("target" if load is load_target else "drafter")
        found = sentence(lambda load=load, folder=folder: load(folder))  # type: ignore[misc]
        assert message in found or (case == "empty" and name == "config.json" and "not JSON" in found)
