"""V4 folders in the published layout and under transformers' names: which tensor holds which parameter.

Parameters map to the published names, and a folder with transformers' names is read through a translation to them.
Quantised tensors read as their float32 values.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.checkpoints.low_bit import CodeTensor, RawFile, RawTensor, ScaledTensor
from dspark_jax.checkpoints.tensor_map import Layout, ParamPath, Stored
from dspark_jax.checkpoints.tensors import TensorFolder
from dspark_jax.errors import UserError
from dspark_jax.targets.low_bit import BLOCK, CODES, GROUP, SCALES

_QUANTISED = ("F8_E4M3", "I8")
_EXPERT = re.compile(r"layers\.(?P<layer>\d+)\.ffn\.experts\.(?P<expert>\d+)\.(?P<which>w[123])\.weight")
_LINEAR, _HEADS = Layout.LINEAR, Layout.HEADS_OUT

_COMPRESSOR: dict[ParamPath, Stored] = {
    ("kv_weight_dc",): Stored("wkv.weight", _LINEAR),
    ("gate_weight_dc",): Stored("wgate.weight", _LINEAR),
    ("ape",): Stored("ape"),
    ("norm", "weight"): Stored("norm.weight"),
}

# Path below a block -> its tensor below the block's prefix: layers, DSpark stages and MTP blocks alike.
BLOCK_TENSORS: dict[ParamPath, Stored] = {
    **{
        (f"{ours}_site", leaf): Stored(f"hc_{theirs}_{leaf}")
        for ours, theirs in (("attention", "attn"), ("mlp", "ffn"))
        for leaf in ("fn", "base", "scale")
    },
    ("attention_norm", "weight"): Stored("attn_norm.weight"),
    ("mlp_norm", "weight"): Stored("ffn_norm.weight"),
    ("attention", "qa_weight_dr"): Stored("attn.wq_a.weight", _LINEAR),
    ("attention", "qb_weight_rqh"): Stored("attn.wq_b.weight", _HEADS),
    ("attention", "kv_weight_dh"): Stored("attn.wkv.weight", _LINEAR),
    ("attention", "oa_weight_gio"): Stored("attn.wo_a.weight", Layout.GROUPS_OUT),
    ("attention", "ob_weight_god"): Stored("attn.wo_b.weight", Layout.HEADS_IN),
    ("attention", "q_norm", "weight"): Stored("attn.q_norm.weight"),
    ("attention", "kv_norm", "weight"): Stored("attn.kv_norm.weight"),
    ("attention", "sink"): Stored("attn.attn_sink"),
    ("attention", "indexer", "q_weight_rqh"): Stored("attn.indexer.wq_b.weight", _HEADS),
    ("attention", "indexer", "weights_proj_dq"): Stored("attn.indexer.weights_proj.weight", _LINEAR),
    **{
        ("attention", *ours, "compressor", *below): Stored(f"attn.{theirs}compressor.{stored.name}", stored.layout)
        for ours, theirs in (((), ""), (("indexer",), "indexer."))
        for below, stored in _COMPRESSOR.items()
    },
    ("mlp", "router", "weight_de"): Stored("ffn.gate.weight", _LINEAR),
    ("mlp", "router", "bias"): Stored("ffn.gate.bias"),
    ("mlp", "router", "table_vk"): Stored("ffn.gate.tid2eid"),
    ("mlp", "gate_weight_edf"): Stored("ffn.experts.{}.w1.weight", _LINEAR),
    ("mlp", "up_weight_edf"): Stored("ffn.experts.{}.w3.weight", _LINEAR),
    ("mlp", "down_weight_efd"): Stored("ffn.experts.{}.w2.weight", _LINEAR),
    ("mlp", "shared", "gate_weight_df"): Stored("ffn.shared_experts.w1.weight", _LINEAR),
    ("mlp", "shared", "up_weight_df"): Stored("ffn.shared_experts.w3.weight", _LINEAR),
    ("mlp", "shared", "down_weight_fd"): Stored("ffn.shared_experts.w2.weight", _LINEAR),
}

_OUTER: dict[ParamPath, Stored] = {
    ("embed_weight_vd",): Stored("embed.weight"),
    ("head_weight_vd",): Stored("head.weight"),
    ("final_norm", "weight"): Stored("norm.weight"),
    **{("collapse", leaf): Stored(f"hc_head_{leaf}") for leaf in ("fn", "base", "scale")},
}


def v4_tensor_map(paths: Iterable[ParamPath]) -> dict[ParamPath, Stored]:
    """Parameter path -> published tensor, for the target's parameters at `paths`."""
    return {
        path: block_tensor(path[2:], f"layers.{path[1]}") if path[0] == "layers" else _OUTER[path] for path in paths
    }


