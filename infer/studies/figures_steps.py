"""The programs that measure what the paper's table and figures are drawn from, and where their results are kept."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_jax.errors import UserError
from dspark_jax.programs import program_command


@dataclass(frozen=True)
class FiguresSettings:
    """Makes the table and the figures of the paper that can be had here."""

    output: Path = Path("docs/figures")
    """Folder of README.md and the plots."""
    results: Path = Path("docs/results")
    """Folder of the measurements."""
    measure: bool = False
    """Measure what is missing first."""
    work: Path = Path("runs/figures")
    """Folder of the programs that measure; they continue there."""
    prompts: tuple[Path, ...] = ()
    """Evaluation sets for the real pair. None given: the held-out prompts of the embedded corpora for both pairs."""


@dataclass(frozen=True)
class Pair:
    """A pair, and the names of its results."""

    title: str
    target: str
    drafter: str
    compare: str
    curves: str
    evaluate: str
    load: str

    @property
    def stem(self) -> str:
        """The beginning of the names of its plots."""
        return "real" if self is PAIRS[1] else "embedded"


PAIRS = (
    Pair(
        "Embedded pair (3.3 M parameters; under load its widened copy of 80 M)",
        "assets/embedded_target",
        "assets/embedded_drafter",
        "compare.json",
        "compare_curves.json",
        "evaluate_embedded.json",
        "load_wide.json",
    ),
    Pair(
        "Real pair (SmolLM2-135M-Instruct)",
        ".cache/real_target",
        "assets/smollm2_135m_drafter",
        "compare_real.json",
        "compare_real_curves.json",
        # Both from the same recorded rounds.
        "load_real.json",
        "load_real.json",
    ),
)
# The study's defaults are the embedded target's.
REAL_STUDY = (
    "--recipe", "smollm2_135m_dspark", "--start", "target", "--layers", "1", "8", "15", "22", "28",
    "--conversations", "assets/smollm2_135m_drafter/conversations.parquet", "--batch", "2", "--anchors", "24",
    "--rollouts", "24", "--learning-rate", "0.002", "--samples", "1", "--max-new-tokens", "48", "--seeds", "1",
)  # fmt: skip
REAL_TABLE = ("--prompts", "200", "--heldout", "10", "--max-length", "256", "--steps", "600")
# Many trainings are short ones: by the loss that learns fastest, the same for all points.
REAL_CURVES = (
    "--prompts", "50", "--heldout", "4", "--max-length", "128", "--steps", "150", "--loss", "lk", "--no-decode",
)  # fmt: skip
EMBEDDED_CURVES = ("--seeds", "1", "--steps", "500")
USERS = ("1", "4", "16")
STRATEGIES = (
    "plain", "fixed-1", "fixed", "threshold", "causal", "look-ahead", "asynchronous", "retrospective",
)  # fmt: skip
THRESHOLDS = ("0.2", "0.4", "0.6", "0.8", "0.9")


def steps(settings: FiguresSettings) -> dict[str, list[str]]:
    """Commands by the result that they make, in order; each continues in its folder below `--work`."""
    work, heldout = settings.work, str(settings.work / "heldout.jsonl")
    found: dict[str, list[str]] = {
        "heldout.jsonl": program_command("train.embedded.corpora", "--limit", "20", "--output", heldout)
    }
    for pair in PAIRS:
        model = ("--target", pair.target, "--drafter", pair.drafter)
        real = pair is PAIRS[1]
        sets = [str(path) for path in settings.prompts] if real and settings.prompts else [heldout]
        study = ("train.studies.compare", "--target", pair.target, *(REAL_STUDY if real else ()))

        found[pair.compare] = program_command(
            *study, *(REAL_TABLE if real else ()), "--only", "main", "--output", folder(settings, pair.compare),
        )  # fmt: skip
        found[pair.curves] = program_command(
            *study, *(REAL_CURVES if real else EMBEDDED_CURVES), "--only", "depth", "block",
            "--output", folder(settings, pair.curves),
        )  # fmt: skip
        # A small target's steps are too cheap for drafts to pay: its load is measured on its widened copy. Rounds of
        # the real pair are recorded, and timed for a minute, so that an idle machine is not needed for an hour.
        if real:
            found |= simulated_load(settings, pair, sets)
            continue

        # Counts and confidences, no times: many requests at once are cheaper and change nothing.
        found[pair.evaluate] = program_command(
            "infer.evaluate", *model, "--datasets", *sets, "--temperatures", "1.0", "--limit", "20",
            "--max-new-tokens", "64", "--slots", "10", "--dtype", "float32", "--policy", "fixed",
            "--thresholds", *THRESHOLDS, "--sts", f"{pair.drafter}/sts.json",
            "--output", folder(settings, pair.evaluate),
        )  # fmt: skip
        wide = ("--target", str(work / "wide/target"), "--drafter", str(work / "wide/drafter"))
        found[pair.load] = program_command(
            "infer.studies.load", *wide, "--prompts", *sets, "--dtype", "float32", "--limit", "20",
            "--concurrency", *USERS, "--output", folder(settings, pair.load),
        )  # fmt: skip

    found["v4_load.json"] = program_command("infer.studies.v4_load", "--output", work / "v4_load")
    return found


def simulated_load(settings: FiguresSettings, pair: Pair, sets: Sequence[str]) -> dict[str, list[str]]:
    """A load simulated from recorded rounds and the costs of rounds: only these take an idle machine."""
    model, users = ("--target", pair.target, "--drafter", pair.drafter, "--dtype", "float32"), ("--concurrency", *USERS)
    traces, profile = (f"{pair.stem}_{name}" for name in ("traces/traces.npz", "profile/metrics.json"))
    return {
        profile: program_command(
            "infer.profile", *model, "--slots", *USERS, "--longest", "192", "--contexts", "0.2", "0.6", "--rounds", "4",
            "--repeats", "5", "--widths", "3", "--output", (settings.work / profile).parent,
        ),
        traces: program_command(
            "infer.studies.load", *model, "--prompts", *sets, "--limit", "10", "--max-new-tokens", "48", *users,
            "--record", "60", "--output", (settings.work / traces).parent,
        ),
        pair.load: program_command(
            "infer.studies.load", "--simulate", settings.work / traces, "--sps", (settings.work / profile).parent,
            *users, "--requests-per-user", "8", "--sts", f"{pair.drafter}/sts.json",
            "--strategies", *STRATEGIES, "--output", folder(settings, pair.load),
        ),
    }  # fmt: skip


def folder(settings: FiguresSettings, name: str) -> Path:
    """Where the program that makes a result continues."""
    return settings.work / Path(name).stem


def measured(settings: FiguresSettings, name: str, words: Sequence[str]) -> None:
    """Runs a program whose result is missing, and keeps its metrics.json under the result's name."""
    # What figures are read from is kept beside the other results, what programs read stays in their folder.
    kept = (settings.results if name.endswith(".json") and "/" not in name else settings.work) / name
    # Rounds and costs are read for the load alone: where that is there, they are not missing.
    if kept.exists() or ("/" in name and (settings.results / PAIRS[1].load).exists()):
        return
    if name == PAIRS[0].load and not (settings.work / "wide").exists():
        widen = ("--target", PAIRS[0].target, "--drafter", PAIRS[0].drafter, "--intermediate-size", "16384")
        run(program_command("infer.studies.widen", *widen, "--output", settings.work / "wide"))

    run(words)
    made = folder(settings, name) / "metrics.json"
    if made.exists() and not kept.exists():
        shutil.copyfile(made, kept)


def run(words: Sequence[str]) -> None:
    """Runs a program; UserError where it fails."""
    print(" ".join(words), flush=True)
    done = subprocess.run(words, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(words[2:4])} ended with status {done.returncode}; mend that and run again.")
