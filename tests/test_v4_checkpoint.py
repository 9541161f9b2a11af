"""DeepSeek-V4 folders: the published layout counted, read, written back; transformers' names; what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dspark_jax.checkpoints.deepseek_v4 import transformers_name
from dspark_jax.checkpoints.deepseek_v4_published import published_tensors, save_v4_target, stored_form
from dspark_jax.checkpoints.drafters import drafter_hf_config, drafter_layout, load_drafter, save_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.low_bit import (
    RawFile,
    ScaledTensor,
    decode_fp4,
    decode_fp8,
    encode_fp4,
    encode_fp8,
    write_raw,
)
from dspark_jax.drafters.deepseek_v4.config import native_config
from dspark_jax.drafters.registry import read_config
from dspark_jax.errors import UserError
from dspark_jax.integrity import examine
from dspark_jax.planning.published_targets import PUBLISHED
from dspark_jax.targets.registry import read_target_config
from dspark_jax.targets.target import Target
from tests.v4_tiny import v4_hf_config, v4_pair

CASE = Path(__file__).parent / "data" / "deepseek_v4_checkpoint" / "target"


@pytest.mark.parametrize(
    ("name", "drafter", "count", "size"),
    [
        ("Flash-DSpark", "dspark", 72_317, 166_878_536_440),
        ("Pro-DSpark", "dspark", 149_782, 892_727_580_904),
        ("Pro", "mtp", 145_116, None),
    ],
)
def test_published_repositories_from_shapes_alone(name: str, drafter: str, count: int, size: int | None) -> None:
    """Tensors and bytes as the publisher's indices state them."""
    tensors = published_tensors(PUBLISHED[f"deepseek-ai/DeepSeek-V4-{name}"], drafter)
    assert len(tensors) == count
    assert size is None or sum(tensor.nbytes for tensor in tensors.values()) == size


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    files = [RawFile(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: (entry.dtype, entry.shape) for file in files for name, entry in file.entries.items()}


def same(first: dict, second: dict) -> None:
    flat, other = flatten_dict(first), flatten_dict(second)
    assert flat.keys() == other.keys()
    for path, leaf in flat.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=str(path))


def test_a_published_folder_comes_back_in_the_same_form(tmp_path: Path) -> None:
    """Target and drafter, written and read again: equal values, and the tensors that shapes alone foretell."""
    target = wide_target()
    drafter = load_drafter(CASE, target, dtype="float32")
    save_v4_target(tmp_path / "target", target.hf_config, target.params, "published")
    save_drafter(tmp_path / "drafter", drafter, target)
    again = load_target(tmp_path / "target", dtype="float32", tokenizer=False, weights="widened")
    same(again.params, target.params)
    reloaded = load_drafter(tmp_path / "drafter", again, dtype="float32")
    same(reloaded.params, drafter.params)
    assert reloaded.hf_config == drafter.hf_config
    foretold = {name: tuple(tensor) for name, tensor in published_tensors(target.hf_config, "dspark").items()}
    assert stored(tmp_path / "target") | stored(tmp_path / "drafter") == foretold == stored(CASE)
    written = RawFile(tmp_path / "target" / "model.safetensors").get_slice("layers.0.ffn.gate.tid2eid").array
    assert written.dtype == np.int64


@pytest.mark.parametrize("kind", ["dspark", "mtp"])
def test_a_drafter_in_float_comes_back(kind: str, tmp_path: Path) -> None:
    target, drafter = v4_pair(kind)
    save_drafter(tmp_path, drafter, target, dtype="float32")
    reloaded = load_drafter(tmp_path, target)
    same(reloaded.params, drafter.params)
    assert reloaded.config == drafter.config


