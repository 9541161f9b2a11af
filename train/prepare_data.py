"""Regenerates the answers of conversations with the target: on-policy data for a drafter.

    python -m train.prepare_data --target assets/embedded_target --embedded-prompts code,chat,math --limit 500 \\
        --output runs/x/conversations.jsonl
    python -m train.prepare_data --target Qwen/Qwen3-4B --prompts perfectblend.jsonl --output runs/y/conversations.jsonl

The assistant turns of the input are dropped and generated anew, turn by turn. A run that was killed is continued by the
same command, and ends with the same file. Beside OUTPUT.jsonl stand OUTPUT.rejected.jsonl (conversations set aside,
each with the reason), OUTPUT.settings.json and OUTPUT.metrics.json.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from configs.cli import parse, program
from dspark_jax.checkpoints.huggingface import load_target, resolve_folder
from dspark_jax.checkpoints.tensors import read_json
from dspark_jax.data.chat import chat_format, load_tokenizer, tokenizer_hash
from dspark_jax.data.jsonl import ResumableJsonl, read_conversations
from dspark_jax.data.manifest import fsync
from dspark_jax.decoding.requests import DecodeConfig
from dspark_jax.errors import UserError
from dspark_jax.targets.config import TargetConfig, config_sha256
from train import corpora
from train.regeneration import Finished, Regenerator, Rejected, Source, prompt_segments
from train.sidecar import require_same_settings, table, weights_fingerprint, write_json, write_settings


@dataclass(frozen=True)
class PrepareSettings:
    """Regenerates the answers of conversations with the target."""

    target: str
    """Folder or hub id of the target."""
    output: Path
    """The JSONL file to write, one finished conversation a line."""
    prompts: tuple[Path, ...] = ()
    """Conversation files in JSONL; with several, ids get the file's name in front."""
    embedded_prompts: str = ""
    """Prompts that come with the project instead: domains of code, chat and math, with commas."""
    split: Literal["train", "heldout"] = "train"
    """Split of the embedded prompts."""
    limit: int = 0
    """Conversations taken of each file or embedded domain; 0: all (math has no end and needs a limit)."""
    temperature: float = 0.7
    """0: greedy."""
    top_p: float = 0.95
    """1: off."""
    top_k: int = 0
    """0: off."""
    max_new_tokens: int = 192
    """Longest answer; one that is cut by it ends its conversation."""
    max_context: int = 0
    """Positions a conversation may take; longer prompts are set aside. 0: the target's context."""
    slots: int = 16
    """Conversations decoded at once."""
    rounds_per_dispatch: int = 16
    """Tokens decoded between two looks at what has ended."""
    seed: int = 0
    """Decides, with a conversation's place in the input, its random numbers; and the order of embedded prompts."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the target's weights and activations; None: as its config says."""
    chat_format: str = "qwen"
    """How the target's chat template marks turns."""

    def __post_init__(self) -> None:
        if bool(self.prompts) == bool(self.embedded_prompts):
            raise UserError("Give the prompts in one way: --prompts FILE.jsonl, or --embedded-prompts code,chat,math.")
        if self.limit == 0 and "math" in self.domains:
            raise UserError("The embedded math prompts have no end: give --limit, the number of each domain's prompts.")
        for name, least in (("limit", 0), ("max_new_tokens", 1), ("slots", 1), ("rounds_per_dispatch", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; at least {least} was expected.")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_context < 0:
            raise UserError("Expected --temperature >= 0, --top-p in (0, 1], --top-k >= 0 and --max-context >= 0.")
        chat_format(self.chat_format)

    @property
    def domains(self) -> list[str]:
        return [domain.strip() for domain in self.embedded_prompts.split(",")] if self.embedded_prompts else []

    def beside(self, kind: str) -> Path:
        """OUTPUT.kind, e.g. conversations.rejected.jsonl."""
        return self.output.with_name(f"{self.output.name.removesuffix('.jsonl')}.{kind}")

    def decode_config(self) -> DecodeConfig:
        return DecodeConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            slots=self.slots,
            rounds_per_dispatch=self.rounds_per_dispatch,
            buckets=(self.slots,),
            smallest_prompt_bucket=64,  # one program for most prompts: compiling another costs more than the padding
        )


RECORDED = (
    "temperature",
    "top_p",
    "top_k",
    "max_new_tokens",
    "max_context",
    "slots",
    "seed",
    "dtype",
    "chat_format",
)
"""Options that decide what is written, and so are recorded and compared."""


@program
def main(argv: list[str]) -> None:
    settings = parse(PrepareSettings, argv, description=__doc__)
    sources, refused = read_sources(settings)
    folder = resolve_folder(settings.target)
    hf_config = read_json(folder / "config.json")
    context = TargetConfig.from_hf_dict(hf_config).max_positions
    if settings.max_context > context:
        raise UserError(f"--max-context is {settings.max_context}, the target's context {context}; lower it.")
    tokenizer = load_tokenizer(folder)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"The tokenizer in {folder} has no chat template; put a chat_template.jinja beside it.")
    identity = {
        "target_sha256": config_sha256(hf_config),
        "weights": weights_fingerprint(folder),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "prompts_sha256": prompts_sha256([*sources, *(r.source for r in refused)]),
        **{name: getattr(settings, name) for name in RECORDED},
    }
    sidecar = settings.beside("settings.json")
    begun = require_same_settings(sidecar, identity, settings.output)
    if settings.output.exists() and not begun:
        raise UserError(f"{settings.output} exists and was not begun by this program; move it or name another output.")
    target = replace(load_target(folder, dtype=settings.dtype, tokenizer=False), tokenizer=tokenizer)
    if not begun:
        write_settings(sidecar, identity, target=settings.target, prompts=_described(settings))
    regenerator = Regenerator(target, settings.chat_format, settings.decode_config(), settings.max_context or context)
    regenerate(settings, regenerator, sources, refused)


