"""Questions about Python, answered from docstrings and the reference topics of `help()`."""

import importlib
import inspect
import random
import re
from dataclasses import dataclass
from functools import lru_cache

from dspark_jax.datagen.corpora.stdlib import definitions, split_of

MAX_CHARACTERS = 620  # of one answer: about 180 tokens of the embedded tokenizer
_MIN_CHARACTERS = 24

_QUESTIONS = {
    "module": (
        "What is the Python module `{name}` for?",
        "What does the module `{name}` do?",
        "Tell me about the `{name}` module.",
    ),
    "class": (
        "What is `{name}` in Python?",
        "What is the class `{name}` for?",
        "Describe the Python class `{name}`.",
    ),
    "function": (
        "What does `{name}` do?",
        "How do I use `{name}` in Python?",
        "Explain the function `{name}`.",
        "What is `{name}` for?",
    ),
    "method": (
        "What does the method `{name}` do?",
        "Explain `{name}`.",
        "What is the method `{name}` for?",
    ),
    "topic": (
        "Explain the Python topic `{name}`.",
        "What does the Python reference say about `{name}`?",
        "Tell me about `{name}` in Python.",
    ),
    "passage": (
        'In the Python reference on `{name}`, explain the part that begins "{start}".',
        'Continue the Python reference on `{name}` from "{start}".',
    ),
}
# Compiled modules have no source file; their documentation is read from the live objects.
_COMPILED = (
    "builtins", "math", "cmath", "itertools", "time", "_operator", "_functools", "_collections", "gc", "marshal",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A subject of questions: source, kind (a key of the question table), dotted name, signature and description."""

    source: str
    kind: str
    name: str
    signature: str
    text: str
    key: str


@lru_cache(maxsize=2)
def pool(split: str) -> tuple[Entry, ...]:
    """The entries of one split, each description once."""
    seen: set[str] = set()
    kept = []
    for entry in (*_documented(), *_compiled(), *_topics()):
        # Duplicates are dropped before the split is looked at: no text may be in both.
        if len(entry.text) < _MIN_CHARACTERS or {entry.text, entry.key} & seen:
            continue
        seen |= {entry.text, entry.key}
        if split_of(entry.source) == split:
            kept.append(entry)

    return tuple(kept)


def conversation(entry: Entry, rng: random.Random) -> list[dict[str, str]]:
    """The user and assistant messages for one entry; `rng` chooses the wording."""
    template = rng.choice(_QUESTIONS[entry.kind])
    question = template.format(name=entry.name, start=" ".join(entry.text.split()[:5]))
    answer = f"`{entry.signature}`\n\n{entry.text}" if entry.signature else entry.text
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _documented() -> list[Entry]:
    entries = []
    for item in definitions():
        if item.doc:
            signature = item.header.removeprefix("def ").rstrip(":") if item.kind in ("function", "method") else ""
            # A long signature would crowd out the description.
            signature = signature if len(signature) <= 120 else ""
            # The first paragraphs say what a thing is for; the rest of a long docstring would be cut anyway.
            text = _chunks(item.doc)[0]
            entries.append(Entry(item.module, item.kind, item.name, signature, text, item.name))

    return entries


def _compiled() -> list[Entry]:
    entries = []
    for module in _COMPILED:
        try:
            owner = importlib.import_module(module)
        except ImportError:
            continue

        # The name as a user would write it: `len`, not builtins.len; `operator.add`, not _operator.add.
        shown = "" if module == "builtins" else module.lstrip("_") + "."
        # Sorted: the order in a module's namespace may differ between builds.
        for name, value in sorted(vars(owner).items()):
            if name.startswith("_") or not callable(value):
                continue
            entries.extend(_live(module, f"{shown}{name}", value, "class" if inspect.isclass(value) else "function"))

            if inspect.isclass(value):
                for attribute, member in sorted(vars(value).items()):
                    if not attribute.startswith("_") and callable(member):
                        entries.extend(_live(module, f"{shown}{name}.{attribute}", member, "method"))

    return entries


def _live(module: str, name: str, value: object, kind: str) -> list[Entry]:
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str) or not doc.isascii():
        return []
    # The source of a split must be finer than "builtins", or all of it would fall on one side.
    return [Entry(".".join([module, *name.split(".")[:2]]), kind, name, "", _chunks(inspect.cleandoc(doc))[0], name)]


def _topics() -> list[Entry]:
    try:
        # Generated documentation, which some distributions leave out.
        topics = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return []

    entries = []
    for name in sorted(topics):
        text = topics[name].encode("ascii", "ignore").decode()
        # Underlines of headings say nothing without markup.
        text = re.sub(r"\n[*=~-]{4,}\n", "\n", text).strip()
        for index, chunk in enumerate(_chunks(text)):
            kind = "topic" if index == 0 else "passage"
            entries.append(Entry(f"topic:{name}", kind, name, "", chunk, f"topic:{name}:{index}"))

    return entries


def _chunks(text: str) -> list[str]:
    """Runs of whole paragraphs of at most MAX_CHARACTERS; a longer paragraph is cut at a line's end."""
    chunks: list[str] = []
    for paragraph in text.split("\n\n"):
        paragraph = paragraph.rstrip()
        while len(paragraph) > MAX_CHARACTERS:
            cut = paragraph.rfind("\n", 0, MAX_CHARACTERS)
            # A single line longer than the limit is cut within.
            cut = cut if cut > 0 else MAX_CHARACTERS
            chunks.append(paragraph[:cut])
            paragraph = paragraph[cut:].lstrip("\n")
        if chunks and len(chunks[-1]) + len(paragraph) + 2 <= MAX_CHARACTERS:
            chunks[-1] = f"{chunks[-1]}\n\n{paragraph}"
        elif paragraph.strip():
            chunks.append(paragraph.strip("\n"))

    return chunks or [""]
