"""DeepSpec-native drafters: the bytes come back, the names are right, and a wrong target is refused in a sentence."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter, shared_tables
from dspark_jax.errors import UserError
from tests.drafters_tiny import HIDDEN, TAPS, VOCAB, write_pair


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_round_trip_is_bit_for_bit(tmp_path: Path, dtype: str, head: str) -> None:
    target, drafter = write_pair(tmp_path / "target", markov_head_type=head)
    save_drafter(tmp_path / "a", drafter, target, dtype=dtype)
    loaded = load_drafter(tmp_path / "a", target)
    assert loaded.config.backbone.dtype == dtype and loaded.target_sha256 == target.config_sha256
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), drafter.params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), loaded.params, expected)
    assert loaded.params["backbone"]["fc"]["weight_io"].dtype == dtype
    assert loaded.params["confidence_head"]["proj"]["weight_io"].dtype == jnp.float32
    save_drafter(tmp_path / "b", loaded, target)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not list((tmp_path / "b").glob("*.tmp"))


def test_names_and_shapes_are_deepspecs(tmp_path: Path) -> None:
    target, drafter = write_pair(tmp_path / "target", markov_head_type="rnn")
    save_drafter(tmp_path / "drafter", drafter, target, dtype="float32")
    stored = load_file(tmp_path / "drafter" / "model.safetensors")
    shapes = {name: array.shape for name, array in stored.items() if not name.startswith("layers.1.")}
    layer = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (40, HIDDEN),
        "self_attn.k_proj.weight": (20, HIDDEN),
        "self_attn.v_proj.weight": (20, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, 40),
        "self_attn.q_norm.weight": (10,),
        "self_attn.k_norm.weight": (10,),
        "mlp.gate_proj.weight": (40, HIDDEN),
        "mlp.up_proj.weight": (40, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, 40),
    }
    assert shapes == {f"layers.0.{name}": shape for name, shape in layer.items()} | {
        "embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "fc.weight": (HIDDEN, len(TAPS) * HIDDEN),
        "hidden_norm.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,),
        "markov_head.markov_w1.weight": (VOCAB, 6),
        "markov_head.markov_w2.weight": (VOCAB, 6),
        "markov_head.joint_proj.weight": (18, HIDDEN + 12),
        "markov_head.joint_proj.bias": (18,),
        "confidence_head.proj.weight": (1, HIDDEN + 6),
        "confidence_head.proj.bias": (1,),
    }
    # A tied target's embedding is written as the head too (docs/algorithm.md, rule 18).
    np.testing.assert_array_equal(stored["lm_head.weight"], shared_tables(target).embed)


def test_frozen_copies_may_be_left_out(tmp_path: Path) -> None:
    target, drafter = write_pair(tmp_path / "target")
    save_drafter(tmp_path / "drafter", drafter, target, frozen_copies=False)
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(load_file(tmp_path / "drafter" / "model.safetensors"))
    load_drafter(tmp_path / "drafter", target)


def test_a_drafter_of_another_target_is_refused(tmp_path: Path) -> None:
    target, drafter = write_pair(tmp_path / "target")
    other, _ = write_pair(tmp_path / "other", seed=1)
    save_drafter(tmp_path / "drafter", drafter, target, dtype="bfloat16")
    with pytest.raises(UserError, match=r"Target/drafter mismatch: the drafter's frozen embed_tokens.weight is not"):
        load_drafter(tmp_path / "drafter", other)
    # Rounding alone is no difference: a float32 target against copies in bfloat16, loaded in float32.
    load_drafter(tmp_path / "drafter", target, dtype="float32")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 60, "Vocabulary mismatch"),
        ("num_target_layers", 9, "Target/drafter mismatch"),
        ("architectures", ["LlamaForCausalLM"], "expected one of Qwen3DSparkModel"),
        ("target_layer_ids", [0, 1, 3], "the last layer of the 4-layer target being forbidden"),
        ("block_size", None, "has no field 'block_size'"),
        ("markov_rank", 5, "The weights and the config are not of one model"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, field: str, value: object, message: str) -> None:
    target, drafter = write_pair(tmp_path / "target")
    save_drafter(tmp_path / "drafter", drafter, target)
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    config[field] = value
    if value is None:
        del config[field]
    (tmp_path / "drafter" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_drafter(tmp_path / "drafter", target)


def test_cut_weights_are_refused(tmp_path: Path) -> None:
    target, drafter = write_pair(tmp_path / "target")
    save_drafter(tmp_path / "drafter", drafter, target)
    weights = tmp_path / "drafter" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_drafter(tmp_path / "drafter", target)


def test_trained_parameters_replace_the_loaded_ones(tmp_path: Path) -> None:
    target, drafter = write_pair(tmp_path / "target")
    trained = replace(drafter, params=jax.tree.map(lambda x: x + 0.5, drafter.params))
    save_drafter(tmp_path / "drafter", trained, target, dtype="float32")
    again = load_drafter(tmp_path / "drafter", target)
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
