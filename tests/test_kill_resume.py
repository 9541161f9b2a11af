"""The data programs, killed with SIGKILL while they work, end with the bytes of an undisturbed run."""

from pathlib import Path

import pytest

from tests.kill_resume import TASKS, kill_and_compare
from tests.tiny import tiny_target  # noqa: F401 - a fixture


@pytest.mark.parametrize("name", ["regenerate", "cache"])
def test_killed_and_continued_is_undisturbed(name: str, tiny_target: Path, tmp_path: Path):  # noqa: F811
    assert kill_and_compare(TASKS[name](tiny_target, tmp_path), tmp_path, times=2) == []
