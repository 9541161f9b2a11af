"""Weights that are not the model's: quantised, left over, whole numbers, not finite, outside the folder, rotated
otherwise. Each is refused by name, for targets and for drafters in every layout; harmless leftovers load."""

import json
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.layouts import LAYOUTS
from dspark_jax.checkpoints.tensors import all_finite
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target
from tests.drafters_tiny import write_pair
from tests.families_tiny import GEMMA, write_family
from tests.tiny import write_tiny_target

Spoil = Callable[[Path], None]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("target"), num_hidden_layers=3)


def fields(**changes: Any) -> Spoil:
    """Sets fields of config.json."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Spoil:
    """Changes the tensors of model.safetensors."""

    def spoil(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors")

    return spoil


def to_int8(stored: dict[str, np.ndarray]) -> None:
    scale = np.abs(stored[Q_PROJ]).max() / 127
    stored[Q_PROJ] = np.round(stored[Q_PROJ] / scale).astype(np.int8)


def to_fp8(folder: Path) -> None:
    """F8_E4M3 in place of the bytes of q_proj: numpy's writer has no such type, so the file is written by hand."""
    stored = load_file(folder / "model.safetensors")
    header, data = {}, b""
    for name, array in stored.items():
        raw = (array.astype(ml_dtypes.float8_e4m3fn) if name == Q_PROJ else array).tobytes()
        kind = "F8_E4M3" if name == Q_PROJ else "F32"
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def poison(value: float) -> Spoil:
    def change(stored: dict[str, np.ndarray]) -> None:
        stored["model.layers.2.mlp.down_proj.weight"][3, 5] = value

    return tensors(change)


def indexed(name: str, links: Path | None = None) -> Spoil:
    """Puts the weights behind an index that names the file `name`, a link to `links` where that is given."""

    def spoil(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        weight_map = dict.fromkeys(stored, name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        outside = folder.parent / "outside.safetensors"
        shutil.move(folder / "model.safetensors", outside)
        if links is not None:
            (folder / name).symlink_to(outside)

    return spoil


def changed_row(embedding: np.ndarray) -> np.ndarray:
    """As after a fine-tuning that added one token to an untied head."""
    head = embedding.copy()
    head[-2] += 1
    return head


def two_sets(folder: Path) -> None:
    indexed("other.safetensors")(folder)
    shutil.copy(folder.parent / "outside.safetensors", folder / "other.safetensors")
    shutil.copy(folder.parent / "outside.safetensors", folder / "model.safetensors")


REFUSED: dict[str, tuple[Spoil, str]] = {
    "gptq": (fields(quantization_config={"quant_method": "gptq", "bits": 4}), r'a quantization_config \("gptq"\)'),
    "mlx": (fields(quantization={"group_size": 64, "bits": 4}), "a quantization"),
    "odd quantisation": (fields(quantization_config=[8]), "a quantization_config"),
    "int8": (tensors(to_int8), rf"Tensor {Q_PROJ} in .* is of type I8; weights are read as BF16, F16, F32, F64"),
    "fp8": (to_fp8, rf"Tensor {Q_PROJ} in .* is of type F8_E4M3"),
    "scales": (
        tensors(lambda t: t.update({Q_PROJ + "_scale": np.ones(1, np.float32)})),
        rf"holds the tensor {Q_PROJ}_scale that its config\.json does not call for",
    ),
    "depth": (
        fields(num_hidden_layers=1),
        r"holds the tensor model\.layers\.1\.input_layernorm\.weight and 21 more that its config\.json does not call",
    ),
    "another head": (
        tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        r"a lm_head\.weight that differs from model\.embed_tokens\.weight, and its config\.json ties",
    ),
    "another head in one row": (
        tensors(lambda t: t.update({"lm_head.weight": changed_row(t["model.embed_tokens.weight"])})),
        r"a lm_head\.weight that differs from model\.embed_tokens\.weight",
    ),
    "two sets": (
        two_sets,
        "holds model.safetensors, and an model.safetensors.index.json .* two sets of weights",
    ),
    "adapter": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}') and None,
        r"holds an adapter \(adapter_config.json\), which is not read; merge it into the weights",
    ),
    "NaN": (poison(np.nan), r"model\.layers\.2\.mlp\.down_proj\.weight in .* holds values that are not finite"),
    "infinity": (poison(-np.inf), "holds values that are not finite"),
    "absolute": (indexed("/etc/passwd"), "names the file '/etc/passwd', which lies outside the folder"),
    "upwards": (indexed("../outside.safetensors"), "which lies outside the folder"),
    "link": (indexed("inside.safetensors", Path("x")), "'inside.safetensors', which lies outside the folder"),
    "interleaved": (fields(rope_interleave=True), "has rope_interleave = True, a layout of the rotary embedding"),
    "not neox": (fields(is_neox_style=False), "has is_neox_style = False"),
    "nested": (fields(rope_parameters={"rope_theta": 1e4, "rope_interleave": True}), "has rope_interleave = True"),
    "partial": (fields(partial_rotary_factor=0.5), r"RoPE 'default' on a part \(0\.5\) of each head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_foreign_weights_are_refused_by_name(target: Path, tmp_path: Path, case: str) -> None:
    spoil, message = REFUSED[case]
    mine = Path(shutil.copytree(target, tmp_path / "target"))
    spoil(mine)
    with pytest.raises(UserError, match=message) as refused:
        load_target(mine, tokenizer=False)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


HARMLESS: dict[str, Spoil] = {
    "buffers": tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})),
    "tied head": tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]})),
    "no quantisation": fields(quantization_config=None, rope_interleave=False, is_neox_style=True),
    "index": lambda folder: (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")})
    ) and None,
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_leftovers_load(target: Path, tmp_path: Path, case: str) -> None:
    mine = Path(shutil.copytree(target, tmp_path / "target"))
    HARMLESS[case](mine)
    found, whole = load_target(mine, tokenizer=False), load_target(target, tokenizer=False)
    np.testing.assert_array_equal(found.params["embed_weight_vd"], whole.params["embed_weight_vd"])


