"""A random Qwen3 target with its own small tokenizer, made in well under a second: what tests run programs on."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dspark_jax.checkpoints.huggingface import abstract_target, save_target
from dspark_jax.targets.joined import apart, together
from dspark_jax.targets.registry import read_target_config

TOKENIZER_SIZE = 300
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")  # ids 0..3

_CHAT_TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
_TEXT = (
    "system\nuser\nassistant\nYou are a helpful assistant.",
    "What is the sum of three and four? The sum of three and four is seven.",
    "Return the length of the list. The function returns the number of items in the list.",
)


def write_tiny_target(folder: str | Path, *, seed: int = 0, **config_overrides: Any) -> Path:
    """Writes a Hugging Face folder (config, weights, tokenizer, chat template, generation config) and returns it.

    `config_overrides` replace fields of config.json (`vocab_size`, `num_hidden_layers`, `sliding_window`, ...). The
    weights are float32 unless `dtype="bfloat16"`, and spread widely, so that greedy choices are seldom near-ties.
    """
    folder = Path(folder)
    hf_config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": TOKENIZER_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index("<|im_end|>"),
        "pad_token_id": SPECIAL.index("<|endoftext|>"),
    } | config_overrides
    save_target(folder, hf_config, random_params(hf_config, seed), hf_config["dtype"])
    write_tokenizer(folder, hf_config["max_position_embeddings"])
    return folder


def random_params(hf_config: dict[str, Any], seed: int = 0) -> dict:
    """Random parameters (numpy arrays) of a target with this config.json: norm weights around 1, biases around 0."""
    config = read_target_config(hf_config)
    _, abstract = abstract_target(config, hf_config["dtype"])
    # Drawn matrix by matrix: how they are joined changes no number.
    matrices = jax.eval_shape(lambda params: apart(params, config), abstract)
    rng = np.random.default_rng(seed)
    spread = hf_config["initializer_range"]

    def draw(path: tuple[str | int, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.ndim > 1:
            return (spread * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        centre = 1.0 if path[-1] == "weight" else 0.0
        return (centre + 0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    drawn = unflatten_dict({path: draw(path, leaf) for path, leaf in flatten_dict(matrices).items()})
    return together(drawn, config, abstract)


@cache
def trained_tokenizer() -> str:
    """tokenizer.json of a byte-level BPE of at most `TOKENIZER_SIZE` entries; learnt once in a process."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer.to_str(pretty=True)


def write_tokenizer(folder: Path, context: int) -> None:
    """The tokenizer, its chat template and the generation config."""
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "additional_special_tokens": ["<|im_start|>"],
    }
    generation = {"eos_token_id": [SPECIAL.index("<|im_end|>"), SPECIAL.index("<|endoftext|>")]}
    (folder / "tokenizer.json").write_text(trained_tokenizer(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
