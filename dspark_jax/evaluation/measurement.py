"""Measures a drafter on evaluation sets: accepted length, acceptance by position, confidence, speed against plain."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tqdm import tqdm

from dspark_jax.checkpoints.huggingface import Weights
from dspark_jax.config.cli import FLAT
from dspark_jax.drafters.registry import Drafter
from dspark_jax.evaluation.acceptance import Acceptance
from dspark_jax.evaluation.answers import Answered, Proposals, answer, reach
from dspark_jax.evaluation.calibration_metrics import calibration_metrics, prefix_survival, reliability
from dspark_jax.evaluation.datasets import DOMAINS, Dialogue, domain_of
from dspark_jax.serving.assembly import temperatures_of
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig, PolicyName
from dspark_jax.targets.target import Target

AVERAGED = ("tau", "drafted_per_round", "verify_rate", "plain_tokens_per_second", "tokens_per_second", "speedup")
"""Figures that are averaged over the sets of a domain."""


@dataclass(frozen=True)
class EvaluateSettings:
    """Evaluates a drafter on evaluation sets."""

    target: str
    """Folder or hub id of the target."""
    drafter: str
    """Folder of the drafter."""
    datasets: tuple[str, ...]
    """JSONL files, folders of them, hub ids."""
    output: Path = Path("runs/evaluate")
    """Folder of metrics.json and the plots."""
    temperatures: tuple[float, ...] = (1.0, 0.0)
    thinking: bool = False
    """Let the chat template open with thinking."""
    limit: int = 0
    """Samples taken of each set; 0: all."""
    thresholds: tuple[float, ...] = ()
    """Confidence thresholds to sweep (a program is compiled for each)."""
    max_new_tokens: int = 256
    repeats: int = 1
    """Timed passes of plain and speculative decoding, alternating."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    weights: Weights = "stored"
    """int8, fp8: the layers' matrices of both models so, with a scale for each output."""
    engine: Annotated[EngineConfig, FLAT] = EngineConfig(smallest_prompt_bucket=128)


@dataclass
class Evaluation:
    """An evaluation run. Its engines are made once and shared by all sets, so that no timed pass compiles."""

    settings: EvaluateSettings
    target: Target
    drafter: Drafter
    sets: dict[str, list[Dialogue]]
    longest: int = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        for temperature in settings.temperatures:  # a calibration for something else is refused before anything runs
            temperatures_of(self.target, self.drafter, SamplingParams(temperature=temperature), settings.engine.sts)
        # The longest conversation of all sets shapes every engine.
        limit = min(settings.engine.longest or self.target.config.max_positions, self.target.config.max_positions)
        samples = [sample for group in self.sets.values() for sample in group]
        reached = (reach(self.target, one, settings.max_new_tokens, settings.thinking) for one in samples)
        self.longest = min(limit, max(reached))

    def engine_of(self, temperature: float, policy: PolicyName, threshold: float = 0.5) -> Engine:
        """An engine with every program compiled."""
        settings = self.settings.engine
        # One bucket for whole blocks of all slots: a fixed policy never needs a smaller one.
        whole = (settings.slots * (self.drafter.config.block_size + 1),)
        config = replace(
            settings,
            longest=self.longest,
            policy=policy,
            threshold=threshold,
            buckets=whole if policy == "fixed" else settings.buckets,
            stop_slots=max(1, len(self.target.stop_tokens)),
            queue=None,
        )
        engine = Engine(self.target, self.drafter, config, SamplingParams(self.settings.max_new_tokens, temperature))
        # Every program is compiled here, outside any timed pass.
        engine.warm_up()

        return engine

    def at(self, temperature: float) -> dict[str, Any]:
        """Figures at one temperature: by data set, averaged by domain, and averaged over the domains."""
        settings = self.settings
        # All engines of a temperature before the first set, so that compilation falls into no timed pass.
        plain = self.engine_of(temperature, "plain")
        timed = self.engine_of(temperature, settings.engine.policy, settings.engine.threshold)
        whole = timed if settings.engine.policy == "fixed" else self.engine_of(temperature, "fixed")
        swept = {value: self.engine_of(temperature, "threshold", value) for value in settings.thresholds}
        rows: dict[str, Any] = {}

        for name, samples in tqdm(self.sets.items(), desc=f"temperature {temperature:g}", unit="set", disable=None):
            passes: list[tuple[Answered, Answered]] = []
            for i in range(settings.repeats):
                # Alternating order: a drift of the machine's speed does not favour either.
                order = [plain, timed] if i % 2 == 0 else [timed, plain]
                done = {id(engine): self._answer(engine, samples) for engine in order}
                passes.append((done[id(plain)], done[id(timed)]))

            # Apart from the timed passes: recording costs time, and acceptance is measured on whole blocks (rule 72).
            recorded, proposals = self._recorded(whole, samples)
            rows[name] = speed_figures(samples, passes, self.drafter.config.block_size)
            rows[name] |= acceptance_figures(recorded)
            rows[name]["confidence"] = self._confidence(proposals, whole.sampling)
            rows[name]["thresholds"] = {
                f"{value:g}": speed_figures(samples, [(passes[0][0], self._answer(engine, samples))], engine.loop.block)
                for value, engine in swept.items()
            }

        return {"policy": timed.why, "datasets": rows, **averages(rows)}

    def _answer(self, engine: Engine, samples: Sequence[Dialogue]) -> Answered:
        return answer(engine, samples, self.settings.seed, self.settings.thinking)

    def _recorded(self, engine: Engine, samples: Sequence[Dialogue]) -> tuple[Answered, Proposals]:
        # For this pass alone: a recorder makes every dispatch return its rounds.
        engine.recorder = proposals = Proposals()
        try:
            return self._answer(engine, samples), proposals
        finally:
            engine.recorder = None

    def _confidence(self, proposals: Proposals, sampling: SamplingParams) -> dict[str, Any] | None:
        """Metrics of predicted prefix survival before and, with sts.json, after calibration; None without a head."""
        # No logits: a drafter without a confidence head, or no round at all.
        logits, accepted, observed = proposals.arrays()
        if not logits.size:
            return None

        temperatures = np.array(temperatures_of(self.target, self.drafter, sampling, self.settings.engine.sts))
        found: dict[str, Any] = {}
        # Temperatures of 1 leave the logits as they are.
        for stage, scale in (("before", np.ones_like(temperatures)), ("after", temperatures)):
            survival = prefix_survival(logits, scale)
            metrics = calibration_metrics(survival, accepted, observed)
            found[stage] = {name: metrics.mean(name) for name in ("ece", "auc", "brier")}
            found[stage] |= {f"{name}_at": getattr(metrics, name).tolist() for name in ("ece", "auc", "brier")}
            found[stage]["reliability"] = reliability(survival, accepted, observed)

        return found if self.settings.engine.sts is not None else {"before": found["before"]}