def test_the_hubs_links_are_inside(target: Path, tmp_path: Path) -> None:
    """Snapshots of the hub's cache are links to blobs."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    shutil.copytree(target, snapshot)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    shutil.move(snapshot / "model.safetensors", blobs / "abc")
    (snapshot / "part.safetensors").symlink_to(Path("..") / ".." / "blobs" / "abc")
    weight_map = dict.fromkeys(load_file(blobs / "abc"), "part.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    load_target(snapshot, tokenizer=False)


def test_multimodal_folders_keep_their_other_parts(tmp_path: Path) -> None:
    write_family(tmp_path, "gemma")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma4", "text_config": GEMMA}))

    def renamed(more: dict[str, np.ndarray]) -> Spoil:
        def change(stored: dict[str, np.ndarray]) -> None:
            for name in [name for name in stored if name.startswith("model.") and "language_model" not in name]:
                stored[name.replace("model.", "model.language_model.", 1)] = stored.pop(name)
            stored |= more

        return tensors(change)

    renamed({"model.vision_tower.encoder.weight": np.ones((2, 2), np.float32)})(tmp_path)
    load_target(tmp_path)
    tensors(lambda t: t.update({"model.language_model.layers.9.x.weight": np.ones(2, np.float32)}))(tmp_path)
    with pytest.raises(UserError, match=r"holds the tensor model\.language_model\.layers\.9\.x\.weight"):
        load_target(tmp_path)


def test_only_ids_of_the_tokenizer_are_known(tmp_path: Path) -> None:
    padded = write_tiny_target(tmp_path / "padded", vocab_size=400)
    with pytest.warns(UserWarning, match=r"a vocabulary of 400 ids and a tokenizer of (\d+): ids from \1 on"):
        found = load_target(padded)
    assert found.known_tokens == len(found.tokenizer) < 400
    config = EngineConfig(1, 32, "fixed", buckets=(1,))
    assert Engine(found, None, config).loop.words == found.known_tokens, "decoding masks what the warning names"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = load_target(write_tiny_target(tmp_path / "whole", vocab_size=found.known_tokens))
        assert whole.known_tokens == found.known_tokens
        assert load_target(padded, tokenizer=False).known_tokens is None
    with pytest.warns(UserWarning, match="text that needs the others cannot be decoded"):
        load_target(write_tiny_target(tmp_path / "short", vocab_size=found.known_tokens - 1))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_place_is_checked_for_finiteness(dtype: Any) -> None:
    array = np.full(1000, np.finfo(np.float16).max / 2, np.float32).astype(dtype)
    array[500] = -0.0
    assert all_finite(array, chunk=64)
    for place in (0, 63, 64, 999):
        for value in (np.nan, np.inf, -np.inf):
            spoiled = array.copy()
            spoiled[place] = value
            assert not all_finite(spoiled, chunk=64)


# Drafters in every layout


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, Drafter]:
    return write_pair(tmp_path_factory.mktemp("pair"))


DRAFTERS: dict[str, tuple[Spoil, str]] = {
    "quantised": (fields(quantization_config={"quant_method": "fp8"}), r'a quantization_config \("fp8"\)'),
    "interleaved": (fields(rope_interleave=True), "has rope_interleave = True"),
    "not neox": (fields(is_neox_style=False), "has is_neox_style = False"),
    "nested": (fields(eagle_config={"rope_interleave": True}), "rope_interleave|eagle_aux_hidden_state_layer_ids"),
    "leftover": (tensors(lambda t: t.update(other=np.ones(1, np.float32))), "holds the tensor other that its config"),
    "whole numbers": (
        tensors(lambda t: t.update({"fc.weight": t["fc.weight"].astype(np.int8)})),
        r"Tensor fc\.weight in .* is of type I8",
    ),
    "NaN": (tensors(lambda t: t["norm.weight"].__setitem__(0, np.nan)), "norm.weight in .* not finite"),
    "missing": (tensors(lambda t: t.pop("fc.weight")), r"has no tensor fc\.weight"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", DRAFTERS)
def test_foreign_drafters_are_refused_by_name(
    pair: tuple[Target, Drafter], tmp_path: Path, layout: str, case: str
) -> None:
    target, drafter = pair
    save_drafter(tmp_path / "d", drafter, target, layout=layout, dtype="float32")
    load_drafter(tmp_path / "d", target)
    spoil, message = DRAFTERS[case]
    spoil(tmp_path / "d")
    with pytest.raises(UserError, match=message):
        load_drafter(tmp_path / "d", target)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_drafters_depth_is_its_files(pair: tuple[Target, Drafter], tmp_path: Path, layout: str) -> None:
    target, drafter = pair
    save_drafter(tmp_path / "d", drafter, target, layout=layout)
    path = tmp_path / "d" / "config.json"
    content = json.loads(path.read_text())
    within = content["transformer_layer_config"] if layout == "speculators" else content
    assert within["num_hidden_layers"] == 2
    within["num_hidden_layers"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"holds the tensor layers\.1\..* that its config\.json does not call for"):
        load_drafter(tmp_path / "d", target)
