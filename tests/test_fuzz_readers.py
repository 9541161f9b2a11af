"""Damaged files of every kind that is read from outside: a whole value or a sentence, within about a minute.

`python -m tests.fuzz_readers --examples 2000` is the longer program.
"""

import pytest

from tests.fuzz_readers import Kind, kinds_of_files, trial

SECONDS = 1.5  # a kind


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[Kind]:
    return kinds_of_files(tmp_path_factory.mktemp("kinds"))


def test_damaged_files_are_read_or_refused_in_a_sentence(kinds: list[Kind]) -> None:
    for kind in kinds:
        kind.read()  # what the first read imports is not on the clock
        found = trial(kind, examples=60, seconds=SECONDS)
        # A loaded machine may come to a few damages alone, all of which may leave the value as it was.
        assert found["refused"] > 0 or found.total() < 30, kind.name
    for kind in kinds:
        kind.read()  # the files are whole again