def speed_figures(
    samples: Sequence[Dialogue], passes: Sequence[tuple[Answered, Answered]], block: int
) -> dict[str, Any]:
    """Figures of a set: median speeds over (plain, speculative) passes, and counts from the first pass."""
    first = passes[0][1]
    made = list(first.generations.values())
    counts = Acceptance.of(made)
    drafted = block * sum(g.drafted for g in made)
    ratios = [fast.tokens_per_second / max(slow.tokens_per_second, 1e-9) for slow, fast in passes]
    verified = sum(counts.verified)

    return {
        "samples": len(samples),
        "cut": len(first.cut),
        "answers": len(made),
        "tokens": first.tokens,
        "rounds": counts.rounds,
        "tau": counts.tau,
        "drafted_per_round": drafted / max(counts.rounds, 1),
        "verified_share": verified / max(drafted, 1),
        # As the reference counts it: committed tokens over all tokens that the target ran on, anchors included.
        "verify_rate": counts.committed / max(verified + counts.rounds, 1),
        "plain_tokens_per_second": float(np.median([slow.tokens_per_second for slow, _ in passes])),
        "tokens_per_second": float(np.median([fast.tokens_per_second for _, fast in passes])),
        "speedup": float(np.median(ratios)),
    }


def acceptance_figures(recorded: Answered) -> dict[str, Any]:
    """Acceptance by position, from a pass that verifies whole blocks."""
    counts = Acceptance.of(list(recorded.generations.values()))
    return {"tau_whole": counts.tau, "unconditional": counts.unconditional, "conditional": counts.conditional}


def averages(rows: dict[str, Any]) -> dict[str, Any]:
    """Means over the sets of each domain, with equal weights, and over the domains."""

    def mean(group: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {key: float(np.mean([row[key] for row in group])) for key in AVERAGED}

    # The paper's domains first, in its order.
    names = [domain for domain in DOMAINS if any(domain_of(name) == domain for name in rows)]
    names += [d for d in dict.fromkeys(map(domain_of, rows)) if d not in names]
    domains = {d: mean([row for name, row in rows.items() if domain_of(name) == d]) for d in names}
    return {"domains": domains, "macro": mean(list(domains.values()))}
