"""Trains the paper's drafters for one target at equal budget, decodes with them, and makes tables and figures.

    python -m train.studies.compare                          everything; about 45 minutes on two idle cores
    python -m train.studies.compare --only main              DSpark, DFlash, Eagle3 and MTP-1, 3 seeds each (Table 1)
    python -m train.studies.compare --only depth block       the curves over depth and block length (Figures 3 and 4)
    python -m train.studies.compare --results docs/results   also copies metrics, plots and the command there

Of another target, here the real one from copies of its layers, on conversations that it has answered before:

    python -m train.studies.compare --target .cache/real_target --recipe smollm2_135m_dspark --start target \\
        --only main --layers 1 8 15 22 28 --conversations assets/smollm2_135m_drafter/conversations.parquet

The target answers the embedded prompts once, and all points share one cache of its hidden states. Each point is a
process: it trains for the same steps on the same sequences, then decodes held-out prompts. The same command continues
a stopped study. OUTPUT/points/NAME is a run, NAME.json its figures; metrics.json and the plots are the results.
"""

import json
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dspark_jax.checkpoints.huggingface import read_hf_config, resolve_folder
from dspark_jax.config.cli import parse, program
from dspark_jax.config.schema import TrainConfig
from dspark_jax.config.sweep import Diff, part
from dspark_jax.data.conversations import file_rows
from dspark_jax.data.manifest import Manifest
from dspark_jax.errors import UserError
from dspark_jax.evaluation.acceptance import COUNTS
from dspark_jax.files import replacing, require_same_settings, weights_hash, write_json, write_settings
from dspark_jax.programs import program_command
from dspark_jax.readers import read_object
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.registry import read_target_config
from dspark_jax.training.guards import Preempted
from dspark_jax.training.point_processes import Point, Runner, report_failures

from .compare_report import publish, report
from .comparison import BLOCK, PAPER, PARTS, SHARED_LOSS, Part, StudyPoint, study_points

HEAD_COST = "head_cost"


POSITIVE = (
    "seeds", "steps", "depth", "block", "anchors", "batch", "max_length", "prompts", "heldout", "samples",
    "max_new_tokens",
)  # fmt: skip
"""Settings that are at least 1."""


@dataclass(frozen=True)
class CompareSettings:
    """Trains and compares drafters of one target."""

    target: str = "embedded"
    """Folder or hub id of the target."""
    recipe: str = "embedded_dspark"
    """Configuration of DSpark for this target, which all points start from."""
    output: Path = Path("runs/compare")
    """Folder of the study."""
    only: tuple[Literal["data", "main", "depth", "block", "next", "losses"], ...] = ()
    """Parts to run; none: those of the paper's figures. Points of earlier runs are reported too."""
    seeds: int = 3
    """Runs of each drafter in the main comparison; the curves have one."""
    steps: int = 1000
    """Optimizer steps of a point."""
    minutes: float = 0.0
    """Instead of --steps: as many as DSpark takes in this time on this machine, measured once."""
    depth: int = 2
    """Draft layers of DSpark and DFlash outside the curve over depth."""
    block: int = BLOCK
    """Drafts of a round outside the curve over block lengths; MTP-1 has one."""
    layers: tuple[int, ...] = (1, 3, 5, 7, 8)
    """Target layers whose hidden states are the input of all drafters."""
    anchors: int = 24
    """Blocks of a sequence that DSpark, DFlash and MTP-1 are trained on."""
    rollouts: int = 0
    """Positions of a sequence that Eagle3 is trained on; 0: every one, as it was devised, a multiple of the others'."""
    start: Literal["random", "target"] = "random"
    """Initial layers of the drafters: random, or copies of the target's last."""
    loss: Literal["own", "lk"] = "own"
    """Loss of block drafters: each its own, or LK without a confidence term for all."""
    learning_rate: float = 0.0
    """Peak learning rate of all points; 0: the recipe's."""
    batch: int = 4
    """Sequences of a step."""
    max_length: int = 256
    """Positions of a training sequence; what is longer is cut."""
    conversations: str = ""
    """Conversations with the target's answers to train on; empty: the target answers the embedded prompts."""
    prompts: int = 500
    """Training prompts of each domain, or conversations of that file."""
    cache: str = ""
    """A target cache to use if its manifest fits; empty: OUTPUT/cache, which is built where it is missing."""
    heldout: int = 20
    """Held-out prompts of each domain."""
    decode: bool = True
    """Decode held-out prompts with each drafter; without, Figures 3 and 4 are of what the trainings expected alone."""
    samples: int = 2
    """Times that each held-out prompt is decoded at temperature 1."""
    max_new_tokens: int = 128
    """Longest answer, in the data and held out."""
    jobs: int = 1
    """Points run at once."""
    index: int | None = None
    """Part of the points that this process runs, counted from 0; None: all."""
    count: int = 1
    """Parts that the points are dealt into."""
    results: str = ""
    """Folder to copy metrics and plots to."""
    results_name: str = "compare"
    """Name of the copies: NAME.json, and the beginning of the plots' names."""
    point: str = ""
    """Run this one point in this process."""

    def __post_init__(self) -> None:
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; at least 1 was expected.")
        if self.loss != "own" and "losses" in self.parts:
            raise UserError(f"--only losses compares losses, and --loss {self.loss} gives all the same; leave one out.")
        for name in ("rollouts", "learning_rate"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; 0 or more was expected.")

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(p for p in PARTS if p in self.only) if self.only else PAPER

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache) if self.cache else self.output / "cache"

    @property
    def prompts_file(self) -> Path:
        return self.output / "heldout.jsonl"


