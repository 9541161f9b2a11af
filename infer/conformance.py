"""Checks that a drafter is read as it was trained, and finds which of the four silent off-by-ones its files have.

    python -m infer.conformance --drafter assets/embedded_drafter --target assets/embedded_target

The target answers real prompts; the drafter's blocks are then laid over those answers, and their expected acceptance is
compared between the declared conventions and each shifted one: slot, layer id, block position, loss mask
(docs/interop.md). Prints a table, writes metrics.json. Exit code 0: the conventions fit; 1: one is off, and is named;
2: bad input.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dspark_jax.checkpoints.drafters import drafter_hf_config, drafter_layout, load_drafter, shared_tables
from dspark_jax.checkpoints.huggingface import load_target, resolve_folder
from dspark_jax.checkpoints.manifest import mismatches, read_manifest
from dspark_jax.config.cli import parse, program
from dspark_jax.data.chat import Encoded, Message, encode_conversation
from dspark_jax.data.conversations import read_prompt_records
from dspark_jax.devices import announce
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.evaluation.conformance import (
    DECLARED,
    Comparison,
    Edges,
    Probe,
    Reading,
    Sequences,
    compare,
    edge_anchors,
    edges,
    readings,
)
from dspark_jax.files import make_output, write_json
from dspark_jax.programs import asset
from dspark_jax.report import table
from dspark_jax.serving.generate import generate
from dspark_jax.serving.prompts import encode
from dspark_jax.serving.requests import Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target

DEFAULT_PROMPTS = asset("conformance_prompts.jsonl")
NEXT_TURN = {"role": "user", "content": "Thank you."}  # gives the answer a continuation that no loss covers
LENGTHS = 64  # sequences are padded to a multiple of this
FEWEST = 8  # answers below which a difference is no evidence
UNTRAINED = 0.02  # acceptance below which readings cannot be told apart


@dataclass(frozen=True)
class ConformanceSettings:
    """Checks that a drafter is read as it was trained."""

    target: str
    """Folder or hub id of the target."""
    drafter: str
    """Folder or hub id of the drafter, in any layout."""
    prompts: tuple[Path, ...] = (DEFAULT_PROMPTS,)
    """JSONL files of conversations or evaluation prompts."""
    output: Path = Path("runs/conformance")
    """Folder of metrics.json."""
    limit: int = 96
    """Prompts taken, evenly spread over all; at least 8."""
    max_new_tokens: int = 96
    temperature: float = 0.7
    """Temperature of the target's answers."""
    anchors: int = 8
    """Blocks measured in each answer."""
    slots: int = 16
    """Answers drawn at once."""
    batch: int = 8
    """Answers measured at once."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    thinking: bool = False
    """Let the chat template open with thinking."""


@dataclass(frozen=True)
class Verdict:
    """The measurements; `off` names the wrong conventions, the clearest first."""

    comparisons: list[Comparison]
    edges: Edges
    off: tuple[str, ...]
    best: Reading


@program
def main(argv: list[str]) -> int:
    settings = parse(ConformanceSettings, argv, description=__doc__)
    # Fewer answers could not give a standard error worth a verdict.
    if settings.limit < FEWEST or min(settings.anchors, settings.slots, settings.batch) < 1:
        raise UserError(f"Expected a limit of {FEWEST} prompts or more, and anchors, slots and batch of 1 or more.")

    messages = read_messages(settings)
    # Both before the output is made: a wrong path leaves nothing behind.
    resolve_folder(settings.target)
    resolve_folder(settings.drafter, "drafter")
    make_output(settings.output)
    announce(settings.dtype)
    target = load_target(settings.target, dtype=settings.dtype)
    drafter = load_doubtful(settings, target)
    # Reported beside the measurement: a manifest may be wrong where the weights are right.
    contradictions = manifest_contradictions(settings.drafter, drafter, target)
    sequences = answered(settings, target, messages)
    verdict = judge(Probe(target, drafter, shared_tables(target), settings.batch), sequences, settings)
    write_json(settings.output / "metrics.json", metrics(verdict, contradictions, settings, drafter))
    print(rows(verdict, drafter))
    for sentence in (*(f"Its manifest contradicts it: {half}." for half in contradictions), summary(verdict, drafter)):
        print(sentence)

    return 1 if verdict.off else 0


def load_doubtful(settings: ConformanceSettings, target: Target) -> Drafter:
    """Loads a drafter regardless of its manifest, and even with layer ids that cannot be right.

    Ids counted from 1 name the last layer, which is never tapped (docs/algorithm.md, rule 15) and refused by loading.
    """
    native = drafter_hf_config(settings.drafter, target.config)
    ids = tuple(native.get("target_layer_ids") or ())
    # An MTP drafter does read the last layer's output, so its ids are as they should be.
    shift = -1 if ids and ids[-1] == target.config.num_layers - 1 and "MTP" not in str(native["architectures"]) else 0
    # Loaded with ids that are allowed, then given those of its files, to be judged as declared.
    drafter = load_drafter(settings.drafter, target, dtype=settings.dtype, compare_manifest=False, layer_shift=shift)
    return replace(drafter, config=replace(drafter.config, target_layer_ids=ids)) if shift else drafter


def manifest_contradictions(path: str, drafter: Drafter, target: Target) -> list[str]:
    manifest = read_manifest(resolve_folder(path, "drafter"))
    return [] if manifest is None else mismatches(manifest, drafter.hf_config, drafter_layout(path), target)


def read_messages(settings: ConformanceSettings) -> list[Sequence[Message]]:
    """The turns before each conversation's first answer; `limit` of them, evenly spread over all files."""
    # First answers only: a later prompt would hold answers of another model.
    found = [record.segments()[0] for file in settings.prompts for record in read_prompt_records(file)]
    if len(found) < FEWEST:
        raise UserError(f"There are {len(found)} prompts; a verdict needs {FEWEST} or more. Give more with --prompts.")
    # Evenly: files are often sorted by domain, and the first `limit` would be of one.
    spread = np.linspace(0, len(found) - 1, min(settings.limit, len(found))).round().astype(int)
    return [found[i] for i in spread]


