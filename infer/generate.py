"""Decodes prompts with a target, plainly or with a drafter, and streams the text.

python -m infer.generate --target assets/embedded_target --drafter assets/embedded_drafter --prompt "..."
python -m infer.generate --target Qwen/Qwen3-4B --prompts questions.jsonl --output answers.jsonl
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import Weights, load_target
from dspark_jax.config.cli import FLAT, parse, program
from dspark_jax.devices import announce
from dspark_jax.errors import UserError
from dspark_jax.evaluation.acceptance import Acceptance
from dspark_jax.files import lock_descriptor, make_output
from dspark_jax.programs import EMBEDDED
from dspark_jax.serving.generate import drain, engine_for
from dspark_jax.serving.prompts import EncodedPrompt, encode, read_prompts
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target

from .meshes import mesh_named


@dataclass(frozen=True)
class GenerateSettings:
    """Decodes prompts, plainly or with a drafter."""

    target: str = ""
    """Folder or hub id of the target, or `embedded`; empty: the pair that comes with this package."""
    drafter: str = ""
    """Folder or hub id of the drafter; empty: plain decoding."""
    prompt: tuple[str, ...] = ()
    """User messages, each a conversation of its own."""
    prompts: tuple[Path, ...] = ()
    """JSONL files of conversations or of evaluation prompts ({"turns": [...]})."""
    output: Path | None = None
    """JSONL file for the answers, one a line, in the order in which they end."""
    system: str = ""
    """System message put before --prompt."""
    thinking: bool = False
    """Let the chat template open with thinking, where it has such a switch."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of weights and activations; None: float32 on a CPU, else the target's own. In bfloat16 a greedy answer may
    differ from plain decoding at a near-tie."""
    weights: Weights = "stored"
    """int8, fp8: the layers' matrices of both models so, with a scale for each output; it may change what is said."""
    mesh: str = ""
    """Devices along the mesh axes, all of them, as in tensor=8; empty: one device."""
    sampling: Annotated[SamplingParams, FLAT] = SamplingParams()
    engine: Annotated[EngineConfig, FLAT] = EngineConfig()


@program
def main(argv: list[str]) -> None:
    settings = parse(GenerateSettings, argv, description=__doc__)
    if bool(settings.prompt) == bool(settings.prompts):
        raise UserError("Give what to decode in one way: --prompt TEXT, or --prompts FILE.jsonl.")
    # Tried before anything is loaded or decoded.
    if settings.output is not None:
        make_output(settings.output.parent)
    # Without a target the whole pair that comes with the package is meant.
    if not settings.target:
        settings = replace(settings, target=EMBEDDED, drafter=settings.drafter or EMBEDDED)

    dtype = announce(settings.dtype)
    form: dict[str, Any] = {"dtype": dtype, "weights": settings.weights, "mesh": mesh_named(settings.mesh)}
    target = load_target(settings.target, **form)
    drafter = load_drafter(settings.drafter, target, **form) if settings.drafter else None
    prompts = prompts_of(settings, target)

    requests = [Request(prompt.tokens) for prompt in prompts]
    engine = engine_for(target, drafter, requests, settings.sampling, settings.engine)
    if engine is None:
        return

    # On stderr, so that stdout holds answers alone.
    print(engine.why, file=sys.stderr)

    started, done = time.perf_counter(), list[Generation]()
    with Answers(settings.output, prompts) as answers:
        for progress in drain(engine):
            # Text of several requests would interleave: then each answer is shown as it ends.
            if len(prompts) == 1:
                _show(progress.text)
            if progress.generation is not None:
                done.append(progress.generation)
                answers.add(progress.generation)
                if len(prompts) > 1:
                    _show(f"--- {prompts[progress.index].id}\n{progress.generation.text}\n")

    print(f"\n{summary(done, time.perf_counter() - started)}")


def prompts_of(settings: GenerateSettings, target: Target) -> list[EncodedPrompt]:
    """The prompts of the files, or of --prompt, encoded."""
    if settings.prompts:
        return read_prompts(target, settings.prompts, thinking=settings.thinking)
    before = [{"role": "system", "content": settings.system}] if settings.system else []
    # Each --prompt is a conversation of its own, not one turn after another.
    turns = [[*before, {"role": "user", "content": text}] for text in settings.prompt]
    return [EncodedPrompt(str(i), "prompt", encode(target, turn, settings.thinking)) for i, turn in enumerate(turns)]


class Answers:
    """The file of answers, written as each one ends: an interrupt loses only those under way."""

    def __init__(self, path: Path | None, prompts: Sequence[EncodedPrompt]):
        self.path, self.prompts = path, prompts
        self._file: TextIO | None = None
        self._count = 0

    def __enter__(self) -> "Answers":
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            except OSError as error:
                raise UserError(f"{self.path} cannot be written ({error.strerror}); give an output that can.") from None
            # Emptied under the lock: another process may be writing its answers there.
            lock_descriptor(self._file.fileno(), self.path, "the answers")
            if self.path.is_file():
                self._file.truncate(0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._file is not None:
            self._file.close()
        if kind is not None and self._count:
            print(
                f"\n{self._count} of {len(self.prompts)} answers had ended; they are in {self.path}.", file=sys.stderr
            )

    def add(self, generation: Generation) -> None:
        """Writes one answer and flushes it."""
        if self._file is None:
            return
        prompt = self.prompts[generation.index]
        # The prompt's tokens would make up most of the file, and follow from the prompt.
        fields = {name: value for name, value in asdict(generation).items() if name != "prompt_tokens"}
        self._file.write(json.dumps({"id": prompt.id, "domain": prompt.domain, **fields}) + "\n")
        self._file.flush()
        self._count += 1


def summary(generations: Sequence[Generation], seconds: float) -> str:
    tokens = sum(len(g.tokens) for g in generations)
    line = f"{len(generations)} requests, {tokens} tokens in {seconds:.2f} s, compilation included"
    counts = Acceptance.of(generations)
    return f"{line}; {counts.rounds} rounds, accepted length {counts.tau:.2f}"


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
