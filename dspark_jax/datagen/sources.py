"""Conversations for train.prepare_data: read, split, deduplicated and numbered."""

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
    """Reads the conversations to answer.

    Args:
        settings: where the prompts come from, the split, and the treatment of duplicates and bad rows.

    Returns:
        The conversations, and those set aside: without prompts, with the prompts of an earlier one, or, with
        `bad_rows` "set-aside", of another form.

    Raises:
        UserError: files that cannot be read, a bad row, an id used twice, or no conversation at all.
    """
    sources: list[Source] = []
    refused: list[Rejected] = []
    seen: set[str] = set()
    first: dict[bytes, str] = {}

    for record in _records(settings):
        if record.id in seen:
            raise UserError(f"{record.where}: the id {record.id!r} was used before; expected every id once.")

        # Every row takes a place, set aside or not, so that places follow from the input alone.
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
            # The first conversation with these prompts claims the digest.
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
    """sha256 (hex) of the sources' places, ids, prompts and extra fields."""
    # In the order of their places: a continued run must find the same conversations under the same numbers.
    digest = hashlib.sha256()
    for source in sorted(sources, key=lambda source: source.index):
        row = (source.index, source.id, source.segments, source.extra)
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def side(messages: Sequence[Message], heldout: float) -> str:
    """The split of a conversation, "train" or "heldout".

    It is a function of the first user turn alone, so that it is the same in any file, order or continuation.

    Args:
        messages: the conversation.
        heldout: share of conversations held out, in [0, 1).
    """
    prompt = next((message["content"] for message in messages if message["role"] == "user"), "")
    # A hash and no draw: a conversation is on one side whatever others are read with it.
    number = int.from_bytes(hashlib.sha256(b"heldout:" + prompt.strip().encode()).digest()[:8], "big")
    return "heldout" if number < heldout * 2**64 else "train"


def _records(settings: PrepareSettings) -> Iterator[ConversationRecord | BadRow]:
    for prefix, rows in _files(settings):
        count = 0
        for record in parse_rows(rows):
            # Rows of another form have no prompt, and are reported in both splits.
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
        # Ids are unique within a file only.
        yield f"{path.stem}/" if len(settings.prompts) > 1 else "", file_rows(path)


def _digest(segments: Segments) -> bytes:
    # Surrounding space does not make another prompt; 16 bytes keep the table of a large corpus small.
    turns = [[(turn["role"], turn["content"].strip()) for turn in segment] for segment in segments]
    return hashlib.sha256(json.dumps(turns).encode()).digest()[:16]