def test_mtp_comes_back_in_the_published_form(tmp_path: Path) -> None:
    """The preview's block: the tensors that shapes alone foretell; what was read is written without loss."""
    target, drafter = v4_pair("mtp", hidden_size=64, moe_intermediate_size=64)
    quantised = {"quantization_config": {"quant_method": "fp8"}, "expert_dtype": "fp4"}
    hf_config = {**target.hf_config, **quantised}
    save_v4_target(tmp_path / "target", hf_config, target.params, "published")
    save_drafter(tmp_path / "drafter", replace(drafter, hf_config={**drafter.hf_config, **quantised}), target)
    foretold = {name: tuple(tensor) for name, tensor in published_tensors(hf_config, "mtp").items()}
    assert stored(tmp_path / "target") | stored(tmp_path / "drafter") == foretold

    held = load_target(tmp_path / "target", tokenizer=False)
    read = load_drafter(tmp_path / "drafter", held)
    assert {"float8_e4m3fn", "int8"} <= {leaf.dtype.name for leaf in jax.tree.leaves(read.params)}
    save_drafter(tmp_path / "again", read, held)
    same(load_drafter(tmp_path / "again", held).params, read.params)


def test_transformers_names_hold_the_same_weights(tmp_path: Path) -> None:
    """A folder with stacked experts and transformers' names, made from the published one."""
    target = wide_target()
    save_v4_target(tmp_path, target.hf_config, target.params, "float32")
    file = RawFile(tmp_path / "model.safetensors")
    tensors = {name: np.array(file.get_slice(name).array) for name in file.keys()}  # noqa: SIM118 - no dict
    renamed = {transformers_name(name): x for name, x in tensors.items() if ".experts." not in name}
    for layer in range(target.config.num_layers):
        for stack, parts in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
            prefix = f"layers.{layer}.ffn.experts"
            made = [np.concatenate([tensors[f"{prefix}.{e}.{w}.weight"] for w in parts]) for e in range(3)]
            renamed[f"model.layers.{layer}.mlp.experts.{stack}"] = np.stack(made)
    write_raw(tmp_path / "model.safetensors", renamed)
    same(load_target(tmp_path, dtype="float32", tokenizer=False).params, target.params)


def test_slices_of_quantised_tensors_are_slices_of_their_values() -> None:
    """Blocks and groups that a device's part begins or ends inside."""
    values = np.random.default_rng(0).normal(size=(200, 320)).astype(np.float32)
    for codes, scales in (encode_fp8(values), encode_fp4(values)):
        whole = (decode_fp4 if codes.dtype == np.int8 else decode_fp8)(codes, scales)
        tensor = ScaledTensor(codes, scales)
        assert tensor.get_shape() == [200, 320]
        for index in ((slice(130, 190), slice(5, 301)), (slice(0, 7), slice(128, 131)), (slice(3, 4), slice(None))):
            np.testing.assert_array_equal(tensor[index], whole[index])
        again = (encode_fp4 if codes.dtype == np.int8 else encode_fp8)(whole)
        np.testing.assert_array_equal((decode_fp4 if codes.dtype == np.int8 else decode_fp8)(*again), whole)
        assert np.abs(whole - values).max() < 1.0


