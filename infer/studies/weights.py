"""Compares a pair with its matrices in 8 bits with the pair as it is stored: logits, texts and accepted length.

    python -m infer.studies.weights
    python -m infer.studies.weights --name real --target .cache/real_target --drafter FOLDER --prompts questions.jsonl

Target and drafter are kept in the same form. Logits are those of the stored target's greedy answers, read by each
target. Accepted lengths are of whole blocks; no times are taken. Without --prompts the held-out prompts of the embedded
corpora are used. Writes docs/results/weights.json, where pairs come beside each other, by --name.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.evaluation.acceptance import Acceptance
from dspark_jax.evaluation.timing import Decoder
from dspark_jax.files import add_results, make_output
from dspark_jax.report import table
from dspark_jax.serving.prompts import EncodedPrompt
from dspark_jax.serving.requests import Generation
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.target import Target

from .heldout import heldout_prompts

KINDS: tuple[Literal["stored", "int8", "fp8"], ...] = ("stored", "int8", "fp8")


@dataclass(frozen=True)
class WeightsSettings:
    """Compares weights in 8 bits with the stored ones."""

    target: str = "assets/embedded_target"
    """Folder, GGUF file or hub id of the target."""
    drafter: str = "assets/embedded_drafter"
    """Folder of the drafter."""
    name: str = "embedded"
    """The pair's name in the results; those of other pairs there are kept."""
    prompts: tuple[Path, ...] = ()
    """JSONL files of prompts. None given: held-out prompts of the embedded corpora."""
    per_domain: int = 8
    """Prompts of each domain or file."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """0: greedy, which must be among them: logits are read along greedy answers."""
    max_new_tokens: int = 64
    """Longest answer."""
    slots: int = 8
    """Requests decoded at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations, and of weights that are not in 8 bits."""
    results: Path = Path("docs/results/weights.json")

    def __post_init__(self) -> None:
        if 0.0 not in self.temperatures:
            raise UserError(f"The temperatures are {list(self.temperatures)}; expected 0 among them.")


@program
def main(argv: list[str]) -> None:
    settings = parse(WeightsSettings, argv, description=__doc__)
    make_output(settings.results.parent, settings.results)
    announce(settings.dtype)

    made = measured(settings)
    add_results(settings.results, {settings.name: made})
    header = [
        "weights",
        "MB",
        *(f"tau, t = {t:g}" for t in settings.temperatures),
        "same best token",
        "KL, nats",
        "texts",
    ]
    print(table(header, [table_row(settings, kind, made[kind]) for kind in KINDS]))


def measured(settings: WeightsSettings) -> dict[str, Any]:
    """Figures of each kind of weights, one pair after the other in memory."""
    shown = {name: str(value) for name, value in asdict(settings).items() if name != "results"}
    sets = " ".join(path.stem for path in settings.prompts)
    made: dict[str, Any] = {"settings": shown | {"prompts": sets}, "machine": machine()}
    stored: tuple[Generation, ...] = ()
    expected = np.empty(0)
    for kind in KINDS:
        target = load_target(settings.target, dtype=settings.dtype, weights=kind)
        drafter = load_drafter(settings.drafter, target, dtype=settings.dtype, weights=kind)
        prompts = heldout_prompts(target, settings.prompts, settings.per_domain)
        answers = {t: decoded(settings, target, drafter, prompts, t) for t in settings.temperatures}
        # The stored pair comes first: the others read its answers.
        stored = stored or answers[0.0]
        logits = [read_logits(target, p, g.tokens) for p, g in zip(prompts, stored, strict=True)]
        expected = np.concatenate(logits) if kind == KINDS[0] else expected

        counts = {t: Acceptance.of(found) for t, found in answers.items()}
        made[kind] = {
            "megabytes": sum(x.nbytes for x in jax.tree.leaves((target.params, drafter.params))) / 1e6,
            **{f"t{t:g}": {"tau": found.tau, "rounds": found.rounds} for t, found in counts.items()},
            "prompts": len(prompts),
            "texts_as_stored": sum(a.tokens == b.tokens for a, b in zip(answers[0.0], stored, strict=True)),
            "logits": compared(np.concatenate(logits), expected),
        }
        del target, drafter
    return made


def decoded(
    settings: WeightsSettings, target: Target, drafter: Drafter, prompts: Sequence[EncodedPrompt], temperature: float
) -> tuple[Generation, ...]:
    """The answers, in whole blocks."""
    longest = max(len(prompt.tokens) for prompt in prompts) + settings.max_new_tokens
    engine = EngineConfig(settings.slots, longest, "fixed", smallest_prompt_bucket=64)
    sampling = SamplingParams(settings.max_new_tokens, temperature, seed=0)
    return Decoder(target, drafter, sampling, engine)(prompts).generations


def read_logits(target: Target, prompt: EncodedPrompt, answer: Sequence[int]) -> np.ndarray:
    """[tokens of the answer, V] float32 logits that decide each of them, by one pass without a cache."""
    model, tokens = target.model(target.params), jnp.asarray([[*prompt.tokens, *answer[:-1]]])
    out = model(tokens, jnp.arange(tokens.shape[1])[None], CausalRows())
    return np.asarray(model.logits(out.hidden[0, len(prompt.tokens) - 1 :]), np.float32)


def compared(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """How far laws are from the expected ones, by logits [N, V]: in the mean of N tokens, and at most.

    `total_variation` is what a drafter that was right would lose of its acceptance at temperature 1.
    """
    laws = [logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True) for logits in (found, expected)]
    own, true = (law.astype(np.float64) for law in laws)
    divergence = (np.exp(true) * (true - own)).sum(axis=-1)
    return {
        "tokens": len(expected),
        "same_best_token": float((found.argmax(-1) == expected.argmax(-1)).mean()),
        "divergence_nats": float(divergence.mean()),
        "total_variation": float(0.5 * np.abs(np.exp(true) - np.exp(own)).sum(axis=-1).mean()),
        "largest_error": float(np.abs(found - expected).max()),
        "largest_logit": float(np.abs(expected).max()),
    }


def table_row(settings: WeightsSettings, kind: str, row: dict[str, Any]) -> list[Any]:
    taus = [f"{row[f't{t:g}']['tau']:.3f}" for t in settings.temperatures]
    logits, texts = row["logits"], f"{row['texts_as_stored']}/{row['prompts']}"
    shown = [f"{logits['same_best_token']:.4f}", f"{logits['divergence_nats']:.2e}", texts]
    return [kind, f"{row['megabytes']:.1f}", *taus, *shown]


if __name__ == "__main__":
    main()
