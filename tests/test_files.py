"""The one atomic writer, the one lock and the hashes of content."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dspark_jax.errors import UserError
from dspark_jax.files import add_results, hash_tree, lock_folder, replacing, weights_hash, write_atomically, write_json


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="value.json cannot be written .No space left"):
        write_json(path, {"a": 2})
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["value.json"]


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "a", "text")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder's entry


HOLD = "import sys, pathlib; from dspark_jax.files import lock_folder; lock_folder(pathlib.Path(sys.argv[1])); print()"


def test_a_folder_has_one_writer_and_a_dead_one_gives_it_up(tmp_path: Path):
    folder = tmp_path / "run"
    code = f"{HOLD}; sys.stdout.flush(); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match="Another process is writing the run .*run; wait for it"):
            lock_folder(folder, "the run")
        other.kill()
    with lock_folder(folder, "the run"):
        (folder / "content").write_text("kept")
    assert (folder / "content").exists()


def test_a_lock_leaves_no_folder_behind_that_it_made(tmp_path: Path):
    with lock_folder(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    lock_folder(tmp_path / "there").release()
    assert (tmp_path / "there").is_dir()


def test_a_link_stays_a_link(tmp_path: Path):
    """To a file on another disk, which is what such links are for; to one that is not there yet as well."""
    (tmp_path / "disk").mkdir()
    for name in ("there", "not yet"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        write_atomically(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink() and (tmp_path / "disk" / name).read_text() == "new"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["disk", "not yet", "not yet", "there", "there"]


def test_weights_are_hashed_whole_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSPARK_JAX_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    file = model / "model.safetensors"
    content = bytearray(5 << 20)
    file.write_bytes(content)
    before = weights_hash(model)
    content[len(content) // 2] ^= 1  # neither in the first nor in the last MiB
    file.write_bytes(content)
    after = weights_hash(model)
    assert before != after and len(after) == 32

    # An archive that is unpacked over it, with the time that it had.
    stat = file.stat()
    content[7] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns and weights_hash(model) != after
    after = weights_hash(model)

    # A note that is none is made anew.
    (note,) = (tmp_path / "cache" / "hashes").iterdir()
    for wrong in (b"", b"[]", b"{", note.read_bytes().replace(after.encode(), b"no hash"), b'{"xxh3": "\xff"}'):
        note.write_bytes(wrong)
        assert weights_hash(model) == after

    monkeypatch.setattr("dspark_jax.files.file_hash", lambda path: pytest.fail(f"{path} was read again"))
    assert weights_hash(model) == after
    file.rename(model / "other.safetensors")
    monkeypatch.undo()
    assert weights_hash(model) != after


def test_results_are_added_to_those_of_other_runs(tmp_path: Path):
    path = tmp_path / "results.json"
    assert add_results(path, {"a": {"x": 1}}) == {"a": {"x": 1}}
    assert add_results(path, {"a": {"y": {"old": 2}}}, levels=2) == {"a": {"x": 1, "y": {"old": 2}}}
    # A row is one measurement: it is replaced whole, and groups that are not named stay.
    add_results(path, {"b": {}, "a": {"y": {"new": 3}}}, levels=2)
    assert json.loads(path.read_text()) == {"a": {"x": 1, "y": {"new": 3}}, "b": {}}
    assert add_results(path, {"a": {"z": 4}}) == {"a": {"z": 4}, "b": {}}
    path.write_text("[]")
    with pytest.raises(UserError, match="the figures of earlier runs"):
        add_results(path, {})


def test_a_tree_is_every_file_below_it(tmp_path: Path):
    (tmp_path / "b").mkdir()
    for name in ("a", "b/c", "b/d.tmp"):
        (tmp_path / name).write_text(name)
    tree = hash_tree(tmp_path)
    assert list(tree) == ["a", "b/c"] and hash_tree(tmp_path / "nowhere") == {}
    (tmp_path / "b/c").write_text("C")
    assert [name for name, found in hash_tree(tmp_path).items() if found != tree[name]] == ["b/c"]
