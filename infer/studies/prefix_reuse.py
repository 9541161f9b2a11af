"""Measures the time to first token of a conversation's second turn, with and without the prefix that its first left.

    python -m infer.studies.prefix_reuse --target assets/embedded_target --drafter assets/embedded_drafter

The first turn's prompt, its answer and the second question together are `--tokens` long; ids are random, since time
does not depend on them. Two engines, one of which keeps prompt chunks, answer the same conversations in alternating
runs, and their answers must be equal. Prints medians, and writes them to OUTPUT.
"""

import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.errors import UserError
from dspark_jax.files import make_output, write_json
from dspark_jax.report import table
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig, PolicyName

from ..serve import ENGINE


@dataclass(frozen=True)
class PrefixReuseSettings:
    """Times the second turn of conversations."""

    target: str
    """Folder or hub id of the target."""
    drafter: str = ""
    """Folder or hub id of its drafter; none: plain decoding."""
    tokens: int = 1000
    """Tokens of the conversation when its second answer begins."""
    answer: int = 40
    """New tokens of the first answer."""
    question: int = 30
    """Tokens of the second question."""
    prefill_chunk: int = ENGINE.prefill_chunk
    """Tokens of a prompt chunk, the unit that is kept."""
    prefix_cache: int = ENGINE.prefix_cache
    """MiB for kept chunks."""
    policy: PolicyName = "fixed"
    """Verify policy."""
    rounds_per_dispatch: int = ENGINE.rounds_per_dispatch
    """Rounds before the host reads tokens: the first token is seen with those of its first dispatch."""
    repeats: int = 11
    """Conversations, each answered by both engines."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations."""
    output: Path = Path("docs/results/prefix_reuse.json")
    """The summary."""

    def __post_init__(self) -> None:
        if self.answer + self.question >= self.tokens:
            raise UserError("The first prompt would be empty; give --tokens beyond --answer and --question together.")


@dataclass(frozen=True)
class Turn:
    """A turn's answer, and the seconds from `submit` to the first tokens that the caller sees, by the wall's clock and
    of the CPU."""

    generation: Generation
    seconds: float
    cpu_seconds: float


@program
def main(argv: list[str]) -> None:
    settings = parse(PrefixReuseSettings, argv, description=__doc__)
    make_output(settings.output.parent)
    announce(settings.dtype)
    target = load_target(settings.target, dtype=settings.dtype, tokenizer=False)
    drafter = load_drafter(settings.drafter, target, dtype=settings.dtype) if settings.drafter else None

    config = EngineConfig(
        slots=1,
        longest=min(settings.tokens + settings.answer, target.config.max_positions),
        policy=settings.policy,
        rounds_per_dispatch=settings.rounds_per_dispatch,
        prefill_chunk=settings.prefill_chunk,
    )
    # Without stop tokens each answer has its full length, in both engines.
    sampling = SamplingParams(settings.answer, stop_tokens=())
    whole = Engine(target, drafter, config, sampling)
    kept = Engine(target, drafter, replace(config, prefix_cache=settings.prefix_cache), sampling)

    # The first conversation compiles, and is not counted.
    rng = np.random.default_rng(0)
    pairs: list[tuple[Turn, Turn]] = []
    for number in range(settings.repeats + 1):
        # New ids each time, so that nothing of an earlier conversation is reused.
        first = rng.integers(0, target.config.vocab_size, settings.tokens - settings.answer - settings.question)
        question = rng.integers(0, target.config.vocab_size, settings.question)
        # By turns: the second of a pair runs on a warmer machine.
        engines = (whole, kept) if number % 2 else (kept, whole)
        made = {id(engine): second_turn(engine, first.tolist(), question.tolist()) for engine in engines}
        pairs.append((made[id(whole)], made[id(kept)]))

    report(settings, pairs[1:])


def second_turn(engine: Engine, first: list[int], question: list[int]) -> Turn:
    """Answer a conversation's first prompt, then the second, which begins with all of it."""
    # The first turn leaves its chunks behind, where the engine keeps any.
    answer = timed(engine, first).generation
    # Few new tokens: the answer of the second turn is compared, not timed.
    room = (engine.config.longest or 0) - len(first) - len(answer.tokens) - len(question)
    return timed(engine, [*first, *answer.tokens, *question], min(8, room))


def timed(engine: Engine, prompt: list[int], new: int | None = None) -> Turn:
    """Run one request alone."""
    sampling = engine.sampling if new is None else replace(engine.sampling, max_new_tokens=new)
    # The clock includes the submission, as a client's would.
    started, spent, first = time.perf_counter(), time.process_time(), None
    engine.submit(0, Request(prompt, sampling))
    while True:
        for progress in engine.step():
            # The first progress brings the prefill's token, whose time is what reuse saves.
            first = first or (time.perf_counter() - started, time.process_time() - spent)
            if progress.generation is not None:
                return Turn(progress.generation, *first)


def report(settings: PrefixReuseSettings, pairs: list[tuple[Turn, Turn]]) -> None:
    """Print and write the medians.

    Raises:
        UserError: answers that differ, after the figures.
    """
    seconds = [statistics.median(pair[i].seconds for pair in pairs) for i in (0, 1)]
    # Ratios of pairs: what slows the machine for a while slows both.
    ratios = sorted(kept.seconds / whole.seconds for whole, kept in pairs)
    by_cpu = sorted(kept.cpu_seconds / whole.cpu_seconds for whole, kept in pairs)
    # Equal token for token: a kept chunk has the very bits that prefilling would give (docs/algorithm.md, rule 116).
    same = sum(whole.generation == kept.generation for whole, kept in pairs)
    facts: dict[str, Any] = {
        "conversations": len(pairs),
        "prompt tokens of the second turn": len(pairs[0][0].generation.prompt_tokens),
        "of them kept": pairs[0][1].generation.cached_tokens,
        "milliseconds to the first token, whole prefill": round(1000 * seconds[0], 1),
        "milliseconds to the first token, kept prefix": round(1000 * seconds[1], 1),
        "median ratio": round(statistics.median(ratios), 3),
        "ratios from and to": [round(ratios[0], 3), round(ratios[-1], 3)],
        "median ratio of CPU seconds": round(statistics.median(by_cpu), 3),
        "ratios of CPU seconds from and to": [round(by_cpu[0], 3), round(by_cpu[-1], 3)],
        "identical answers": f"{same}/{len(pairs)}",
    }
    shown = {name: str(value) for name, value in asdict(settings).items()}
    # Before the check, so that a fault leaves its figures.
    write_json(settings.output, {"settings": shown, "machine": machine(), **facts})

    print(table(("second turns", ""), [(name, str(value)) for name, value in facts.items()]))
    if same < len(pairs):
        raise UserError(
            "Answers with a kept prefix differ from those of whole prefills; that is a fault of the engine."
        )


if __name__ == "__main__":
    main()
