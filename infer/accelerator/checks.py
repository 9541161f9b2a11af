"""The numeric parts: the device against the host, golden cases, and greedy decoding with drafts against without."""

import os
import re
import subprocess
import sys
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.command import run
from dspark_jax.evaluation.timing import Decoder, differences
from dspark_jax.programs import EMBEDDED, ROOT, asset
from dspark_jax.readers import read_object
from dspark_jax.serving.prompts import EncodedPrompt, read_prompts
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.target import Target

from .pairs import Shape, random_pair
from .report import Report

NEAR_TIE = 0.05
"""Nats between the two best logits of a decision that rounding to bfloat16 may turn."""


def logits(report: Report, part: str) -> None:
    """The embedded target's logits on the device against those of the host in float32: in float32 at the highest
    precision of products, and in bfloat16."""
    host = jax.local_devices(backend="cpu")[0]
    tokens = np.random.default_rng(0).integers(0, 1000, (4, 48))
    with jax.default_device(host):
        expected = _logits(load_target(EMBEDDED, dtype="float32", tokenizer=False), tokens)
    for dtype, precision in (("float32", "highest"), ("bfloat16", "default")):
        with jax.default_matmul_precision(precision):
            found = _logits(load_target(EMBEDDED, dtype=dtype, tokenizer=False), tokens)
        report.add(part, **{f"{dtype}, {precision}": _compared(found, expected)})


def _logits(target: Target, tokens: np.ndarray) -> np.ndarray:
    def run(params: Any, ids: jax.Array) -> jax.Array:
        model = target.model(params)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return model.logits(model(ids, positions, CausalRows()).hidden)

    return np.asarray(jax.jit(run)(target.params, jnp.asarray(tokens)), np.float32)


def _compared(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    return {
        "largest_error": float(np.abs(found - expected).max()),
        "largest_logit": float(np.abs(expected).max()),
        "same_best_token": float((found.argmax(-1) == expected.argmax(-1)).mean()),
    }


def golden(report: Report, part: str, shape: Shape) -> None:
    """Cases of the reference implementation in tests/data, in a process of its own, at the highest precision."""
    if not (ROOT / "tests" / "golden.py").exists():
        report.add(part, left_out="The golden cases are in a checkout's tests/, which this installation has not.")
        return
    # From the report: asking jax would take the device from the process that is to use it.
    platform = str(report.parts.get("device", {}).get("platform", "cpu"))
    # Their tolerances are those of float32 products.
    platform = "cuda,cpu" if platform == "gpu" else platform
    env = os.environ | {"JAX_PLATFORMS": platform, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    for case in shape.cases:
        if report.out_of_time(part):
            return
        words = [sys.executable, "-m", "tests.golden", f"tests/data/{case}"]
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=max(report.left, 60))
        line = next((line for line in done.stdout.splitlines() if line.startswith(case)), done.stderr[-300:])
        report.add(part, **{case: {"ok": done.returncode == 0, "said": re.sub(r"\s+", " ", line)}})

    if wrong := [case for case in shape.cases if not report.parts[part][case]["ok"]]:
        report.add(part, failed=f"{', '.join(wrong)}: see what is said of each.")


def greedy(report: Report, part: str, shape: Shape) -> None:
    """Greedy answers with drafts against those without, in bfloat16: how many are the same, and at what gap between
    the two best logits the others part. A gap that is no near-tie would be a fault."""
    if shape.config:
        target = load_target(EMBEDDED, dtype="bfloat16")
        drafter = load_drafter(EMBEDDED, target, dtype="bfloat16")
        prompts, longest = read_prompts(target, (asset("conformance_prompts.jsonl"),), 24, False), 96
    else:
        target, drafter = random_pair(shape)
        prompts, longest = [EncodedPrompt(str(i), "", (i + 1,) * 8) for i in range(2)], 12

    config = EngineConfig(slots=min(8, len(prompts)), policy="fixed")
    sampling = SamplingParams(longest)
    plain, drafted = (Decoder(target, way, sampling, config)(prompts) for way in (None, drafter))
    found = differences(target, prompts, plain.generations, drafted.generations)
    gaps = sorted(difference.gap for difference in found)
    report.add(
        part,
        dtype=str(target.params["embed_weight_vd"].dtype),
        prompts=len(prompts), identical=len(prompts) - len(found),
        near_ties=sum(gap < NEAR_TIE for gap in gaps), faults=sum(gap >= NEAR_TIE for gap in gaps), gaps=gaps,
        tau=median([generation.accepted_length for generation in drafted.generations]),
    )  # fmt: skip


def training(report: Report, part: str, shape: Shape) -> None:
    """train.bench: seconds a step, MFU, memory."""
    results = report.path.with_suffix(".training.json")
    try:
        # By its name: the wings know nothing of each other.
        run("train-bench", "train.bench", [*shape.training, "--results", str(results)])
        figures = read_object(results, expected="the figures of train.bench")
        report.add(part, **{name: value for name, value in figures.items() if name not in ("terms", "machine")})
    finally:
        results.unlink(missing_ok=True)
