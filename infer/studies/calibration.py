"""Measures the worth of calibration: confidences raw, scaled by temperatures, fitted online or isotonically, and known.

    python -m infer.profile --target T --drafter D --slots 1 4 16 --output runs/profile
    python -m infer.studies.calibration --target T --drafter D --prompts heldout.jsonl \
        --profiles runs/profile/sps-*.json --output runs/calibration --results docs/results/calibration_study.json

Whole blocks are recorded at every temperature. Calibrations are fitted on the even prompts, all domains of a sampling
temperature together, and measured on the odd ones: their ECE by domain, temperature and block position, and the tokens
a second that the real policies make of them, simulated with the measured costs. `known` is what no confidence can
reach: the outcomes themselves. The same is done with confidences made too sharp or too bold. Recordings are kept in
--output, and a stopped study continues from them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from dspark_jax.arrays import read_arrays
from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.evaluation.calibrate import Rounds, record
from dspark_jax.evaluation.calibration_metrics import calibration_metrics, prefix_survival
from dspark_jax.evaluation.calibrators import Isotonic, conditional_logits, online_survival
from dspark_jax.evaluation.simulator import SimulatedDevice, Traces, simulate
from dspark_jax.evaluation.temperature_scaling import fit_temperatures
from dspark_jax.files import (
    lock_folder,
    make_output,
    require_same_settings,
    write_atomically,
    write_json,
    write_settings,
)
from dspark_jax.report import calibration_plot, table
from dspark_jax.scheduling.calibration import Online, Static
from dspark_jax.scheduling.costs import ScheduleTables
from dspark_jax.scheduling.policies import Adaptive, Causal, LookAhead
from dspark_jax.serving.profile import Profile
from dspark_jax.serving.prompts import EncodedPrompt, read_prompts
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target

METHODS = ("none", "sts", "online", "sts + online", "isotonic", "known")
POLICIES: dict[str, type[Adaptive]] = {"causal": Causal, "look-ahead": LookAhead}
LAYOUT = {"prompt": ("int32", 1), "logits": ("float32", 2), "accepted": ("bool", 2), "observed": ("bool", 2)}
"""Dtypes and ranks of recorded rounds."""
CASES = {"as trained": (1.0, 0.0), "twice as sharp": (2.0, 0.0), "bolder by 1.5": (1.0, 1.5)}
"""Factor and constant on all confidence logits: how a drafter may be miscalibrated. Trained for many epochs it is
bolder by a constant, which no temperature can correct."""
ALL = "all"
"""The domain of all prompts together."""


@dataclass(frozen=True)
class CalibrationStudySettings:
    """Compares calibrations of a drafter's confidence."""

    target: str
    """Folder or hub id of the target."""
    drafter: str
    """Folder of a drafter with a confidence head."""
    prompts: tuple[Path, ...]
    """JSONL files of held-out conversations or evaluation prompts."""
    profiles: tuple[Path, ...]
    """Profiles that infer.profile wrote (sps-SLOTS.json): the costs under as many users as their slots."""
    output: Path = Path("runs/calibration")
    """Folder of the recordings, metrics.json and a plot of each case."""
    results: Path | None = None
    """JSON file for a further copy of metrics.json."""
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    """Sampling temperatures."""
    samples: int = 4
    """Answers recorded of each prompt; 1 at temperature 0."""
    max_new_tokens: int = 64
    limit: int = 0
    """Prompts taken of each domain; 0: all."""
    slots: int = 16
    """Requests recorded at once."""
    requests_per_user: int = 8
    """Simulated requests of each user."""
    dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        if not self.profiles or not self.temperatures or min(self.samples, self.requests_per_user) < 1:
            raise UserError("Profiles and temperatures must be given; samples and requests-per-user must be 1 or more.")


RECORDING = (
    "target", "drafter", "prompts", "temperatures", "samples", "max_new_tokens", "limit", "slots", "dtype",
)  # fmt: skip
"""Settings that decide what is recorded; costs may change without recording anew."""


