"""A run of train.prepare_data: begins or continues its output, writes answers as they finish, sums up."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dspark_jax.checkpoints.huggingface import load_target, read_hf_config, resolve_folder
from dspark_jax.data.jsonl import ResumableJsonl, parse_line
from dspark_jax.data.tokenizers import load_tokenizer, tokenizer_hash
from dspark_jax.datagen.regeneration import Answerer, Finished, Regenerator, Rejected, Source
from dspark_jax.datagen.self_prompts import DOMAINS, Writer, excluded_prompts, read_domains, write_prompts
from dspark_jax.datagen.settings import PrepareSettings
from dspark_jax.devices import announce
from dspark_jax.errors import UserError
from dspark_jax.files import (
    file_hash,
    require_same_settings,
    weights_hash,
    write_atomically,
    write_json,
    write_settings,
)
from dspark_jax.readers import Schema, check_fields, integer, optional, read_records, shown, text
from dspark_jax.sharding import mesh_of_several
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.registry import read_target_config

ANSWERED: Schema = {"tokens": integer(), "finish_reason": text()}
SET_ASIDE: Schema = {"reason": text()}
JUDGED: Schema = {"reason": optional(text())}
MOVE_AWAY = "move the file away and run again"


def with_self_prompts(settings: PrepareSettings) -> tuple[PrepareSettings, Counter[str]]:
    """Has the target write its own prompts to OUTPUT.prompts.jsonl, or completes that file.

    Returns:
        Settings that read that file, and the number of candidates dropped by reason; empty where the file existed.

    Raises:
        UserError: the file was begun with other settings, or the target does not write prompts of these domains.
    """
    # The finished file and the log of all candidates, from which a killed run continues.
    path, log = settings.beside("prompts.jsonl"), settings.beside("candidates.jsonl")
    folder = resolve_folder(settings.target)
    identity = {
        "weights_xxh3": weights_hash(folder),
        "self_prompts": settings.self_prompts,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "slots": settings.slots,
        "domains": None if settings.domains is None else file_hash(settings.domains),
        "exclude": [file_hash(file) for file in settings.exclude],
    }
    begun = require_same_settings(settings.beside("prompts.settings.json"), identity, path)
    dropped: Counter[str] = Counter()

    # The file is written whole at the end, so its existence means that it is complete.
    if not path.exists():
        domains = DOMAINS if settings.domains is None else read_domains(settings.domains)
        excluded = excluded_prompts(settings.exclude)
        target = load_target(folder, dtype=settings.dtype, mesh=mesh_of_several(settings.mesh))
        if not getattr(target.tokenizer, "chat_template", None):
            raise UserError(f"The tokenizer in {folder} has no chat template; put a chat_template.jinja beside it.")
        if not begun:
            write_settings(settings.beside("prompts.settings.json"), identity, target=settings.target)

        writer = Writer(target, domains, settings.engine(), settings.seed)
        # In memory at once: prompts are short, and the file must not be there before it is whole.
        rows = list(write_prompts(writer, settings.self_prompts, log, excluded))
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        dropped.update(row["reason"] for row in _read_rows(log, JUDGED) if row["reason"] is not None)

    # From here on the run is one over an ordinary file of prompts.
    return replace(settings, prompts=(path,), self_prompts=0, domains=None, exclude=()), dropped


def load_regenerator(settings: PrepareSettings, prompts: str) -> Regenerator:
    """Loads the target, after checking its small files and the output against the settings.

    Raises:
        UserError: a context too short, no chat template, or an output begun with other settings.
    """
    folder = resolve_folder(settings.target)
    hf_config = read_hf_config(folder)
    # From the small files: all of this is refused before the weights are read.
    context = read_target_config(hf_config).max_positions
    if settings.max_context > context:
        raise UserError(f"--max-context is {settings.max_context}, the target's context {context}; lower it.")

    tokenizer = load_tokenizer(folder)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"The tokenizer in {folder} has no chat template; put a chat_template.jinja beside it.")

    identity = {
        # Weights too: two checkpoints of one architecture share their config.
        "target_sha256": config_sha256(hf_config),
        "weights_xxh3": weights_hash(folder),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "prompts_sha256": prompts,
        **settings.recorded(),
    }
    check_begun(settings, identity)
    # All checks are done. The tokenizer is loaded already, so the target comes without one.
    announce(settings.dtype)
    mesh = mesh_of_several(settings.mesh)
    target = replace(load_target(folder, dtype=settings.dtype, mesh=mesh, tokenizer=False), tokenizer=tokenizer)
    begin(settings, identity)

    return Regenerator(
        target, settings.thinking, settings.sampling(), settings.engine(), settings.max_context or context
    )


def check_begun(settings: PrepareSettings, identity: Mapping[str, Any]) -> bool:
    """Whether the output was begun with these settings; UserError where it was with others, or by another program."""
    begun = require_same_settings(settings.beside("settings.json"), identity, settings.output)
    if settings.output.exists() and not begun:
        raise UserError(f"{settings.output} exists and was not begun by this program; move it or name another output.")
    return begun


def begin(settings: PrepareSettings, identity: Mapping[str, Any]) -> None:
    """Records the settings beside a new output."""
    if not check_begun(settings, identity):
        who = settings.target or settings.server
        write_settings(settings.beside("settings.json"), identity, target=who, prompts=settings.described)


def regenerate(
    settings: PrepareSettings,
    answerer: Answerer,
    sources: list[Source],
    refused: list[Rejected],
    push: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], Counter[str]]:
    """Answers the conversations that are not finished, then sorts the files by the order of the sources.

    Args:
        settings: of the run.
        answerer: the target here, or a server of it.
        sources: conversations to answer.
        refused: conversations set aside when they were read.
        push: called when answers have been written, to bring them to a store when it is time.

    Returns:
        As `summarise`.

    Raises:
        UserError: the output holds other conversations, or the server does not answer.
    """
    # Refused ones have places too: rejected.jsonl is sorted like the output.
    order = {source.id: source.index for source in [*sources, *(r.source for r in refused)]}
    fitting, too_long = answerer.sort_out(sources)
    began, made = time.perf_counter(), 0

    with ResumableJsonl(settings.output) as done, ResumableJsonl(settings.beside("rejected.jsonl")) as aside:
        # Another input would leave its answers in the file, beside those of this one.
        strangers = (done.finished | aside.finished) - order.keys()
        if strangers:
            raise UserError(f"{settings.output} holds the id {min(strangers)!r}, which is not among the prompts.")

        aside.append(map(_rejected_row, (r for r in [*refused, *too_long] if r.source.id not in aside.finished)))
        # Both files were cut to whole records when they were opened.
        finished = done.finished | aside.finished
        todo = [source for source in fitting if source.id not in finished]

        with tqdm(total=len(order), initial=len(order) - len(todo), unit="conversation") as bar:
            # `fitting`, not `todo`: the longest conversation shapes the programs, in a continued run as in the first.
            for ended in answerer.answers(todo, fitting) if todo else ():
                done.append(_row(e) for e in ended if isinstance(e, Finished))
                aside.append(_rejected_row(e) for e in ended if isinstance(e, Rejected))
                made += sum(e.tokens for e in ended if isinstance(e, Finished))
                bar.update(len(ended))
                bar.set_postfix_str(f"{made / (time.perf_counter() - began):,.0f} tokens/s", refresh=False)
                push()

        # Written as they ended, whose order depends on timing; sorted, equal runs give equal bytes.
        for path in (done.path, aside.path):
            _sort_lines(path, order)

        if not aside.finished:
            aside.path.unlink()

    return summarise(settings, made, time.perf_counter() - began)


def summarise(settings: PrepareSettings, made: int, seconds: float) -> tuple[dict[str, Any], Counter[str]]:
    """Writes OUTPUT.metrics.json and counts the conversations set aside by reason, numbers in the reasons masked.

    Args:
        settings: of the run.
        made: tokens generated in this run.
        seconds: duration of this run.

    Returns:
        The metrics, of the whole output except for the speed, and the counted reasons.
    """
    # Counted from the files, not from this run: a continued run sums up what earlier ones have done too.
    rows = _read_rows(settings.output, ANSWERED)
    reasons = [row["reason"] for row in _read_rows(settings.beside("rejected.jsonl"), SET_ASIDE)]
    metrics = {
        "conversations": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "cut_at_max_new_tokens": sum(row["finish_reason"] == "length" for row in rows),
        "rejected": len(reasons),
        "xxh3": file_hash(settings.output),
        "tokens_this_run": made,
        "seconds_this_run": round(seconds, 3),
        "tokens_per_second": made / seconds,
    }
    write_json(settings.beside("metrics.json"), metrics)

    return metrics, Counter(re.sub(r"\d+", "#", reason) for reason in reasons)


def _read_rows(path: Path, schema: Schema) -> list[dict[str, Any]]:
    """The rows of a file that an earlier run may have begun; UserError naming the first that lacks a field."""
    rows = read_records(path)
    for row in rows:
        check_fields(row, schema, f"{path}, the row with id {shown(row.get('id'))},", required=schema, cure=MOVE_AWAY)
    return rows


def _row(ended: Finished) -> Mapping[str, Any]:
    fields = {"messages": list(ended.messages), "finish_reason": ended.finish_reason, "tokens": ended.tokens}
    return {"id": ended.source.id, **ended.source.extra, **fields}


def _rejected_row(ended: Rejected) -> Mapping[str, Any]:
    return {"id": ended.source.id, "where": ended.source.where, "reason": ended.reason}


def _sort_lines(path: Path, order: Mapping[str, int]) -> None:
    """Rewrites a finished file in the order of the sources, atomically."""
    # As bytes: the lines themselves stay as they were written.
    lines = path.read_bytes().splitlines(keepends=True)
    lines.sort(key=lambda line: order[parse_line(line, str(path))["id"]])
    write_atomically(path, b"".join(lines))