def test_parts_of_a_sharded_read_are_parts_of_the_whole() -> None:
    """Each device's part alone, by the layout of its parameter."""
    from dspark_jax.checkpoints.deepseek_v4 import V4Folder, v4_tensor_map
    from dspark_jax.checkpoints.tensors import _read_part

    folder, target = V4Folder(CASE), wide_target()
    flat = flatten_dict(target.params)
    for path, source in v4_tensor_map(flat).items():
        whole = np.asarray(flat[path])
        index = tuple(slice(n // 2, n) for n in whole.shape)
        slices = [folder.stored(name) for name, _ in source.parts(whole.shape)]
        part = _read_part(slices, source, whole.shape, whole.dtype, "here", index)
        np.testing.assert_array_equal(part, whole[index], err_msg=str(path))


def test_what_stays_float32_and_whole_numbers() -> None:
    target = load_target(CASE, dtype="bfloat16", tokenizer=False, weights="widened")
    kinds = {path[-1]: leaf.dtype.name for path, leaf in flatten_dict(target.params).items()}
    assert {kinds[name] for name in ("fn", "base", "scale", "ape", "sink", "bias")} == {"float32"}
    assert kinds["table_vk"] == "int32" and kinds["gate_weight_edf"] == "bfloat16"
    assert stored_form("layers.3.attn.compressor.wkv.weight") == "BF16"
    assert jax.tree.leaves(target.params)


# What is refused


def copied(tmp_path: Path, **fields: Any) -> Path:
    folder = Path(shutil.copytree(CASE, tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@cache
def wide_target() -> Target:
    return load_target(CASE, dtype="float32", tokenizer=False, weights="widened")


def rewritten(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    """The folder with its tensors in one file and without an index, after a change of them."""
    shards = [RawFile(path) for path in sorted(folder.glob("*.safetensors"))]
    tensors = {name: np.array(file.get_slice(name).array) for file in shards for name in file.entries}
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    change(tensors)
    write_raw(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("name", ["layers.0.attn.wkv", "layers.1.ffn.experts.2.w1", "mtp.0.main_proj"])
def test_a_missing_scale_is_named(name: str, tmp_path: Path) -> None:
    folder = rewritten(copied(tmp_path), lambda tensors: tensors.pop(f"{name}.scale"))
    with pytest.raises(UserError, match=rf"{name}\.weight without its {name}\.scale"):
        load_drafter(folder, wide_target()) if name.startswith("mtp") else load_target(folder, tokenizer=False)


@pytest.mark.parametrize("nested", [False, True])
def test_a_later_version_is_named_by_every_reader(nested: bool, tmp_path: Path) -> None:
    """V4.1: a quantised folder with half of V4's fields, in text_config where it sees images too."""
    folder = copied(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "deepseek_v41"}
    if nested:
        config = {"model_type": "deepseek_v41", "text_config": config | {"model_type": "deepseek_v41_text"}} | {
            "quantization_config": config["quantization_config"]
        }
    (folder / "config.json").write_text(json.dumps(config))

    readers: list[Callable[[], Any]] = [
        lambda: load_target(folder, tokenizer=False),
        lambda: load_drafter(folder, wide_target()),
        lambda: drafter_layout(folder),
        lambda: drafter_hf_config(folder, wide_target().config),
    ]
    for read in readers:
        with pytest.raises(UserError, match=r"model_type 'deepseek_v41', a later .* than DeepSeek-V4; .* Give a V4"):
            read()
    assert "a later architecture than DeepSeek-V4" in examine(folder)[0].fault


def test_a_drafter_is_examined_with_its_target_and_alone(tmp_path: Path) -> None:
    """A folder is whole only with its drafter; a drafter's own folder has the target's config.json."""
    faults = {
        "dspark_markov_rank": (8, "confidence_head"),
        "compress_ratios": ([4, 128, 0, 0], "mtp.2.attn.attn_sink and 53 more"),
    }
    for name, (value, fault) in faults.items():
        (whole,) = examine(copied(tmp_path / name, **{name: value}))
        assert whole.kind == "target" and fault in whole.fault

    folder = rewritten(copied(tmp_path), lambda tensors: tensors.pop("mtp.1.ffn.experts.1.w2.scale"))
    assert "without its mtp.1.ffn.experts.1.w2.scale" in examine(folder)[0].fault
    folder = rewritten(copied(tmp_path / "unmarked"), lambda tensors: tensors.pop("mtp.0.main_proj.weight"))
    assert "holds no drafter" in examine(folder)[0].fault

    drafter = load_drafter(CASE, wide_target())
    save_drafter(tmp_path / "alone", drafter, wide_target())
    (found,) = examine(tmp_path / "alone")
    assert (found.kind, found.facts["kind"], found.fault) == ("drafter", "dspark", "")
    assert drafter_hf_config(tmp_path / "alone", wide_target().config) == drafter.hf_config

    with pytest.raises(UserError, match="no layout but the published one"):
        drafter_layout(CASE)


def test_tensors_of_another_architecture_are_named(tmp_path: Path) -> None:
    """A later version that kept the model_type: its streams have other names."""

    def renamed(tensors: dict[str, np.ndarray]) -> None:
        tensors["layers.0.mhc_attn_fn"] = tensors.pop("layers.0.hc_attn_fn")

    folder = rewritten(copied(tmp_path), renamed)
    with pytest.raises(UserError, match=r"holds the tensor layers\.0\.mhc_attn_fn that its config\.json does not call"):
        load_target(folder, tokenizer=False)


def test_a_table_of_experts_that_there_are_not_is_refused(tmp_path: Path) -> None:
    def beyond(tensors: dict[str, np.ndarray]) -> None:
        tensors["layers.0.ffn.gate.tid2eid"][5, 1] = 3

    folder = rewritten(copied(tmp_path), beyond)
    with pytest.raises(UserError, match=r"tid2eid in .* names the experts 0 to 3; .* n_routed_experts 3\. Copy"):
        load_target(folder, tokenizer=False)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    for read in (lambda: load_target(folder, tokenizer=False), lambda: load_drafter(folder, wide_target())):
        with pytest.raises(UserError, match="model-00002-of-00003.safetensors is missing"):
            read()


def test_a_dspark_module_of_other_widths_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path, dspark_markov_rank=8)
    target = wide_target()
    with pytest.raises(UserError, match=r"confidence_head.* has shape \[1, 144\]; .* \[1, 136\]"):
        load_drafter(folder, target)


def test_a_folder_without_a_drafter_is_told(tmp_path: Path) -> None:
    target = wide_target()
    save_v4_target(tmp_path, target.hf_config, target.params, "published")
    with pytest.raises(UserError, match="holds no drafter"):
        load_drafter(tmp_path, target)


TYPES = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"compress_ratios": [0, 4, 16, 0, 0], "layer_types": TYPES, "compress_rates": {TYPES[2]: 8}}, "contradicts"),
        ({"compress_ratios": [0, 4]}, "one a layer"),
        ({"compress_ratios": [0, 4, 8, 4]}, "one 0 for each mtp block"),
        ({"num_hash_layers": 2, "mlp_layer_types": ["hash_moe", "moe", "moe"]}, "contradicts itself: num_hash_layers"),
        ({"model_type": "deepseek_v4_1"}, "model_type 'deepseek_v4_1'"),
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ({"num_attention_heads": 3}, "o_groups"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "yarn or none"),
        ({"hc_mult": "four"}, "hc_mult"),
        ({"qk_rope_head_dim": 10}, "qk_rope_head_dim 10; expected an even number of at most 8"),
        ({"qk_rope_head_dim": 3}, "an even number of at most 8"),
        ({"quantised_caches": True, "head_dim": 100}, "96 channels of a key unrotated and an index_head_dim of 8"),
        ({"quantised_caches": True, "index_head_dim": 12}, "and a power of two"),
    ],
)  # fmt: skip
def test_a_wrong_config_gets_a_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_target_config(v4_hf_config(**fields))


def test_types_without_rates_leave_the_ratio_to_the_published_field() -> None:
    config = read_target_config(v4_hf_config(layer_types=TYPES))
    assert [layer.ratio for layer in config.layers] == [0, 4, 8]


def test_taps_of_dspark_are_of_any_order_and_different() -> None:
    native = native_config(v4_hf_config(dspark_target_layer_ids=[2, 0]), "dspark")
    assert read_config(native).target_layer_ids == (2, 0)
    for ids in ([1, 1], [1, 3], [-2], []):
        with pytest.raises(UserError, match="target_layer_ids"):
            read_config(native | {"dspark_target_layer_ids": ids})
    with pytest.raises(UserError, match="dspark_block_size"):
        read_config(native | {"dspark_block_size": "five"})
