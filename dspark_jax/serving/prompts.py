"""Prompts to decode: from conversation files, from evaluation sets ({"turns": [...]})."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_jax.data.chat import encode_prompt
from dspark_jax.data.jsonl import parse_conversation, read_jsonl
from dspark_jax.errors import UserError
from dspark_jax.targets.target import Target


@dataclass(frozen=True)
class Prompt:
    """Token ids that end where the answer begins, and the group that results are reported under."""

    id: str
    domain: str
    tokens: tuple[int, ...]


def read_prompts(target: Target, files: Sequence[Path], form: str = "qwen", limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of every domain of JSONL files: conversations (their turns up to the first answer) or
    evaluation sets (their first turn). A line's domain is its `domain` field, else the file's name."""
    prompts: list[Prompt] = []
    taken: dict[str, int] = {}
    for file in files:
        for number, row in read_jsonl(file):
            domain = str(row.get("domain", file.stem)) if isinstance(row, dict) else file.stem
            if limit is not None and taken.get(domain, 0) >= limit:
                continue
            taken[domain] = taken.get(domain, 0) + 1
            messages = prompt_messages(row, f"{file} line {number}")
            name = str(row.get("id", f"{file.stem}-{number}"))
            prompts.append(Prompt(name, domain, encode(target, messages, form)))
    if not prompts:
        named = ", ".join(map(str, files)) or "No file"
        raise UserError(f"{named} holds no prompt; give JSONL with messages or turns.")
    return prompts


def encode(target: Target, messages: list[dict[str, str]], form: str) -> tuple[int, ...]:
    if target.tokenizer is None:
        raise UserError(f"{target.name} has no tokenizer files, so it can't read prompts; add tokenizer.json.")
    return tuple(int(token) for token in encode_prompt(target.tokenizer, messages, form))


def prompt_messages(row: Any, where: str) -> list[dict[str, str]]:
    """The turns before the first answer of a line of JSONL; `where` names the line in the UserError of a bad one."""
    if isinstance(row, dict) and "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
            raise UserError(f"{where}: turns is {json.dumps(turns)[:60]}; expected a list of texts.")
        return [{"role": "user", "content": turns[0]}]
    messages = list(parse_conversation(row, where))
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    return messages[: answers[0]] if answers else messages
