"""Reference cases that mistakes are measured against, in units of what each case allows."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.drafters.registry import Drafter
from dspark_jax.targets.target import Target
from tests.golden_v4 import Result, Vectors

DATA = Path(__file__).parent / "data"
MTP_CASE, DSPARK_CASE = DATA / "deepseek_v4_mtp", DATA / "deepseek_v4_checkpoint"


@cache
def loaded(case: Path) -> tuple[Vectors, Target, Drafter]:
    target = load_target(case / "target", dtype="float32", tokenizer=False)
    return Vectors(case), target, load_drafter(case / "target", target, dtype="float32")


def worst(vectors: Vectors, found: dict[str, Any]) -> float:
    """The largest error of any array in units of what the case allows."""
    results = [result for name, value in found.items() for result in vectors.close(name, value)]
    assert len(results) == len(found)
    return largest(results)


def largest(results: list[Result]) -> float:
    """The largest error in units of what is allowed; infinite where there is a NaN."""
    return max(np.inf if np.isnan(error) else error / allowed for _, error, allowed, _ in results)
