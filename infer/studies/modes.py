"""Measures the three modes of verification beside each other: accepted length, tokens per second, texts.

    python -m infer.studies.modes
    python -m infer.studies.modes --target .cache/real_target --drafter assets/smollm2_135m_drafter --prompts q.jsonl
    python -m infer.studies.modes --drafter runs/compare/points/dflash2,depth=2,block=7,seed=0/drafter --name dflash2

At each temperature, rejection, block and coupled verification of chains, and trees, decode the same prompts in
alternating runs under each of --policies; figures are medians, prefill included, by the clock of --clock. At 0 the
modes are one. Coupled and greedy texts are compared with those of plain decoding, and near-ties are counted apart.
Without --prompts the held-out prompts of the embedded corpora are used. Writes docs/results/next_drafters.json, where
drafters of one target that were measured alike come beside each other, by --name.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.devices import announce, machine
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.evaluation.acceptance import Acceptance, seeded
from dspark_jax.evaluation.timing import Decoder, Passes, Timed, alternate, differences, median_ratio, median_speed
from dspark_jax.files import make_output, read_results, write_json
from dspark_jax.report import table
from dspark_jax.serving.assembly import loop_and_params
from dspark_jax.serving.profiling import measure_profile
from dspark_jax.serving.prompts import EncodedPrompt
from dspark_jax.serving.sampling import Mode, SamplingParams
from dspark_jax.serving.settings import EngineConfig, PolicyName, policy_named, verifier_of
from dspark_jax.targets.target import Target

from .heldout import heldout_prompts

# In nats between the two best of a race, above the differences between float32 batches of different widths.
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class ModesSettings:
    """Measures rejection, block and coupled verification of a pair."""

    target: str = "assets/embedded_target"
    """Folder, GGUF file or hub id of the target."""
    drafter: str = "assets/embedded_drafter"
    """Folder of the drafter."""
    name: str = "dspark"
    """Its name in the results; those of other drafters there are kept."""
    prompts: tuple[Path, ...] = ()
    """JSONL files of prompts. None given: held-out prompts of the embedded corpora."""
    per_domain: int = 8
    """Prompts of each domain or file."""
    temperatures: tuple[float, ...] = (0.5, 1.0, 1.3)
    """0: greedy."""
    policies: tuple[PolicyName, ...] = ("fixed",)
    """Verify policies; retrospective is measured in coupled mode alone."""
    trees: tuple[int, ...] = (16,)
    """Nodes of draft trees, measured whole in coupled mode, and under rejection where the block divides them."""
    by_node: bool = True
    """Measure coupled trees node by node too, as far as they are worth their rows; their costs are profiled first."""
    repeats: int = 3
    """Alternating runs at each temperature."""
    slots: int = 1
    """Requests decoded at once."""
    max_new_tokens: int = 96
    """Longest answer."""
    seed: int = 0
    """Seed of the first prompt; the others follow."""
    clock: Literal["wall", "cpu"] = "wall"
    """Seconds that count. cpu: those of this process on all cores, for a machine that is shared."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations."""
    result: Path = Path("docs/results/next_drafters.json")
    """The figures."""

    def __post_init__(self) -> None:
        if self.repeats < 1 or not self.temperatures or min(self.temperatures) < 0:
            raise UserError("There is nothing to compare: repeats must be 1 or more, and temperatures from 0 on given.")

    def sampling(self, temperature: float, mode: Mode) -> SamplingParams:
        return SamplingParams(self.max_new_tokens, temperature, seed=self.seed, mode=mode)


@program
def main(argv: list[str]) -> None:
    settings = parse(ModesSettings, argv, description=__doc__)
    make_output(settings.result.parent, settings.result)
    announce(settings.dtype)
    # Before anything is measured: figures of other prompts could not stand beside these.
    earlier = measured_alike(settings)
    target = load_target(settings.target, dtype=settings.dtype)
    drafter = load_drafter(settings.drafter, target, dtype=settings.dtype)
    prompts = heldout_prompts(target, settings.prompts, settings.per_domain)

    # One temperature after the other: engines of one are released before the next.
    made: dict[str, Any] = {}
    for t in settings.temperatures:
        made[f"t{t:g}"] = at_temperature(settings, target, drafter, prompts, t)
        # Written each time, so that a run that is cut keeps its figures.
        write_json(settings.result, summary(settings, {**earlier, settings.name: made}))

    header = ["temperature", "mode, policy", "tau", "less rejection's", "tok/s", "over rejection", "plain's own text"]
    print(
        f"\n{table(header, [row for name, rows in made.items() for row in table_rows(name, rows)])}\n{settings.result}"
    )


