"""Targets from Hugging Face folders: layouts, placement, round trips, and a sentence for all that does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax import load_target
from dspark_jax.checkpoints.huggingface import save_target, stop_tokens
from dspark_jax.errors import UserError
from dspark_jax.targets.config import RopeConfig, config_sha256
from dspark_jax.targets.joined import apart
from dspark_jax.targets.layers import head_logits
from dspark_jax.targets.registry import read_target_config
from tests.decoding_tiny import next_logits, run_python
from tests.drafters_tiny import target_hf_config
from tests.tiny import write_tiny_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("target"), attention_bias=True, tie_word_embeddings=False)


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "target"))


def edit(folder: Path, name: str = "config.json", **fields: Any) -> None:
    """Sets fields of a JSON file; None removes one."""
    content = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def split_file(folder: Path, parts: int) -> None:
    """model.safetensors as `parts` indexed files."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {
        name: f"model-{i % parts + 1:05d}-of-{parts:05d}.safetensors" for i, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def same(a: dict, b: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_one_file_or_many(folder: Path, tmp_path: Path) -> None:
    whole, parted = load_target(folder), copy(folder, tmp_path)
    split_file(parted, 3)
    found = load_target(parted)
    same(found.params, whole.params)
    assert found.config == whole.config and found.config_sha256 == whole.config_sha256
    assert found.graphdef == whole.graphdef  # so that both share compiled programs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_for_bit(tmp_path: Path, dtype: str, tied: bool) -> None:
    first = write_tiny_target(tmp_path / "a", dtype=dtype, attention_bias=True, tie_word_embeddings=tied)
    target = load_target(first)
    assert {leaf.dtype for leaf in jax.tree.leaves(target.params)} == {jnp.dtype(dtype)}
    save_target(tmp_path / "b", target.hf_config, target.params, dtype)
    for name in ("config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    names = set(load_file(tmp_path / "b" / "model.safetensors"))
    assert ("lm_head.weight" in names) is not tied and "model.layers.1.self_attn.o_proj.bias" in names
    assert not list((tmp_path / "b").glob("*.tmp"))


def test_layouts_are_transposed_once(folder: Path) -> None:
    """Stored output-first, kept input-first."""
    stored, target = load_file(folder / "model.safetensors"), load_target(folder)
    params = apart(target.params, target.config)["layers"][0]
    attention, prefix = params["attention"], "model.layers.0.self_attn"
    np.testing.assert_array_equal(attention["q_weight_dp"], stored[f"{prefix}.q_proj.weight"].T)
    np.testing.assert_array_equal(attention["o_weight_pd"], stored[f"{prefix}.o_proj.weight"].T)
    np.testing.assert_array_equal(attention["k_bias_c"], stored[f"{prefix}.k_proj.bias"])
    np.testing.assert_array_equal(params["mlp"]["down_weight_fd"], stored["model.layers.0.mlp.down_proj.weight"].T)


def test_other_dtypes_are_asked_for(folder: Path) -> None:
    low, stored = load_target(folder, dtype="bfloat16"), load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(
        np.asarray(low.params["embed_weight_vd"]), stored["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    )
    with pytest.raises(UserError, match="Target dtype 'float16' is not supported; choose float32 or bfloat16"):
        load_target(folder, dtype="float16")


@pytest.mark.subprocesses
def test_hub_layout_is_found_offline(folder: Path, tmp_path: Path) -> None:
    """The local hub cache under HF_HOME, without network; in a process of its own, as HF_HOME is read at import."""
    repo, commit = tmp_path / "hub" / "models--tiny--Target", "0" * 40
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    program = (
        f"import os; os.environ.update(HF_HOME={str(tmp_path)!r}, HF_HUB_OFFLINE='1', JAX_PLATFORMS='cpu')\n"
        "import dspark_jax\n"
        "target = dspark_jax.load_target('tiny/Target')\n"
        "assert target.name == 'tiny/Target' and target.tokenizer is not None and target.stop_tokens == (2, 0)\n"
        "try:\n    dspark_jax.load_target('tiny/Other')\n"
        "except dspark_jax.UserError as error:\n    assert 'neither a folder here nor a model' in str(error), error\n"
        "else:\n    raise AssertionError\n"
    )
    run_python("-c", program)


def test_stop_tokens(folder: Path, tmp_path: Path) -> None:
    """generation_config's, one or several, before config.json's; none at all is allowed."""
    mine = copy(folder, tmp_path)
    assert load_target(mine, tokenizer=False).stop_tokens == (2, 0)
    edit(mine, "generation_config.json", eos_token_id=7)
    assert load_target(mine, tokenizer=False).stop_tokens == (7,)
    (mine / "generation_config.json").write_text("{}")
    edit(mine, eos_token_id=[5, 6])
    assert load_target(mine, tokenizer=False).stop_tokens == (5, 6)
    (mine / "generation_config.json").unlink()
    edit(mine, eos_token_id=9)
    assert load_target(mine, tokenizer=False).stop_tokens == (9,)
    edit(mine, eos_token_id=None)
    assert load_target(mine, tokenizer=False).stop_tokens == ()
    assert stop_tokens(mine, {"eos_token_id": None, "text_config": {"eos_token_id": 3}}) == (3,)


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def cut_file(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def lose_shard(folder: Path) -> None:
    split_file(folder, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def misplace(folder: Path) -> None:
    split_file(folder, 2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = sorted(index["weight_map"])
    index["weight_map"][names[0]] = index["weight_map"][names[1]]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tensor": (drop_tensor, r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight, which its config\.json"),
    "another shape": (
        lambda f: edit(f, intermediate_size=48),
        r"down_proj\.weight in .* has shape \[32, 64\]; config\.json calls for \[32, 48\]",
    ),
    "cut file": (cut_file, r"model\.safetensors is not a whole safetensors file: its tensors take .*; copy it again"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "is not a whole safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds neither model\.safetensors nor model\.safete"),
    "no shard": (lose_shard, r"model-00002-of-00002\.safetensors is missing in .* though its index names it"),
    "wrong index": (misplace, "though the index places it there"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json does not exist; expected the config.json of"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not JSON"),
    "no field": (lambda f: edit(f, hidden_size=None), r"config\.json has no field 'hidden_size'"),
    "no theta": (lambda f: edit(f, rope_theta=None), "gives no rope_theta"),
    "rope": (
        lambda f: edit(f, rope_scaling={"rope_type": "longrope", "factor": 2}),
        "RoPE scaling 'longrope'; targets here read default, linear, yarn, llama3 and proportional",
    ),
    "model": (
        lambda f: edit(f, model_type="gpt2"),
        r"model_type 'gpt2'; targets that load here are deepseek_v4, .*, llama, qwen3, qwen3_moe",
    ),
    "activation": (
        lambda f: edit(f, hidden_act="gelu"),
        "hidden_act 'gelu'; qwen3 targets are implemented with 'silu' only",
    ),
    "layer types": (lambda f: edit(f, layer_types=["full_attention"]), "lists 1 layer_types for 2 layers"),
    "layer type": (lambda f: edit(f, layer_types=["full_attention", "chunked"]), "layer type 'chunked'"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "The tokenizer in .* does not load"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_a_sentence(folder: Path, tmp_path: Path, case: str) -> None:
    mine = copy(folder, tmp_path)
    spoil, message = BROKEN[case]
    spoil(mine)
    with pytest.raises(UserError, match=message) as refused:
        load_target(mine)
    assert str(refused.value).strip().endswith(".")


@pytest.mark.parametrize("name", ["missing/folder/here", "./missing", "missing", "/missing/folder"])
def test_a_path_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not a folder; give a model folder"):
        load_target(name)


@pytest.mark.subprocesses
def test_eight_devices_hold_their_parts_only() -> None:
    run_python("-m", "tests.sharded_decode", "load")


# Config fields


def test_rope_is_read_in_both_spellings() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "attention_factor": 0.9}
    old = target_hf_config(rope_scaling={"type": "yarn", **yarn})
    new = target_hf_config(rope_parameters={"rope_type": "yarn", "rope_theta": 5000.0, **yarn})
    del new["rope_theta"]
    assert RopeConfig.from_hf_dict(old) == RopeConfig.from_hf_dict(new)
    assert RopeConfig.from_hf_dict(old).beta_fast == 16.0


def test_windows_follow_transformers() -> None:
    def windows(**fields: Any) -> tuple[int | None, ...]:
        return tuple(layer.window for layer in read_target_config(target_hf_config(**fields)).layers)

    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows(sliding_window=8) == (None,) * 4
    assert windows(use_sliding_window=True, sliding_window=8, layer_types=kinds) == (8, None, 8, None)
    assert windows(use_sliding_window=True, sliding_window=8, max_window_layers=3) == (None, None, None, 8)
    assert windows(use_sliding_window=False, sliding_window=8, max_window_layers=0) == (None,) * 4


def test_identity_is_what_changes_the_computation() -> None:
    base = target_hf_config()
    assert config_sha256(base | {"transformers_version": "9", "dtype": "bfloat16"}) == config_sha256(base)
    assert config_sha256(base | {"rope_theta": 1.0}) != config_sha256(base)


def test_a_window_hides_what_is_older(tmp_path: Path) -> None:
    target = load_target(
        write_tiny_target(tmp_path, use_sliding_window=True, sliding_window=3, max_window_layers=0), tokenizer=False
    )
    rows = np.arange(10, 22)[None].repeat(2, 0)
    rows[1, 0] = 99
    logits = next_logits(target, rows)
    # Two layers with a window of 3 reach back 4 positions.
    assert np.allclose(logits[0, 5:], logits[1, 5:], atol=1e-6) and not np.allclose(
        logits[0, 4], logits[1, 4], atol=1e-4
    )


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 13, 16, 17])
def test_the_head_gives_the_same_logits_for_any_number_of_rows(rows: int) -> None:
    # Counts that are filled up on a CPU, their neighbours, and those that are not.
    rng = np.random.default_rng(rows)
    hidden, head = rng.standard_normal((rows, 8), np.float32), rng.standard_normal((24, 8), np.float32)
    found = jax.jit(head_logits, static_argnums=2)(hidden[None], head, None)
    np.testing.assert_allclose(found, hidden[None] @ head.T, atol=1e-5)
