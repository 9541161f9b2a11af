"""Functions of the standard library: requested by signature and docstring, answered with their source."""

import random
import textwrap
from functools import lru_cache

from dspark_jax.datagen.corpora.stdlib import Definition, definitions, split_of

MAX_CHARACTERS = 760  # of user and assistant text together: about 250 tokens of the embedded tokenizer
_MAX_DOC = 320

_WRITE = (
    "Write the {what}.",
    "Write the {what} in Python.",
    "Implement the {what} in Python.",
)
_WRITE_DOC = (
    "Write the {what}: {line}",
    "Implement the {what} in Python. {line}",
    "I need the {what}. {line}",
)


@lru_cache(maxsize=2)
def pool(split: str) -> tuple[Definition, ...]:
    """The functions of one split that are short enough, each body once.

    The held-out ones all have a docstring; training also takes undocumented functions of two lines or more.
    """
    seen: set[str] = set()
    kept = []
    for item in definitions():
        if item.kind not in ("function", "method") or not item.body or {item.body, item.name} & seen:
            continue

        # Before the split is looked at: no body may be in both.
        seen |= {item.body, item.name}
        # The header stands in question and answer; 60 is for the words around it.
        length = 2 * len(item.header) + len(_short_doc(item.doc)) + len(item.body) + 60
        asked = bool(item.doc) or (split == "train" and "\n" in item.body)
        if asked and length <= MAX_CHARACTERS and split_of(item.module) == split:
            kept.append(item)

    return tuple(kept)


def conversation(item: Definition, rng: random.Random) -> list[dict[str, str]]:
    """The user and assistant messages for one function; `rng` chooses the wording."""
    doc = _short_doc(item.doc)
    answer = f"```python\n{item.header}\n{item.body}\n```"
    owner = f" of the class `{item.name.split('.')[-2]}`" if item.kind == "method" else ""
    # Mostly completion, as in code evaluations; the rest asks in words.
    if doc and rng.random() < 0.7:
        quoted = textwrap.indent(f'"""{doc}"""', "    ")
        question = f"Complete this {item.kind}{owner}:\n```python\n{item.header}\n{quoted}\n```"
    else:
        signature = item.header.removeprefix("def ").split(" -> ")[0].rstrip(":")
        template = rng.choice(_WRITE_DOC if doc else _WRITE)
        line = " ".join(doc.split("\n\n")[0].split())
        question = template.format(what=f"{item.kind} `{signature}`{owner}", line=line)

    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _short_doc(doc: str) -> str:
    """The first paragraphs of a docstring, at most _MAX_DOC characters, cut between paragraphs."""
    kept = ""
    for paragraph in doc.split("\n\n"):
        if kept and len(kept) + len(paragraph) + 2 > _MAX_DOC:
            break
        kept = f"{kept}\n\n{paragraph}" if kept else paragraph
    return kept[:_MAX_DOC] if len(kept) > _MAX_DOC else kept
