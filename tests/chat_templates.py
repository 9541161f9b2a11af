"""Chat templates in the manner of the public ones, with what each makes of an answer: the oracle of the chat tests."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<｜User｜>",
    "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<|user|>", "<|assistant|>", "<|end|>", "<|start|>", "<|message|>",
    "<|channel|>", "<|return|>",
)  # fmt: skip
ORDINARY = ("<think>", "</think>")  # added tokens that are not special, as in Qwen3

# As Llama 3 and Qwen: line breaks are a word of their own, whatever follows them.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEXT = ("system\nuser\nassistant\nmodel\n\n", "The sum of three and four is seven.\n\n\ndef f(a):\n    return a\n")


@dataclass(frozen=True)
class Style:
    """A template, the tokenizer's end of sequence, and the text that the target generates for an answer.

    `multi_turn`: whether a row holds all answers of a plain conversation; `system`: whether it takes a system message.
    """

    template: str
    eos: str
    generated: Callable[[str, bool], str]
    multi_turn: bool = True
    system: bool = True


def closed_by(marker: str, lead: str = "") -> Callable[[str, bool], str]:
    return lambda content, thinking: (lead if not content.startswith(lead) else "") + content + marker


def _chatml(before: str = "", opening: str = "") -> str:
    return (
        before
        + "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}" + opening + "{%- endif %}"
    )


_DEFAULT_SYSTEM = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI.<|im_end|>\n' }}{%- endif %}"
)
_EMPTY_THOUGHT = (
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
)

# As Qwen3: thoughts stay behind the last question only, where an answer without any gets an empty thought.
_QWEN3 = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role != 'assistant' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- else %}"
    "{%- set said = m.content %}{%- set thought = '' %}{%- if '</think>' in said %}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{ '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' + said.lstrip('\n') }}"
    "{%- else %}{{ said }}{%- endif %}{{ '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}" + _EMPTY_THOUGHT + "{%- endif %}"
)
_LLAMA3 = (
    "{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{ 'Today Date: ' + strftime_now('%d %b %Y') + '\n\n' }}{%- if messages[0].role == 'system' %}"
    "{{ messages[0].content | trim }}{%- set messages = messages[1:] %}{%- endif %}"
    "{{ '<|eot_id|>' }}{%- for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
_GEMMA = (
    "{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}{{ '<s>' }}"
    "{%- for m in messages %}{%- set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}"
)
_MISTRAL = (
    "{%- set ns = namespace(system='') %}{{ '<s>' }}{%- for m in messages %}"
    "{%- if m.role == 'system' %}{%- set ns.system = m.content + '\n\n' %}"
    "{%- elif m.role == 'user' %}{{ '[INST] ' + ns.system + m.content + ' [/INST]' }}{%- set ns.system = '' %}"
    "{%- else %}{{ ' ' + m.content + '</s>' }}{%- endif %}{%- endfor %}"
)
_DEEPSEEK = (
    "{{ '<s>' }}{%- for m in messages %}{%- if m.role == 'system' %}{{ m.content }}"
    "{%- elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{%- else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{{ '<think>' if thinking else '</think>' }}{%- endif %}"
)
# The one that docs/deepseek-v4.md gives, as the released folders have none.
_DEEPSEEK_V4 = (
    (Path(__file__).parents[1] / "docs" / "deepseek-v4.md").read_text("utf-8").split("```jinja\n")[1].split("\n```")[0]
)
_MERGING = (
    "{%- set ns = namespace(role='') %}{%- for m in messages %}{%- if m.role == ns.role %}{{ '\n\n' + m.content }}"
    "{%- else %}{%- if ns.role %}{{ '<|end|>\n' }}{%- endif %}{{ '<|' + m.role + '|>\n' + m.content }}{%- endif %}"
    "{%- set ns.role = m.role %}{%- endfor %}{{ '<|end|>\n' }}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{%- endif %}"
)
_HARMONY = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{%- endif %}"
)
_VICUNA = (
    "{%- for m in messages %}{%- if m.role == 'system' %}{{ m.content + ' ' }}"
    "{%- elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{%- else %}{{ 'ASSISTANT: ' + m.content + '</s>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{%- endif %}"
)
_ALPACA = (
    "{%- for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '### assistant:\n' }}{%- endif %}"
)
_TRIMMING = _chatml().replace("m.content", "m.content | trim")
_DATED = _chatml("{{ '<|im_start|>system\nIt is ' + strftime_now('%Y-%m-%d') + '.<|im_end|>\n' }}")


def _qwen3_generated(content: str, thinking: bool) -> str:
    """With thinking on the answer is the template's: its thought, or an empty one."""
    if not thinking:
        return content + "<|im_end|>"
    thought, _, said = content.rpartition("</think>")
    thought = thought.split("</think>")[0].split("<think>")[-1].strip("\n")
    return f"<think>\n{thought}\n</think>\n\n" + said.lstrip("\n") + "<|im_end|>"


