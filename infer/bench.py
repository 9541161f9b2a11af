"""Measures decoding: speculative against plain over prompts in domains, or plain against transformers' generate.

    python -m infer.bench --target embedded --drafter runs/demo/fit/drafter --prompts runs/demo/heldout.jsonl
    python -m infer.bench --target embedded --prompts runs/demo/heldout.jsonl --against transformers

Every figure is a median over alternating runs, after one for compilation; prefill is part of the time. Writes
metrics.json and, with a drafter, the plot of conditional acceptance by block position.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import Weights, load_target, resolve_folder
from dspark_jax.config.cli import FLAT, parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.evaluation.acceptance import Acceptance
from dspark_jax.evaluation.timing import Decoder, Timed, alternate, differences, median_ratio, median_speed
from dspark_jax.files import make_output, write_json
from dspark_jax.report import acceptance_plot, table
from dspark_jax.serving.prompts import EncodedPrompt, read_prompts
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target


@dataclass(frozen=True)
class BenchSettings:
    """Measures decoding speed and acceptance."""

    target: str
    """Folder or hub id of the target."""
    prompts: tuple[Path, ...]
    """JSONL files of conversations or evaluation prompts."""
    drafter: str = ""
    """Folder of the drafter."""
    against: Literal["plain", "transformers"] = "plain"
    """Comparison: speculative against plain decoding, or plain decoding against transformers' generate on PyTorch."""
    output: Path = Path("runs/bench")
    """Folder of metrics.json and the plots."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    repeats: int = 5
    """Alternations at the first temperature."""
    sampled_repeats: int = 1
    """Alternations at the other temperatures."""
    max_new_tokens: int = 96
    seed: int = 0
    limit: int = 0
    """Prompts taken of each domain; 0: all."""
    thinking: bool = False
    """Let the chat template open with thinking, where it has such a switch."""
    dtype: Literal["float32", "bfloat16"] | None = None
    weights: Weights = "stored"
    """int8, fp8: the layers' matrices of both models so, with a scale for each output; it may change what is said."""
    engine: Annotated[EngineConfig, FLAT] = EngineConfig(slots=1, rounds_per_dispatch=64, smallest_prompt_bucket=64)

    def sampling(self, temperature: float) -> SamplingParams:
        return SamplingParams(self.max_new_tokens, temperature, seed=self.seed)


@program
def main(argv: list[str]) -> None:
    settings = parse(BenchSettings, argv, description=__doc__)
    if settings.against == "plain" and not settings.drafter:
        raise UserError("There is nothing to compare: give --drafter DIR, or --against transformers.")
    # Checked before the target is loaded, which can take minutes.
    if min(settings.repeats, settings.sampled_repeats) < 1 or not settings.temperatures:
        raise UserError(
            "There is nothing to measure: repeats and sampled-repeats must be 1 or more, and a temperature given."
        )

    make_output(settings.output)
    dtype = announce(settings.dtype)
    target = load_target(settings.target, dtype=dtype, weights=settings.weights)
    prompts = read_prompts(target, settings.prompts, settings.limit or None, settings.thinking)
    if settings.against == "transformers":
        metrics = against_transformers(settings, target, prompts)
    else:
        drafter = load_drafter(settings.drafter, target, dtype=dtype, weights=settings.weights)
        metrics = against_plain(settings, target, drafter, prompts)
        acceptance_plot(settings.output / "conditional_acceptance.png", metrics["temperatures"])

    metrics["machine"] = machine()
    metrics["settings"] = asdict(settings)
    write_json(settings.output / "metrics.json", metrics)
    print(f"metrics and plots in {settings.output}")


def against_plain(
    settings: BenchSettings, target: Target, drafter: Drafter, prompts: Sequence[EncodedPrompt]
) -> dict[str, Any]:
    """Figures by temperature and domain: tau, acceptance by position, speeds, ratio, and (greedy) identical outputs.

    Args:
        settings: of the measurement.
        target: decodes plainly and verifies.
        drafter: of that target.
        prompts: with their domains.
    """
    domains = {name: [p for p in prompts if p.domain == name] for name in dict.fromkeys(p.domain for p in prompts)}
    metrics: dict[str, Any] = {"temperatures": {}}
    for i, temperature in enumerate(settings.temperatures):
        # One engine configuration for both ways: slots, lengths and buckets are the same.
        how = settings.sampling(temperature), settings.engine
        decoders: dict[str, Callable[[], Timed]] = {}
        for domain, group in domains.items():
            decoders[f"{domain}/plain"] = partial(Decoder(target, None, *how), group)
            decoders[f"{domain}/speculative"] = partial(Decoder(target, drafter, *how), group)

        # All domains and both ways in one alternation, so that drift of the machine affects all equally.
        runs = alternate(decoders, settings.repeats if i == 0 else settings.sampled_repeats)
        key = f"t{temperature:g}"
        metrics["temperatures"][key] = compare(target, domains, runs, greedy=temperature == 0)
        print(comparison_table(key, metrics["temperatures"][key]))

    return metrics