def regenerate(
    settings: PrepareSettings, regenerator: Regenerator, sources: list[Source], refused: list[Rejected]
) -> None:
    """Answers what is not finished yet, then puts the files into the order of the sources and prints the table."""
    order = {source.id: source.index for source in [*sources, *(r.source for r in refused)]}
    fitting, too_long = regenerator.sort_out(sources)
    began, made = time.perf_counter(), 0
    with ResumableJsonl(settings.output) as done, ResumableJsonl(settings.beside("rejected.jsonl")) as aside:
        strangers = (done.finished | aside.finished) - order.keys()
        if strangers:
            raise UserError(f"{settings.output} holds the id {min(strangers)!r}, which is not among the prompts.")
        aside.append(map(_rejected_row, (r for r in [*refused, *too_long] if r.source.id not in aside.finished)))
        finished = done.finished | aside.finished
        todo = [source for source in fitting if source.id not in finished]
        with tqdm(total=len(order), initial=len(order) - len(todo), unit="conversation") as bar:
            for ended in regenerator.run(todo, regenerator.longest(fitting)) if todo else ():
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


def read_sources(settings: PrepareSettings) -> tuple[list[Source], list[Rejected]]:
    """The conversations to answer, and those whose form has no prompt; UserError for files that can't be read."""
    sources: list[Source] = []
    refused: list[Rejected] = []
    seen: set[str] = set()
    for name, where, messages, extra in _records(settings):
        if name in seen:
            raise UserError(f"{where}: the id {name!r} was used before; expected every id once.")
        seen.add(name)
        source = Source(len(seen) - 1, name, (), extra, where)
        try:
            sources.append(replace(source, segments=prompt_segments(messages)))
        except UserError as error:
            refused.append(Rejected(source, str(error)))
    if not seen:
        raise UserError(f"{_described(settings)} holds no conversations; at least one was expected.")
    return sources, refused


def _records(settings: PrepareSettings) -> Iterator[tuple[str, str, list[dict[str, Any]], dict[str, Any]]]:
    """(id, where it stands, messages, further fields) of every conversation."""
    limit = settings.limit or None
    for path in settings.prompts:
        prefix = f"{path.stem}/" if len(settings.prompts) > 1 else ""
        for count, record in enumerate(read_conversations(path)):
            if count == limit:
                break
            yield prefix + record.id, f"{path} line {record.line}", record.messages, record.extra
    for domain in settings.domains:
        for item in corpora.prompts(domain, settings.split, limit, settings.seed):
            extra = {"domain": item["domain"], "source": item["source"]}
            yield item["id"], f"embedded {domain}", item["messages"], extra


def prompts_sha256(sources: Iterable[Source]) -> str:
    """Hash of the sources' places, ids, prompts and further fields."""
    digest = hashlib.sha256()
    for source in sorted(sources, key=lambda source: source.index):
        row = (source.index, source.id, source.segments, source.extra)
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


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
    print(table(metrics))
    for reason in sorted(set(reasons))[:10]:
        print(f"set aside ({reasons.count(reason):,}): {reason}")


def _row(ended: Finished) -> Mapping[str, Any]:
    fields = {"messages": list(ended.messages), "finish_reason": ended.finish_reason, "tokens": ended.tokens}
    return {"id": ended.source.id, **ended.source.extra, **fields}


def _rejected_row(ended: Rejected) -> Mapping[str, Any]:
    return {"id": ended.source.id, "where": ended.source.where, "reason": ended.reason}


def _described(settings: PrepareSettings) -> str:
    if settings.prompts:
        return ", ".join(map(str, settings.prompts))
    return f"The embedded split {settings.split!r} of {settings.embedded_prompts}"


def _sort_lines(path: Path, order: Mapping[str, int]) -> None:
    """Rewrites a finished file in the order of the sources, atomically."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines.sort(key=lambda line: order[json.loads(line)["id"]])
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as handle:
        handle.writelines(lines)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    fsync(path.parent)


if __name__ == "__main__":
    main()
