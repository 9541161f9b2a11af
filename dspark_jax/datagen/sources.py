"""The conversations that train.prepare_data answers: read, split and deduplicated, each with its place."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from dspark_jax.data.chat import Message
from dspark_jax.data.conversations import (
    BadRow,
    ConversationRecord,
    Row,
    Segments,
    file_rows,
    hub_rows,
    parse_rows,
    prompt_segments,
)
from dspark_jax.datagen import corpora
from dspark_jax.datagen.regeneration import Rejected, Source
from dspark_jax.datagen.settings import PrepareSettings
from dspark_jax.errors import UserError


def read_sources(settings: PrepareSettings) -> tuple[list[Source], list[Rejected]]:
    """The conversations to answer, and those set aside unanswered: no prompt in them, prompts that an earlier one has,
    and, where bad rows don't stop the program, rows of another form. UserError for what can't be read."""
    sources: list[Source] = []
    refused: list[Rejected] = []
    seen: set[str] = set()
    first: dict[bytes, str] = {}

    for record in _records(settings):
        if record.id in seen:
            raise UserError(f"{record.where}: the id {record.id!r} was used before; expected every id once.")

        source = Source(len(seen), record.id, (), {}, record.where)
        seen.add(record.id)
        if isinstance(record, BadRow):
            if settings.bad_rows == "stop":
                raise UserError(record.reason)
            refused.append(Rejected(source, record.reason))
            continue

        source = replace(source, extra=record.extra)
        try:
            source = replace(source, segments=prompt_segments(record.messages))
            earlier = first.setdefault(_digest(source.segments), source.where) if settings.dedup else source.where
            if earlier != source.where:
                raise UserError(f"its prompts are those of {earlier}.")
        except UserError as error:
            refused.append(Rejected(source, str(error)))
        else:
            sources.append(source)

    if not seen:
        raise UserError(f"{settings.described} holds no conversations; at least one was expected.")
    return sources, refused


def prompts_sha256(sources: Iterable[Source]) -> str:
    """Hash of the sources' places, ids, prompts and further fields."""
    digest = hashlib.sha256()
    for source in sorted(sources, key=lambda source: source.index):
        row = (source.index, source.id, source.segments, source.extra)
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def side(messages: Sequence[Message], heldout: float) -> str:
    """The split of a conversation, train or heldout: a function of its first prompt alone, so that it stays there
    in any file, order or continuation."""
    prompt = next((message["content"] for message in messages if message["role"] == "user"), "")
    number = int.from_bytes(hashlib.sha256(b"heldout:" + prompt.strip().encode()).digest()[:8], "big")
    return "heldout" if number < heldout * 2**64 else "train"


def _records(settings: PrepareSettings) -> Iterator[ConversationRecord | BadRow]:
    for prefix, rows in _files(settings):
        count = 0
        for record in parse_rows(rows):
            # Rows of another form have no prompt, and are named on either side.
            if isinstance(record, ConversationRecord) and side(record.messages, settings.heldout) != settings.split:
                continue
            if settings.limit and count == settings.limit:
                break
            count += 1
            yield replace(record, id=prefix + record.id)

    for domain in settings.embedded_domains:
        for number, item in enumerate(corpora.prompts(domain, settings.split, settings.limit or None, settings.seed)):
            extra = {"domain": item["domain"], "source": item["source"]}
            yield ConversationRecord(item["id"], item["messages"], f"embedded {domain} {number}", extra)


def _files(settings: PrepareSettings) -> Iterator[tuple[str, Iterator[Row]]]:
    if settings.dataset:
        yield "", hub_rows(settings.dataset, settings.dataset_split, settings.dataset_config)
    for path in settings.prompts:
        yield f"{path.stem}/" if len(settings.prompts) > 1 else "", file_rows(path)


def _digest(segments: Segments) -> bytes:
    turns = [[(turn["role"], turn["content"].strip()) for turn in segment] for segment in segments]
    return hashlib.sha256(json.dumps(turns).encode()).digest()[:16]
