"""Measures SmolLM2-135M-Instruct with its drafter against plain decoding, on questions of three domains.

    make real-target
    python -m infer.studies.real_pair --questions eval_datasets/gsm8k.jsonl eval_datasets/mbpp.jsonl \\
        eval_datasets/mt-bench.jsonl --domains math code chat

The first questions of each domain are asked: one request at a time, in alternating runs at temperatures 0 and 1.
Figures are medians, prefill included. Writes docs/results/real_pair.json, and infer.bench's figures and plots into the
run's folder.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.evaluation.drafted import drafted_pieces
from dspark_jax.files import make_output, write_json
from dspark_jax.report import acceptance_plot, painted, speed_plot, table
from dspark_jax.serving.prompts import EncodedPrompt, read_prompts
from dspark_jax.serving.settings import EngineConfig, PolicyName
from dspark_jax.targets.target import Target

from ..bench import BenchSettings, against_plain

# Gap of the target's two best logits, above the differences between float32 batches of different widths.
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class RealPairSettings:
    """Measures speculative against plain decoding of a pair, by domain."""

    questions: tuple[Path, ...]
    """JSONL files of questions."""
    domains: tuple[str, ...] = ()
    """The files' domains, in their order. None: those that the rows name."""
    target: str = ".cache/real_target"
    """Folder, GGUF file or hub id of the target."""
    drafter: str = "assets/smollm2_135m_drafter"
    """Folder of the drafter."""
    per_domain: int = 8
    """Questions asked of each domain."""
    policy: PolicyName = "auto"
    """Verify policy."""
    repeats: int = 3
    """Alternations at temperature 0."""
    sampled_repeats: int = 3
    """Alternations at temperature 1."""
    max_new_tokens: int = 96
    """Longest answer."""
    answers: int = 0
    """Questions, each of another domain, whose greedy answers are printed with their drafted tokens marked."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations."""
    output: Path = Path("runs/real_pair")
    """Folder of the run's own files."""
    result: Path = Path("docs/results/real_pair.json")
    """The summary."""

    def __post_init__(self) -> None:
        if self.domains and len(self.domains) != len(self.questions):
            raise UserError(
                f"{len(self.questions)} files of questions and {len(self.domains)} domains were given; expected a "
                "domain for each file."
            )


@program
def main(argv: list[str]) -> None:
    settings = parse(RealPairSettings, argv, description=__doc__)
    make_output(settings.output, settings.result)
    announce(settings.dtype)
    target = load_target(settings.target, dtype=settings.dtype)
    drafter = load_drafter(settings.drafter, target, dtype=settings.dtype)
    prompts = questions(settings, target)
    # One length for all domains, so that they share their compiled programs and the profile.
    longest = -(-(max(len(prompt.tokens) for prompt in prompts) + settings.max_new_tokens) // 64) * 64
    engine = EngineConfig(1, longest, settings.policy, rounds_per_dispatch=64, smallest_prompt_bucket=64)

    bench = BenchSettings(
        target=settings.target,
        prompts=settings.questions,
        drafter=settings.drafter,
        output=settings.output,
        repeats=settings.repeats,
        sampled_repeats=settings.sampled_repeats,
        max_new_tokens=settings.max_new_tokens,
        dtype=settings.dtype,
        engine=engine,
    )

    # The program's own comparison, so that the study's figures are those that a user gets from infer.bench.
    metrics = against_plain(bench, target, drafter, prompts)
    acceptance_plot(settings.output / "conditional_acceptance.png", metrics["temperatures"])
    speed_plot(settings.output / "speed.png", metrics["temperatures"])
    write_json(settings.output / "metrics.json", metrics)

    # The summary is what documents cite; the run's own files stay in --output.
    made = summary(metrics["temperatures"]) | {"policy": settings.policy, "machine": machine()}
    made |= {"max_new_tokens": settings.max_new_tokens, "repeats": settings.repeats}
    write_json(settings.result, made)

    rows = [
        [name, *(f"{row[key]:.2f}" for key in ("t0", "t1", "tau_t0", "tau_t1"))]
        for name, row in made["by_domain"].items()
    ]
    print(f"\n{table(['domain', 'ratio, T = 0', 'T = 1', 'tau, T = 0', 'T = 1'], rows)}\n{settings.result}")
    show_answers(settings, bench, target, drafter, prompts)


def show_answers(
    settings: RealPairSettings, bench: BenchSettings, target: Target, drafter: Drafter, prompts: list[EncodedPrompt]
) -> None:
    """Prints greedy answers with their drafted tokens marked."""
    # Whole blocks, so that drafts are seen also where `auto` would decode plainly.
    engine = replace(bench.engine, policy="fixed")
    # Reversed, so that the first prompt of each domain is what stays.
    firsts = {prompt.domain: prompt for prompt in reversed(prompts)}
    chosen = sorted(firsts.values(), key=prompts.index)[: settings.answers]

    colour = sys.stdout.isatty()
    if chosen:
        print(f"\nDrafted and accepted tokens are {'green' if colour else 'in ‹›'}, whole blocks being verified.")
    for prompt in chosen:
        answer = drafted_pieces(target, drafter, prompt.tokens, bench.sampling(0.0), engine)
        print(f"\n--- {prompt.domain}, {prompt.id}\n{painted(answer, colour)}")


def questions(settings: RealPairSettings, target: Target) -> list[EncodedPrompt]:
    """The first questions of every domain."""
    if not settings.domains:
        # Rows that name their domain are limited by domain.
        return read_prompts(target, settings.questions, settings.per_domain)

    made: list[EncodedPrompt] = []
    # Data sets name no domain in their rows; the file does.
    for path, domain in zip(settings.questions, settings.domains, strict=True):
        found = read_prompts(target, [path], settings.per_domain)[: settings.per_domain]
        made += [replace(prompt, domain=domain) for prompt in found]
    return made


def summary(temperatures: dict[str, Any]) -> dict[str, Any]:
    """Ratios as a mean over domains and by domain, accepted lengths, and the number of outputs equal to plain ones.

    Args:
        temperatures: figures of `infer.bench.compare` under t0 and t1.
    """
    by_domain = {
        name: {
            **{key: temperatures[key][name]["speculative_over_plain"] for key in ("t0", "t1")},
            **{f"tau_{key}": temperatures[key][name]["tau"] for key in ("t0", "t1")},
            **{
                f"{key}_tokens_per_second": {
                    kind: temperatures[key][name][f"{kind}_tokens_per_second"] for kind in ("plain", "speculative")
                }
                for key in ("t0", "t1")
            },
        }
        for name in temperatures["t0"]
        # The pooled row would count domains by their number of tokens.
        if name != "all"
    }
    # Greedy outputs may differ from plain decoding's only at a near-tie; both counts are given.
    greedy = temperatures["t0"]["all"]

    return {
        **{
            f"speculative_over_plain_{key}": sum(row[key] for row in by_domain.values()) / len(by_domain)
            for key in ("t0", "t1")
        },
        "by_domain": by_domain,
        "identical_t0": greedy["identical"],
        "near_ties_t0": sum(difference["gap"] < NEAR_TIE for difference in greedy["differences"]),
        "prompts_t0": greedy["prompts"],
    }


if __name__ == "__main__":
    main()
