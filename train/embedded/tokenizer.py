"""The embedded target's tokenizer: a byte-level BPE in the manner of Qwen, learned from the training conversations."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 2048
PAD, START, END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
SPECIAL = (PAD, START, END, MASK)  # ids 0..3
DEFAULT_SYSTEM = "You are a helpful assistant."

# As in Qwen: letters with one leading character, digits one by one, punctuation with a leading space, line breaks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Puts the default system message in front where there is none, as Qwen's templates do. Training rows and prompts are
# both rendered by it, so a drafter has the same context in training and in decoding (docs/algorithm.md, rule 103).
_CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>' + '\n' }}{%- endif -%}"
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def learn_tokenizer(conversations: Iterable[list[dict[str, str]]]) -> Tokenizer:
    """Byte-level BPE of VOCABULARY entries over the contents of the conversations' messages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )

    tokenizer.decoder = decoders.ByteLevel()

    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        # All 256 bytes, so that no text is out of vocabulary.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    tokenizer.train_from_iterator(_texts(conversations), trainer)

    return tokenizer


def _texts(conversations: Iterable[list[dict[str, str]]]) -> Iterator[str]:
    for messages in conversations:
        # The header of every conversation counts too, so that it costs one token a word.
        yield f"system\n{DEFAULT_SYSTEM}"
        for message in messages:
            yield f"{message['role']}\n{message['content']}"


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json (HF layout)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")

    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "pad_token": PAD,
        "mask_token": MASK,
        "additional_special_tokens": [START],
    }

    _write_json(folder / "tokenizer_config.json", described)
    # Both end a generation: END closes a turn, PAD is Qwen's end of a document.
    ids = {name: tokenizer.token_to_id(name) for name in (PAD, END)}
    generation = {"do_sample": False, "eos_token_id": [ids[END], ids[PAD]], "pad_token_id": ids[PAD]}
    _write_json(folder / "generation_config.json", generation)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
