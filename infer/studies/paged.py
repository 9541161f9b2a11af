"""Replays requests of mixed lengths on one memory budget, slot by slot and in pages: how many fit, and what they say.

    python -m infer.studies.paged --target assets/embedded_target --drafter assets/embedded_drafter \
        --prompts gsm8k.jsonl mt-bench.jsonl humaneval.jsonl

The budget is the decode state of an engine with `--slots` slots for `--longest` positions each. The other engine has
`--paged-slots` slots, and as many pages as then fit into the same bytes. Both answer the same requests, taken from the
files in turn, all of them waiting from the beginning; answers end where the target ends them, or at `--new` tokens.
With `--shared` all prompts begin alike, and a third engine keeps prefixes in its pages, which requests then have in
common. Counts need one pass and hold on a busy machine; `--repeats` times further passes, by turns, on an idle one.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.config.cli import parse, program
from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.decoding.prefill import admit
from dspark_jax.decoding.round import LoopParams
from dspark_jax.devices import announce, machine
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.files import make_output, write_json
from dspark_jax.planning.compiled import copies, memory_of
from dspark_jax.planning.decoding import bytes_of
from dspark_jax.report import table
from dspark_jax.serving.assembly import make_loop
from dspark_jax.serving.chunks import blank_chunk
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.prompts import read_prompts
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target

from .auto import mixed

MIB = 2**20
LARGE = 64 * 1024
"""Bytes from which an array of the state counts as a cache in the program's text."""


@dataclass(frozen=True)
class PagedSettings:
    """Replays requests on one memory budget, slot by slot and in pages."""

    target: str
    """Folder or hub id of the target."""
    prompts: tuple[Path, ...]
    """Files of prompts, such as evaluation sets."""
    drafter: str = ""
    """Folder or hub id of its drafter; none: plain decoding."""
    requests: int = 64
    """Requests, taken from the files in turn; prompts that leave no room for an answer are passed over."""
    slots: int = 4
    """Slots of the engine without pages, whose decode state is the budget."""
    paged_slots: int = 20
    """Slots of the engine with pages."""
    longest: int = 1024
    """Positions that a request may take."""
    shared: int = 0
    """Tokens, those of the first prompts, that every prompt begins with; 0: prompts as they are."""
    new: int = 512
    """New tokens of an answer, at most."""
    page: int = 64
    """Positions of a page."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """A pass for each."""
    rounds_per_dispatch: int = 4
    repeats: int = 0
    """Timed passes of each engine at the first temperature."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations."""
    results: Path = Path("docs/results/paged.json")


@dataclass
class Replay:
    """What an engine did with the requests.

    Attributes:
        generations: by index.
        running: requests in slots during each dispatch in which others waited.
        held: positions that these held, with those that were not cached yet.
        dispatches: in all.
        seconds: by the wall's clock, compilation included in an engine's first pass.
    """

    generations: dict[int, Generation] = field(default_factory=dict)
    running: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    dispatches: int = 0
    seconds: float = 0.0


@program
def main(argv: list[str]) -> None:
    settings = parse(PagedSettings, argv, description=__doc__)
    if min(settings.requests, settings.slots, settings.paged_slots) < 1 or settings.repeats < 0:
        raise UserError("There is nothing to replay: give 1 or more requests and slots.")
    make_output(settings.results.parent)
    announce(settings.dtype)
    target = load_target(settings.target, dtype=settings.dtype)
    drafter = load_drafter(settings.drafter, target, dtype=settings.dtype) if settings.drafter else None

    prompts = trace(settings, target)
    engines = engines_of(settings, target, drafter)
    found: dict[str, Any] = {name: memory(engine) for name, engine in engines.items()}
    identical: dict[str, int] = {}
    for temperature in settings.temperatures:
        passes = {name: replay(engine, prompts, settings, temperature) for name, engine in engines.items()}
        # Shown as they come: a pass may take minutes.
        print(", ".join(f"{name}: {made.dispatches} dispatches" for name, made in passes.items()), flush=True)
        first, *others = passes.values()
        # Of all engines.
        identical[f"t{temperature:g}"] = min(same(first, other) for other in others)
        for name, made in passes.items():
            found[name][f"t{temperature:g}"] = counts(made, engines[name])

    times: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(settings.repeats):
        # Forwards and backwards by turns, so that a drifting clock rate does not favour an engine.
        for name in list(engines)[:: 1 if repeat % 2 else -1]:
            times[name].append(replay(engines[name], prompts, settings, settings.temperatures[0]).seconds)
    report(settings, found, identical, times, prompts)


