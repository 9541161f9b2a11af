"""Regenerates the answers of conversations with the target: on-policy data for a drafter.

    python -m train.prepare_data --target assets/embedded_target --embedded-prompts code,chat,math --limit 500 \\
        --output runs/x/conversations.jsonl
    python -m train.prepare_data --target Qwen/Qwen3-4B --dataset mlabonne/open-perfectblend --output runs/y/train.jsonl
    python -m train.prepare_data --server http://host:8000/v1 --server-model Qwen/Qwen3-4B --prompts sharegpt.parquet \\
        --heldout 0.01 --output runs/z/train.jsonl
    ... --split heldout --heldout 0.01 --output runs/z/heldout.jsonl     the other side of that split

The assistant turns of the input are dropped and generated anew, turn by turn. A run that was killed is continued by the
same command, and, where the target runs here on as many devices, ends with the same file. Beside OUTPUT.jsonl stand
OUTPUT.rejected.jsonl (conversations set aside, each with the reason), OUTPUT.settings.json and OUTPUT.metrics.json.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dspark_jax.checkpoints.huggingface import load_target, read_hf_config, resolve_folder
from dspark_jax.config.cli import parse, program
from dspark_jax.data.chat import load_tokenizer, tokenizer_hash
from dspark_jax.data.jsonl import ResumableJsonl
from dspark_jax.datagen.regeneration import Answerer, Finished, Regenerator, Rejected, Source
from dspark_jax.datagen.server import ServedAnswers
from dspark_jax.datagen.settings import PrepareSettings
from dspark_jax.datagen.sources import prompts_sha256, read_sources
from dspark_jax.devices import announce
from dspark_jax.errors import UserError
from dspark_jax.files import require_same_settings, weights_hash, write_atomically, write_json, write_settings
from dspark_jax.report import listing
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.registry import read_target_config

from .devices import mesh_of_several


@program
def main(argv: list[str]) -> None:
    settings = parse(PrepareSettings, argv, description=__doc__)
    sources, refused = read_sources(settings)
    prompts = prompts_sha256([*sources, *(r.source for r in refused)])
    if settings.server:
        begin(settings, {"prompts_sha256": prompts, **settings.recorded()})
        answerer: Answerer = ServedAnswers(settings)
    else:
        answerer = load_regenerator(settings, prompts)
    regenerate(settings, answerer, sources, refused)


def load_regenerator(settings: PrepareSettings, prompts: str) -> Regenerator:
    """The target of the settings, loaded once its small files and the output were found to fit."""
    folder = resolve_folder(settings.target)
    hf_config = read_hf_config(folder)
    context = read_target_config(hf_config).max_positions
    if settings.max_context > context:
        raise UserError(f"--max-context is {settings.max_context}, the target's context {context}; lower it.")
    tokenizer = load_tokenizer(folder)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"The tokenizer in {folder} has no chat template; put a chat_template.jinja beside it.")
    identity = {
        "target_sha256": config_sha256(hf_config),
        "weights_xxh3": weights_hash(folder),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "prompts_sha256": prompts,
        **settings.recorded(),
    }
    check_begun(settings, identity)
    announce(settings.dtype)
    mesh = mesh_of_several(settings.mesh)
    target = replace(load_target(folder, dtype=settings.dtype, mesh=mesh, tokenizer=False), tokenizer=tokenizer)
    begin(settings, identity)
    return Regenerator(target, settings.thinking, settings.decode_config(), settings.max_context or context)


def check_begun(settings: PrepareSettings, identity: Mapping[str, Any]) -> bool:
    """Whether the output was begun, with these settings; UserError when with others, or by someone else."""
    begun = require_same_settings(settings.beside("settings.json"), identity, settings.output)
    if settings.output.exists() and not begun:
        raise UserError(f"{settings.output} exists and was not begun by this program; move it or name another output.")
    return begun


def begin(settings: PrepareSettings, identity: Mapping[str, Any]) -> None:
    """Records the settings beside an output that is new."""
    if not check_begun(settings, identity):
        who = settings.target or settings.server
        write_settings(settings.beside("settings.json"), identity, target=who, prompts=settings.described)


def regenerate(settings: PrepareSettings, answerer: Answerer, sources: list[Source], refused: list[Rejected]) -> None:
    """Answers what is not finished yet, then puts the files into the order of the sources and prints the table."""
    order = {source.id: source.index for source in [*sources, *(r.source for r in refused)]}
    fitting, too_long = answerer.sort_out(sources)
    began, made = time.perf_counter(), 0
    with ResumableJsonl(settings.output) as done, ResumableJsonl(settings.beside("rejected.jsonl")) as aside:
        strangers = (done.finished | aside.finished) - order.keys()
        if strangers:
            raise UserError(f"{settings.output} holds the id {min(strangers)!r}, which is not among the prompts.")
        aside.append(map(_rejected_row, (r for r in [*refused, *too_long] if r.source.id not in aside.finished)))
        finished = done.finished | aside.finished
        todo = [source for source in fitting if source.id not in finished]
        with tqdm(total=len(order), initial=len(order) - len(todo), unit="conversation") as bar:
            for ended in answerer.answers(todo, fitting) if todo else ():
                done.append(_row(e) for e in ended if isinstance(e, Finished))
                aside.append(_rejected_row(e) for e in ended if isinstance(e, Rejected))
                made += sum(e.tokens for e in ended if isinstance(e, Finished))
                bar.update(len(ended))
                bar.set_postfix_str(f"{made / (time.perf_counter() - began):,.0f} tokens/s", refresh=False)
        for path in (done.path, aside.path):
            _sort_lines(path, order)
        if not aside.finished:
            aside.path.unlink()
    report(settings, made, time.perf_counter() - began)


def report(settings: PrepareSettings, made: int, seconds: float) -> None:
    """Prints the closing table and writes OUTPUT.metrics.json; both count the whole output, the speed this run."""
    rows = [json.loads(line) for line in settings.output.read_bytes().splitlines()]
    aside = settings.beside("rejected.jsonl")
    reasons = [json.loads(line)["reason"] for line in aside.read_bytes().splitlines()] if aside.exists() else []
    metrics = {
        "conversations": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "cut_at_max_new_tokens": sum(row["finish_reason"] == "length" for row in rows),
        "rejected": len(reasons),
        "tokens_this_run": made,
        "seconds_this_run": round(seconds, 3),
        "tokens_per_second": made / seconds,
    }
    write_json(settings.beside("metrics.json"), metrics)
    print(listing(metrics))
    alike = Counter(re.sub(r"\d+", "#", reason) for reason in reasons)
    for reason, count in alike.most_common(10):
        print(f"set aside ({count:,}): {reason}")


def _row(ended: Finished) -> Mapping[str, Any]:
    fields = {"messages": list(ended.messages), "finish_reason": ended.finish_reason, "tokens": ended.tokens}
    return {"id": ended.source.id, **ended.source.extra, **fields}


def _rejected_row(ended: Rejected) -> Mapping[str, Any]:
    return {"id": ended.source.id, "where": ended.source.where, "reason": ended.reason}


def _sort_lines(path: Path, order: Mapping[str, int]) -> None:
    """Rewrites a finished file in the order of the sources, atomically."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines.sort(key=lambda line: order[json.loads(line)["id"]])
    write_atomically(path, b"".join(lines))


if __name__ == "__main__":
    main()
