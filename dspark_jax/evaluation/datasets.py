"""Evaluation sets: JSONL of {"turns": [...]} or of conversations, from files, folders or the hub, and their domains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_jax.data.jsonl import parse_conversation, read_jsonl
from dspark_jax.errors import UserError

# The paper's groups. A set that is in none of them is a domain of its own, unless its rows name one.
DOMAINS = {
    "math": ("gsm8k", "math500", "aime25"),
    "code": ("mbpp", "humaneval", "livecodebench"),
    "chat": ("mt-bench", "alpaca", "arena-hard-v2"),
}


@dataclass(frozen=True)
class Sample:
    """What a user says, turn by turn; the answers between are the model's. `index` is its place among all samples."""

    index: int
    id: str
    dataset: str
    turns: tuple[str, ...]
    system: str | None = None


def read_datasets(sources: Sequence[str], limit: int | None = None) -> dict[str, list[Sample]]:
    """The first `limit` samples of every set, by the set's name: the row's `domain` field, else the file's name.

    Raises:
      UserError: a source that is no JSONL file, no folder with any and no data set on the hub, or a row without turns.
    """
    sets: dict[str, list[Sample]] = {}
    total = 0
    for file in [file for source in sources for file in _files(source)]:
        for number, row in read_jsonl(file):
            name = str(row.get("domain", file.stem)) if isinstance(row, Mapping) else file.stem
            taken = sets.setdefault(name, [])
            if limit is None or len(taken) < limit:
                taken.append(_sample(total, row, name, file, number))
                total += 1
    if not total:
        raise UserError(f"{', '.join(sources) or 'No source'} holds no samples; give JSONL with turns or messages.")
    return sets


def domain_of(dataset: str) -> str:
    """The group that a set's figures are averaged under."""
    return next((domain for domain, sets in DOMAINS.items() if dataset in sets), dataset)


def _sample(index: int, row: Any, dataset: str, file: Path, number: int) -> Sample:
    where = f"{file} line {number}"
    if isinstance(row, Mapping) and "turns" in row:
        turns, system = row["turns"], None
    else:
        messages = parse_conversation(row, where)
        turns = [turn["content"] for turn in messages if turn["role"] == "user"]
        system = next((turn["content"] for turn in messages if turn["role"] == "system"), None)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise UserError(f"{where}: its turns are {str(turns)[:60]}; expected a list of texts.")
    name = str(row.get("id", f"{file.stem}-{number}"))
    return Sample(index, name, dataset, tuple(turns), system)


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    folder = path if path.is_dir() else _from_hub(source)
    files = sorted(folder.rglob("*.jsonl"))
    if not files:
        raise UserError(f"{source} holds no .jsonl file; give evaluation sets as JSONL, one sample a line.")
    return files


def _from_hub(source: str) -> Path:
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or source.endswith(".jsonl"):
        raise UserError(f"{source} is neither a file nor a folder here; give one, or a hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=["*.jsonl"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"{source} is neither a file or folder here nor a data set that the hub gives "
            f"({str(error).splitlines()[0]}); check the name, the network or HF_HOME."
        ) from None
