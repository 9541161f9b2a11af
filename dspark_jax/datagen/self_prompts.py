"""Prompts sampled from the chat model itself, as continuations of a user's turn (Magpie, arXiv 2406.08464).

A model tuned on conversations continues the start of a user's turn with a plausible request. A system message that
names a domain, and the first words of the turn, keep a small model to the point: without them many of its turns never
end. Prompts and answers are then both the target's own, for any chat model, without a network.

Candidate i is a function of (seed, i) and the domains alone, so a killed run can be continued.
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dspark_jax.data.conversations import read_prompt_records
from dspark_jax.data.jsonl import ResumableJsonl, parse_line, read_lines
from dspark_jax.data.templates import render
from dspark_jax.errors import UserError
from dspark_jax.readers import read_records
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.requests import Generation, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target

WINDOW = 64
"""Candidates written before they are counted again; the most that a kill can lose."""

LONGEST, NEW_TOKENS = 600, 110  # characters of a prompt; tokens generated after its opener
SHORTEST_WORDS = 4
LEAST_ASCII, LEAST_DIFFERENT = 0.97, 0.7  # shares of a prompt's characters, and of its word triples
_SAME = 60  # characters by which two prompts are compared
_MARK = "\N{SNOWMAN}"
_NUMBER = re.compile(r"\d|\b(two|three|four|five|six|seven|eight|nine|ten|half|twice|double|dozen)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Domain:
    """A subject of prompts, with the beginnings that candidates are drawn from.

    Attributes:
        name: stored with each prompt.
        systems: system messages, one of which is drawn for a candidate.
        openers: first words of a turn, one of which is drawn.
        needs: "number" to drop prompts that ask nothing about numbers.
    """

    name: str
    systems: tuple[str, ...]
    openers: tuple[str, ...]
    needs: str = ""


_PEOPLE = ("Liam", "Mia", "Carlos", "Priya", "Elena", "Omar", "Julia", "Ravi", "Hana", "Tom", "Nina", "Leo")
_DOES = ("has", "buys", "sells", "earns", "reads", "bakes", "drives", "saves", "plants", "needs", "walks", "works")
DOMAINS = (
    Domain(
        "math",
        (
            "You are a helpful assistant that solves math word problems.",
            "You are a math tutor. The user asks word problems about everyday life and ends with a question.",
            "You are an assistant that answers questions on arithmetic, percentages and rates step by step.",
        ),
        (
            *(f"{name} {does}" for name in _PEOPLE for does in _DOES),
            "A farmer", "A train", "A store", "A school", "A box", "There are", "In a", "If", "The", "How many", "Two",
        ),
        needs="number",
    ),
    Domain(
        "code",
        (
            "You are an assistant that answers programming questions in Python.",
            "You are a coding assistant. The user asks for short Python functions.",
        ),
        (
            "Write a Python function to", "Write a function that takes", "Write a python function to check whether",
            "Write a function to count", "Write a function to sort", "Implement a function", "Given a list of",
            "How do I", "Create a Python class", "What does", "Complete this Python function:\n```python\ndef",
        ),
    ),
    Domain(
        "chat",
        (
            "You are a helpful assistant.",
            "You are an assistant that helps with writing: emails, stories, essays and poems.",
            "You are an assistant that answers questions about science, history, geography and health.",
        ),
        (
            "What", "How", "Why", "Explain", "Write a", "Describe", "Imagine you are", "Can you", "Give me", "Suggest",
            "Compare", "Tell me about", "What is the difference between", "Summarize", "List", "Help me", "Should",
        ),
    ),
)  # fmt: skip


def read_domains(path: Path) -> tuple[Domain, ...]:
    """Domains of a JSONL file: {"domain": name, "system": [...], "openers": [...]} a line, "needs" optional.

    Raises:
        UserError: no line, or one of another form.
    """
    made = []
    for number, row in enumerate(read_records(path), start=1):
        name, needs = row.get("domain"), row.get("needs", "")
        # Without openers the model begins the turn itself.
        systems, openers = _texts(row.get("system")), _texts(row.get("openers", [""]))
        if not isinstance(name, str) or not systems or not openers:
            raise UserError(
                f'{path} line {number} is no domain; expected {{"domain": NAME, "system": [TEXT, ...], '
                '"openers": [TEXT, ...]}.'
            )

        if needs not in ("", "number"):
            raise UserError(f'{path} line {number} has needs {needs!r}; expected "number", or no such field.')

        made.append(Domain(name, systems, openers, needs))

    if not made:
        raise UserError(f"{path} holds no domain; give one a line.")
    return tuple(made)


def _texts(value: Any) -> tuple[str, ...]:
    """A list of texts; () for anything else."""
    return tuple(value) if isinstance(value, list) and all(isinstance(text, str) for text in value) else ()


def excluded_prompts(files: Iterable[Path]) -> set[str]:
    """Keys of user turns that must not be written (see `same_as`).

    Args:
        files: evaluation sets ({"turns": [...]}) or conversations.

    Raises:
        UserError: a file that cannot be read, or a row of another form.
    """
    found: set[str] = set()
    for file in files:
        for record in read_prompt_records(file):
            for turn in (message["content"] for message in record.messages if message["role"] == "user"):
                # Evaluations often add instructions on further lines, so the first line is excluded too.
                for text in (turn, turn.split("\n")[0]):
                    found.update(same_as(text))

    return found


def same_as(text: str) -> tuple[str, str]:
    """Keys under which two prompts count as the same: the words, and their first `_SAME` characters."""
    words = " ".join(re.findall(r"\w+", text.lower()))
    return words, words[:_SAME]


@dataclass
class Filter:
    """Decides which candidates are kept; `seen` holds the keys of kept and excluded prompts."""

    seen: set[str]

    def reason(self, text: str, domain: Domain, ended: bool) -> str | None:
        """Why a candidate is dropped; None keeps it and drops later ones like it."""
        words = text.split()
        triples = list(zip(words, words[1:], words[2:], strict=False))
        checks = {
            "it does not end by itself": not ended,
            "it is too short": len(words) < SHORTEST_WORDS,
            "it is too long": len(text) > LONGEST,
            "it is not in Latin letters": sum(map(str.isascii, text)) < LEAST_ASCII * len(text),
            "it repeats itself": len(triples) > 8 and len(set(triples)) < LEAST_DIFFERENT * len(triples),
            "it asks nothing about numbers": domain.needs == "number" and not (_NUMBER.search(text) and "?" in text),
            "a prompt like it is there or excluded": not self.seen.isdisjoint(same_as(text)),
        }
        # The first reason in this order is reported; only a kept candidate blocks others.
        found = next((reason for reason, applies in checks.items() if applies), None)
        if found is None:
            self.seen.update(same_as(text))

        return found


@dataclass(frozen=True)
class Writer:
    """Samples candidates from `target` at temperatures 0.7 to 1, for both common and unusual prompts."""

    target: Target
    domains: tuple[Domain, ...]
    engine: EngineConfig
    seed: int

    def candidate(self, index: int) -> tuple[Domain, str, str, float]:
        """(domain, system message, opener, temperature) of a candidate."""
        # Seeds of text are reproducible: `random` hashes them by sha512.
        rng = random.Random(f"{self.seed}:{index}")
        domain = rng.choice(self.domains)
        return domain, rng.choice(domain.systems), rng.choice(domain.openers), rng.choice((0.7, 0.8, 0.9, 1.0))

    def window(self, first: int) -> list[tuple[int, Domain, str, bool]]:
        """(index, domain, text, whether it ended) of the `WINDOW` candidates from `first` on, in order."""
        # A candidate is drawn from its own index, so a window can be generated again by itself.
        drawn = {index: self.candidate(index) for index in range(first, first + WINDOW)}
        config = replace(self.engine, longest=self.longest, stop_slots=max(1, len(self.target.stop_tokens)))
        # A fresh engine for each window, so that nothing depends on the windows before.
        engine = Engine(self.target, None, config)

        for index, (_, system, opener, temperature) in drawn.items():
            # Apart from the draw above: another opener must not share the same noise.
            noise = random.Random(f"{self.seed}:{index}:noise").getrandbits(31)
            engine.submit(
                index, Request(self.prefix(system, opener), SamplingParams(NEW_TOKENS, temperature, seed=noise))
            )

        done: dict[int, Generation] = {}
        while not engine.idle:
            done |= {step.index: step.generation for step in engine.step() if step.generation is not None}

        return [
            (index, domain, self.text(opener, done[index]), done[index].finish_reason == "stop")
            for index, (domain, _, opener, _) in drawn.items()
        ]

    @cached_property
    def longest(self) -> int:
        """Positions of the longest candidate: one set of compiled programs for all windows."""
        prefixes = (self.prefix(s, o) for domain in self.domains for s in domain.systems for o in domain.openers)
        return max(map(len, prefixes)) + NEW_TOKENS

    def prefix(self, system: str, opener: str) -> tuple[int, ...]:
        """Token ids up to the opener of a user's turn, as the chat template renders it."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": _MARK}]
        # A mark that no template writes itself stands for the user's words.
        rendered = render(self.target.tokenizer, messages, add_generation_prompt=False)
        # Everything that the template writes before the user's words; the model continues from there.
        before, mark, _ = rendered.partition(_MARK)
        if not mark:
            raise UserError(
                f"The chat template of {self.target.name} does not show what a user says; it can't begin a turn."
            )

        return tuple(self.target.tokenizer(before + opener, add_special_tokens=False)["input_ids"])

    def text(self, opener: str, made: Generation) -> str:
        """The whole turn; an open code block is closed."""
        # The opener belongs to the turn; the model only continued it.
        said = made.tokens[:-1] if made.finish_reason == "stop" else made.tokens
        text = (opener + self.target.tokenizer.decode(list(said), skip_special_tokens=True)).strip()
        return text + "\n```" if text.count("```") % 2 else text