def block_tensor(below: ParamPath, prefix: str) -> Stored:
    """The tensor of the parameter at path `below` a block stored under `prefix`; codes and scales are tensors of their
    own, kept in the layout of the file but for experts and a layer's last matrix, which are input-first."""
    if below[-1] not in (CODES, SCALES):
        stored = BLOCK_TENSORS[below]
        return Stored(f"{prefix}.{stored.name}", stored.layout)

    name = f"{prefix}.{BLOCK_TENSORS[below[:-1]].name}"
    turned = "{}" in name or below[-2:] == ("ob_weight_god", CODES)
    layout = _LINEAR if turned else Layout.SAME
    return Stored(name if below[-1] == CODES else scale_name(name), layout, codes=True)


class V4Folder(TensorFolder):
    """Tensors by their published names, whichever names the folder has; slices of fp8 and fp4 tensors are values."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        # One tensor tells the two namings apart: every target has an embedding.
        self.renamed = "model.embed_tokens.weight" in self._file_of

    def _handle(self, path: Path) -> Any:
        # Not safetensors' own reader, which has no numpy type for fp8 and fp4 codes.
        if path not in self._open:
            self._open[path] = RawFile(path)
        return self._open[path]

    def stored(self, name: str) -> Any:
        """The tensor of a published name, sliceable. UserError where its scales are missing or of another shape."""
        if self.renamed:
            return self._transformers(name)

        tensor = self.raw(name)
        if self._entries[name].dtype not in _QUANTISED:
            return tensor

        # Codes without their scales would read as weights of the wrong size, all of them finite.
        scale = scale_name(name)
        if scale not in self.names:
            raise UserError(
                f"{self.folder} has the quantised tensor {name} without its {scale}; copy the folder again."
            )

        scales, (rows, columns) = self.raw(scale).array, tensor.array.shape

        # fp4 packs two codes in a byte: GROUP values take GROUP / 2 columns. fp8 has a scale for each BLOCK² tile.
        fp4 = self._entries[name].dtype == "I8"
        expected = [rows, columns // (GROUP // 2)] if fp4 else [-(-rows // BLOCK), -(-columns // BLOCK)]

        if list(scales.shape) != expected:
            raise UserError(
                f"Tensor {scale} in {self.folder} has shape {list(scales.shape)}; {name} of shape "
                f"{[rows, columns]} calls for {expected}. Copy the folder again."
            )

        return ScaledTensor(tensor.array, scales)

    def codes(self, name: str) -> CodeTensor:
        """The bytes of a quantised tensor or of its scales; UserError where the tensor is not quantised."""
        where = f"{name} in {self.folder}"
        dtype = self._entries[name].dtype if name in self.names else "missing"
        if self.renamed or dtype not in (*_QUANTISED, "F8_E8M0"):
            # Missing scales are named as `stored` names them, and so is a tensor that is missing altogether.
            self.stored(name if name in self.names else name.removesuffix("scale") + "weight")
            raise UserError(
                f"Tensor {where} is not quantised, though config.json says so; load the target with "
                "weights='widened', or take quantization_config out of config.json."
            )
        return CodeTensor(self.raw(name).array, where)

    def stored_name(self, name: str) -> str:
        """The folder's own name of the tensor that holds a published one."""
        if not self.renamed:
            return name

        # Of each layer's experts transformers keeps two stacked tensors: gate and up in one, down in the other.
        found = _EXPERT.fullmatch(name)
        if found is None:
            return transformers_name(name)

        stack = "down_proj" if found["which"] == "w2" else "gate_up_proj"
        return f"model.layers.{found['layer']}.mlp.experts.{stack}"

    def _transformers(self, name: str) -> Any:
        """A published tensor out of transformers' ones, which stack the experts [E, ...] and put gate above up."""
        stored, found = self.raw(self.stored_name(name)), _EXPERT.fullmatch(name)
        if found is None:
            return stored

        array, which = stored.array[int(found["expert"])], found["which"]

        # w1 is the gate, w3 the up projection: the first and second half of the rows.
        half = len(array) // 2
        return RawTensor(array if which == "w2" else array[:half] if which == "w1" else array[half:])