def answered(settings: ConformanceSettings, target: Target, prompts: Sequence[Sequence[Message]]) -> Sequences:
    """Whole conversations as in training, with the target's own answers and a next turn."""
    sampling = SamplingParams(settings.max_new_tokens, settings.temperature, seed=settings.seed)
    engine = EngineConfig(settings.slots, rounds_per_dispatch=64)
    room = target.config.max_positions - settings.max_new_tokens
    requests, asked = [], []

    for turns in prompts:
        tokens = encode(target, turns, settings.thinking)
        # A prompt without room for an answer would end at once and measure nothing.
        if len(tokens) < room:
            requests.append(Request(tokens))
            asked.append(turns)

    texts = [generation.text for generation in generate(target, None, requests, sampling, engine)]

    found = []
    for turns, text in zip(asked, texts, strict=True):
        conversation = [*turns, {"role": "assistant", "content": text}]
        # The last row holds the answer, whatever the template did to the turns before.
        row = encode_conversation(target.tokenizer, conversation, None, settings.thinking)[-1]
        # What the template closes an answer with shows only when another turn follows.
        following = encode(target, [*conversation, NEXT_TURN], settings.thinking)
        if (one := _followed(target.tokenizer, row, following)) is not None:
            found.append(one)

    return _padded(found, target.config.max_positions)


def _followed(tokenizer: Any, row: Encoded, following: Sequence[int]) -> tuple[np.ndarray, int, int, int] | None:
    """Returns (tokens with a next turn's, the answer's first and last position, the first position after its closing).

    Whitespace that the template writes after an end marker belongs to the closing: only some trainers supervise it, so
    it is not judged. None where the next prompt does not repeat the answer.
    """
    # The last answer's tokens and its closing, all in one stretch.
    supervised = np.flatnonzero(row.loss_mask)
    answer = row.input_ids[supervised].tolist()
    # From the end: the same words may occur in an earlier turn.
    starts = range(len(following) - len(answer), -1, -1)
    at = next((i for i in starts if list(following[i : i + len(answer)]) == answer), None)
    # The template rewrote the answer, or it is too short to have a middle and an end.
    if at is None or len(answer) < 4:
        return None

    rest = following[at + len(answer) :]
    blank = next((i for i, token in enumerate(rest) if tokenizer.decode([token]).strip()), None)
    if blank is None:
        return None

    last = int(supervised[-1])
    return np.concatenate([row.input_ids, np.asarray(rest, np.int32)]), int(supervised[0]), last, last + 1 + blank


