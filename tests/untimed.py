"""The records of a run without what the clock decides: what runs that took the same steps have in common."""

from pathlib import Path
from typing import Any

from dspark_jax.training.run_folder import read_records
from dspark_jax.training.summary import OF_A_WINDOW, SPEED

TIMES = {*SPEED, *OF_A_WINDOW, "goodput"}


def untimed(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_records(run / "metrics.jsonl")]
