"""Object stores, against moto's S3 server: objects, sentences, the writer's right, copies of folders."""

import os
import threading
from pathlib import Path

import pytest

from dspark_jax.errors import UserError
from dspark_jax.integrity import examine
from dspark_jax.storage import objects
from dspark_jax.storage.lease import FILE, Lease
from dspark_jax.storage.places import Place, local_path, place_of, stores_folder
from dspark_jax.storage.replica import Replica, fetched_file, fetched_folder, written, written_file
from tests.store_fixtures import machine, place, server
from tests.stores import S3Server

__all__ = ["machine", "server"]  # fixtures


def test_places_and_paths_stand_for_each_other(machine: Path):
    found = place_of("s3://pod/runs/a/")
    assert found == place("runs/a") and str(found) == "s3://pod/runs/a"
    # pathlib drops a slash, and options are parsed as paths.
    assert place_of(Path("s3://pod/runs/a")) == found
    assert local_path("s3://pod/runs/a") == machine / "work/s3/pod/runs/a"
    assert place_of(machine / "work/s3/pod/runs/a") == place_of(machine / "read/s3/pod/runs/a") == found
    assert place_of("runs/a") is None and place_of(stores_folder() / "work/s3") is None
    with pytest.raises(UserError, match="s3://pod/runs/a is in an object store; copy it"):
        examine(Path("s3://pod/runs/a"))
    with pytest.raises(UserError, match="dotted part"):
        place_of("gs://pod/../b")


def test_objects_are_read_as_written():
    data = os.urandom(2 * objects.PART_BYTES + 5)
    objects.write(place("o/large"), (data[at : at + 1_000_000] for at in range(0, len(data), 1_000_000)))
    objects.write(place("o/small"), b"")
    seen = objects.listing(place("o"))
    assert {name: found.bytes for name, found in seen.items()} == {"large": len(data), "small": 0}
    assert objects.read(place("o/large"), (5, 12)) == data[5:12] and objects.read(place("o/small")) == b""

    objects.remove([place("o/large"), place("o/never")])
    assert objects.find(place("o/large")) is None


def test_downloads_are_whole_and_what_was_asked_for(tmp_path: Path):
    data = os.urandom(objects.PART_BYTES + 7)
    objects.write(place("d/one"), data)
    seen = objects.find(place("d/one"))
    assert seen is not None
    objects.download(place("d/one"), tmp_path / "one", seen)
    assert (tmp_path / "one").read_bytes() == data

    with pytest.raises(UserError, match="d/one is damaged: its hash is"):
        objects.download(place("d/one"), tmp_path / "two", seen, xxh3="0" * 32)
    objects.write(place("d/one"), b"another")
    with pytest.raises(UserError, match="d/one has changed while it was read"):
        objects.download(place("d/one"), tmp_path / "two", seen)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_conditional_writes_have_one_winner():
    assert (first := objects.create(place("c/a"), b"1")) is not None
    assert objects.create(place("c/a"), b"2") is None
    second = objects.replace(place("c/a"), b"3", first)
    assert second is not None and objects.replace(place("c/a"), b"4", first) is None
    # An answer that was lost: the same write again finds its own content.
    assert objects.create(place("c/a"), b"3") is not None
    assert objects.read(place("c/a")) == b"3"


def test_faults_that_pass_are_not_seen(server: S3Server, tmp_path: Path):
    data = os.urandom(3 * objects.PART_BYTES)
    server.faults(every=3, status=503)
    objects.write(place("f/a"), data)
    seen = objects.listing(place("f"))["a"]
    objects.download(place("f/a"), tmp_path / "a", seen)
    assert (tmp_path / "a").read_bytes() == data


