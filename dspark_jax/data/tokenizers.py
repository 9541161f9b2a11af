"""A tokenizer loaded from its files, and the hash of what decides its token ids.

The files are checked before the library reads them: of a damaged one it gives no sentence, or worse than none.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dspark_jax.errors import UserError
from dspark_jax.readers import read_object

MOST_TOKENIZER_BYTES = 512 << 20
"""A vocabulary of a million words with its merges has a tenth of that."""


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The Hugging Face tokenizer of a folder or hub id, never running code that comes with it.

    Raises:
        UserError: nothing loadable there.
    """
    from transformers import AutoTokenizer

    path = Path(folder)
    if path.is_dir() and not any(
        (path / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    ):
        raise UserError(f"{path} holds no tokenizer: expected tokenizer.json beside tokenizer_config.json.")

    # Checked first: of a damaged file transformers gives no sentence, while `read_object` names file and place.
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if os.path.lexists(path / name):
            read_object(path / name)
    if os.path.lexists(path / "tokenizer.json"):
        _check_ids(path / "tokenizer.json")

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        tokenizer("a b", add_special_tokens=False)  # some faults of a damaged configuration show only in use
        return tokenizer
    except BaseException as error:  # damaged files raise nearly anything, Rust panics included
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"The tokenizer in {folder} does not load ({reason}); copy its files again.") from None


def _check_ids(path: Path) -> None:
    """UserError for a tokenizer.json whose ids leave far more holes than it has tokens: the tokenizers library prints
    every hole, which took gigabytes for one damaged digit."""
    content = read_object(path, limit=MOST_TOKENIZER_BYTES)
    model, added = content.get("model"), content.get("added_tokens")
    words = model.get("vocab") if isinstance(model, dict) else None
    ids = list(words.values()) if isinstance(words, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []

    # Generous: published tokenizers leave some ids free, and none of them leaves ten times as many as it uses.
    most = 10 * len(ids) + 100_000
    wrong = next((i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < most), None)
    if wrong is not None:
        raise UserError(
            f"{path} gives a token the id {wrong!r:.40}; expected whole numbers from 0 to {most - 1:,} for its "
            f"{len(ids):,} tokens. Copy the file again."
        )


def tokenizer_hash(folder_or_tokenizer: Any) -> str:
    """sha256 (hex) of everything that decides token ids: vocabulary, merges, normaliser, pre-tokeniser, added tokens.

    The same for a folder and for the tokenizer loaded from it, and untouched by earlier calls with truncation or
    padding. The chat template is not part of it: it changes texts, not ids.
    """
    tokenizer = folder_or_tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: dict[str, Any] = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        content = json.loads(backend.to_str())
        content.pop("truncation", None)  # state of the last call, not of the tokenizer
        content.pop("padding", None)

    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
