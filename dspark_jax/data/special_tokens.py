"""Tokenising a text in which names of special tokens are ordinary text, and special tokens stand under aliases.

The text is tokenised whole, by the tokenizer's own rules. Cut into parts at its special tokens, each part would be the
beginning of a text to the tokenizer, and some (Metaspace, as for Llama 2 and Mistral) mark that beginning.
"""

import json
import re
import secrets
import weakref
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from dspark_jax.errors import UserError

_made: "weakref.WeakKeyDictionary[Any, AliasedSpecials]" = weakref.WeakKeyDictionary()


def aliased(tokenizer: Any) -> "AliasedSpecials":
    """A Hugging Face tokenizer's aliased copy; made once, since copying a vocabulary takes a second."""
    if tokenizer not in _made:
        _made[tokenizer] = AliasedSpecials(tokenizer.backend_tokenizer)
    return _made[tokenizer]


class AliasedSpecials:
    """A copy of a tokenizer's backend whose special tokens have aliases that no text holds, under the same ids."""

    def __init__(self, backend: Tokenizer):
        content = json.loads(backend.to_str())
        specials = [token for token in content["added_tokens"] if token["special"]]
        # Random, so that no message can name a special token; ASCII, so that no normaliser changes it.
        self.aliases = {token["content"]: f"<{secrets.token_hex(16)}>" for token in specials}
        for token in specials:
            token["content"] = self.aliases[token["content"]]

        _rename(content["model"], self.aliases)
        # It adds tokens around a text, which is asked for without them, and names some of those renamed.
        content |= {"post_processor": None, "truncation": None, "padding": None}
        self._backend = Tokenizer.from_str(json.dumps(content))
        self._names = re.compile("|".join(map(re.escape, sorted(self.aliases, key=len, reverse=True))))
        for name, alias in self.aliases.items():
            if self._backend.token_to_id(alias) != backend.token_to_id(name):
                raise UserError(
                    f"The tokenizer's special token {name!r:.60} can't be told from text that names it; leave out "
                    "messages that do, or mend tokenizer.json."
                )

    def ids(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Token ids of a text.

        Args:
            text: where it holds the name of a special token, the token is meant.
            stand_ins: by name of a special token, what stands in the text where the name itself is meant.
        """
        text = self._names.sub(lambda found: self.aliases[found.group()], text)
        for name, stand_in in stand_ins.items():
            text = text.replace(stand_in, name)
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def _rename(model: dict[str, Any], aliases: Mapping[str, str]) -> None:
    """Renames words of a tokenizer's model, whose ids stay; a merge that makes a renamed word is dropped."""
    words = model["vocab"]
    if isinstance(words, dict):
        model["vocab"] = {aliases.get(word, word): number for word, number in words.items()}
    else:  # Unigram: (word, score) by id
        model["vocab"] = [[aliases.get(word, word), score] for word, score in words]

    if model.get("unk_token") in aliases:
        model["unk_token"] = aliases[model["unk_token"]]
    if "merges" in model:
        parts = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        # A part may be renamed as well: special tokens are in the vocabulary of some models as any word.
        kept = [pair for pair in parts if not {"".join(pair), *pair} & set(aliases)]
        model["merges"] = kept