def test_faults_that_stay_are_one_sentence(server: S3Server, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="s3://pod/e/none does not exist"):
        objects.read(place("e/none"))
    with pytest.raises(UserError, match="The bucket s3://nowhere does not exist"):
        objects.listing(Place("s3", "nowhere", "a"))

    monkeypatch.setenv("DSPARK_STORE_SECONDS", "1")
    server.faults(every=1, status=503)
    with pytest.raises(UserError, match=r"s3://pod/e/a could not be written \(503.*within 1 s"):
        objects.write(place("e/a"), b"1")
    server.faults()

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"could not be read \(no connection\) within 1 s"):
        objects.read(place("e/a"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(UserError, match="credentials"):
        objects.read(place("e/a"))


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(UserError, match=r"pip install 'dspark-jax\[gs\]'"):
        objects.find(Place("gs", "pod", "a"))


def test_a_place_has_one_writer(tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    with Lease(place("l") / FILE, here, "the run", seconds=2), pytest.raises(UserError, match="is writing the run"):
        Lease(place("l") / FILE, there, "the run", seconds=2)
    assert objects.find(place("l") / FILE) is None

    # Its writer was killed: the same folder continues at once, another machine after the wait.
    dead = Lease(place("l") / FILE, here, "the run", seconds=60)
    dead._ended.set()
    Lease(place("l") / FILE, here, "the run", seconds=60)._ended.set()
    alive = Lease(place("l") / FILE, there, "the run", seconds=1)
    with pytest.raises(UserError, match="has taken over the run s3://pod/l"):
        dead._ended = threading.Event()
        dead._seconds = 0.1
        dead._renew()
        dead.check()
    alive.check()
    alive.release()


def test_a_folder_is_pulled_and_pushed(machine: Path):
    with written("s3://pod/w", "the export", last=("done.json",)) as out:
        (out.folder / "part").mkdir()
        (out.folder / "part" / "a.bin").write_bytes(b"a")
        (out.folder / "done.json").write_text("{}")
        (out.folder / "torn.tmp").write_text("")
    assert list(objects.listing(place("w"))) == ["done.json", "part/a.bin"]

    # Another process changed the store; what lies here is replaced, and what nobody pushed is gone.
    objects.write(place("w/part/a.bin"), b"b")
    (machine / "work/s3/pod/w/left.txt").write_text("left by a kill")
    with written("s3://pod/w", "the export") as out:
        assert (out.folder / "part/a.bin").read_bytes() == b"b" and not (out.folder / "left.txt").exists()
        (out.folder / "part/a.bin").unlink()
    assert list(objects.listing(place("w"))) == ["done.json"]


def test_files_of_one_folder_have_writers_of_their_own():
    """So has a file whose name begins with that of another: its rows of the moment are neither replaced nor sent."""
    folder = local_path("s3://pod/files/one.jsonl").parent
    for name in ("one", "one.two", "one"):
        with written_file(f"s3://pod/files/{name}.jsonl", "the conversations", [f"{name}.metrics.json"]) as out:
            (out.folder / f"{name}.jsonl").write_text(name)
            (out.folder / f"{name}.metrics.json").write_text("{}")
        (folder / "one.two.jsonl").write_text("unfinished")
    assert list(objects.listing(place("files"))) == [
        f"one.{ending}" for ending in ("jsonl", "metrics.json", "two.jsonl", "two.metrics.json")
    ]
    assert (folder / "one.two.jsonl").read_text() == "unfinished"
    assert objects.read(place("files/one.two.jsonl")) == b"one.two"


def test_what_is_read_is_fetched_once(server: S3Server):
    objects.write(place("m/config.json"), b"{}")
    folder = fetched_folder("s3://pod/m", "model")
    before = server.requests()["GET"]
    assert fetched_folder("s3://pod/m", "model") == folder and (folder / "config.json").read_text() == "{}"
    assert server.requests()["GET"] == before + 1  # the listing

    objects.write(place("m/config.json"), b'{"a": 1}')
    assert fetched_file("s3://pod/m/config.json").read_text() == '{"a": 1}'
    with pytest.raises(UserError, match="s3://pod/none holds no model"):
        fetched_folder("s3://pod/none", "model")
    with pytest.raises(UserError, match="s3://pod/m/none.json does not exist"):
        fetched_file("s3://pod/m/none.json")


def test_a_push_sends_what_has_changed(server: S3Server):
    replica = Replica(place("p"), local_path("s3://pod/p"))
    replica.pull()
    for name in ("a", "b"):
        (replica.folder / name).write_text(name)
    replica.push()
    before = server.requests()["PUT"]
    (replica.folder / "b").write_text("changed")
    replica.push()
    assert server.requests()["PUT"] == before + 1 and objects.read(place("p/b")) == b"changed"
