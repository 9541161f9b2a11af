"""Decodes the same prompts with this engine, with transformers and with llama.cpp, in alternating runs.

    make real-target && pip install xllamacpp
    python -m infer.studies.runtimes --prompts runs/demo/heldout.jsonl --per-domain 4

One request at a time, greedy, prefill included. transformers runs the same float32 weights on PyTorch: alone, with
prompt lookup, and assisted by its own first layers (there is no smaller sibling to assist it). llama.cpp runs the GGUF
file as it is, with 4-bit products of its own, so its answers may differ. Ways that are not installed are left out.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.gguf import gguf_file
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.errors import UserError
from dspark_jax.evaluation.acceptance import Acceptance
from dspark_jax.evaluation.timing import Decoder, Timed, alternate, median_ratio, median_speed
from dspark_jax.files import make_output, write_json
from dspark_jax.report import table
from dspark_jax.serving.prompts import EncodedPrompt, read_prompts
from dspark_jax.serving.requests import Generation
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig

from ..bench import TransformersDecoder


@dataclass(frozen=True)
class RuntimeSettings:
    """Compares this engine with transformers and llama.cpp on one target."""

    prompts: tuple[Path, ...]
    """JSONL files of conversations or evaluation prompts."""
    target: str = ".cache/real_target"
    """Folder, GGUF file or hub id of the target; llama.cpp takes part where it is a GGUF file."""
    drafter: str = "assets/smollm2_135m_drafter"
    """Folder of the drafter."""
    per_domain: int = 4
    """Prompts taken of each domain."""
    max_new_tokens: int = 64
    """Longest answer."""
    repeats: int = 3
    """Alternations."""
    lookup: int = 4
    """Tokens that transformers' prompt lookup proposes at a time."""
    early_exit: int = 10
    """Layers of the target that assist it in transformers' assisted generation."""
    result: Path = Path("docs/results/runtimes.json")
    """The figures."""


@program
def main(argv: list[str]) -> None:
    settings = parse(RuntimeSettings, argv, description=__doc__)
    make_output(settings.result.parent)
    announce("float32")
    ways, prompts = all_ways(settings)
    runs = alternate({name: partial(way, prompts) for name, way in ways.items()}, settings.repeats)

    # Every way is greedy in float32, so tokens that differ are near-ties, or 4-bit products in llama.cpp's case.
    expected = [generation.tokens for generation in runs["plain"][0].generations]
    rows = {name: row_of(made, runs["plain"], expected) for name, made in runs.items()}
    # Of one run: the others repeat its tokens.
    rows["speculative"]["tau"] = Acceptance.of(runs["speculative"][0].generations).tau

    write_json(settings.result, {"ways": rows, "prompts": len(prompts), "machine": machine()})
    body = [
        [name, f"{row['tokens_per_second']:.1f}", f"{row['over_plain']:.2f}", f"{row['identical']}/{len(prompts)}"]
        for name, row in rows.items()
    ]
    print(f"\n{table(['way', 'tok/s', 'over plain', 'same tokens'], body)}\n{settings.result}")


