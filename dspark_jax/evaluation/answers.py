"""Whole evaluation sets through an engine: conversations whose answers are fed back, and what the rounds recorded."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark_jax.data.chat import encode_prompt
from dspark_jax.decoding.state import RoundRecord
from dspark_jax.errors import UserError
from dspark_jax.evaluation.datasets import Sample
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.targets.target import Target

TURNS_APART = 64  # seeds between two samples: more than any conversation has turns
TURN_SLACK = 16  # tokens: what an answer may gain when it is tokenised again with its markers


@dataclass(frozen=True)
class ChatStyle:
    """How conversations become prompts."""

    form: str = "qwen"
    thinking: bool = False

    def encode(self, target: Target, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        return tuple(int(t) for t in encode_prompt(target.tokenizer, messages, self.form, self.thinking))


@dataclass(frozen=True)
class Answered:
    """One pass over a set. `generations` by (sample index, turn); `cut`: conversations, by sample index, that ended
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


def first_messages(sample: Sample) -> list[dict[str, str]]:
    system = [{"role": "system", "content": sample.system}] if sample.system else []
    return [*system, {"role": "user", "content": sample.turns[0]}]


def reach(target: Target, style: ChatStyle, sample: Sample, new: int) -> int:
    """Positions that a conversation may take at most, with answers of `new` tokens."""
    messages: list[dict[str, str]] = []
    for turn in sample.turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": ""}]
    system = first_messages(sample)[:-1]
    count = len(style.encode(target, [*system, *messages[:-1]]))
    return count + len(sample.turns) * new + (len(sample.turns) - 1) * TURN_SLACK


def answer(engine: Engine, style: ChatStyle, samples: Sequence[Sample], seed: int) -> Answered:
    """Answers every turn of every sample. A turn's random numbers come from (seed, sample, turn) alone."""
    target = engine.target
    messages = {sample.index: first_messages(sample) for sample in samples}
    prompts = {index: style.encode(target, said) for index, said in messages.items()}
    by_index = {sample.index: sample for sample in samples}
    made: dict[tuple[int, int], Generation] = {}
    cut: list[int] = []
    started = time.perf_counter()

    def ask(index: int, turn: int, prompt: tuple[int, ...]) -> None:
        try:
            engine.submit(index * TURNS_APART + turn, Request(prompt, seed=seed + index * TURNS_APART + turn))
        except UserError:
            cut.append(index)

    for sample in samples:
        ask(sample.index, 0, prompts[sample.index])
    while not engine.idle:
        for progress in engine.step():
            if progress.generation is None:
                continue
            index, turn = divmod(progress.index, TURNS_APART)
            made[index, turn] = progress.generation
            if turn + 1 < len(by_index[index].turns):
                messages[index] += [
                    {"role": "assistant", "content": progress.generation.text},
                    {"role": "user", "content": by_index[index].turns[turn + 1]},
                ]
                ask(index, turn + 1, style.encode(target, messages[index]))
    return Answered(made, tuple(cut), time.perf_counter() - started)
