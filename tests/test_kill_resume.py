"""The data programs, killed with SIGKILL while they work, end with the bytes of an undisturbed run."""

from pathlib import Path

import pytest

from tests.kill_resume import TASKS, kill_and_compare
from tests.tiny import write_tiny_target


@pytest.mark.parametrize("name", ["regenerate", "cache"])
def test_killed_and_continued_is_undisturbed(name: str, tmp_path: Path):
    task = TASKS[name](write_tiny_target(tmp_path / "target"), tmp_path)
    assert kill_and_compare(task, tmp_path, times=2) == []
