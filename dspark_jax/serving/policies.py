"""Verify policies by name, and the tables that they read from files: for the command lines of programs."""

from pathlib import Path
from typing import Literal

from dspark_jax.checkpoints.serving_tables import SpsTable, read_sps
from dspark_jax.drafters.registry import Drafter
from dspark_jax.readers import read_object
from dspark_jax.scheduling.costs import CostTable, ScheduleTables
from dspark_jax.scheduling.policies import (
    Asynchronous,
    Causal,
    Fixed,
    LookAhead,
    Threshold,
    VerifyPolicy,
    bucket_ladder,
)
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.profile import Profile
from dspark_jax.serving.requests import DecodeConfig
from dspark_jax.serving.temperatures import read_calibration, validity
from dspark_jax.targets.target import Target

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


def temperatures_of(target: Target, drafter: Drafter, config: DecodeConfig, sts: Path | None) -> tuple[float, ...]:
    """[K] temperatures of the confidence logits: of sts.json, else ones. UserError for a table that was calibrated for
    something else."""
    if sts is None:
        return (1.0,) * drafter.config.block_size
    return tuple(read_calibration(sts, validity(target, drafter, config)).tolist())


def costs_of(sps: Path, requests: int, buckets: tuple[int, ...]) -> CostTable:
    """Seconds of a round at each bucket: of a profile of this project, or of sps.json as servers write it."""
    if "profile" in read_object(sps):
        return Profile.read(sps).cost_table()
    table = read_sps(sps)
    if isinstance(table, SpsTable):
        seconds = [1.0 / table.steps_per_second(tokens) for tokens in buckets]
    else:
        seconds = [table.step_seconds(requests, tokens - requests) for tokens in buckets]
    return CostTable.of(buckets, seconds)


def make_engine(
    target: Target,
    drafter: Drafter | None,
    config: DecodeConfig,
    longest: int,
    sts: Path | None = None,
    sps: Path | None = None,
) -> Engine:
    """An engine whose policy, if load-adaptive, has its tables: from the files, else from a profile of its own."""
    stops = max(1, len(config.stop_tokens or target.stop_tokens))
    if drafter is None or not config.policy.needs_tables:
        return Engine(target, drafter, config, longest, stops)
    temperatures = temperatures_of(target, drafter, config, sts)
    if sps is None:
        return Engine(target, drafter, config, longest, stops, temperatures=temperatures)
    buckets = config.buckets or bucket_ladder(config.slots, drafter.config.block_size + 1)
    tables = ScheduleTables.of(costs_of(sps, config.slots, buckets), temperatures)
    return Engine(target, drafter, config, longest, stops, tables)
