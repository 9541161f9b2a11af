"""Targets from GGUF files: the same logits and the same tokens as the Hugging Face folders that they were made from."""

import json
import os
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

from dspark_jax.checkpoints.gguf import _LAYER, _OUTER, converted_folder, gguf_file
from dspark_jax.checkpoints.gguf_tokenizer import write_tokenizer
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.data.tokenizers import load_tokenizer
from dspark_jax.errors import UserError
from dspark_jax.programs import asset
from dspark_jax.targets.attention import CausalRows
from tests.tiny import write_tiny_target

KINDS = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


def write_gguf(
    folder: Path, file: Path, pre: str = "gpt-2", types: dict[str, str] | None = None, **metadata: Any
) -> Path:
    """A Hugging Face folder as llama.cpp's converter writes it; `types`: quantisations by the end of a tensor's name.

    The tensors of the folder are replaced by what the file decodes to.
    """
    config = json.loads((folder / "config.json").read_text())
    kind = KINDS[config["model_type"]]
    writer = gguf.GGUFWriter(file, kind)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if kind == "qwen3moe":
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    for name, value in metadata.items():
        writer.add_string(name.replace("__", "."), value)
    _add_tokenizer(writer, folder, pre)
    _add_tensors(writer, folder, config, types or {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, pre: str) -> None:
    stored = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"] for token in stored["added_tokens"]}
    vocabulary = stored["model"]["vocab"] | {token["content"]: token["id"] for token in stored["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in stored["model"]["merges"]])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(load_tokenizer(folder).chat_template)


def _add_tensors(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any], types: dict[str, str]) -> None:
    weights = load_file(folder / "model.safetensors")
    layer_names = {theirs: ours for ours, theirs in _LAYER.items()}
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    experts: dict[str, list[np.ndarray]] = {}
    for name in sorted(weights):
        if ".experts." in name:
            layer, expert, part = name.split(".")[2], int(name.split(".")[5]), name.split(".")[6].split("_")[0]
            experts.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", []).insert(expert, weights[name])
            continue
        if name in outer:
            stored = outer[name]
        else:
            below = name.removeprefix("model.layers.").removesuffix(".weight")
            layer, below = below.split(".", 1)
            stored = f"blk.{layer}.{layer_names[below]}.weight"
        named = next((of for end, of in types.items() if stored.endswith(end)), "F32")
        kind = gguf.GGMLQuantizationType[named]
        array, back = weights[name], lambda x: x
        if config["model_type"] == "llama" and stored.endswith(("attn_q.weight", "attn_k.weight")):
            array, back = _interleaved(array, config["head_dim"]), lambda x: _halves(x, config["head_dim"])
        raw = quantize(array, kind) if named != "F32" else array
        weights[name] = np.ascontiguousarray(back(dequantize(raw, kind).reshape(array.shape)))
        writer.add_tensor(stored, raw, raw_dtype=kind)
    for name, parts in experts.items():
        writer.add_tensor(name, np.stack(parts))
    save_file(weights, folder / "model.safetensors")


def _interleaved(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Q and K of Llama models as llama.cpp's converter permutes them."""
    out, into = weight.shape
    return weight.reshape(out // head_dim, 2, head_dim // 2, into).swapaxes(1, 2).reshape(out, into)


def _halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse, element by element: row 2i of a head is its row i, row 2i + 1 its row i + H/2."""
    order = [
        head * head_dim + (2 * i if i < head_dim // 2 else 2 * i - head_dim + 1)
        for head in range(len(weight) // head_dim)
        for i in range(head_dim)
    ]
    return weight[order]


def logits(target: Any) -> np.ndarray:
    tokens = jnp.asarray([[5, 9, 40, 7, 100, 3, 21, 8]])
    model = target.model(target.params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(model(tokens, positions, CausalRows(), ()).hidden @ model.head_weight().T)


@pytest.mark.parametrize(
    ("model_type", "more"),
    [("llama", {"tie_word_embeddings": False}), ("qwen3", {}), ("qwen3_moe", EXPERTS)],
)
def test_logits_are_those_of_the_folder(tmp_path: Path, model_type: str, more: dict[str, Any]) -> None:
    folder = write_tiny_target(tmp_path / "hf", model_type=model_type, **more)
    file = write_gguf(folder, tmp_path / "model.gguf")
    made = load_target(file)
    np.testing.assert_array_equal(logits(made), logits(load_target(folder)))
    assert made.stop_tokens == (2,)
    assert describe_target(f"{tmp_path}:model.gguf").config_sha256 == made.config_sha256


def test_quantised_matrices_of_a_llama_are_decoded(tmp_path: Path) -> None:
    folder = write_tiny_target(tmp_path / "hf", model_type="llama")
    types = {"token_embd.weight": "Q8_0", "attn_q.weight": "Q4_1", "attn_k.weight": "Q4_0", "ffn_gate.weight": "F16",
             "ffn_down.weight": "Q5_1"}  # fmt: skip
    file = write_gguf(folder, tmp_path / "model.gguf", types=types)
    made = load_target(file)
    assert made.config.dtype == "bfloat16"
    expected = load_target(folder, dtype="bfloat16")
    np.testing.assert_array_equal(logits(made), logits(expected))


def test_a_file_is_converted_once_and_again_when_it_changes(tmp_path: Path) -> None:
    folder = write_tiny_target(tmp_path / "hf")
    (tmp_path / "one").mkdir()
    file = write_gguf(folder, tmp_path / "one" / "model.gguf")
    first = converted_folder(file)
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert gguf_file(file.parent) == file
    assert converted_folder(file) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    write_gguf(write_tiny_target(tmp_path / "other", seed=1), file)
    assert converted_folder(file) != first


def test_two_processes_convert_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one finishes after the last look at the final place and before the rename."""
    file = write_gguf(write_tiny_target(tmp_path / "hf"), tmp_path / "model.gguf")
    rename = os.replace

    def overtaken(made: Path, final: Path) -> None:
        if Path(made).name.startswith("making-"):
            shutil.copytree(made, final)
        rename(made, final)

    monkeypatch.setattr(os, "replace", overtaken)
    folder = converted_folder(file)
    assert (folder / "config.json").exists() and [folder] == list(folder.parent.iterdir())


def test_a_scaling_without_its_factor_is_one_sentence(tmp_path: Path) -> None:
    folder = write_tiny_target(tmp_path / "hf")
    file = write_gguf(folder, tmp_path / "model.gguf", qwen3__rope__scaling__type="yarn")
    with pytest.raises(UserError, match=r"has no metadata qwen3\.rope\.scaling\.factor"):
        load_target(file)


def test_tokens_and_template_are_those_of_the_folder(tmp_path: Path) -> None:
    embedded = asset("embedded_target")
    folder = write_tiny_target(tmp_path / "hf", vocab_size=3072, hidden_size=16)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((embedded / name).read_bytes())
    file = write_gguf(folder, tmp_path / "model.gguf", pre="qwen2")
    made, published = load_tokenizer(converted_folder(file)), load_tokenizer(folder)
    text = "It's 3.14159 or 1,024!\n\n\tdef f(x):\n        return x ** 2  # é 😀 你好，世界 <|im_end|>"
    assert made(text)["input_ids"] == published(text)["input_ids"]
    assert made.decode(made(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "Hi"}]
    render = {"tokenize": False, "add_generation_prompt": True}
    assert made.apply_chat_template(chat, **render) == published.apply_chat_template(chat, **render)


def test_digits_stand_alone_where_the_file_says_so(tmp_path: Path) -> None:
    folder = write_tiny_target(tmp_path / "hf")
    made = load_tokenizer(converted_folder(write_gguf(folder, tmp_path / "model.gguf", pre="smollm")))
    assert made.tokenize("12 345") == ["1", "2", "Ġ", "3", "4", "5"]


@pytest.mark.parametrize("keep", [3, 200, 20_000])
def test_a_file_that_is_cut_off_is_one_sentence(tmp_path: Path, keep: int) -> None:
    file = write_gguf(write_tiny_target(tmp_path / "hf"), tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"is no whole GGUF file .* copy it again"):
        load_target(file)
    assert not list((tmp_path / "model.gguf.d").iterdir())


def header(tensors: int, fields: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


KEY = struct.pack("<Q", 1) + b"a"
HOSTILE = {
    "numbers": header(0, 1, KEY + struct.pack("<IIQ", 9, 0, 2**60)),
    "texts": header(0, 1, KEY + struct.pack("<IIQ", 9, 8, 2**60)),
    "numbers within the file": header(0, 1, KEY + struct.pack("<IIQ", 9, 0, 9_000_000)),
    "arrays in arrays": header(0, 1, KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
    "wide arrays in arrays": header(0, 1, KEY + struct.pack("<IIQ", 9, 9, 2**40) + struct.pack("<IQ", 9, 2**40) * 9),
    "fields": header(0, 2**63, b""),
    "tensors": header(2**63, 0, b""),
    "axes": header(1, 0, KEY + struct.pack("<I", 2**32 - 1)),
    "name": header(1, 0, struct.pack("<Q", 2**63)),
    "other byte order": b"GGUF" + struct.pack(">IQQ", 3, 2**40, 0),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_headers_that_never_end_are_one_sentence(tmp_path: Path, case: str) -> None:
    """Counts beyond the file or any use: the file is sparse and large, so that its end does not bound them."""
    file = tmp_path / "model.gguf"
    file.write_bytes(HOSTILE[case])
    os.truncate(file, 1 << 26)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"is no whole GGUF file \(.* announce.*\); copy it again"):
        load_target(file)
    assert time.monotonic() - began < 20


def test_a_damaged_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    """Its own fields, each of another kind in turn, in a whole file."""
    file = write_gguf(write_tiny_target(tmp_path / "folder"), tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    damages: list[dict[str, Any]] = [
        {"merges": ["Ġ t", "no-space"]},
        {"merges": ["Ġ nowhere"]},
        {"merges": 7},
        {"tokens": [*tokens[:-1], 3]},
        {"token_type": [1] * (len(tokens) - 1)},
        {"eos_token_id": len(tokens)},
        {"eos_token_id": [1]},
        {"eot_token_id": -1},
        {"pre": 5},
    ]
    for damage in damages:
        wrong = {f"tokenizer.ggml.{name}": value for name, value in damage.items()}
        with pytest.raises(UserError, match="model.gguf") as refused:
            write_tokenizer(tmp_path, file, fields | wrong)
        assert "\n" not in str(refused.value)


def test_foreign_files_are_one_sentence(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(b"PK\x03\x04" + bytes(400))
    with pytest.raises(UserError, match="is no whole GGUF file"):
        load_target(foreign)
    with pytest.raises(UserError, match="does not exist"):
        load_target(tmp_path / "missing.gguf")
    (tmp_path / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="holds several GGUF files"):
        load_target(tmp_path)


def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'mamba'; those read here are llama, qwen3, qwen3moe"):
        load_target(tmp_path / "mamba.gguf")
    file = write_gguf(write_tiny_target(tmp_path / "hf"), tmp_path / "model.gguf", pre="viking")
    with pytest.raises(UserError, match="cuts text as 'viking'"):
        load_target(file)
