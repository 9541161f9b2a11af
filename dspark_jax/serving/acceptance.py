"""The acceptance of a pair's drafts by position, measured in a few seconds on questions that are asked of the target.

Whether drafting pays depends on it as much as on what rounds cost. It is of whole blocks and kept for the pair in the
user's cache, so that only the first engine measures it.

Axes: R request slots, K block position.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dspark_jax.checkpoints.tensors import write_json
from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.decoding.prefill import admit
from dspark_jax.decoding.round import DecodeLoop, LoopParams, init_state
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.files import user_cache
from dspark_jax.readers import (
    Schema,
    check_fields,
    check_seal,
    integer,
    list_of,
    object_of,
    read_object,
    sealed,
)
from dspark_jax.scheduling.costs import Occupancy
from dspark_jax.serving.chunks import next_chunk, prompt_bucket
from dspark_jax.serving.jobs import Job, make_job, tokenize_prompt
from dspark_jax.serving.memory import Memory, memory_of
from dspark_jax.serving.requests import Request
from dspark_jax.serving.roster import Entry
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.serving.temperatures import validity
from dspark_jax.targets.kv_cache import ByPage
from dspark_jax.targets.target import Target

QUESTIONS = (
    "A box holds 12 red and 30 blue pens. How many pens are in 4 such boxes? Think step by step.",
    "Write a Python function that returns the largest even number of a list, or None.",
    "Give me three tips for sleeping better.",
    "A train covers 180 km in 2 hours and 15 minutes. What is its mean speed in km/h?",
    "Write a Python class for a stack with push, pop and len.",
    "Why does the moon always show us the same side?",
    "Tom is 4 years older than Ann. Together they are 30. How old is each of them?",
    "Show a SQL query that counts the orders of each customer in the last month.",
    "Write a short letter to a friend who has moved to another town.",
)
"""Mathematics, code and conversation in turn, so that a measurement that time cuts short has some of each."""
NEW_TOKENS = 48
"""Tokens of an answer that are decoded: enough to leave the opening behind, which drafters know best."""
BUDGET = 4.0
"""Seconds after which no further question is asked, compilation aside."""


@dataclass(frozen=True)
class Accepted:
    """Drafts of whole blocks, by position, or nodes of whole trees, the best paths first."""

    judged: tuple[int, ...]  # [K] drafts behind a prefix that was accepted whole; [N] rounds of a tree
    accepted: tuple[int, ...]  # [K] or [N] of them
    tree: bool = False

    @property
    def expected(self) -> np.ndarray:
        """[K + 1] tokens of a round that verifies 0, 1, .. K drafts; a position at which no draft was judged counts as
        one that rejects all."""
        rates = np.asarray(self.accepted) / np.maximum(self.judged, 1)
        # Along a chain a draft needs those before it; a node's rate is that of its whole path.
        return 1.0 + np.concatenate([[0.0], np.cumsum(rates if self.tree else np.cumprod(rates))])


def questions_for(target: Target, loop: DecodeLoop, config: EngineConfig, sampling: SamplingParams) -> list[Job]:
    """The questions as jobs that fit a slot of `loop`, all of its pages, and one chunk of a prompt; random ids without
    a tokenizer."""
    rng = np.random.default_rng(0)
    positions = loop.size - loop.width
    if isinstance(loop.layout, ByPage):
        positions = min(positions, loop.layout.count * loop.layout.page)
    # Half of them for the question, half for the answer, each within the target's context.
    room = min(positions, target.config.max_positions) // 2
    settings = replace(
        sampling,
        max_new_tokens=max(1, min(NEW_TOKENS, room - 1)),
        stop=(), stop_tokens=None, seed=None, logprobs=None, verify_length=None, logit_bias=(),
    )  # fmt: skip

    made: list[Job] = []
    for index, question in enumerate(QUESTIONS):
        if target.tokenizer is None:
            prompt = tuple(rng.integers(0, target.known_tokens or target.config.vocab_size, 16).tolist())
        else:
            prompt = _asked(target, question)

        # A question that is too long loses its beginning: its end is where an answer goes on.
        job = make_job(target, settings, index, Request(prompt[-min(room, config.prefill_chunk) :]))
        ends = tuple(job.sampling.stop_tokens or ())[: loop.stop_slots]
        made.append(replace(job, sampling=replace(job.sampling, stop_tokens=ends)))
    return made


def _asked(target: Target, question: str) -> tuple[int, ...]:
    try:
        return tokenize_prompt(target, [{"role": "user", "content": question}], "A question", False)
    except UserError:  # no chat template, or one that refuses: a target of bare text goes on from it as well
        return tokenize_prompt(target, question, "A question", False)


def measure_acceptance(
    loop: DecodeLoop, params: LoopParams, jobs: Sequence[Job], config: EngineConfig, budget: float = BUDGET
) -> Accepted:
    """Decode answers with every draft verified, and count the accepted ones.

    Runs the engine's own programs. Allocates a temporary decode state, as profiling does.

    Args:
        loop: with a drafter and a load-adaptive policy; of trees, with `BestNodes`.
        params: with tables whose `forced` is set.
        jobs: answered as many at a time as there are slots, and memory for.
        config: widths of prompts.
        budget: seconds after which no further ones are begun.
    """
    state, occupancy = init_state(loop, params), Occupancy.of()
    limits = jax.device_put((np.int32(loop.size), np.bool_(False)))
    counted = np.zeros((2, loop.block), int)
    memory, waiting = memory_of(loop, loop.size), [Entry(job, 0.0) for job in jobs]
    started, begun = time.perf_counter(), False

    with tqdm(total=len(jobs), desc="asking the pair, once", leave=False, disable=None) as bar:
        # The first group compiles the programs, which is no measure of the next ones' time.
        while waiting and (not begun or time.perf_counter() - started <= budget):
            group = _seated(memory, waiting, loop.requests)
            # Without pages what a request writes is dropped, and what it reads is another's.
            state = memory.placed(state)
            for slot, entry in group.items():
                width = prompt_bucket(config, loop.size, 0, len(entry.job.prompt))
                chunk = next_chunk(loop, width, [(slot, entry.job, 0)])
                state = admit(loop, params, state, jax.device_put(chunk), True)

            # Until all of them have ended: `rounds` is more than any can last.
            state = run_rounds(loop, params, state, occupancy, *limits)
            seen = jax.device_get((state.counters.judged_at, state.counters.accepted_at))
            counted += np.stack([part[: len(group)].sum(axis=0) for part in seen])

            del waiting[: len(group)]
            bar.update(len(group))
            started, begun = started if begun else time.perf_counter(), True

    if loop.tree is not None:
        # By rank, which no counter of the loop has; nothing was forgotten since the state was made.
        memory_of_nodes = jax.device_get(state.policy.shared.own)
        rounds = (int(memory_of_nodes.rounds),) * loop.drafts
        return Accepted(rounds, tuple(map(int, memory_of_nodes.reached)), tree=True)
    judged, accepted = (tuple(map(int, row)) for row in counted)
    return Accepted(judged, accepted)


def _seated(memory: Memory, waiting: Sequence[Entry], slots: int) -> dict[int, Entry]:
    """The first of those that wait, by slot: as many as memory holds to their ends, nothing else being held."""
    memory.clear()
    group: dict[int, Entry] = {}
    for slot, entry in zip(range(slots), waiting, strict=False):
        if not memory.admit(slot, entry, group):
            break
        group[slot] = entry
    return group


def load_or_ask(
    target: Target,
    drafter: Drafter,
    loop: DecodeLoop,
    params: LoopParams,
    config: EngineConfig,
    sampling: SamplingParams,
    folder: Path | None = None,
) -> Accepted:
    """The pair's acceptance under `sampling`: that of the engine's calibration where it has one that holds it; else
    read from a folder, or measured in a few seconds and stored there.

    Args:
        target, drafter: the pair, whose weights the stored measurement is valid for.
        loop, params, config: of the engine, with tables.
        sampling: under which the questions are answered.
        folder: None: `user_cache()`. If it cannot be written, every start measures again.
    """
    # A calibration has far more rounds than are measured here, on prompts that were chosen for the pair.
    chains = loop.tree is None
    if chains and config.sts is not None and (recorded := _recorded(config.sts, loop.block)) is not None:
        return recorded

    # Of weights and settings and not of the machine.
    key = {**validity(target, drafter, sampling), "block": loop.block, "questions": list(QUESTIONS)}
    key |= {} if chains else {"tree": repr(loop.tree)}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = (folder or user_cache()) / f"acceptance-{name}.json"
    if path.exists():
        try:
            return replace(_read(path, key, loop.drafts), tree=not chains)
        except UserError:  # a torn or foreign file: measure again
            pass

    assert params.tables is not None, "a load-adaptive policy has tables"
    forced = params._replace(tables=params.tables._replace(forced=jax.device_put(np.bool_(True))))
    found = measure_acceptance(loop, forced, questions_for(target, loop, config, sampling), config)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, sealed({"key": key, "judged": list(found.judged), "accepted": list(found.accepted)}))
    except (UserError, OSError):
        pass
    return found


def _recorded(sts: Path, block: int) -> Accepted | None:
    """The acceptance in a calibration's rounds; None where its file has none. UserError where it holds no counts."""
    # The file was read for its temperatures before, which checks what it is valid for.
    facts = read_object(sts).get("valid_for", {})
    if "judged" not in facts:
        return None
    counts = list_of(integer(0), least=block, most=block)
    schema: Schema = {"judged": counts, "accepted": counts}
    check_fields(
        facts, schema, f"{sts}, under valid_for,", required=schema, cure="calibrate again with infer.calibrate"
    )
    return Accepted(tuple(facts["judged"]), tuple(facts["accepted"]))


def _read(path: Path, key: dict[str, Any], block: int) -> Accepted:
    where, cure = str(path), "delete it"
    content = read_object(path, expected="an acceptance that an engine measured")
    counts = list_of(integer(0), least=block, most=block)
    schema: Schema = {"key": object_of(), "judged": counts, "accepted": counts}
    check_fields(content, schema, where, required=schema, cure=cure)
    check_seal(content, where, cure=cure)

    # The name is only a hash of the key, so the key itself is compared.
    if content["key"] != key:
        raise UserError(f"{where} is of another pair; {cure}.")
    return Accepted(tuple(content["judged"]), tuple(content["accepted"]))