@program
def main(argv: list[str]) -> None:
    settings = parse(CalibrationStudySettings, argv, description=__doc__)
    # Read first: a profile that cannot be read must not cost the recording.
    profiles = sorted((Profile.read(path) for path in settings.profiles), key=lambda profile: profile.tokens[0])
    make_output(settings.output, settings.results)
    dtype = announce(settings.dtype)
    target = load_target(settings.target, dtype=dtype)
    drafter = load_drafter(settings.drafter, target, dtype=dtype)
    if not getattr(drafter.config, "enable_confidence_head", False):
        raise UserError(f"{drafter.name} has no confidence head; there is nothing to calibrate.")
    check_profiles(profiles, drafter.config.block_size)

    prompts = read_prompts(target, settings.prompts, settings.limit or None)
    with lock_folder(settings.output, "the study"):
        begin(settings)
        found: dict[str, dict[str, Any]] = {case: {} for case in CASES}
        for temperature in settings.temperatures:
            rounds = recorded(settings, target, drafter, prompts, temperature)
            for case, (factor, constant) in CASES.items():
                distorted = rounds._replace(logits=rounds.logits * np.float32(factor) + np.float32(constant))
                found[case][f"t{temperature:g}"] = study(settings, distorted, prompts, profiles)

    metrics = {"cases": found, "machine": machine(), "settings": asdict(settings)}
    for path in (settings.output / "metrics.json", settings.results):
        if path is not None:
            write_json(path, metrics)

    for case, temperatures in found.items():
        calibration_plot(settings.output / f"{case.replace(' ', '-')}.png", temperatures)
        print(f"\n== {case} ==\n{shown(temperatures)}")
    print(f"metrics and plots in {settings.output}")


def check_profiles(profiles: Sequence[Profile], block: int) -> None:
    """Refuses costs that are not of whole blocks of this drafter: the simulator would clip them silently."""
    for profile in profiles:
        slots, most = profile.tokens[0], profile.tokens[-1]
        if most != slots * (block + 1):
            raise UserError(
                f"A profile of {slots} slots reaches {most} tokens; expected {slots * (block + 1)}, blocks of {block} "
                "with their anchors. Profile this drafter with infer.profile."
            )


# Recording


def begin(settings: CalibrationStudySettings) -> None:
    """Begins the study's folder or continues it; UserError where it was begun with other recordings."""
    kept = {name: getattr(settings, name) for name in RECORDING} | {"prompts": [str(p) for p in settings.prompts]}
    path = settings.output / "settings.json"
    if not require_same_settings(path, kept, settings.output):
        write_settings(path, kept)


def recorded(
    settings: CalibrationStudySettings,
    target: Target,
    drafter: Drafter,
    prompts: Sequence[EncodedPrompt],
    temperature: float,
) -> Rounds:
    """Rounds of whole blocks at this temperature, sorted by request, from the study's folder if they are there.

    Request i answers prompt i, cyclically; `Rounds.prompt` is the request.
    """
    path = settings.output / f"rounds-t{temperature:g}.npz"
    if path.exists():
        return Rounds(**read_arrays(path, LAYOUT, "rounds of a calibration study"))

    # Greedy answers of a prompt are all the same: one is enough.
    samples = settings.samples if temperature > 0 else 1
    requests = [prompt.tokens for prompt in prompts] * samples
    sampling = SamplingParams(settings.max_new_tokens, temperature)
    found = record(target, drafter, requests, sampling, EngineConfig(slots=settings.slots), samples=1)
    # Stable: the rounds of a request stay in the order in which they were decoded.
    found = found.of(np.argsort(found.prompt, kind="stable"))

    kept = {name: getattr(found, name).astype(dtype) for name, (dtype, _) in LAYOUT.items()}
    buffer = BytesIO()
    np.savez_compressed(buffer, **kept)
    # Whole or not at all: a torn recording would stop the study's next run.
    write_atomically(path, buffer.getvalue())
    return Rounds(**kept)


# Fitting and measuring