def compare(
    target: Target, domains: dict[str, list[EncodedPrompt]], runs: dict[str, list[Timed]], greedy: bool
) -> dict[str, Any]:
    """Figures of one temperature by domain, and under "all" for all domains together."""
    rows: dict[str, Any] = {}
    repeats = len(next(iter(runs.values())))
    # Run i of all domains together is the sum of their runs i, as if they had been one pass.
    whole = {
        name: [
            Timed(
                tuple(g for domain in domains for g in runs[f"{domain}/{name}"][i].generations),
                sum(runs[f"{domain}/{name}"][i].seconds for domain in domains),
            )
            for i in range(repeats)
        ]
        for name in ("plain", "speculative")
    }
    # All domains are one more row, of the same form.
    groups = {name: (group, runs[f"{name}/plain"], runs[f"{name}/speculative"]) for name, group in domains.items()}
    groups["all"] = ([p for group in domains.values() for p in group], whole["plain"], whole["speculative"])

    for name, (group, plain, speculative) in groups.items():
        rows[name] = {
            "prompts": len(group),
            "tokens": speculative[0].tokens,
            **asdict(Acceptance.of(speculative[0].generations)),
            "plain_tokens_per_second": median_speed(plain),
            "speculative_tokens_per_second": median_speed(speculative),
            "speculative_over_plain": median_ratio(speculative, plain),
            "ratios": [s.tokens_per_second / p.tokens_per_second for s, p in zip(speculative, plain, strict=True)],
        }
        # Sampled outputs differ in their draws by right, so only greedy ones are compared (docs/algorithm.md, rule 6).
        if greedy:
            found = differences(target, group, plain[0].generations, speculative[0].generations)
            rows[name]["identical"] = len(group) - len(found)
            rows[name]["differences"] = [asdict(difference) for difference in found]

    return rows


def comparison_table(key: str, rows: dict[str, Any]) -> str:
    header = ["domain", "tau", "accepted given the prefix, k = 1..", "plain tok/s", "spec. tok/s", "ratio", "identical"]
    body = []
    for name, row in rows.items():
        rates = " ".join(f"{rate:.2f}" for rate in row["conditional"])
        identical = f"{row['identical']}/{row['prompts']}" if "identical" in row else "-"
        speeds = [f"{row['plain_tokens_per_second']:.0f}", f"{row['speculative_tokens_per_second']:.0f}"]
        body.append([name, f"{row['tau']:.2f}", rates, *speeds, f"{row['speculative_over_plain']:.2f}", identical])

    return f"\ntemperature {key.removeprefix('t')}\n{table(header, body)}"


def against_transformers(settings: BenchSettings, target: Target, prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
    """Greedy plain decoding against `generate` of transformers on the same weights; figures for metrics.json."""
    # Greedy, so that both must give the same tokens: a faster wrong answer would show. In one dtype, without which the
    # comparison would be of two widths of weights and not of two programs.
    dtype = target.params["embed_weight_vd"].dtype.name
    reference = TransformersDecoder.load(settings.target, dtype, settings.max_new_tokens)
    decode = Decoder(target, None, settings.sampling(0.0), settings.engine)
    runs = alternate({"plain": lambda: decode(prompts), "transformers": lambda: reference(prompts)}, settings.repeats)
    mine, theirs = runs["plain"][0].generations, runs["transformers"][0].generations

    metrics = {
        "dtype": dtype,
        "plain_tokens_per_second": median_speed(runs["plain"]),
        "transformers_tokens_per_second": median_speed(runs["transformers"]),
        "plain_over_transformers": median_ratio(runs["plain"], runs["transformers"]),
        "ratios": [
            a.tokens_per_second / b.tokens_per_second for a, b in zip(runs["plain"], runs["transformers"], strict=True)
        ],
        "identical": sum(a.tokens == b.tokens for a, b in zip(mine, theirs, strict=True)),
        "prompts": len(prompts),
    }

    header = ["dtype of both", "plain tok/s", "transformers tok/s", "ratio", "identical"]
    speeds = [f"{metrics['plain_tokens_per_second']:.0f}", f"{metrics['transformers_tokens_per_second']:.0f}"]
    ratio = f"{metrics['plain_over_transformers']:.2f}"
    print(table(header, [[dtype, *speeds, ratio, f"{metrics['identical']}/{len(prompts)}"]]))

    return metrics


@dataclass(frozen=True)
class TransformersDecoder:
    """Greedy `generate` of transformers on the CPU, one request at a time; `options` are further arguments of it."""

    model: Any
    max_new_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, target: str, dtype: str, max_new_tokens: int) -> "TransformersDecoder":
        """The target in PyTorch; UserError where that is not installed."""
        try:
            import torch
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise UserError("Comparing with transformers needs PyTorch; install it with `make parity-env`.") from None

        # `eval`: a model in training mode would apply dropout, where its config has some.
        model = AutoModelForCausalLM.from_pretrained(resolve_folder(target), dtype=getattr(torch, dtype)).eval()
        return cls(model, max_new_tokens)

    def having(self, **options: Any) -> "TransformersDecoder":
        """The same model with further arguments of `generate`."""
        return replace(self, options={**self.options, **options})

    def __call__(self, prompts: Sequence[EncodedPrompt]) -> Timed:
        import time

        import torch

        from dspark_jax.serving.requests import Generation

        start, made = time.perf_counter(), []
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt.tokens])
            with torch.inference_mode():
                # One prompt, so there is no padding: the mask is all ones, and the pad id only silences a warning.
                out = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.max_new_tokens, do_sample=False,
                    pad_token_id=0, **self.options,
                )  # fmt: skip
            # `generate` returns the prompt too.
            tokens = tuple(out[0, len(prompt.tokens) :].tolist())
            # Only tokens are compared and counted; the engine's other fields have no counterpart.
            made.append(Generation(i, prompt.tokens, tokens, "", "", 0, 0, (), (), ()))

        return Timed(tuple(made), time.perf_counter() - start)


if __name__ == "__main__":
    main()
