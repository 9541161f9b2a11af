"""DSpark against MTP-1 on a tiny DeepSeek-V4 target: loss and accepted length in training, accepted length held out.

    python -m train.studies.v4_tiny --output runs/v4_tiny --results docs/results/v4_tiny.json

Trains the target (`train.embedded.v4_target`) and both drafters by their configurations, then decodes held-out prompts
in the compiled loop, verifying whole blocks, at temperatures 1 and 0. Minutes on two cores; parts that are finished are
kept, so that the same command continues.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dspark_jax.config.cli import load_config, parse, program
from dspark_jax.config.schema import TrainConfig
from dspark_jax.devices import machine
from dspark_jax.errors import UserError
from dspark_jax.files import make_output, write_json
from dspark_jax.report import table
from dspark_jax.training.run_folder import read_records

from .compare import run
from .compare_point import train_and_decode
from .compare_report import TEMPERATURES, acceptance

KINDS = ("dspark", "mtp")


@dataclass(frozen=True)
class V4TinySettings:
    """Trains a tiny V4 target with both of its drafters, and decodes held-out prompts."""

    output: Path = Path("runs/v4_tiny")
    """Folder of the target and the runs."""
    results: Path | None = None
    """JSON file of the figures, beside metrics.json in the output folder."""
    target_steps: int = 300
    """Optimizer steps of the target."""
    steps: int = 200
    """Optimizer steps of each drafter."""
    heldout: int = 30
    """Held-out prompts."""
    max_new_tokens: int = 64
    """Longest answer."""
    samples: int = 1
    """Times that each prompt is decoded at temperature 1."""


@program
def main(argv: list[str]) -> None:
    settings = parse(V4TinySettings, argv, description=__doc__)
    if min(settings.target_steps, settings.steps, settings.heldout, settings.samples) < 1:
        raise UserError("--target-steps, --steps, --heldout and --samples are 1 or more.")
    make_output(settings.output)

    # The prompts are written last, when the target is whole.
    if not (settings.output / "heldout.jsonl").exists():
        run(
            *("train.embedded.v4_target", "--output", settings.output, "--steps", settings.target_steps),
            *("--heldout", settings.heldout),
        )

    found = {kind: point(settings, kind) for kind in KINDS}
    about = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    metrics = {**found, "machine": machine(), "settings": about}
    for path in (settings.output / "metrics.json", settings.results):
        if path is not None:
            make_output(path.parent)
            write_json(path, metrics)
    print(shown(found))


def drafter_config(settings: V4TinySettings, kind: str) -> TrainConfig:
    """The configuration of a drafter on the study's target."""
    config = load_config(f"deepseek_v4_tiny_{kind}")
    assert isinstance(config, TrainConfig)
    data = replace(config.data, conversations=str(settings.output / "conversations.jsonl"))
    return replace(
        config,
        target=str(settings.output / "target"),
        data=data,
        run_dir=str(settings.output / kind),
        max_steps=settings.steps,
        log_every=min(config.log_every, settings.steps),
    )


def point(settings: V4TinySettings, kind: str) -> dict[str, Any]:
    """Loss and expected accepted length by step, and the accepted length of held-out prompts, of one drafter."""
    config = drafter_config(settings, kind)
    prompts, words = settings.output / "heldout.jsonl", {"max_new_tokens": settings.max_new_tokens}
    result = train_and_decode(config, prompts, samples=settings.samples, **words)

    # Pooled over all prompts: they are of one domain, arithmetic.
    heldout: dict[str, Any] = {}
    for key in TEMPERATURES:
        (decoded,) = acceptance(result, key).values()
        heldout[f"tau_{key}"] = decoded.tau
        heldout[f"conditional_{key}"] = [float(rate) for rate in decoded.conditional]

    records = read_records(Path(config.run_dir) / "metrics.jsonl")
    training = [{name: r[name] for name in ("step", "loss", "tau_probabilistic")} for r in records if "loss" in r]
    return {"training": training, "heldout": heldout, "parameters": result["parameters"]}


def shown(found: dict[str, dict[str, Any]]) -> str:
    """Training by step, then the held-out prompts."""
    steps = [record["step"] for record in found[KINDS[0]]["training"]]
    curves = {kind: {r["step"]: r for r in found[kind]["training"]} for kind in KINDS}
    body = []
    for step in steps:
        figures = [curves[kind][step][name] for kind in KINDS for name in ("loss", "tau_probabilistic")]
        body.append([str(step), *(f"{figure:.2f}" for figure in figures)])

    header = ["step", *(f"{kind}: {name}" for kind in KINDS for name in ("loss", "tau"))]
    heldout = [[kind, *(f"{found[kind]['heldout'][f'tau_{key}']:.2f}" for key in TEMPERATURES)] for kind in KINDS]
    return f"{table(header, body)}\n\n{table(['held out, tau', *TEMPERATURES], heldout)}"


if __name__ == "__main__":
    main()