def study(
    settings: CalibrationStudySettings, rounds: Rounds, prompts: Sequence[EncodedPrompt], profiles: Sequence[Profile]
) -> dict[str, Any]:
    """ECE by method, domain and position, and simulated tokens a second by method, policy and users."""
    # Prompts alternate within their domain between fitting and measuring; all answers of a prompt go together.
    prompt = rounds.prompt % len(prompts)
    domains = [prompt.domain for prompt in prompts]
    parity = np.array([domains[:i].count(domain) % 2 for i, domain in enumerate(domains)])[prompt]

    fit, measured = rounds.of(parity == 0), rounds.of(parity == 1)
    if not len(fit.prompt) or not len(measured.prompt):
        raise UserError("Prompts for fitting and others for measuring are needed: two or more of each domain.")
    temperatures = fit_temperatures(*fit[1:])

    accepted = measured.accepted
    survival = {
        "none": prefix_survival(measured.logits),
        "sts": prefix_survival(measured.logits, temperatures),
        "online": online_survival(measured, np.ones_like(temperatures)),
        "sts + online": online_survival(measured, temperatures),
        "isotonic": Isotonic(fit)(measured.logits),
        "known": accepted.astype(np.float64),
    }

    of = np.array(domains)[measured.prompt % len(prompts)]
    rows = {name: np.ones(len(of), bool) if name == ALL else of == name for name in (ALL, *sorted(set(of)))}
    ece = {
        method: {name: errors(survival[method][row], measured.of(row)) for name, row in rows.items()}
        for method in METHODS
    }
    return {
        "rounds": len(of),
        "tau": float(1 + accepted.sum(axis=1).mean()),
        "temperatures": temperatures.tolist(),
        "ece": ece,
        "load": loads(settings, measured, [len(p.tokens) for p in prompts], survival, temperatures, profiles),
    }


def errors(survival: np.ndarray, rounds: Rounds) -> dict[str, Any]:
    """ECE and Brier score in the mean, and the ECE by position."""
    metrics = calibration_metrics(survival, rounds.accepted, rounds.observed)
    return {"ece": metrics.mean("ece"), "brier": metrics.mean("brier"), "by_position": metrics.ece.tolist()}


def loads(
    settings: CalibrationStudySettings,
    rounds: Rounds,
    prompts: Sequence[int],
    survival: dict[str, np.ndarray],
    temperatures: np.ndarray,
    profiles: Sequence[Profile],
) -> dict[str, Any]:
    """Simulated figures by policy, users and method; `prompts` are the lengths of all prompts."""
    requests, number = np.unique(rounds.prompt, return_inverse=True)
    drafts = rounds.accepted.sum(axis=1)
    # Each round commits its accepted drafts and a token of the target's; the first token comes with the prefill.
    lengths = 1 + np.bincount(number, drafts + 1)
    ints = (drafts, number, np.array(prompts)[requests % len(prompts)], lengths)
    traces = Traces(rounds.logits, *(column.astype(np.int32) for column in ints))

    found: dict[str, Any] = {name: {} for name in POLICIES}
    runs = [(name, profile, method) for name in POLICIES for profile in profiles for method in METHODS]
    for name, profile, method in tqdm(runs, desc="simulated", unit="run", disable=None):
        users, online = profile.tokens[0], "online" in method
        # An online fit happens inside the policy; the others reach it as logits that are calibrated already.
        logits = rounds.logits if online else conditional_logits(survival[method])
        scale = temperatures.tolist() if method == "sts + online" else [1.0] * len(temperatures)
        policy = POLICIES[name](calibration=Online() if online else Static())

        device = SimulatedDevice(ScheduleTables.of(profile.cost_table(), scale), profile.tokens)
        sent = users * (settings.requests_per_user + 1)
        made = simulate(policy, len(temperatures), replace(traces, logits=logits), device, users, sent)
        figures = {"tokens_per_second": made.tokens_per_second, "budget": made.verify_budget, "tau": made.tau}
        found[name].setdefault(str(users), {})[method] = figures

    return found


def shown(found: dict[str, Any]) -> str:
    """The study as two tables: errors by domain, and speeds over those without calibration."""
    errors_of = [
        [key.removeprefix("t"), domain, *(f"{100 * row['ece'][method][domain]['ece']:.2f} %" for method in METHODS)]
        for key, row in found.items()
        for domain in row["ece"]["none"]
    ]
    speeds = []
    for key, row in found.items():
        for policy, users in row["load"].items():
            for count, made in users.items():
                base = made["none"]["tokens_per_second"]
                over = [f"{made[method]['tokens_per_second'] / base:.3f}" for method in METHODS]
                speeds.append([key.removeprefix("t"), policy, count, f"{made['none']['budget']:.2f}", *over])

    first = table(["temperature", "domain", *METHODS], errors_of)
    second = table(["temperature", "policy", "users", "verified a round, none", *METHODS], speeds)
    return f"\nECE, mean over positions\n{first}\n\ntokens a second over those without calibration\n{second}"


if __name__ == "__main__":
    main()
