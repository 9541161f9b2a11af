"""Writes the tokenizer in a GGUF file's metadata as tokenizer.json and tokenizer_config.json, chat template included.

Byte-level BPE only (`tokenizer.ggml.model` gpt2), with the pre-tokenisation that `tokenizer.ggml.pre` names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_jax.checkpoints.tensors import write_json
from dspark_jax.errors import UserError
from dspark_jax.readers import Check, Schema, check_fields, integer, list_of, text

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""`tokenizer.ggml.token_type`: special, always kept whole, an unused place in the table."""

# Qwen2's rule. Llama 3's differs in one place: it groups up to three digits where Qwen2 takes them one by one.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_PATTERNS = {
    "qwen2": _WORDS,
    "deepseek-r1-qwen": _WORDS,
    "llama-bpe": _WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
    "llama3": _WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
}
_PLAIN = ("gpt-2", "default")
# transformers' name of a special token -> GGUF's.
_NAMED = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "mask": "mask"}
_MERGE = Check("two words with a space between", lambda value: isinstance(value, str) and " " in value)
_FIELDS: Schema = {
    "tokenizer.ggml.tokens": list_of(text(), least=1),
    "tokenizer.ggml.token_type": list_of(integer()),
    "tokenizer.ggml.merges": list_of(
        Check("two words with a space between", lambda v: isinstance(v, str) and " " in v)
    ),
    "tokenizer.ggml.pre": text(),
    "tokenizer.chat_template": text(),
}


def write_tokenizer(folder: Path, file: Path, fields: Mapping[str, Any]) -> None:
    """Writes both files.

    Args:
        folder: the destination.
        file: the GGUF file, for messages.
        fields: its metadata.

    Raises:
        UserError: the tokenizer is damaged, is not byte-level BPE, or its pre-tokenisation is not supported.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(
            f"{file} has a tokenizer of kind {kind!r}; byte-level BPE ('gpt2') is read from GGUF files. Give the "
            "model as a Hugging Face folder."
        )

    _check(file, fields)
    tokens, types = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type")
    # Without types every token is an ordinary word.
    types = types or [1] * len(tokens)
    pre = fields.get("tokenizer.ggml.pre", "default")
    # At the first space: byte-level tokens hold none, as a space is stored as another character.
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", [])]

    # Unused places would be words of the tokenizer otherwise, and count as known tokens.
    vocabulary = {token: i for i, (token, of) in enumerate(zip(tokens, types, strict=True)) if of != UNUSED}

    # Llama 3's table has words that no sequence of merges produces.
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in ("llama-bpe", "llama3"))
    except Exception as error:  # the tokenizers library raises no narrower type
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} holds tokens and merges that do not fit ({reason}); copy it again.") from None
    made = Tokenizer(model)

    # Qwen2's tokenizer normalises; the metadata does not say so.
    if _PATTERNS.get(pre) == _WORDS:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = _pre_tokenizer(file, pre)
    made.decoder = decoders.ByteLevel()

    # Added after the model is built, so that they keep their ids and are never split by its merges.
    for of, special in ((CONTROL, True), (USER_DEFINED, False)):
        chosen = [token for token, found in zip(tokens, types, strict=True) if found == of]
        made.add_tokens([AddedToken(token, special=special, normalized=False) for token in chosen])

    made.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(fields, tokens))


def _check(file: Path, fields: Mapping[str, Any]) -> None:
    """UserError for fields of another type or length, and for special tokens that the table does not have."""
    check_fields(fields, _FIELDS, str(file), required=("tokenizer.ggml.tokens",))
    count = len(fields["tokenizer.ggml.tokens"])
    if (types := fields.get("tokenizer.ggml.token_type")) and len(types) != count:
        raise UserError(
            f"{file} gives {len(types):,} types for {count:,} tokens; expected one for each; copy it again."
        )

    named = {f"tokenizer.ggml.{key}_token_id": integer(0, count - 1) for key in (*_NAMED.values(), "eot")}
    check_fields(fields, named, str(file))


def _pre_tokenizer(file: Path, pre: str) -> Any:
    """The pre-tokeniser of that name; UserError listing the supported ones."""
    from tokenizers import Regex, pre_tokenizers

    # GPT-2's own pattern is built into the byte-level step.
    if pre in _PLAIN:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _DIGITS_APART:
        # Digits come apart first, then GPT-2's pattern cuts the rest.
        first, regex = pre_tokenizers.Digits(individual_digits=True), True
    elif pre in _PATTERNS:
        # The pattern replaces GPT-2's, so the byte-level step must not cut again.
        first, regex = pre_tokenizers.Split(Regex(_PATTERNS[pre]), "isolated"), False
    else:
        known = ", ".join(sorted([*_PLAIN, *_DIGITS_APART, *_PATTERNS]))
        raise UserError(
            f"{file} cuts text as {pre!r} before it is tokenised, which is not known here ({known} are); give the "
            "model as a Hugging Face folder."
        )

    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)])


def _tokenizer_config(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """tokenizer_config.json: the names of special tokens, and the chat template where the file has one."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
    }

    # transformers wants the text of a special token where GGUF has its id.
    for name, key in _NAMED.items():
        if (token := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token"] = tokens[token]

    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config