IDENTITY = (
    "recipe", "minutes", "depth", "block", "layers", "anchors", "rollouts", "start", "loss", "learning_rate",
    "batch", "max_length", "conversations", "prompts", "cache", "heldout", "decode",
    "samples", "max_new_tokens",
)  # fmt: skip
"""Settings shared by all points of a study, beside the target and the steps."""


@program
def main(argv: list[str]) -> None:
    settings = parse(CompareSettings, argv, description=__doc__)
    begin(settings)
    points = all_points(settings)
    if settings.point:
        run_point(settings, points, settings.point)
        return

    # Only the starting program prepares: the points are its children, and find everything there.
    prepare(settings)
    steps = step_count(settings)
    jobs = {p.name: Point(p.name, command(argv, p.name), result_file(settings, p.name)) for p in points}
    # The head's cost is a job of its own: it is timed, so it should not share a process with training.
    if "block" in settings.parts:
        jobs[HEAD_COST] = Point(HEAD_COST, command(argv, HEAD_COST), result_file(settings, HEAD_COST))

    runner = Runner(settings.output / "logs", settings.jobs)
    failed = runner.run([jobs[name] for name in part(list(jobs), settings.index, settings.count)])
    # The report covers every finished point, whichever job or earlier command ran it.
    about = {"command": " ".join(["python -m train.studies.compare", *argv]), "steps": steps, **asdict(settings)}
    made = report(settings.output, finished(settings), read_if_there(result_file(settings, HEAD_COST)), about)
    if made and settings.results:
        publish(settings.output, Path(settings.results), settings.results_name)

    report_failures(failed, runner.logs)


def command(argv: list[str], point: str) -> tuple[str, ...]:
    return ("train.studies.compare", *argv, "--point", point)


def result_file(settings: CompareSettings, name: str) -> Path:
    return settings.output / "points" / f"{name}.json"


def all_points(settings: CompareSettings) -> list[StudyPoint]:
    """The points of the requested parts, each once: the curves share points with the main comparison."""
    shape = (settings.depth, settings.seeds, settings.block)
    return list(dict.fromkeys(p for name in settings.parts for p in study_points(name, *shape)))