def _padded(found: Sequence[tuple[np.ndarray, int, int, int]], longest: int) -> Sequences:
    """Pads the conversations whose answer and next token fit; UserError for too few of them."""
    kept = [one for one in found if one[3] < min(len(one[0]), longest)]
    if len(kept) < FEWEST:
        raise UserError(
            f"{len(kept)} of the answers are long enough to be measured, and {FEWEST} are needed; give more prompts."
        )

    rows = [tokens[:longest] for tokens, *_ in kept]
    # A multiple of a fixed length, so that other prompts often need no other program.
    size = -(-max(map(len, rows)) // LENGTHS) * LENGTHS
    tokens = np.zeros((len(rows), size), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids

    first, last, after = (np.asarray([one[i] for one in kept], np.int32) for i in (1, 2, 3))
    return Sequences(tokens, first, last, after)


def judge(probe: Probe, sequences: Sequences, settings: ConformanceSettings) -> Verdict:
    """Reads the drafter in all ways; the loss mask is judged under the best-fitting reading."""
    block = probe.drafter.config.block_size
    inside = middle_anchors(sequences, block, settings.anchors, settings.seed)
    # Rows of -1 are answers shorter than a block.
    whole = inside.min(axis=1) >= 0
    if whole.sum() < FEWEST:
        raise UserError(
            f"{int(whole.sum())} of the answers are longer than a block of {block}, and {FEWEST} are needed; give more "
            "prompts or a larger --max-new-tokens."
        )

    chosen = Sequences(*(field[whole] for field in sequences))
    comparisons = compare(probe.acceptance(chosen, inside[whole], readings(probe.drafter)))
    # Only one of the first three conventions is named: a wrong one spoils the readings of the others.
    better = sorted((c for c in comparisons if c.better()), key=lambda c: -c.gain)
    best = better[0] if better else comparisons[0]
    if max(c.acceptance for c in comparisons) < UNTRAINED:
        raise UserError(
            f"The drafter's acceptance is {best.acceptance:.1%} under every reading, so none can be told from another; "
            "it is untrained, or of another target."
        )

    # All answers, not only those longer than a block: their ends are alike.
    at = edge_anchors(sequences, block)
    end = edges(sequences, at, probe.acceptance(sequences, at, [best.reading])[best.reading])
    off = [best.reading.convention] if better else []
    off += ["loss mask"] if end.early(best.acceptance) or end.late() else []

    return Verdict(comparisons, end, tuple(name for name in off if name), best.reading)


def middle_anchors(sequences: Sequences, block: int, count: int, seed: int) -> np.ndarray:
    """[S, count] random anchors whose blocks lie wholly within the answer; rows of -1 where there is no room."""
    # Anchors are drawn once and shared by all readings, whose difference then varies less than either.
    rng = np.random.default_rng(seed)
    anchors = np.full((len(sequences.first), count), -1, np.int32)
    for row, (first, last) in enumerate(zip(sequences.first, sequences.last, strict=True)):
        # A block that left the answer would be judged on tokens that no loss mask covers.
        if last - block - 1 > first:
            anchors[row] = np.sort(rng.integers(first, last - block - 1, count))
    return anchors


def rows(verdict: Verdict, drafter: Drafter) -> str:
    shown = []
    for c in verdict.comparisons:
        name = c.reading.convention or "all"
        difference = "" if c.reading == DECLARED else f"{c.gain:+.3f} ± {c.error:.3f}"
        # Several readings may be better at once; the verdict names the best.
        mark = "" if not c.better() else "fits best" if c.reading == verdict.best else "fits better"
        shown.append((name, c.reading.describe(drafter), f"{c.acceptance:.3f}", f"{c.tau:.2f}", difference, mark))

    end, mask = verdict.edges, "loss mask" in verdict.off
    for what, value in (("the answer's last token but one", end.before), ("the answer's last token", end.last),
                        ("the token after the answer", end.after)):  # fmt: skip
        shown.append(("loss mask", what, f"{value:.3f}", "", "", ""))

    shown[-1] = (*shown[-1][:-1], "trained on it" if mask and not end.late() else "")
    shown[-2] = (*shown[-2][:-1], "not trained on it" if mask and end.late() else "")
    return table(("convention", "read", "acceptance", "tau", "difference", ""), shown)


def summary(verdict: Verdict, drafter: Drafter) -> str:
    if not verdict.off:
        return "The conventions fit: no shifted reading is better than the declared one."

    said = []
    if verdict.best.convention in verdict.off:
        said.append(f"The {verdict.best.convention} convention is off: it was trained with "
                    f"{verdict.best.describe(drafter)}.")  # fmt: skip
    if "loss mask" in verdict.off:
        early = "one position early: it has learnt the token after the answer"
        late = "one position late: it has not learnt the answer's last token"
        said.append(f"The loss mask is off: it was read {late if verdict.edges.late() else early}.")

    return " ".join(said)


def metrics(
    verdict: Verdict, contradictions: Sequence[str], settings: ConformanceSettings, drafter: Drafter
) -> dict[str, Any]:
    # `asdict` nests the reading; the file has its three shifts beside the figures.
    def entry(c: Comparison) -> dict[str, Any]:
        fields = {name: value for name, value in asdict(c).items() if name != "reading"}
        named = {"convention": c.reading.convention or "declared", "read": c.reading.describe(drafter)}
        return named | asdict(c.reading) | fields | {"better": c.better()}

    return {
        "off": list(verdict.off),
        "best": asdict(verdict.best),
        "readings": [entry(c) for c in verdict.comparisons],
        "edges": asdict(verdict.edges),
        "manifest_contradictions": list(contradictions),
        "settings": asdict(settings),
    }


if __name__ == "__main__":
    sys.exit(main())