def check_tables(folder: V4Folder, names: Iterable[str], experts: int) -> None:
    """UserError where a table of token ids among `names` names an expert that there is not: compiled gathers would take
    another one's score without a word."""
    for name in sorted(names):
        # One that is missing is named with the others that are read later.
        if name.endswith(".tid2eid") and folder.stored_name(name) in folder.names:
            table = np.asarray(folder.stored(name)[:])
            if table.size and not 0 <= table.min() <= table.max() < experts:
                raise UserError(
                    f"Tensor {name} in {folder.folder} names the experts {table.min()} to {table.max()}; config.json "
                    f"has n_routed_experts {experts}. Copy the file again."
                )


def scale_name(name: str) -> str:
    """The tensor of a quantised tensor's scales."""
    return name.removesuffix("weight") + "scale"


def v4_needed(folder: V4Folder, names: Iterable[str]) -> set[str]:
    """The folder's own names of the tensors that published ones are read from, scales included."""
    mine = {folder.stored_name(name) for name in names}
    return mine | {scale_name(name) for name in mine if scale_name(name) in folder.names}


_RENAMED = [
    (r"embed\.weight", "model.embed_tokens.weight"),
    (r"head\.weight", "lm_head.weight"),
    (r"norm\.weight", "model.norm.weight"),
    (r"hc_head_(\w+)", r"model.hc_head.hc_\1"),
    (r"layers\.(\d+)\.(.*)", r"model.layers.\1.\2"),
]
# In this order: a later pattern sees what earlier ones have made of a name.
_RENAMED_BELOW = [
    (r"\.hc_(attn|ffn)_(\w+)", r".\1_hc.\2"),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
    (r"\.attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attn\.indexer\.wq_b\.", ".self_attn.compressor.indexer.q_b_proj."),
    (r"\.attn\.attn_sink", ".self_attn.sinks"),
    (r"\.attn\.", ".self_attn."),
    (r"(compressor.*)\.wgate\.", r"\1.gate_proj."),
    (r"(compressor.*)\.norm\.", r"\1.kv_norm."),
    (r"(compressor.*)\.ape", r"\1.position_bias"),
    (r"self_attn\.q_norm\.", "self_attn.q_a_norm."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.w([qo])_([ab])\.", r".\1_\2_proj."),
    (r"\.ffn\.gate\.bias", ".mlp.gate.e_score_correction_bias"),
    (r"\.ffn\.", ".mlp."),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w2\.", ".down_proj."),
    (r"\.w3\.", ".up_proj."),
]


def transformers_name(name: str) -> str:
    """transformers' name of a published tensor other than an expert's."""
    # At most one of these matches, since each describes a whole name.
    for pattern, renamed in _RENAMED:
        if re.fullmatch(pattern, name):
            name = re.sub(pattern, renamed, name)
            break

    for pattern, renamed in _RENAMED_BELOW:
        name = re.sub(pattern, renamed, name)

    return name
