"""Reads prompts to decode from conversation files and evaluation sets ({"turns": [...]})."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_jax.data.chat import Message, encode_prompt
from dspark_jax.data.conversations import read_prompt_records
from dspark_jax.errors import UserError
from dspark_jax.targets.target import Target


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt, ready to decode."""

    id: str
    domain: str  # group that results are reported under
    tokens: tuple[int, ...]  # ids, up to where the answer begins


def read_prompts(
    target: Target, files: Sequence[Path], limit: int | None = None, thinking: bool = False
) -> list[EncodedPrompt]:
    """Read the prompts of conversations (the turns up to the first answer) and of evaluation sets (the first turn).

    Args:
        target: its tokenizer encodes them.
        files: JSONL, JSON or Parquet.
        limit: prompts taken from each domain, a row's `domain` field or else its file's name; None: all.
        thinking: value of the chat template's switch.
    Returns:
        The prompts in the order of files and rows.
    Raises:
        UserError: a file that cannot be read, a row of another form, no prompt at all, a target without a tokenizer.
    """
    prompts: list[EncodedPrompt] = []
    taken: dict[str, int] = {}
    for file in files:
        for record in read_prompt_records(file):
            domain = str(record.extra.get("domain", Path(file).stem))
            # Counted by domain, not by file: an evaluation set may come in several files.
            if limit is not None and taken.get(domain, 0) >= limit:
                continue
            taken[domain] = taken.get(domain, 0) + 1
            prompts.append(EncodedPrompt(record.id, domain, encode(target, record.segments()[0], thinking)))

    if not prompts:
        named = ", ".join(map(str, files)) or "No file"
        raise UserError(f"{named} holds no prompt; give JSONL with messages or turns.")
    return prompts


def encode(target: Target, messages: Sequence[Message], thinking: bool = False) -> tuple[int, ...]:
    """Token ids of a prompt, up to where the answer begins; UserError if the target has no tokenizer."""
    if target.tokenizer is None:
        raise UserError(f"{target.name} has no tokenizer files, so it can't read prompts; add tokenizer.json.")
    # With the template's opening of the answer, so that the first new token is the answer's.
    return tuple(encode_prompt(target.tokenizer, messages, thinking).tolist())