STYLES = {
    "chatml": Style(_chatml(), "<|im_end|>", closed_by("<|im_end|>")),
    "chatml, default system": Style(_chatml(_DEFAULT_SYSTEM), "<|im_end|>", closed_by("<|im_end|>")),
    "chatml, empty thought": Style(_chatml(opening=_EMPTY_THOUGHT), "<|im_end|>", closed_by("<|im_end|>"), False),
    "qwen3": Style(_QWEN3, "<|im_end|>", _qwen3_generated, False),
    "llama3": Style(_LLAMA3, "<|eot_id|>", closed_by("<|eot_id|>")),
    "gemma": Style(_GEMMA, "</s>", closed_by("<end_of_turn>"), system=False),
    "mistral": Style(_MISTRAL, "</s>", closed_by("</s>", " ")),
    "deepseek": Style(_DEEPSEEK, "<｜end▁of▁sentence｜>", closed_by("<｜end▁of▁sentence｜>"), False),
    "deepseek_v4": Style(_DEEPSEEK_V4, "<｜end▁of▁sentence｜>", closed_by("<｜end▁of▁sentence｜>")),
    "trimming": Style(_TRIMMING, "<|im_end|>", closed_by("<|im_end|>")),
    "dated": Style(_DATED, "<|im_end|>", closed_by("<|im_end|>")),
    "merging": Style(_MERGING, "<|end|>", closed_by("<|end|>")),
    "harmony": Style(
        _HARMONY, "<|return|>", closed_by("<|return|>", "<|channel|>final<|message|>"), multi_turn=False
    ),
    "vicuna": Style(_VICUNA, "</s>", closed_by("</s>", " ")),
    "alpaca": Style(_ALPACA, "</s>", closed_by("</s>"), multi_turn=False),
}  # fmt: skip


@cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330 + len(SPECIAL), special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(_TEXT, trainer)
    # As Phi: whitespace after this one is its own.
    tokenizer.add_special_tokens([AddedToken("<|user|>", special=True, rstrip=True)])
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ORDINARY])
    return tokenizer.to_str()


@cache
def _word_backend(kind: str) -> str:
    """As SentencePiece's vocabularies: spaces are part of a word, and a text's beginning may be marked as one is."""
    letters = sorted({*" \n▁.,?!:{}[]<>/|'\"", *map(chr, range(33, 127)), *_TEXT[0], *_TEXT[1]} - {" "})
    words = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁The", "▁sum", "and", "▁and"]
    if kind == "unigram":
        made = Tokenizer(
            models.Unigram([(word, -1.0 - i / 1000) for i, word in enumerate(words)], words.index("<unk>"), True)
        )
    else:
        pairs = [("▁", "T"), ("▁T", "h"), ("▁Th", "e"), ("a", "n"), ("an", "d"), ("▁", "and")]
        words += [a + b for a, b in pairs if a + b not in words]
        made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, pairs, unk_token="<unk>", byte_fallback=True))
    if kind == "gemma":  # no mark at the beginning
        made.normalizer = normalizers.Replace(" ", "▁")
    elif kind == "prepending":  # Llama 2's older form: every part between special tokens begins with one
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if kind == "always" else "first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(parts)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (*SPECIAL, "<unk>")])
    made.add_tokens([AddedToken(name, special=False) for name in ORDINARY])
    return made.to_str()


BACKENDS = ("bytes", "first", "always", "prepending", "gemma", "unigram")


def tokenizer_of(name: str, backend: str = "bytes") -> PreTrainedTokenizerFast:
    style = STYLES[name]
    stored = _backend() if backend == "bytes" else _word_backend(backend)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(stored), eos_token=style.eos, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = style.template
    return tokenizer