def finished(settings: CompareSettings) -> dict[StudyPoint, dict[str, Any]]:
    """Results of all finished points of any part, from this command and earlier ones."""
    # More seeds than any study has: earlier commands may have run more than this one.
    everything = dict.fromkeys(p for name in PARTS for p in study_points(name, settings.depth, 99, settings.block))
    found = {p: read_if_there(result_file(settings, p.name)) for p in everything}
    return {p: result for p, result in found.items() if result is not None}


def read_if_there(path: Path) -> dict[str, Any] | None:
    return dict(read_object(path)) if path.exists() else None


# The study's settings and data


def begin(settings: CompareSettings) -> None:
    """Checks the settings and refuses to mix two studies in one folder, before anything runs."""
    folder = resolve_folder(settings.target)
    layers = target_layers(settings)
    if settings.depth > layers or max(settings.layers) > layers - 2:
        raise UserError(
            f"The target has {layers} layers; expected --layers up to {layers - 2} and --depth up to {layers}, found "
            f"{list(settings.layers)} and {settings.depth}."
        )

    identity = {name: getattr(settings, name) for name in IDENTITY} | {"weights_xxh3": weights_hash(folder)}
    # Points that were measured with fewer counts cannot be reported beside new ones.
    identity["counts"] = list(COUNTS)
    # With minutes the steps are measured, and recorded in budget.json.
    if not settings.minutes:
        identity["steps"] = settings.steps
    if not require_same_settings(settings.output / "study.json", identity, settings.output):
        write_settings(settings.output / "study.json", identity, target=settings.target)


def prepare(settings: CompareSettings) -> None:
    """Makes held-out prompts, the target's answers and the cache of its hidden states, with the programs for them."""
    if not settings.prompts_file.exists():
        run("train.embedded.corpora", "--limit", settings.heldout, "--output", settings.prompts_file)
    if cache_fits(settings):
        return
    # A cache that was named is another's: it is used or refused, never built over.
    if settings.cache:
        raise UserError(f"{settings.cache} is no finished cache; leave --cache out, and the study makes its own.")

    conversations = settings.output / "conversations.jsonl"
    if settings.conversations:
        take_conversations(Path(settings.conversations), conversations, settings.prompts)
    else:
        # Temperature 1 and the whole law: drafters learn the distribution that they are measured on.
        run(
            *("train.prepare_data", "--target", settings.target, "--embedded-prompts", "code,chat,math"),
            *("--limit", settings.prompts, "--output", conversations, "--max-new-tokens", settings.max_new_tokens),
            *("--temperature", 1.0, "--top-p", 1.0, "--slots", 64, "--dtype", "float32"),
        )
    run(
        *("train.build_cache", "--target", settings.target, "--conversations", conversations),
        *("--output", settings.cache_folder, "--layers", *cached_layers(settings)),
        *("--max-length", settings.max_length, "--compute-dtype", "float32"),
    )


def take_conversations(file: Path, to: Path, each: int) -> None:
    """Writes the first `each` conversations of every domain in `file` to a JSONL file, in the file's order."""
    taken = Counter[str]()
    with replacing(to) as temporary, temporary.open("w", encoding="utf-8") as out:
        for _, row in file_rows(file):
            if isinstance(row, UserError):
                raise row
            domain = str(row.get("domain", "")) if isinstance(row, dict) else ""
            taken[domain] += 1
            if taken[domain] <= each:
                out.write(json.dumps(row) + "\n")


def target_layers(settings: CompareSettings) -> int:
    return read_target_config(read_hf_config(resolve_folder(settings.target))).num_layers


def cached_layers(settings: CompareSettings) -> tuple[int, ...]:
    """The layers that any drafter needs, the last one for MTP-1."""
    return (*settings.layers, target_layers(settings) - 1)


