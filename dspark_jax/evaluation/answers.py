"""Whole evaluation sets through an engine: conversations whose answers are fed back, and what the rounds recorded."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dspark_jax.data.chat import Message
from dspark_jax.decoding.state import RoundRecord
from dspark_jax.errors import UserError
from dspark_jax.evaluation.datasets import Dialogue
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.prompts import encode
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.targets.target import Target

TURN_SLACK = 16  # tokens: what an answer may gain when it is tokenised again with its markers


@dataclass(frozen=True)
class Answered:
    """One pass over a set. `generations` by (dialogue, turn); `cut`: dialogues that ended
    before their last turn or never began, because the next prompt did not fit."""

    generations: dict[tuple[int, int], Generation]
    cut: tuple[int, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(len(g.tokens) for g in self.generations.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Proposals:
    """A recorder: the confidence logits [n, K] of every round, verify lengths [n] and accepted counts [n]."""

    logits: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    accepted: list[np.ndarray] = field(default_factory=list)

    def __call__(self, holders: tuple[int | None, ...], records: RoundRecord) -> None:
        live = np.asarray(records.committed) > 0
        self.logits.append(np.asarray(records.confidence)[live])
        self.lengths.append(np.asarray(records.verify_lengths)[live])
        self.accepted.append(np.asarray(records.accepted)[live])

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(logits [n, K], whole prefix accepted [n, K], observed [n, K])."""
        logits = np.concatenate(self.logits) if self.logits else np.zeros((0, 0))
        k = np.arange(logits.shape[1])
        lengths, accepted = (
            np.concatenate(x)[:, None] if x else np.zeros((0, 1)) for x in (self.lengths, self.accepted)
        )
        return logits, (k < accepted).astype(np.float64), k < lengths


def reach(target: Target, dialogue: Dialogue, new: int, thinking: bool = False) -> int:
    """Positions that a conversation may take at most, with answers of `new` tokens."""
    messages: list[Message] = []
    for segment in dialogue.segments:
        messages += [*segment, {"role": "assistant", "content": ""}]
    turns = len(dialogue.segments)
    return len(encode(target, messages[:-1], thinking)) + turns * new + (turns - 1) * TURN_SLACK


def answer(engine: Engine, dialogues: Sequence[Dialogue], seed: int, thinking: bool = False) -> Answered:
    """Answers every turn of every dialogue, each answer fed back before the next turn.

    Args:
        engine: an idle one.
        dialogues: with indices that differ.
        seed: a turn's random numbers come from (seed, dialogue, turn) alone.
        thinking: what the chat template's switch is set to.
    """
    messages: dict[int, list[Message]] = {dialogue.index: [] for dialogue in dialogues}
    by_index = {dialogue.index: dialogue for dialogue in dialogues}
    asked: list[tuple[int, int]] = []  # (dialogue, turn) of every request; its place is the engine's index
    made: dict[tuple[int, int], Generation] = {}
    cut: list[int] = []

    def ask(index: int, turn: int) -> None:
        messages[index] += by_index[index].segments[turn]
        prompt = encode(engine.target, messages[index], thinking)
        try:
            engine.submit(len(asked), Request(prompt, replace(engine.sampling, seed=turn_seed(seed, index, turn))))
        except UserError:
            cut.append(index)
        else:
            asked.append((index, turn))

    started = time.perf_counter()
    for dialogue in dialogues:
        ask(dialogue.index, 0)

    while not engine.idle:
        for progress in engine.step():
            if progress.generation is None:
                continue

            index, turn = asked[progress.index]
            made[index, turn] = progress.generation
            messages[index].append({"role": "assistant", "content": progress.generation.text})
            if turn + 1 < len(by_index[index].segments):
                ask(index, turn + 1)

    return Answered(made, tuple(cut), time.perf_counter() - started)


def turn_seed(seed: int, index: int, turn: int) -> int:
    """A seed of 32 bits for one turn: neighbouring dialogues and turns share no random numbers, however many."""
    words = (seed % 2**32, seed // 2**32 % 2**32, index, turn)
    return int(np.random.SeedSequence(words).generate_state(1)[0])
