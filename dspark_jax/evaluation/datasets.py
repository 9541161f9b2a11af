"""Evaluation sets: rows of {"turns": [...]} or of conversations, from files, folders or the hub, and their domains."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_jax.data.conversations import Segments, read_prompt_records
from dspark_jax.errors import UserError

# The paper's groups. A set that is in none of them is a domain of its own, unless its rows name one.
DOMAINS = {
    "math": ("gsm8k", "math500", "aime25"),
    "code": ("mbpp", "humaneval", "livecodebench"),
    "chat": ("mt-bench", "alpaca", "arena-hard-v2"),
}
SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Dialogue:
    """The user's side of a conversation; the answers in between come from the model.

    Attributes:
        index: its place among all dialogues.
        dataset: the set it belongs to.
        segments: the turns before each answer.
    """

    index: int
    id: str
    dataset: str
    segments: Segments


def read_datasets(sources: Sequence[str], limit: int | None = None) -> dict[str, list[Dialogue]]:
    """The first `limit` dialogues of every set.

    Args:
        sources: files, folders or hub ids.
        limit: dialogues of each set; None: all.

    Returns:
        Dialogues by the set's name: a row's `domain` field, else the file's name.

    Raises:
        UserError: a source that is neither a file, a folder of files nor a data set on the hub; a row without turns.
    """
    sets: dict[str, list[Dialogue]] = {}
    total = 0
    # All files are looked up before the first is read, so that a wrong name is refused at once.
    for file in [file for source in sources for file in _files(source)]:
        for record in read_prompt_records(file):
            name = str(record.extra.get("domain", file.stem))
            taken = sets.setdefault(name, [])
            if limit is None or len(taken) < limit:
                # Numbered over all sets: the number decides the random numbers of its answers.
                taken.append(Dialogue(total, record.id, name, record.segments()))
                total += 1

    if not total:
        raise UserError(f"{', '.join(sources) or 'No source'} holds no samples; give JSONL with turns or messages.")
    return sets


def domain_of(dataset: str) -> str:
    """The group in which a set's figures are averaged."""
    return next((domain for domain, sets in DOMAINS.items() if dataset in sets), dataset)


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]

    folder = path if path.is_dir() else _from_hub(source)
    # Sorted: the order in a folder differs between disks, and places decide random numbers.
    files = sorted(file for suffix in SUFFIXES for file in folder.rglob(f"*{suffix}"))
    if not files:
        raise UserError(f"{source} holds no {' or '.join(SUFFIXES)} file; give evaluation sets in either.")

    return files


def _from_hub(source: str) -> Path:
    # A mistyped path must not become a request to the hub.
    if source.count("/") != 1 or source.startswith((".", "/", "~")) or source.endswith(SUFFIXES):
        raise UserError(f"{source} is neither a file nor a folder here; give one, or a hub id (owner/name).")

    # Imported here: local files need no hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(source, repo_type="dataset", allow_patterns=[f"*{suffix}" for suffix in SUFFIXES])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"{source} is neither a file or folder here nor a data set that the hub gives "
            f"({str(error).splitlines()[0]}); check the name, the network or HF_HOME."
        ) from None