def trace(settings: PagedSettings, target: Target) -> list[tuple[int, ...]]:
    """Token ids of the prompts, from the files in turn."""
    prompts = read_prompts(target, settings.prompts, limit=settings.requests)
    # Any text does for a system prompt, as long as it is the same.
    system = tuple(token for prompt in prompts for token in prompt.tokens)[: settings.shared]
    # An answer has to have room.
    room = settings.longest - settings.new - len(system)
    fitting = [prompt for prompt in prompts if len(prompt.tokens) <= room]
    found = [(*system, *prompt.tokens) for prompt in mixed(fitting, 0)][: settings.requests] if fitting else []
    if len(found) < settings.requests:
        raise UserError(
            f"{len(found)} prompts leave room for {settings.new} new tokens in {settings.longest}; expected "
            f"{settings.requests}: give more files, or fewer requests."
        )
    return found


def engines_of(settings: PagedSettings, target: Target, drafter: Drafter | None) -> dict[str, Engine]:
    """The engines; the pages are those that fit into the decode state of the engine without."""
    config = EngineConfig(
        settings.slots, settings.longest, "fixed", rounds_per_dispatch=settings.rounds_per_dispatch, max_logprobs=1,
        prefill_chunk=128, smallest_prompt_bucket=128, page=settings.page,
    )  # fmt: skip
    # One bucket: whole blocks of all slots, which most of a replay verifies, and a fraction of the programs.
    width = 1 if drafter is None else drafter.config.block_size + 1
    wide = replace(config, slots=settings.paged_slots, cache_pages=1, buckets=(settings.paged_slots * width,))
    config = replace(config, buckets=(settings.slots * width,))
    params = LoopParams(target.params, {} if drafter is None else drafter.params)

    def size(made: EngineConfig) -> int:
        return bytes_of(jax.eval_shape(make_loop(target, drafter, made).init_state, params))

    budget, least = size(config), size(wide)
    pages = 1 + (budget - least) // (size(replace(wide, cache_pages=2)) - least)
    if pages * settings.page < settings.longest:
        raise UserError(
            f"{settings.paged_slots} slots leave {max(pages, 0)} pages of the budget, too few for one request of "
            f"{settings.longest} positions; give fewer paged slots, or more slots."
        )
    wide = replace(wide, cache_pages=pages)
    engines = {"by slot": Engine(target, drafter, config), "in pages": Engine(target, drafter, wide)}
    if settings.shared:
        # A bound that holds all pages: requests alone take kept ones away.
        engines["in shared pages"] = Engine(target, drafter, replace(wide, prefix_cache=-(-budget // MIB)))
    return engines


def memory(engine: Engine) -> dict[str, Any]:
    """Bytes of the state and of what the compiled programs take beside it, and the caches that a round copies."""
    limits = jnp.int32(8), jnp.asarray(False)
    rounds = run_rounds.lower(engine.loop, engine.params, engine.state, engine.occupancy, *limits).compile()
    chunk = blank_chunk(engine.loop, engine.config.slots, engine.config.prefill_chunk)
    prefill = admit.lower(engine.loop, engine.params, engine.state, chunk, True).compile()

    temporaries = [memory_of(made)["temporary"] / MIB for made in (rounds, prefill)]
    leaves = jax.tree.leaves((engine.state.target_cache, engine.state.draft))
    caches = {leaf.shape for leaf in leaves if leaf.nbytes > LARGE}
    state = bytes_of(engine.state) / MIB
    return {
        "slots": engine.config.slots,
        "pages": engine.config.cache_pages,
        "state_mib": state,
        "dispatch_temporaries_mib": temporaries[0],
        "prefill_temporaries_mib": temporaries[1],
        "peak_mib": state + max(temporaries),
        "whole_cache_copies": len(copies(rounds.as_text() or "", caches)),
    }


def replay(engine: Engine, prompts: Sequence[tuple[int, ...]], settings: PagedSettings, temperature: float) -> Replay:
    """Answer all prompts, which wait from the beginning."""
    for index, prompt in enumerate(prompts):
        engine.submit(index, Request(prompt, SamplingParams(settings.new, temperature, seed=index)))

    made = Replay()

    def look() -> None:
        # The end of a list is no load: fewer are left than there is room for.
        if engine.waiting:
            made.running.append(engine.running)
            made.held.append(engine.positions)

    engine.meanwhile, started = look, time.perf_counter()
    while not engine.idle:
        progress = engine.step()
        made.dispatches += 1
        made.generations |= {p.index: p.generation for p in progress if p.generation is not None}
    made.seconds = time.perf_counter() - started
    return made


def same(first: Replay, second: Replay) -> int:
    """Requests with the same tokens and the same rounds."""
    # Prompt tokens that a kept prefix spared are no part of an answer.
    found = {index: replace(made, cached_tokens=0) for index, made in second.generations.items()}
    return sum(first.generations[index] == made for index, made in found.items())


def counts(made: Replay, engine: Engine) -> dict[str, Any]:
    """Figures of a pass that do not depend on the machine."""
    lengths = [len(one.prompt_tokens) + len(one.tokens) for one in made.generations.values()]
    return {
        "requests_at_once_mean": statistics.fmean(made.running) if made.running else float(len(lengths)),
        "requests_at_once_most": max(made.running, default=len(lengths)),
        "positions_held_mean": statistics.fmean(made.held) if made.held else 0.0,
        "dispatches": made.dispatches,
        "preempted_so_far": engine.memory.preempted,
        "prompt_tokens_reused_so_far": 0 if engine.prefixes is None else engine.prefixes.reused,
        "positions_of_a_request_median": statistics.median(lengths),
        "positions_of_a_request_most": max(lengths),
        "tokens": sum(len(one.tokens) for one in made.generations.values()),
    }


def report(
    settings: PagedSettings,
    found: dict[str, Any],
    identical: dict[str, int],
    times: dict[str, list[float]],
    prompts: Sequence[tuple[int, ...]],
) -> None:
    """Write and print the figures.

    Raises:
        UserError: a program that copies a cache, after the figures.
    """
    first = f"t{settings.temperatures[0]:g}"
    # Of the last engine, which has all that there is, over the first.
    base, best = list(found)[0], list(found)[-1]
    ratio = {
        name: found[best][name]["requests_at_once_mean"] / found[base][name]["requests_at_once_mean"]
        for name in identical
    }
    for name, seconds in times.items():
        if seconds:
            tokens = found[name][first]["tokens"]
            found[name]["tokens_per_second_median"] = statistics.median(tokens / s for s in seconds)

    shown = {name: str(value) for name, value in asdict(settings).items()}
    sets = [Path(path).stem for path in settings.prompts]
    facts = {"requests": len(prompts), "identical": identical, "requests_at_once_ratio": ratio}
    stored = {"settings": shown | {"prompts": " ".join(sets)}, "machine": machine(), **facts, **found}
    write_json(settings.results, stored)

    rows = [[name, *(f"{found[kind][name]:,.2f}" for kind in found)] for name, v in found["by slot"].items()
            if isinstance(v, int | float)]  # fmt: skip
    rows += [
        [f"{name}: {row}", *(f"{found[kind][name][row]:,.2f}" for kind in found)]
        for name in identical
        for row in found["by slot"][name]
    ]
    print(table(["", *found], rows))
    print(f"requests at once, ratio: {ratio}; identical of {len(prompts)}: {identical}; {settings.results}")
    if any(found[kind]["whole_cache_copies"] for kind in found):
        raise UserError("A round copies a whole cache; that is a fault of the loop.")


if __name__ == "__main__":
    main()