def measured_alike(settings: ModesSettings) -> dict[str, Any]:
    """Figures of other drafters in the result file; UserError where they are of another target, prompts or lengths."""
    found = read_results(settings.result)
    if not found:
        return {}
    differ = [name for name, value in conditions(settings).items() if found.get(name) != value]
    if differ:
        raise UserError(
            f"{settings.result} was measured with other {', '.join(differ)}; give another --result, or remove the file."
        )
    return {name: rows for name, rows in found["modes"].items() if name != settings.name}


def conditions(settings: ModesSettings) -> dict[str, Any]:
    """What drafters must have in common to be compared."""
    names = ("target", "per_domain", "slots", "max_new_tokens", "seed", "clock", "dtype")
    return {name: getattr(settings, name) for name in names} | {"prompts": [str(path) for path in settings.prompts]}


def at_temperature(
    settings: ModesSettings, target: Target, drafter: Drafter, prompts: Sequence[EncodedPrompt], temperature: float
) -> dict[str, Any]:
    """Figures of every mode and policy at one temperature, and of plain decoding in coupled mode.

    Args:
        settings: of the measurement.
        target, drafter: the pair.
        prompts: decoded by all.
        temperature: 0 for greedy decoding, of which there is one mode.
    """
    # One length for all, so that the ways differ in nothing but the mode and the policy.
    longest = -(-(max(len(prompt.tokens) for prompt in prompts) + settings.max_new_tokens) // 64) * 64
    engine = EngineConfig(settings.slots, longest, rounds_per_dispatch=64, smallest_prompt_bucket=64)

    # The reference of coupled texts: it draws from the same noise, token by token.
    shared = "coupled" if temperature else "greedy"
    ways = {f"plain, {shared}": Decoder(target, None, settings.sampling(temperature, "coupled"), engine)}
    for policy in settings.policies:
        # Retrospective scheduling looks at all of a round's confidences: lossless in coupled mode alone (rule 79).
        for mode in ("coupled",) if policy == "retrospective" or not temperature else get_args(Mode):
            how = settings.sampling(temperature, mode), replace(engine, policy=policy)
            ways[f"{mode if temperature else shared}, {policy}"] = Decoder(target, drafter, *how)
    with TemporaryDirectory() as folder:
        for nodes in settings.trees:
            law, whole = settings.sampling(temperature, "coupled"), replace(engine, policy="fixed", tree=nodes)
            ways[f"{shared}, tree {nodes}"] = Decoder(target, drafter, law, whole)
            # Siblings: as many at each level of a chain, so that only multiples of the block have a form.
            if temperature and nodes > drafter.config.block_size and nodes % drafter.config.block_size == 0:
                siblings = settings.sampling(temperature, "rejection"), whole
                ways[f"rejection, tree {nodes}"] = Decoder(target, drafter, *siblings)
            if not settings.by_node:
                continue
            priced = by_node(settings, target, drafter, law, whole, Path(folder) / f"sps-{nodes}.json")
            ways[f"{shared}, tree {nodes} by node"] = Decoder(target, drafter, law, priced)

        # An engine for each way, which decodes in all of its passes.
        clocked = {name: partial(timed_by, settings.clock, Passes(way, prompts)) for name, way in ways.items()}
        runs = alternate(clocked, settings.repeats)
    rows = {name: figures(found, runs.get(_whole_chain(name))) for name, found in runs.items()}

    requests = seeded(prompts, settings.sampling(temperature, "coupled"))
    # Seeds by prompt, as `Decoder` gives them: equal noise is what makes texts comparable.
    sampling = [request.sampling or SamplingParams() for request in requests]
    for name, row in rows.items():
        # Texts in coupled mode equal plain decoding's but for near-ties (docs/algorithm.md, rule 111).
        if name.startswith(shared):
            plain, coupled = (runs[way][0].generations for way in (f"plain, {shared}", name))
            parted = differences(target, prompts, plain, coupled, sampling)
            row["identical"], row["prompts"] = len(prompts) - len(parted), len(prompts)
            row["near_ties"] = sum(difference.gap < NEAR_TIE for difference in parted)

    return rows


def by_node(
    settings: ModesSettings, target: Target, drafter: Drafter, sampling: SamplingParams, engine: EngineConfig, sps: Path
) -> EngineConfig:
    """An engine that verifies the nodes worth their rows, whose costs are of the clock that counts."""
    priced = replace(engine, policy="retrospective")
    # By the wall clock the engine measures for itself, and finds what it measured before.
    if settings.clock == "cpu":
        policy = policy_named(priced.policy, tree=priced.tree)
        loop, params = loop_and_params(target, drafter, priced, policy, verifier_of(sampling.mode))
        measure_profile(loop, params, sampling.temperature, clock=time.process_time).save(sps)
        priced = replace(priced, sps=sps)
    return priced


def timed_by(clock: str, decode: Callable[[], Timed]) -> Timed:
    """One pass, with the seconds of the clock that was asked for."""
    # Both clocks are read: which one counts is the caller's choice.
    started = time.process_time()
    run = decode()
    return run if clock == "wall" else replace(run, seconds=time.process_time() - started)


def _whole_chain(name: str) -> str:
    """The way that this one is compared with: rejection, or greedy decoding, under the same policy; for trees whole
    chains, and look-ahead for the policy that rejection does not have."""
    # Trees are always whole, so that chains of whole blocks are what they are compared with.
    mode, policy = name.split(", ")
    policy = "fixed" if policy.startswith("tree") else policy.replace("retrospective", "look-ahead")
    return f"{'greedy' if mode == 'greedy' else 'rejection'}, {policy}"


def figures(runs: Sequence[Timed], rejection: Sequence[Timed] | None) -> dict[str, Any]:
    """tau and speed of one way, compared with rejection where that was measured."""
    # The seeds are those of the prompts, so each run gives the same tokens and the first speaks for all.
    acceptance = Acceptance.of(runs[0].generations)
    row: dict[str, Any] = {
        "tau": acceptance.tau,
        "conditional": acceptance.conditional,
        "tokens_per_second": median_speed(runs),
    }

    if rejection is not None:
        # Prompt by prompt: prompts differ more among themselves than the modes do.
        pairs = zip(runs[0].generations, rejection[0].generations, strict=True)
        gains = np.array([a.accepted_length - b.accepted_length for a, b in pairs])
        row["tau_over_rejection"] = acceptance.tau / Acceptance.of(rejection[0].generations).tau
        row["tau_gain"], row["tau_gain_error"] = float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains)))
        row["speed_over_rejection"] = median_ratio(runs, rejection)
    return row


