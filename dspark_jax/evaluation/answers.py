"""Whole evaluation sets through an engine: conversations with answers fed back, and the records of their rounds.

Axes: n recorded rounds, K block position.
"""

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

TURN_SLACK = 16  # tokens that an answer may grow by when it is tokenised again with its markers


@dataclass(frozen=True)
class Answered:
    """One pass over a set.

    Attributes:
        generations: by (dialogue, turn).
        cut: dialogues that ended before their last turn or never began, because the next prompt did not fit.
        seconds: wall-clock time, prefill included.
    """

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
    """A recorder for an engine: confidence logits [n, K], verify lengths [n] and accepted counts [n] of every round."""

    logits: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    accepted: list[np.ndarray] = field(default_factory=list)

    def __call__(self, holders: tuple[int | None, ...], records: RoundRecord) -> None:
        # A slot without a request, or a round after its end, commits nothing.
        live = np.asarray(records.committed) > 0
        self.logits.append(np.asarray(records.confidence)[live])
        self.lengths.append(np.asarray(records.verify_lengths)[live])
        self.accepted.append(np.asarray(records.accepted)[live])

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(logits [n, K], whole prefix accepted [n, K], observed [n, K])."""
        logits = np.concatenate(self.logits) if self.logits else np.zeros((0, 0))
        # Comparing positions with counts gives the masks: [K] against [n, 1].
        k = np.arange(logits.shape[1])
        lengths, accepted = (
            np.concatenate(x)[:, None] if x else np.zeros((0, 1)) for x in (self.lengths, self.accepted)
        )
        return logits, (k < accepted).astype(np.float64), k < lengths


def reach(target: Target, dialogue: Dialogue, new: int, thinking: bool = False) -> int:
    """Upper bound of a conversation's positions, with answers of at most `new` tokens."""
    messages: list[Message] = []
    for segment in dialogue.segments:
        # Empty answers: the template's own tokens are counted here, those of the answers below.
        messages += [*segment, {"role": "assistant", "content": ""}]
    turns = len(dialogue.segments)
    return len(encode(target, messages[:-1], thinking)) + turns * new + (turns - 1) * TURN_SLACK


def answer(engine: Engine, dialogues: Sequence[Dialogue], seed: int, thinking: bool = False) -> Answered:
    """Answers every turn of every dialogue, each answer fed back before the next turn.

    Args:
        engine: must be idle.
        dialogues: with distinct indices.
        seed: a turn's random numbers come from (seed, dialogue, turn) alone.
        thinking: setting of the chat template's thinking switch.

    Returns:
        All generations, the dialogues that did not fit, and the time taken.
    """

    messages: dict[int, list[Message]] = {dialogue.index: [] for dialogue in dialogues}
    by_index = {dialogue.index: dialogue for dialogue in dialogues}
    asked: list[tuple[int, int]] = []  # (dialogue, turn) of every request, by the index it is submitted under
    made: dict[tuple[int, int], Generation] = {}
    cut: list[int] = []

    def ask(index: int, turn: int) -> None:
        messages[index] += by_index[index].segments[turn]
        prompt = encode(engine.target, messages[index], thinking)
        # Refused by the engine where the prompt outgrew its slots: the dialogue ends there, the set goes on.
        try:
            engine.submit(len(asked), Request(prompt, replace(engine.sampling, seed=turn_seed(seed, index, turn))))
        except UserError:
            cut.append(index)
        else:
            asked.append((index, turn))

    started = time.perf_counter()
    for dialogue in dialogues:
        ask(dialogue.index, 0)

    # Turns are submitted as answers end, so dialogues of different lengths share the slots throughout.
    while not engine.idle:
        for progress in engine.step():
            if progress.generation is None:
                continue

            index, turn = asked[progress.index]
            made[index, turn] = progress.generation
            messages[index].append({"role": "assistant", "content": progress.generation.text})
            # The next turn queues behind all others.
            if turn + 1 < len(by_index[index].segments):
                ask(index, turn + 1)

    return Answered(made, tuple(cut), time.perf_counter() - started)


def turn_seed(seed: int, index: int, turn: int) -> int:
    """A seed of 32 bits for one turn, hashed so that neighbouring dialogues and turns share no random numbers."""
    # Words of 32 bits, as SeedSequence takes them (docs/algorithm.md, rule 107).
    words = (seed % 2**32, seed // 2**32 % 2**32, index, turn)
    return int(np.random.SeedSequence(words).generate_state(1)[0])