def cache_fits(settings: CompareSettings) -> bool:
    """Whether the study's cache is complete; UserError where it is of other layers or another target."""
    folder = settings.cache_folder
    if not (folder / "manifest.json").exists() or not Manifest.load(folder).complete:
        return False

    # Layers in the spec, target by config and weights: a cache of another checkpoint would train to other features.
    spec, target = Manifest.load(folder).spec, resolve_folder(settings.target)
    built = read_object(folder / "build.json")["settings"] if (folder / "build.json").exists() else {}
    found = (tuple(spec.layer_ids), spec.target_sha256, built.get("weights_xxh3", ""))
    wanted = (cached_layers(settings), config_sha256(read_hf_config(target)), weights_hash(target))

    for name, theirs, ours in zip(("layers", "target config", "target weights"), found, wanted, strict=True):
        if theirs != ours:
            raise UserError(
                f"The cache {folder} was built with {name} {theirs}, this study has {ours}; give a new --output, or "
                "leave --cache out."
            )

    return True


def run(module: str, *words: object) -> None:
    """Runs a program of the project; UserError where it fails, after its own sentence on stderr."""
    print(f"== python -m {' '.join(map(str, (module, *words)))}", flush=True)
    code = subprocess.run(program_command(module, *words), check=False).returncode
    if code:
        raise UserError(f"The study stopped at {module} (exit code {code}); the same command continues there.")


# Points


def run_point(settings: CompareSettings, points: list[StudyPoint], name: str) -> None:
    from . import compare_point  # imported here, so that the program that starts the points needs little memory

    if name == HEAD_COST:
        write_json(result_file(settings, name), compare_point.head_cost(settings.target))
        return

    point = next((point for point in points if point.name == name), None)
    if point is None:
        raise UserError(f"The study has no point {name!r}; its points are {', '.join(p.name for p in points)}.")

    try:
        result = compare_point.train_and_decode(
            point_config(settings, point, step_count(settings)),
            settings.prompts_file if settings.decode else None,
            max_new_tokens=settings.max_new_tokens,
            samples=settings.samples,
        )
    # As train.fit ends: the run is saved, and the same command continues it.
    except Preempted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None
    write_json(result_file(settings, name), {**asdict(point), **result})


def point_config(settings: CompareSettings, point: StudyPoint, steps: int) -> TrainConfig:
    """The point's training run: its drafter's recipe, with data and steps shared by all points."""
    # Steps end the run, not epochs: all points see the same sequences in the same order.
    longest = settings.max_length
    # A program is compiled for each bucket, which short sequences never earn back.
    buckets = (longest // 2, 3 * longest // 4, longest) if longest > 128 else (longest,)
    common: Diff = {
        "target": settings.target,
        "run_dir": str(settings.output / "points" / point.name),
        "drafter.target_layer_ids": settings.layers,
        "drafter.num_anchors": settings.anchors,
        "loss.rollout_positions": settings.rollouts,
        "data.cache": str(settings.cache_folder),
        "data.max_length": longest,
        "data.length_buckets": buckets,
        "data.global_batch": settings.batch,
        "epochs": 1_000_000,
        "max_steps": steps,
        "log_every": max(1, steps // 20),
        "checkpoint.every_steps": max(1, steps // 3),
        "checkpoint.keep": 1,
        **SHARED_LOSS[settings.loss],
    }
    if settings.learning_rate:
        common["optimizer.learning_rate"] = settings.learning_rate

    return point.config(settings.recipe, common, target_layers(settings), copies=settings.start == "target")


def step_count(settings: CompareSettings) -> int:
    """`steps`, or the number that DSpark makes in `minutes` on this machine, measured once and stored."""
    if not settings.minutes:
        return settings.steps

    path = settings.output / "budget.json"
    if not path.exists():
        from .compare_point import seconds_a_step

        # DSpark at the study's depth, long enough for a median without compilation.
        probe = StudyPoint("dspark", settings.depth, settings.block, 0)
        config = point_config(settings, probe, 60)
        seconds = seconds_a_step(config, settings.output / "probe")
        write_json(path, {"step_seconds": seconds, "steps": max(1, round(60 * settings.minutes / seconds))})

    return int(read_object(path)["steps"])


if __name__ == "__main__":
    main()
