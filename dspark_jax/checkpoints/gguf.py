"""Targets in llama.cpp's GGUF files, converted to Hugging Face folders once and loaded like any other from then on.

A file is named by itself, by its folder, or as `folder:file` where a folder holds several. The converted folder lies
beside it, in `NAME.gguf.d/HASH` with HASH of the file's bytes: written whole or not at all, and again when the file
changes. Every quantisation is decoded to float32 and stored in bfloat16, or in float32 if the file's own matrices are.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dspark_jax.checkpoints.gguf_header import check_header
from dspark_jax.checkpoints.gguf_tokenizer import write_tokenizer
from dspark_jax.checkpoints.tensors import write_json, write_tensors
from dspark_jax.errors import UserError
from dspark_jax.files import file_hash
from dspark_jax.targets.config import RopeConfig

SUFFIX = ".gguf"
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
}
"""`general.architecture` -> Hugging Face's architecture and model_type, of the files that are read."""

# Bytes of one output shard: the most that conversion holds in memory beside the tensor at hand.
SHARD_BYTES = 2 << 30

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
# One stacked tensor each; Hugging Face stores every expert apart.
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}


def gguf_file(path_or_id: str | Path) -> Path | None:
    """The GGUF file that a target's name refers to: the file, `folder:file`, or the only one in a folder.

    Returns:
        The file; None for everything else (a Hugging Face folder, a hub id).

    Raises:
        UserError: a name that ends in .gguf without such a file, or a folder with several and no config.json.
    """
    path = Path(path_or_id)
    if path.is_dir():
        # A folder with a config.json is a Hugging Face folder, whatever GGUF files lie beside its weights.
        found = [] if (path / "config.json").exists() else sorted(path.glob(f"*{SUFFIX}"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise UserError(f"{path} holds several GGUF files ({names}); name one, as in {path}:{found[0].name}.")
        return found[0] if found else None

    if path.suffix != SUFFIX:
        return None

    # `folder:file` ends in .gguf too, but no such path exists.
    folder, colon, name = str(path_or_id).rpartition(":")
    if colon and Path(folder).is_dir():
        path = Path(folder) / name
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a GGUF file, or a folder that holds one.")

    return path


def converted_folder(file: Path) -> Path:
    """The Hugging Face folder of a GGUF file, converted now if it does not exist yet.

    Raises:
        UserError: the file is not whole; its architecture, rotation or tokenizer is not supported; or the folder beside
            it cannot be written.
    """
    # Named by content, so that a file that was replaced is converted again.
    parent = file.with_name(f"{file.name}.d")
    final = parent / file_hash(file)

    # config.json is written last and renamed with its folder: its presence means a whole conversion.
    if (final / "config.json").exists():
        return final

    try:
        parent.mkdir(exist_ok=True)
        # Beside its final place, since a rename is atomic within one file system only.
        made = Path(tempfile.mkdtemp(prefix="making-", dir=parent))
    except OSError as error:
        raise UserError(
            f"{file} is turned into a folder beside it, and {parent} cannot be written ({error.strerror}); copy the "
            "file to where that is possible."
        ) from error

    try:
        _convert(file, made)
        try:
            os.replace(made, final)
        except OSError as error:
            # Another process may have been faster: a folder that holds files is not replaced, and its bytes are the
            # same. Tried before it is looked for, since the other one may finish between the two.
            if not (final / "config.json").exists():
                raise UserError(
                    f"The folder that {file} was turned into cannot be put at {final} ({error.strerror}); remove what "
                    "is there."
                ) from error
    finally:
        # After a rename there is nothing left to remove; after an error the unfinished folder goes.
        shutil.rmtree(made, ignore_errors=True)

    return final


def _convert(file: Path, folder: Path) -> None:
    """Writes a whole Hugging Face folder: weights, tokenizer, generation_config.json and, last, config.json."""
    from gguf import GGUFReader

    try:
        check_header(file)
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    # The reader checks little: on a cut file it fails in the middle of its own arithmetic.
    except (ValueError, KeyError, IndexError, OSError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} is no whole GGUF file ({reason}); copy it again.") from error

    # Memory maps: nothing is read before a tensor is decoded.
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    # The config comes first: an architecture that is not read is refused before gigabytes are decoded.
    config = hf_config(file, fields, tensors)
    _write_weights(folder, config, file, tensors)
    write_tokenizer(folder, file, fields)

    # A chat model ends its turn with eot, which need not be eos.
    stops = {fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")} - {None}
    write_json(folder / "generation_config.json", {"eos_token_id": sorted(stops)})
    write_json(folder / "config.json", config)


def hf_config(file: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that a GGUF file's metadata and tensors describe.

    Args:
        file: for messages.
        fields: metadata by key.
        tensors: tensors of the gguf package's reader, by name.

    Raises:
        UserError: it is a part of a split file, its architecture or rotation is not supported, or a key is missing.
    """
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{file} is a GGUF file of architecture {kind!r}; those read here are {known}.")

    if int(fields.get("split.count", 1)) > 1:
        raise UserError(f"{file} is one of {fields['split.count']} parts; join them with llama-gguf-split --merge.")

    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{file} has no tensor token_embd.weight; give the file of a language model.")

    architecture, model_type = ARCHITECTURES[kind]
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        **_sizes(_Metadata(file, kind, fields)),
        # Shapes come fastest axis first in GGUF: the last one is the vocabulary.
        "vocab_size": int(embedding.shape[-1]),
        # The format has no field for it: a tied model's file has no output tensor.
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32" if embedding.tensor_type.name == "F32" else "bfloat16",
    }

    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = int(token)

    # Last: Llama 3's scaling is recovered with the sizes and theta that the config has by now.
    scaling = _rope_scaling(file, kind, fields, tensors, config)
    return config if scaling is None else config | {"rope_scaling": scaling}


@dataclass(frozen=True)
class _Metadata:
    """The metadata of one architecture, whose keys start with its name."""

    file: Path
    kind: str
    fields: Mapping[str, Any]

    def get(self, name: str, default: Any) -> Any:
        """A field that the format gives a default."""
        return self.fields.get(f"{self.kind}.{name}", default)

    def need(self, name: str) -> Any:
        """A field without one; UserError where it is absent."""
        if (found := self.get(name, None)) is None:
            raise UserError(
                f"{self.file} has no metadata {self.kind}.{name}, which its architecture needs; copy it again."
            )
        return found


def _sizes(metadata: _Metadata) -> dict[str, Any]:
    """The fields of config.json that an architecture's metadata hold: sizes, norm, rotation base, experts."""
    need = metadata.need
    heads, hidden = int(need("attention.head_count")), int(need("embedding_length"))
    config = {
        "hidden_size": hidden,
        "intermediate_size": int(need("feed_forward_length")),
        "num_hidden_layers": int(need("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(metadata.get("attention.head_count_kv", heads)),
        "head_dim": int(metadata.get("attention.key_length", hidden // heads)),
        # The architectures read here have one activation and no bias, and the format no field for either.
        "hidden_act": "silu",
        "attention_bias": False,
        # Stored in float32, where 1e-5 is 9.99999974e-06.
        "rms_norm_eps": float(f"{need('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(metadata.get("rope.freq_base", 10000.0)),
        "max_position_embeddings": int(need("context_length")),
    }

    if metadata.kind == "llama":
        config["mlp_bias"] = False
    if metadata.kind == "qwen3moe":
        config |= {
            "num_experts": int(need("expert_count")),
            "num_experts_per_tok": int(need("expert_used_count")),
            "moe_intermediate_size": int(need("expert_feed_forward_length")),
            # Not in the metadata; the published Qwen3 mixtures agree on these three.
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def _rope_scaling(
    file: Path, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """`rope_scaling`; Llama 3's is stored as a tensor of factors, from which its four numbers are recovered."""
    if (factors := tensors.get("rope_freqs.weight")) is not None:
        found = _decoded(factors).reshape(-1)
        # Only the original length is unknown: the low and high factors are the same in all of Llama 3's models.
        for original in (8192, 4096, 2048):
            scaling = {
                "rope_type": "llama3",
                "factor": float(round(float(found.max()), 3)),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
            # Tried through the same code that will run, so that a match means equal frequencies at load.
            rope = RopeConfig.from_hf_dict({**config, "rope_scaling": scaling})
            plain = RopeConfig.from_hf_dict(config).inverse_frequencies(config["head_dim"])[0]
            # The file holds divisors: plain frequency over scaled frequency.
            ours = np.array(plain) / np.array(rope.inverse_frequencies(config["head_dim"])[0])
            # Loosely: the file holds float32 divisors, and the three candidates differ by far more.
            if ours.shape == found.shape and np.allclose(ours, found, rtol=1e-3):
                return scaling

        raise UserError(f"{file} has RoPE factors other than Llama 3's, which are not read; give another conversion.")

    named = fields.get(f"{kind}.rope.scaling.type", "none")
    if named == "none":
        return None
    if named not in ("linear", "yarn"):
        raise UserError(f"{file} asks for RoPE scaling {named!r}; none, linear and yarn are read from GGUF files.")

    # Without its own field, the context length is that before scaling.
    original = fields.get(f"{kind}.rope.scaling.original_context_length", config["max_position_embeddings"])
    if (factor := fields.get(f"{kind}.rope.scaling.factor")) is None:
        raise UserError(
            f"{file} asks for RoPE scaling {named!r} and has no metadata {kind}.rope.scaling.factor; copy it again."
        )
    return {"rope_type": named, "factor": float(factor), "original_max_position_embeddings": int(original)}


def _write_weights(folder: Path, config: Mapping[str, Any], file: Path, tensors: Mapping[str, Any]) -> None:
    """model.safetensors, or shards of about `SHARD_BYTES` with their index: no more is in memory at once."""
    # numpy has no bfloat16; its float32 is not in ml_dtypes.
    dtype = np.dtype(getattr(ml_dtypes, config["dtype"], config["dtype"]))
    shards: list[dict[str, np.ndarray]] = [{}]
    files: dict[str, str] = {}
    size = total = 0

    def close() -> None:
        """Writes the last shard and frees its arrays."""
        name = f"model-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shards[-1])
        files.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    for name, array in _hf_tensors(file, config, tensors):
        # Before adding, so that a shard exceeds the limit by one oversize tensor only.
        if size and size + array.size * dtype.itemsize > SHARD_BYTES:
            close()
            shards.append({})
            size = 0
        shards[-1][name] = np.ascontiguousarray(array).astype(dtype)
        size += shards[-1][name].nbytes
        total += shards[-1][name].nbytes

    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0])
        return

    # The unfinished shard is the last; one shard alone is written under the plain name, without an index.
    close()
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def _hf_tensors(file: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face's name, float32 array) of each tensor; UserError for one that the target has no parameter for."""
    for name, tensor in tensors.items():
        # Written to config.json by `_rope_scaling`.
        if name == "rope_freqs.weight":
            continue
        if name in _OUTER:
            yield _OUTER[name], _decoded(tensor)
            continue

        # "blk.3.attn_q.weight" has four parts; a fifth, or another ending, is a tensor that no model here has.
        parts = name.split(".")
        known = len(parts) == 4 and parts[0] == "blk" and parts[3] == "weight"
        if known and parts[2] in _LAYER:
            array = _decoded(tensor)
            # llama.cpp interleaves Q and K for architecture llama only; the Qwen files keep halves.
            if config["model_type"] == "llama" and parts[2] in ("attn_q", "attn_k"):
                array = _halves(array, config["head_dim"])
            yield f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight", array
        elif known and parts[2] in _EXPERTS:
            # [E, F, D] or [E, D, F], one expert for each index of the first axis.
            for expert, array in enumerate(_decoded(tensor)):
                yield f"model.layers.{parts[1]}.mlp.experts.{expert}.{_EXPERTS[parts[2]]}.weight", array
        else:
            raise UserError(
                f"{file} has a tensor {name}, for which {config['model_type']} targets here have no place; give a file "
                "of the model as published."
            )


def _halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows [Q*H, D] with rotary pairs (i, i + H/2), from the interleaved (2i, 2i + 1) of llama.cpp's Llama files."""
    out, into = weight.shape
    pairs = weight.reshape(out // head_dim, head_dim // 2, 2, into)  # [Q, H/2, 2, D]

    return pairs.swapaxes(1, 2).reshape(out, into)


def _decoded(tensor: Any) -> np.ndarray:
    """float32, output-first as in Hugging Face; GGUF lists the fastest axis first."""
    from gguf.quants import dequantize

    values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    return values.reshape(tuple(int(n) for n in reversed(tensor.shape)))