def summary(settings: ModesSettings, made: dict[str, Any]) -> dict[str, Any]:
    """The contents of the result file: `tau_t1` and `tau_t0` by name, and all figures by drafter and temperature."""
    # The first policy stands for its mode in the summary; all of them are under `modes`.
    policy = settings.policies[0]
    suffixes = {f"rejection, {policy}": "", f"greedy, {policy}": ""}
    suffixes |= {f"{mode}, {policy}": f"_{mode}" for mode in ("block", "coupled")}
    suffixes |= {f"coupled, tree {nodes}": f"_tree_{nodes}_coupled" for nodes in settings.trees}
    suffixes |= {f"rejection, tree {nodes}": f"_tree_{nodes}_rejection" for nodes in settings.trees}
    suffixes |= {f"greedy, tree {nodes}": f"_tree_{nodes}" for nodes in settings.trees}
    suffixes |= {f"{way} by node": f"{name}_by_node" for way, name in suffixes.items() if ", tree " in way}

    def taus(temperature: str) -> dict[str, float]:
        return {
            f"{name}{suffix}": rows[temperature][way]["tau"]
            for name, rows in made.items()
            for way, suffix in suffixes.items()
            if way in rows.get(temperature, {})
        }

    return {
        "tau_t1": taus("t1"),
        "tau_t0": taus("t0"),
        "modes": made,
        "drafter": settings.drafter,
        "repeats": settings.repeats,
        **conditions(settings),
        "machine": machine(),
    }


def table_rows(temperature: str, rows: dict[str, Any]) -> list[list[str]]:
    """One line a way."""
    made = []
    for name, row in rows.items():
        # With its standard error, by which a gain can be told from chance.
        gain = f"{row['tau_gain']:+.2f} ± {row['tau_gain_error']:.2f}" if "tau_gain" in row else "-"
        ratio = f"{row['speed_over_rejection']:.3f}" if "speed_over_rejection" in row else "-"
        same = f"{row['identical']}/{row['prompts']}, {row['near_ties']} near-ties" if "identical" in row else "-"
        speed = f"{row['tokens_per_second']:.0f}"
        made.append([temperature.removeprefix("t"), name, f"{row['tau']:.2f}", gain, speed, ratio, same])
    return made


if __name__ == "__main__":
    main()
