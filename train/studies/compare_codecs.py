"""Compares codecs of the target cache: bytes a token, reading speed, and the accepted length of drafters.

    python -m train.studies.compare_codecs                                  small: one seed a codec, 300 steps
    python -m train.studies.compare_codecs --seeds 3 --steps 1000 --heldout 20 --samples 2

The target answers the embedded prompts once; each codec gets a cache of its hidden states, and drafters that differ in
the cache alone are trained from them and decode held-out prompts. The same command continues a stopped study.
OUTPUT/cache-CODEC are the caches, points/NAME the runs, NAME.json their figures; metrics.json and the table the result.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dspark_jax.checkpoints.huggingface import resolve_folder
from dspark_jax.config.cli import load_config, parse, program
from dspark_jax.config.schema import TrainConfig
from dspark_jax.config.sweep import Diff, apply_diff
from dspark_jax.data.manifest import Manifest
from dspark_jax.data.pipeline import Batches
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.data.views import Truncated
from dspark_jax.devices import machine
from dspark_jax.errors import UserError
from dspark_jax.evaluation.acceptance import COUNTS, macro_tau
from dspark_jax.files import require_same_settings, weights_hash, write_json, write_settings
from dspark_jax.readers import read_object
from dspark_jax.report import table
from dspark_jax.training.point_processes import Point, Runner, report_failures

from .compare import run
from .compare_report import TEMPERATURES, acceptance, estimate

CodecName = Literal["bfloat16", "float32", "float8_e4m3", "int8"]
REFERENCE = "bfloat16"
MAX_LENGTH = 256
READ_BATCH = 16
IDENTITY = ("conversations", "steps", "prompts", "heldout", "samples", "max_new_tokens")
"""Settings shared by all points of a study, beside the target."""


@dataclass(frozen=True)
class CodecSettings:
    """Trains and compares drafters from caches of several codecs."""

    target: str = "embedded"
    """Folder or hub id of the target."""
    output: Path = Path("runs/compare_codecs")
    """Folder of the study."""
    codecs: tuple[CodecName, ...] = ("bfloat16", "float8_e4m3", "int8")
    """Codecs to compare, bfloat16 among them."""
    conversations: str = ""
    """The target's answers in JSONL; empty: made here from the embedded prompts."""
    seeds: int = 1
    """Drafters of each codec."""
    steps: int = 300
    """Optimizer steps of each."""
    prompts: int = 100
    """Training prompts of each domain, where the answers are made here."""
    heldout: int = 8
    """Held-out prompts of each domain."""
    samples: int = 1
    """Times that each held-out prompt is decoded at temperature 1."""
    max_new_tokens: int = 128
    """Longest answer, in the data and held out."""
    passes: int = 5
    """Times that each cache is read to measure the speed."""
    jobs: int = 1
    """Drafters trained at once."""
    point: str = ""
    """Run this one point in this process."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "prompts", "heldout", "samples", "max_new_tokens", "passes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; at least 1 was expected.")
        if REFERENCE not in self.codecs:
            raise UserError(
                f"--codecs are {list(self.codecs)}; {REFERENCE}, which the others are held against, is not."
            )

    @property
    def answers(self) -> Path:
        return Path(self.conversations) if self.conversations else self.output / "conversations.jsonl"

    @property
    def prompts_file(self) -> Path:
        return self.output / "heldout.jsonl"

    def cache(self, codec: str) -> Path:
        return self.output / f"cache-{codec}"

    def result(self, codec: str, seed: int) -> Path:
        return self.output / "points" / f"{codec},seed={seed}.json"


@program
def main(argv: list[str]) -> None:
    settings = parse(CodecSettings, argv, description=__doc__)
    points = {
        settings.result(codec, seed).stem: (codec, seed) for seed in range(settings.seeds) for codec in settings.codecs
    }
    if settings.point:
        run_point(settings, points, settings.point)
        return

    # The points only read what this process has prepared.
    begin(settings)
    prepare(settings)
    jobs = [
        Point(name, ("train.studies.compare_codecs", *argv, "--point", name), settings.result(*key))
        for name, key in points.items()
    ]
    runner = Runner(settings.output / "logs", settings.jobs)
    failed = runner.run(jobs)
    report(settings, " ".join(["python -m train.studies.compare_codecs", *argv]))
    report_failures(failed, runner.logs)


def begin(settings: CodecSettings) -> None:
    """Refuses to mix two studies in one folder."""
    identity = {name: getattr(settings, name) for name in IDENTITY}
    identity |= {"weights_xxh3": weights_hash(resolve_folder(settings.target)), "counts": list(COUNTS)}
    path = settings.output / "study.json"
    if not require_same_settings(path, identity, settings.output):
        write_settings(path, identity, target=settings.target)


def prepare(settings: CodecSettings) -> None:
    """Makes held-out prompts, answers and a cache for each codec, by their programs; existing ones are kept."""
    if not settings.prompts_file.exists():
        run("train.embedded.corpora", "--limit", settings.heldout, "--output", settings.prompts_file)

    # Answers are only needed for caches that are still to be built.
    missing = [codec for codec in settings.codecs if not complete(settings.cache(codec))]
    if missing and not settings.conversations:
        run(
            *("train.prepare_data", "--target", settings.target, "--embedded-prompts", "code,chat,math"),
            *("--limit", settings.prompts, "--output", settings.answers, "--max-new-tokens", settings.max_new_tokens),
            *("--slots", 64, "--dtype", "float32"),
        )

    # One set of answers for all caches: they differ in the codec alone.
    layers = base_config().drafter.target_layer_ids
    for codec in missing:
        run(
            *("train.build_cache", "--target", settings.target, "--conversations", settings.answers),
            *("--output", settings.cache(codec), "--layers", *layers, "--codec", codec),
            *("--max-length", MAX_LENGTH, "--compute-dtype", "float32"),
        )


def complete(cache: Path) -> bool:
    return (cache / "manifest.json").exists() and Manifest.load(cache).complete


def base_config() -> TrainConfig:
    return load_config("embedded_dspark")


# Points


def run_point(settings: CodecSettings, points: Mapping[str, tuple[str, int]], name: str) -> None:
    # Imported here, so that the program that starts the points stays small.
    from .compare_point import train_and_decode

    if name not in points:
        raise UserError(f"The study has no point {name!r}; its points are {', '.join(points)}.")

    codec, seed = points[name]
    result = train_and_decode(
        point_config(settings, codec, seed),
        settings.prompts_file,
        max_new_tokens=settings.max_new_tokens,
        samples=settings.samples,
    )
    write_json(settings.result(codec, seed), {"codec": codec, "seed": seed, **result})


def point_config(settings: CodecSettings, codec: str, seed: int) -> TrainConfig:
    """The embedded recipe on a codec's cache; drafters with one seed differ in the cache alone."""
    name = settings.result(codec, seed).stem
    diff: Diff = {
        "name": name,
        "target": settings.target,
        "run_dir": str(settings.output / "points" / name),
        "data.cache": str(settings.cache(codec)),
        "seed": seed,
        "data.seed": seed,
        # Steps end the run, so that every codec's drafter sees the same sequences.
        "epochs": 1_000_000,
        "max_steps": settings.steps,
        "log_every": max(1, settings.steps // 20),
        "checkpoint.every_steps": max(1, settings.steps // 3),
        "checkpoint.keep": 1,
    }

    return apply_diff(base_config(), diff)


# Reading and the report


def reading(folder: Path, passes: int) -> dict[str, float]:
    """Median speed of reading a cache through the trainer's pipeline, with checksums and padding, files cached."""
    cache = TargetCache(folder)
    batches = Batches(Truncated(cache, MAX_LENGTH), READ_BATCH, seed=0, buckets=(MAX_LENGTH,))
    # Real tokens, not padded ones: the speed is that of the data.
    tokens, seconds = int(cache.lengths.sum()), []

    for _ in range(passes + 1):  # the first only brings the files into memory
        began = time.perf_counter()
        with batches.iterate(0, batches.steps_per_epoch) as iterator:
            for _batch in iterator:
                pass
        seconds.append(time.perf_counter() - began)

    speed = tokens / statistics.median(seconds[1:])
    return {"tokens_per_second": speed, "bytes_per_second": speed * cache.spec.token_bytes, "tokens": tokens}


def report(settings: CodecSettings, command: str) -> None:
    """Writes metrics.json and prints a table of the codecs with finished points."""
    found: dict[str, dict[int, dict[str, Any]]] = {codec: finished(settings, codec) for codec in settings.codecs}
    found = {codec: results for codec, results in found.items() if results}
    # Every codec is held against bfloat16 of the same seed, as far as that is finished.
    reference = found.get(REFERENCE, {})
    rows: dict[str, dict[str, Any]] = {}

    for codec, results in found.items():
        spec = TargetCache(settings.cache(codec)).spec
        share = spec.token_bytes / TargetCache(settings.cache(REFERENCE)).spec.token_bytes
        rows[codec] = {"bytes_per_token": spec.token_bytes, "share_of_bfloat16": share}
        rows[codec]["reading"] = reading(settings.cache(codec), settings.passes)
        for key in TEMPERATURES:
            rows[codec] |= accepted(key, results, reference)

        rows[codec]["train_loss"] = estimate([result["train_loss"] for result in results.values()])

    if not rows:
        return

    about = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items() if name != "point"}
    write_json(
        settings.output / "metrics.json", {"codecs": rows, "machine": machine(), "settings": about, "command": command}
    )
    print(codec_table(rows))
    print(f"Metrics are in {settings.output / 'metrics.json'}.")


def finished(settings: CodecSettings, codec: str) -> dict[int, dict[str, Any]]:
    paths = {seed: settings.result(codec, seed) for seed in range(settings.seeds)}
    return {seed: dict(read_object(path)) for seed, path in paths.items() if path.exists()}


def accepted(key: str, results: Mapping[int, Any], reference: Mapping[int, Any]) -> dict[str, Any]:
    """Accepted length, macro-averaged and by domain, and the share lost against bfloat16 with the same seed."""
    taus = {seed: macro_tau(acceptance(result, key)) for seed, result in results.items()}
    theirs = {seed: macro_tau(acceptance(reference[seed], key)) for seed in taus if seed in reference}
    # Paired by seed: the two drafters saw the same sequences, so their difference varies less than either.
    losses = [1 - taus[seed] / tau for seed, tau in theirs.items()]
    by_domain: dict[str, list[float]] = {}

    for result in results.values():
        for domain, found in acceptance(result, key).items():
            by_domain.setdefault(domain, []).append(found.tau)

    return {
        f"tau_{key}": estimate(list(taus.values())),
        f"tau_domains_{key}": {domain: estimate(values) for domain, values in by_domain.items()},
        f"tau_loss_{key}": estimate(losses) if losses else None,
    }


def codec_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    header = [
        "codec",
        "bytes/token",
        "of bfloat16",
        "read tokens/s",
        "read MB/s",
        "τ, T=1",
        "lost",
        "τ, greedy",
        "lost",
    ]
    lines = []

    for codec, row in rows.items():
        line = [codec, f"{row['bytes_per_token']:,}", f"{row['share_of_bfloat16']:.1%}"]
        line += [f"{row['reading']['tokens_per_second']:,.0f}", f"{row['reading']['bytes_per_second'] / 1e6:,.0f}"]
        for key in TEMPERATURES:
            # Three decimals: what a codec loses is smaller than what drafters differ by.
            line += [with_interval(row[f"tau_{key}"], "{:.3f}"), with_interval(row[f"tau_loss_{key}"], "{:.1%}")]
        lines.append(line)

    return table(header, lines)


def with_interval(value: Mapping[str, Any] | None, form: str) -> str:
    """A mean, with the half-width of its interval over seeds where there is more than one."""
    if value is None:
        return "-"
    mean = form.format(value["mean"])
    return mean if value["ci95"] is None else f"{mean} ± {form.format(value['ci95'])}"


if __name__ == "__main__":
    main()
