"""One short run of each fault program; docs/reliability.md has the long ones."""

from pathlib import Path

import pytest

from tests.kill_disk import fill_and_compare
from tests.kill_flips import flip_and_read
from tests.kill_resume import TASKS
from tests.tiny import write_tiny_target

pytestmark = pytest.mark.usefixtures("shared_steps")


def test_flipped_bits_are_told_or_change_nothing(tmp_path: Path):
    counts = flip_and_read(tmp_path, times=20, seed=7)
    assert len(counts) == 10 and all(found.total() == 2 for found in counts.values())
    assert not any(found["SILENT"] or found["TRACE"] for found in counts.values()), counts
    assert sum(found["sentence"] for found in counts.values()) > 15


def test_a_disk_that_is_too_small_is_a_sentence_and_no_loss(tmp_path: Path):
    """By limits on a file's size, which need no rights; the long runs mount a small disk where they may."""
    task = TASKS["cache"](write_tiny_target(tmp_path / "target", num_hidden_layers=3), tmp_path)
    found = fill_and_compare(task, tmp_path, times=1, seed=3, mounted=False)
    assert found.wrong == [] and found.stopped == 1