def all_ways(
    settings: RuntimeSettings,
) -> tuple[dict[str, Callable[[Sequence[EncodedPrompt]], Timed]], list[EncodedPrompt]]:
    """The ways of decoding by name, and the prompts."""
    # float32 throughout: the comparison is of runtimes, and half precision differs among them.
    target = load_target(settings.target, dtype="float32")
    drafter = load_drafter(settings.drafter, target, dtype="float32")
    prompts = read_prompts(target, settings.prompts, settings.per_domain)

    # Rounded up, as the engine's bucket would be; llama.cpp gets the same context.
    longest = -(-(max(len(prompt.tokens) for prompt in prompts) + settings.max_new_tokens) // 64) * 64
    sampling = SamplingParams(settings.max_new_tokens, 0.0)
    # One slot, since the other runtimes decode one request at a time; long dispatches, since nothing is streamed.
    engine = EngineConfig(1, longest, rounds_per_dispatch=64, smallest_prompt_bucket=64)
    ways: dict[str, Callable[[Sequence[EncodedPrompt]], Timed]] = {
        "plain": Decoder(target, None, sampling, engine),
        "speculative": Decoder(target, drafter, sampling, engine),
    }

    try:
        # Optional packages: a way that is missing here is named and left out, the others are still compared.
        alone = TransformersDecoder.load(settings.target, "float32", settings.max_new_tokens)
        ways["transformers"] = alone
        ways["transformers, prompt lookup"] = alone.having(prompt_lookup_num_tokens=settings.lookup)
        ways["transformers, assisted"] = alone.having(assistant_early_exit=settings.early_exit)
    except UserError as error:
        print(f"Left out: {error}")

    try:
        ways["llama.cpp"] = LlamaCpp.load(settings.target, target.tokenizer, longest, settings.max_new_tokens)
    except UserError as error:
        print(f"Left out: {error}")
    return ways, prompts


def row_of(made: Sequence[Timed], plain: Sequence[Timed], expected: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Figures of one way; `expected` are the tokens of this engine's plain decoding."""
    # Of one run: greedy decoding repeats its tokens.
    found = [generation.tokens for generation in made[0].generations]
    return {
        "tokens_per_second": median_speed(made),
        # By pairs of alternating runs, so that a change in the machine's load reaches both.
        "over_plain": median_ratio(made, plain),
        "identical": sum(a == b for a, b in zip(found, expected, strict=True)),
    }


@dataclass(frozen=True)
class LlamaCpp:
    """Greedy decoding by llama.cpp, one request at a time, through the package xllamacpp."""

    server: Any
    tokenizer: Any
    max_new_tokens: int

    @classmethod
    def load(cls, target: str, tokenizer: Any, longest: int, max_new_tokens: int) -> "LlamaCpp":
        """A server in this process for the target's GGUF file.

        Args:
            target: file, or folder with one.
            tokenizer: the target's.
            longest: positions of its context.
            max_new_tokens: longest answer.
        Raises:
            UserError: the target is not a GGUF file, or the package is not installed.
        """
        # llama.cpp reads the file itself; the weights that were loaded here are of no use to it.
        file = gguf_file(target)
        if file is None:
            raise UserError(f"{target} is no GGUF file, which llama.cpp needs.")
        try:
            import xllamacpp
        except ImportError:
            raise UserError("llama.cpp is not installed; `pip install xllamacpp` gives it.") from None

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        # One sequence with the whole context, as the engine has one slot.
        params.n_ctx, params.n_parallel = longest, 1
        # Its log, a dozen lines for each request, would bury the table.
        params.verbosity = 0
        return cls(xllamacpp.Server(params), tokenizer, max_new_tokens)

    def __call__(self, prompts: Sequence[EncodedPrompt]) -> Timed:
        start, answers, made = time.perf_counter(), [], list[Generation]()
        for prompt in prompts:
            # Token ids and no text: its own tokenizer might split the prompt in another way.
            asked = {"prompt": list(prompt.tokens), "max_tokens": self.max_new_tokens, "temperature": 0.0}
            # Without its prompt cache, so that each run prefills as the others do.
            answers.append(self.server.handle_completions({**asked, "cache_prompt": False})["choices"][0])
        seconds = time.perf_counter() - start

        # Its answers are texts, so their tokens are made again, with the stop token that a text leaves out. Tokens are
        # all that the comparison reads; llama.cpp has no rounds to count.
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = self.tokenizer.encode(answer["text"], add_special_tokens=False)
            ids += [self.tokenizer.eos_token_id] if answer["finish_reason"] == "stop" else []
            made.append(Generation(i, prompt.tokens, tuple(ids), "", "", 0, 0, (), (), ()))
        return Timed(tuple(made), seconds)


if __name__ == "__main__":
    main()
