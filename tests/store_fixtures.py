"""Fixtures of the tests against an S3 server: one server a file, and this machine's own copies for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_jax.storage.places import Place
from tests.stores import BUCKET, S3Server, on_this_machine


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture(autouse=True)
def machine(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine with copies of its own, and a server without faults."""
    for name, value in on_this_machine(server, tmp_path / "stores").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    server.faults()
    return tmp_path / "stores"


def place(name: str) -> Place:
    """A place in the server's bucket."""
    return Place("s3", BUCKET, name)
