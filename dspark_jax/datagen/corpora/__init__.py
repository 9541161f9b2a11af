"""Conversations of three domains, made from the Python installation itself.

`code`: functions of the standard library from signature and docstring; `chat`: docstrings and reference topics as
questions and answers; `math`: generated word problems with worked answers. Everything is a pure function of
(domain, split, seed) and of the Python version whose library is read. A standard-library module is wholly in the
'train' or wholly in the 'heldout' split, and so is a math question.
"""

import random
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

from dspark_jax.datagen.corpora import chat, code
from dspark_jax.datagen.corpora import math as arithmetic
from dspark_jax.errors import UserError

DOMAINS = ("code", "chat", "math")
SPLITS = ("train", "heldout")


def conversations(domain: str, split: str, limit: int | None = None, seed: int = 0) -> Iterator[dict]:
    """Yields {'id', 'domain', 'source', 'messages'}; messages are one user and one assistant turn.

    Args:
        domain: one of `DOMAINS`.
        split: one of `SPLITS`.
        limit: conversations at most. None: `code` and `chat` end after each item was given once, `math` never does.
        seed: sets the order and the wording.

    Raises:
        UserError: an unknown domain or split.
    """
    if domain not in DOMAINS:
        raise UserError(f"unknown domain {domain!r}: expected one of {', '.join(DOMAINS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    return islice(_arithmetic(split, seed) if domain == "math" else _library(domain, split, seed), limit)


def prompts(domain: str, split: str, limit: int | None = None, seed: int = 0) -> Iterator[dict]:
    """Like `conversations`, with only the user turn in 'messages'."""
    for item in conversations(domain, split, limit, seed):
        yield {**item, "messages": item["messages"][:1]}


def _library(domain: str, split: str, seed: int) -> Iterator[dict]:
    items: list[tuple[str, str, Any, Callable[[Any, random.Random], list[dict[str, str]]]]]
    if domain == "code":
        items = [(item.module, item.name, item, code.conversation) for item in code.pool(split)]
    else:
        items = [(entry.source, entry.key, entry, chat.conversation) for entry in chat.pool(split)]

    # Seeded by text: neighbouring seeds and domains share no order.
    order = random.Random(f"{domain}:{split}:{seed}")
    order.shuffle(items)
    for source, key, item, build in items:
        # From the item alone: its wording does not depend on its place or the limit.
        wording = random.Random(f"{seed}:{key}")
        yield {"id": f"{domain}-{key}", "domain": domain, "source": source, "messages": build(item, wording)}


def _arithmetic(split: str, seed: int) -> Iterator[dict]:
    for number in count():
        # From the number alone: both splits draw the same problems, and each takes its own.
        question, answer = arithmetic.problem(random.Random(f"math:{seed}:{number}"))
        if arithmetic.in_split(question, split):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield {"id": f"math-{seed}-{number}", "domain": "math", "source": "math", "messages": messages}
