"""Decodes prompts with a target, plainly or with a drafter, and streams the text as it comes.

python -m infer.generate --target assets/embedded_target --drafter assets/embedded_drafter --prompt "..."
python -m infer.generate --target Qwen/Qwen3-4B --prompts-file questions.jsonl --output answers.jsonl
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import announce
from dspark_jax.errors import UserError
from dspark_jax.evaluation.acceptance import Acceptance
from dspark_jax.files import make_output, write_atomically
from dspark_jax.programs import EMBEDDED
from dspark_jax.serving.generate import stream
from dspark_jax.serving.policies import PolicyName, policy_named
from dspark_jax.serving.prompts import Prompt, encode, read_prompts
from dspark_jax.serving.requests import DecodeConfig, Generation, Request


@dataclass(frozen=True)
class GenerateSettings:
    """Decodes prompts, plainly or with a drafter."""

    target: str = ""
    """Folder or hub id of the target, or `embedded`; empty: the pair that comes with this package."""
    drafter: str = ""
    """Folder or hub id of the drafter; empty: plain decoding."""
    prompt: tuple[str, ...] = ()
    """What the user says, one conversation each."""
    prompts_file: tuple[Path, ...] = ()
    """JSONL files of conversations or of evaluation prompts ({"turns": [...]})."""
    output: Path | None = None
    """JSONL file for the answers, one a line, written when all are done."""
    system: str = ""
    """System message put before --prompt."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    """1: off."""
    min_p: float = 0.0
    """0: off."""
    seed: int = 0
    slots: int = 8
    """Requests decoded at once."""
    verify_length: int | None = None
    """Drafts verified a round; None: the whole block."""
    policy: PolicyName = "fixed"
    """How many drafts are verified: fixed, threshold, or one that weighs what a draft costs on this machine."""
    confidence_threshold: float = 0.5
    """Of the threshold policy: the drafts before the first whose confidence is below this are verified."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights and activations; None: as the target's config says."""
    thinking: bool = False
    """Let the chat template open with thinking."""

    def decode_config(self) -> DecodeConfig:
        return DecodeConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            slots=self.slots,
            verify_length=self.verify_length,
            policy=policy_named(self.policy, self.confidence_threshold),
        )


@program
def main(argv: list[str]) -> None:
    settings = parse(GenerateSettings, argv, description=__doc__)
    if bool(settings.prompt) == bool(settings.prompts_file):
        raise UserError("Give what to decode in one way: --prompt TEXT, or --prompts-file FILE.jsonl.")
    if settings.output is not None:
        make_output(settings.output.parent)
    if not settings.target:
        settings = replace(settings, target=EMBEDDED, drafter=settings.drafter or EMBEDDED)
    announce(settings.dtype)
    target = load_target(settings.target, dtype=settings.dtype)
    drafter = load_drafter(settings.drafter, target, dtype=settings.dtype) if settings.drafter else None
    if settings.prompts_file:
        prompts = read_prompts(target, settings.prompts_file, thinking=settings.thinking)
    else:
        before = [{"role": "system", "content": settings.system}] if settings.system else []
        turns = [[*before, {"role": "user", "content": text}] for text in settings.prompt]
        prompts = [Prompt(str(i), "prompt", encode(target, t, settings.thinking)) for i, t in enumerate(turns)]
    requests = [Request(prompt.tokens) for prompt in prompts]
    started, done = time.perf_counter(), {}
    for progress in stream(target, drafter, requests, settings.decode_config()):
        if len(prompts) == 1:
            _show(target.tokenizer.decode([t for t in progress.tokens if t not in target.stop_tokens]))
        if progress.generation is not None:
            done[progress.index] = progress.generation
            if len(prompts) > 1:
                _show(f"--- {prompts[progress.index].id}\n{progress.generation.text}\n")
    seconds = time.perf_counter() - started
    generations = [done[i] for i in range(len(prompts))]
    if settings.output is not None:
        _write(settings.output, prompts, generations)
    print(f"\n{summary(generations, seconds)}")


def summary(generations: list[Generation], seconds: float) -> str:
    tokens = sum(len(g.tokens) for g in generations)
    line = f"{len(generations)} requests, {tokens} tokens in {seconds:.2f} s, compilation included"
    counts = Acceptance.of(generations)
    return f"{line}; {counts.rounds} rounds, accepted length {counts.tau:.2f}"


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write(path: Path, prompts: list[Prompt], generations: list[Generation]) -> None:
    rows = []
    for prompt, generation in zip(prompts, generations, strict=True):
        fields = {k: v for k, v in asdict(generation).items() if k not in ("index", "prompt_tokens")}
        rows.append(json.dumps({"id": prompt.id, "domain": prompt.domain, **fields}))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "\n".join(rows) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give an output that can.") from None


if __name__ == "__main__":
    main()