def write_prompts(writer: Writer, wanted: int, log: Path, excluded: set[str]) -> Iterator[dict[str, Any]]:
    """Yields `wanted` conversations of one user turn each.

    Args:
        writer: makes the candidates.
        wanted: prompts to keep.
        log: JSONL file of all candidates with their reasons; those in it are not generated again.
        excluded: keys from `excluded_prompts`.

    Raises:
        UserError: hardly any of the target's candidates is kept.
    """

    by_name = {domain.name: domain for domain in writer.domains}
    sieve, kept = Filter(set(excluded)), 0
    with ResumableJsonl(log) as done, tqdm(total=wanted, unit="prompt", desc="writing prompts") as bar:
        earlier = [parse_line(line, f"{log} line {number}") for number, line in read_lines(log)]
        first = 0
        while kept < wanted:
            # A window that a kill cut short is generated again whole, and only its missing rows are appended.
            window = earlier[first : first + WINDOW]
            if len(window) < WINDOW:
                window = _judged(writer.window(first), sieve)
                done.append(row for row in window if row["id"] not in done.finished)
            else:
                # Replayed for the keys of kept candidates only: a dropped one counts as not ended, which adds none.
                for row in window:
                    sieve.reason(row["text"], by_name[row["domain"]], row["reason"] is None)

            for row in window:
                if row["reason"] is None and kept < wanted:
                    kept += 1
                    bar.update()
                    yield _conversation(row)

            first += WINDOW
            # Below one kept in fifty the run would hardly end.
            if first >= 8 * WINDOW and kept < first / 50:
                raise UserError(
                    f"Of {first} turns that {writer.target.name} began, {kept} are prompts; these domains do not suit "
                    "it. Give others with --domains, or prompts with --prompts."
                )


def _judged(made: Sequence[tuple[int, Domain, str, bool]], sieve: Filter) -> list[dict[str, Any]]:
    return [
        {"id": f"self-{index}", "domain": domain.name, "text": text, "reason": sieve.reason(text, domain, ended)}
        for index, domain, text, ended in made
    ]


def _conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": row["text"]}]
    return {"id": row["id"], "domain": row["domain"], "source": "self", "messages": messages}
