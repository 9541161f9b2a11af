"""Verify policies by name, and the tables that they read from files: for the command lines of programs."""

from pathlib import Path
from typing import Literal

import numpy as np

from dspark_jax.checkpoints.serving_tables import SpsTable, StsTable, read_sps, read_sts
from dspark_jax.checkpoints.tensors import read_json
from dspark_jax.decoding.occupancy import CostTable, ScheduleTables
from dspark_jax.decoding.profile import Profile
from dspark_jax.decoding.scheduler import Asynchronous, Causal, Fixed, LookAhead, Threshold, VerifyPolicy
from dspark_jax.drafters.registry import LoadedDrafter

PolicyName = Literal["fixed", "threshold", "causal", "look-ahead", "asynchronous"]


def policy_named(name: PolicyName, threshold: float = 0.0) -> VerifyPolicy:
    """The strategy with its default guards; `threshold` is the threshold policy's."""
    policies: dict[str, VerifyPolicy] = {
        "fixed": Fixed(),
        "threshold": Threshold(threshold),
        "causal": Causal(),
        "look-ahead": LookAhead(),
        "asynchronous": Asynchronous(),
    }
    return policies[name]


def temperatures_of(drafter: LoadedDrafter, sts: Path | None) -> np.ndarray:
    """[K] temperatures of the confidence logits: of sts.json, else ones. UserError for another block's table."""
    if sts is None:
        return np.ones(drafter.config.block_size)
    table: StsTable = read_sts(sts)
    table.check_block(drafter.config.block_size)
    return np.asarray(table.temperatures)


def costs_of(sps: Path, requests: int, buckets: tuple[int, ...]) -> CostTable:
    """Seconds of a round at each bucket: of a profile of this project, or of sps.json as servers write it."""
    if "profile" in read_json(sps):
        return Profile.read(sps).cost_table()
    table = read_sps(sps)
    if isinstance(table, SpsTable):
        seconds = [1.0 / table.steps_per_second(tokens) for tokens in buckets]
    else:
        seconds = [table.step_seconds(requests, tokens - requests) for tokens in buckets]
    return CostTable.of(buckets, seconds)


def schedule_tables(
    drafter: LoadedDrafter, requests: int, buckets: tuple[int, ...], sts: Path | None, sps: Path | None
) -> ScheduleTables | None:
    """What adaptive policies read, None without a cost table: the engine then profiles by itself."""
    if sps is None:
        return None
    return ScheduleTables.of(costs_of(sps, requests, buckets), temperatures_of(drafter, sts).tolist())
