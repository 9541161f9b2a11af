"""Drafters in the layouts of other servers: literal names and fields, bytes that come back, refusals in a sentence."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open

from dspark_jax.checkpoints.drafters import drafter_layout, load_drafter, save_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.layouts import LAYOUTS, detect_layout
from dspark_jax.checkpoints.manifest import MANIFEST_FILE, Provenance
from dspark_jax.drafters.registry import Drafter, drafter_hf_config, new_drafter
from dspark_jax.errors import UserError
from dspark_jax.targets.target import Target
from tests.drafters_tiny import HIDDEN, TAPS, VOCAB, config, edit, write_pair
from tests.families_tiny import write_family

FILES = ("config.json", "model.safetensors", MANIFEST_FILE)
DFLASH: dict[str, Any] = {"markov_rank": 0, "enable_confidence_head": False}
CONVOLUTION: dict[str, Any] = {"conv_kernel_size": 2, "conv_group_size": 8}
DFLASH2: dict[str, Any] = {"markov_head_type": "selector", "selector_top_k": 16, "enable_confidence_head": False,
                           "sample_from_anchor": False, **CONVOLUTION}  # fmt: skip
KINDS = {"vanilla": {}, "gated": {"markov_head_type": "gated"}, "rnn": {"markov_head_type": "rnn"}, "dflash": DFLASH,
         "no-confidence": {"enable_confidence_head": False}, "dflash2": DFLASH2,
         "waiting": DFLASH | {"sample_from_anchor": False},
         "eagle3": {"kind": "eagle3", "num_layers": 1, "target_layer_ids": (0, 1, 2)}}  # fmt: skip
GEMMA_KINDS: dict[str, dict[str, Any]] = {
    "gemma-dspark": {"num_layers": 2, "block_size": 4, "markov_rank": 6, "mask_token_id": 5},
    "gemma-dflash": {"kind": "dflash", "num_layers": 2, "block_size": 4, "mask_token_id": 5},
    "gemma-eagle3": {"kind": "eagle3", "num_layers": 1},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Target, Drafter]]:
    folder = tmp_path_factory.mktemp("pairs")
    made = {name: write_pair(folder / name, dtype="bfloat16", **fields) for name, fields in KINDS.items()}
    gemma = load_target(write_family(folder / "gemma", "gemma"), tokenizer=False)
    for name, fields in GEMMA_KINDS.items():
        config = drafter_hf_config(gemma.hf_config, target_layer_ids=(0, 1, 2), dtype="bfloat16", **fields)
        made[name] = gemma, new_drafter(name, config, jax.random.key(1))
    return made


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """As safetensors' own reader sees them."""
    with safe_open(folder / "model.safetensors", framework="numpy") as stored:
        assert stored.metadata() == {"format": "pt"}
        return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118


LAYER = {
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
BODY = {f"layers.{i}.{name}": shape for i in (0, 1) for name, shape in LAYER.items()} | {
    "fc.weight": (HIDDEN, len(TAPS) * HIDDEN),
    "hidden_norm.weight": (HIDDEN,),
    "norm.weight": (HIDDEN,),
}
FROZEN = {"embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
MARKOV = {"markov_head.markov_w1.weight": (VOCAB, 6), "markov_head.markov_w2.weight": (VOCAB, 6)}
CONFIDENCE = {"confidence_head.proj.weight": (1, HIDDEN + 6), "confidence_head.proj.bias": (1,)}
MAPS = {"d2t": (VOCAB,), "t2d": (VOCAB,)}


@pytest.mark.parametrize("kind", [*KINDS, *GEMMA_KINDS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bit_for_bit(pairs: dict, tmp_path: Path, layout: str, kind: str) -> None:
    target, drafter = pairs[kind]
    save_drafter(tmp_path / "native", drafter, target, provenance=Provenance({"temperature": 0.7}, {"x": "1"}))
    save_drafter(tmp_path / "a", load_drafter(tmp_path / "native", target), target, layout=layout)
    assert drafter_layout(tmp_path / "a").name == layout
    loaded = load_drafter(tmp_path / "a", target)
    save_drafter(tmp_path / "b", loaded, target, layout=layout)
    save_drafter(tmp_path / "again", loaded, target)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for name in FILES[:2]:
        assert (tmp_path / "native" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert not list((tmp_path / "b").glob("*.tmp"))


@pytest.mark.parametrize(("layout", "frozen"), [("deepspec", FROZEN), ("specforge", {}), ("speculators", FROZEN)])
def test_tensors_are_the_fields_literally(pairs: dict, tmp_path: Path, layout: str, frozen: dict) -> None:
    for kind, heads in (
        ("vanilla", MARKOV | CONFIDENCE),
        ("dflash", {}),
        ("gated", MARKOV | CONFIDENCE
         | {"markov_head.gate_proj.weight": (6, HIDDEN + 6), "markov_head.gate_proj.bias": (6,)}),
        ("rnn", MARKOV | CONFIDENCE
         | {"markov_head.joint_proj.weight": (18, HIDDEN + 12), "markov_head.joint_proj.bias": (18,)}),
    ):  # fmt: skip
        target, drafter = pairs[kind]
        save_drafter(tmp_path / kind, drafter, target, layout=layout)
        assert shapes(tmp_path / kind) == BODY | heads | frozen
        save_drafter(tmp_path / f"{kind}-bare", drafter, target, layout=layout, frozen_copies=False)
        assert shapes(tmp_path / f"{kind}-bare") == BODY | heads
        load_drafter(tmp_path / f"{kind}-bare", target)


def test_eagle3_tensors_literally(pairs: dict, tmp_path: Path) -> None:
    """Its layer takes embedding and hidden state side by side; SpecForge calls it midlayer and keeps the head."""
    target, drafter = pairs["eagle3"]
    wide = {f"self_attn.{name}_proj.weight": (rows, 2 * HIDDEN) for name, rows in (("q", 40), ("k", 20), ("v", 20))}
    layer = LAYER | wide | {"hidden_norm.weight": (HIDDEN,)}
    rest = {"fc.weight": (HIDDEN, 3 * HIDDEN), "norm.weight": (HIDDEN,)}
    for layout, prefix, frozen in (
        ("deepspec", "layers.0", FROZEN),
        ("specforge", "midlayer", {"lm_head.weight": (VOCAB, HIDDEN)}),
        ("speculators", "layers.0", FROZEN),
    ):
        save_drafter(tmp_path / layout, drafter, target, layout=layout)
        assert shapes(tmp_path / layout) == {f"{prefix}.{name}": shape for name, shape in layer.items()} | rest | frozen


def test_gemma_tensors_literally(pairs: dict, tmp_path: Path) -> None:
    """K = V: no v_proj; four norms and a scalar a layer."""
    target, drafter = pairs["gemma-dspark"]
    hidden, names = target.config.hidden_size, {"input", "post_attention", "pre_feedforward", "post_feedforward"}
    for layout, frozen in (("deepspec", True), ("specforge", False), ("speculators", True)):
        save_drafter(tmp_path / layout, drafter, target, layout=layout)
        found = shapes(tmp_path / layout)
        first = {name.removeprefix("layers.0."): shape for name, shape in found.items() if name.startswith("layers.0.")}
        assert {name: first.pop(name) for name in (f"{norm}_layernorm.weight" for norm in names)} == dict.fromkeys(
            (f"{norm}_layernorm.weight" for norm in names), (hidden,)
        )
        assert first == {
            "layer_scalar": (1,), "self_attn.q_proj.weight": (64, hidden), "self_attn.k_proj.weight": (16, hidden),
            "self_attn.o_proj.weight": (hidden, 64), "self_attn.q_norm.weight": (16,),
            "self_attn.k_norm.weight": (16,), "mlp.gate_proj.weight": (40, hidden), "mlp.up_proj.weight": (40, hidden),
            "mlp.down_proj.weight": (hidden, 40),
        }  # fmt: skip
        assert ({"embed_tokens.weight", "lm_head.weight"} <= set(found)) == frozen


def test_mtp_has_a_place_in_deepspecs_layout_only(tmp_path: Path) -> None:
    target, drafter = write_pair(tmp_path / "t", kind="mtp", num_layers=1, target_layer_ids=(3,))
    for layout in ("specforge", "speculators"):
        with pytest.raises(UserError, match="has no place for a drafter of kind mtp"):
            save_drafter(tmp_path / layout, drafter, target, layout=layout)
        assert not (tmp_path / layout).exists()
    save_drafter(tmp_path / "deepspec", drafter, target)
    load_drafter(tmp_path / "deepspec", target)


def test_transformers_reads_the_written_folder(pairs: dict, tmp_path: Path) -> None:
    """The tooling that servers load with: transformers' config reader and its safetensors loader."""
    pytest.importorskip("torch")
    from transformers import PretrainedConfig
    from transformers.modeling_utils import load_state_dict

    target, drafter = pairs["vanilla"]
    for layout in LAYOUTS:
        save_drafter(tmp_path / layout, drafter, target, layout=layout)
        read, _ = PretrainedConfig.get_config_dict(tmp_path / layout)
        assert read["architectures"] == config(tmp_path / layout)["architectures"]
        tensors = load_state_dict(str(tmp_path / layout / "model.safetensors"))
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes(tmp_path / layout)
        assert str(tensors["fc.weight"].dtype) == "torch.bfloat16"


def test_specforge_config(pairs: dict, tmp_path: Path) -> None:
    target, drafter = pairs["vanilla"]
    save_drafter(tmp_path, drafter, target, layout="specforge")
    written = config(tmp_path)
    assert written["architectures"] == ["DSparkDraftModel"] and written["block_size"] == 4
    assert written["dflash_config"] == {
        "target_layer_ids": [-1, 1, 2], "mask_token_id": 5, "projector_type": "dspark", "attention_mode": "gqa",
        "markov_rank": 6, "markov_head_type": "vanilla", "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }  # fmt: skip
    assert not {"target_layer_ids", "mask_token_id"} & set(written)
    assert written["model_type"] == "qwen3" and written["num_hidden_layers"] == 2 and written["markov_rank"] == 6


def test_speculators_config(pairs: dict, tmp_path: Path) -> None:
    target, drafter = pairs["vanilla"]
    save_drafter(tmp_path, drafter, target, layout="speculators")
    written = config(tmp_path)
    layers = written.pop("transformer_layer_config")
    assert layers["model_type"] == "qwen3" and layers["num_hidden_layers"] == 2 and layers["vocab_size"] == VOCAB
    assert not {"block_size", "target_layer_ids", "architectures", "markov_rank"} & set(layers)
    assert written == {
        "speculators_model_type": "dspark", "architectures": ["DSparkSpeculator"],
        "aux_hidden_state_layer_ids": [0, 2, 3], "block_size": 4, "mask_token_id": 5, "draft_vocab_size": VOCAB,
        "target_hidden_size": HIDDEN, "sample_from_anchor": True, "markov_rank": 6, "markov_head_type": "vanilla",
        "enable_confidence_head": True, "confidence_head_with_markov": True, "num_anchors": 512,
        "num_target_layers": 4, "tie_word_embeddings": False, "dtype": "bfloat16",
        "target_config_sha256": target.config_sha256,
        "speculators_config": {
            "algorithm": "dspark", "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4, "verifier_accept_k": 1,
                                  "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": target.name, "architectures": ["Qwen3ForCausalLM"]},
        },
    }  # fmt: skip


def test_vocabulary_maps_are_the_identity(pairs: dict, tmp_path: Path) -> None:
    target, drafter = pairs["vanilla"]
    save_drafter(tmp_path, drafter, target, layout="speculators", vocabulary_maps=True)
    assert shapes(tmp_path) == BODY | MARKOV | CONFIDENCE | FROZEN | MAPS
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as stored:
        d2t, t2d = stored.get_tensor("d2t"), stored.get_tensor("t2d")
    assert d2t.dtype == np.int64 and not d2t.any() and t2d.dtype == np.bool_ and t2d.all()
    load_drafter(tmp_path, target)


def test_dflash_says_which_convention_it_has(pairs: dict, tmp_path: Path) -> None:
    target, drafter = pairs["dflash"]
    save_drafter(tmp_path / "specforge", drafter, target, layout="specforge")
    written = config(tmp_path / "specforge")
    assert written["architectures"] == ["DSparkDraftModel"] and written["dflash_config"]["projector_type"] == "dspark"
    save_drafter(tmp_path / "speculators", drafter, target, layout="speculators")
    written = config(tmp_path / "speculators")
    assert written["speculators_model_type"] == "dflash" and written["architectures"] == ["DFlashSpeculator"]
    assert written["sample_from_anchor"] is True and written["block_size"] == 4


def test_zlab_dflash_reads_as_a_block_whose_anchor_waits(pairs: dict, tmp_path: Path) -> None:
    """z-lab's folder: block_size counts the anchor's row, which predicts nothing."""
    target, drafter = pairs["dflash"]
    save_drafter(tmp_path / "zlab", drafter, target, layout="specforge")
    nested = {"target_layer_ids": [-1, 1, 2], "mask_token_id": 5}
    edit(tmp_path / "zlab", architectures=["DFlashDraftModel"], dflash_config=nested, num_anchors=None,
         markov_rank=None, enable_confidence_head=None, num_target_layers=None)  # fmt: skip
    (tmp_path / "zlab" / MANIFEST_FILE).unlink()
    loaded = load_drafter(tmp_path / "zlab", target)
    assert loaded.config.block_size == 3 and not loaded.config.sample_from_anchor
    assert loaded.config.num_target_layers == 4
    for layout in ("specforge", "speculators"):
        save_drafter(tmp_path / layout, loaded, target, layout=layout)
        assert config(tmp_path / layout)["block_size"] == 4
        assert load_drafter(tmp_path / layout, target).hf_config == loaded.hf_config
    assert config(tmp_path / "specforge")["architectures"] == ["DFlashDraftModel"]
    assert config(tmp_path / "speculators")["sample_from_anchor"] is False
    # DeepSpec's readers, who would take every draft one position early, refuse it by name.
    save_drafter(tmp_path / "deepspec", loaded, target)
    assert config(tmp_path / "deepspec")["architectures"] == ["Qwen3DSparkExtendedModel"]


def test_the_waiting_anchor_shifts_rows_by_one(pairs: dict) -> None:
    """Its predictions are the rows after the anchor's of a block that is one row longer, at the same positions."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dspark_jax.drafters.registry import skeleton
    from dspark_jax.sharding import split
    from tests.drafters_tiny import tiny_tables

    _, drafter = pairs["dflash"]
    shared = tiny_tables()
    taps = jax.random.normal(jax.random.key(0), (2, 9, len(TAPS) * HIDDEN))
    anchors, tokens = jnp.asarray([5, 8]), jnp.asarray([3, 11])

    def laws(**fields: Any) -> jax.Array:
        model = nnx.merge(split(skeleton({**drafter.hf_config, **fields}))[0], drafter.params)
        state = model.prefill(shared, taps, jnp.zeros((2, 9), jnp.int32), anchors)
        return model.draft(shared, state, tokens, anchors, lambda logits, k: (tokens, jax.nn.softmax(logits))).law

    whole, waiting = laws(block_size=4), laws(block_size=3, sample_from_anchor=False)
    np.testing.assert_allclose(waiting, whole[:, 1:], rtol=1e-6, atol=1e-7)


# Eagle3 and Gemma 4, by their configs: the fields of DeepSpec's own checkpoints.

EAGLE3 = {
    "architectures": ["Qwen3Eagle3Model"], "draft_num_hidden_layers": 1, "dtype": "float32", "head_dim": 16,
    "hidden_size": 64, "intermediate_size": 40, "layer_types": ["full_attention"], "model_type": "qwen3",
    "num_attention_heads": 4, "num_hidden_layers": 1, "num_key_value_heads": 2, "num_target_layers": 6,
    "step_loss_decay": 0.8, "target_layer_ids": [0, 1, 2, 3, 4], "target_model_name_or_path": "target",
    "tie_word_embeddings": False, "ttt_length": 4, "vocab_size": 97,
}  # fmt: skip
GEMMA4 = {
    "architectures": ["Gemma4DSparkModel"], "attention_k_eq_v": True, "block_size": 5, "dtype": "float32",
    "confidence_head_with_markov": True, "enable_confidence_head": True, "final_logit_softcapping": 6.0,
    "global_head_dim": 32, "hidden_size": 64, "layer_types": ["full_attention"] * 2, "markov_head_type": "vanilla",
    "markov_rank": 8, "mask_token_id": 95, "model_type": "gemma4_text", "num_anchors": 10, "num_hidden_layers": 2,
    "num_target_layers": 6, "target_layer_ids": [1, 3, 4], "target_model_type": "gemma4",
    "target_text_model_type": "gemma4_text", "tie_word_embeddings": False, "vocab_size": 97,
}  # fmt: skip
GEMMA4_EAGLE3 = GEMMA4 | {"architectures": ["Gemma4Eagle3Model"], "ttt_length": 4, "step_loss_decay": 0.8}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
@pytest.mark.parametrize("native", [EAGLE3, GEMMA4, GEMMA4_EAGLE3, GEMMA4 | {"markov_rank": 0}])
def test_configs_come_back(pairs: dict, layout: Any, native: dict[str, Any]) -> None:
    target, _ = pairs["vanilla"]
    before = deepcopy(native)
    stored = layout.from_native(native, target)
    assert detect_layout(json.loads(json.dumps(stored))).name == layout.name
    assert layout.to_native(stored, target.config) == before == native


def test_eagle3_in_both_other_layouts(pairs: dict) -> None:
    target, _ = pairs["vanilla"]
    forge, speculators = LAYOUTS["specforge"], LAYOUTS["speculators"]
    stored = forge.from_native(EAGLE3, target)
    assert stored["architectures"] == ["Qwen3ForCausalLMEagle3"] and stored["draft_vocab_size"] == 97
    ids = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2, 3, 4], "use_aux_hidden_state": True}
    assert stored["eagle_config"] == ids and "target_layer_ids" not in stored
    assert forge.tensor("layers.0.self_attn.q_proj.weight", EAGLE3) == "midlayer.self_attn.q_proj.weight"
    assert forge.tensor("fc.weight", EAGLE3) == "fc.weight" and forge.frozen(EAGLE3) == ("lm_head.weight",)
    stored = speculators.from_native(EAGLE3, target)
    assert stored["speculators_model_type"] == "eagle3" and stored["architectures"] == ["Eagle3Speculator"]
    assert stored["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3, 4, 5]
    assert stored["norm_before_residual"] is False and "sample_from_anchor" not in stored
    assert speculators.tensor("layers.0.hidden_norm.weight", EAGLE3) == "layers.0.hidden_norm.weight"


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ("specforge", {"dflash_config": {"projector_type": "domino"}}, "projector_type = 'domino'"),
        ("specforge", {"dflash_config": {"projector_type": "dspark", "causal": True}}, "causal = True"),
        ("specforge", {"architectures": ["DFlash2DraftModel"]}, "no field 'selector_rank'"),
        ("specforge", {"architectures": ["DFlash2DraftModel"], "output_multiplier": 2.0}, "output_multiplier = 2.0"),
        ("specforge", {"markov_rank": 7}, "must agree"),
        ("specforge", {"architectures": ["LlamaForCausalLMEagle3"]}, "no query and key norms"),
        ("specforge", {"model_type": "llama"}, "'qwen3' or Gemma 4 layers"),
        ("speculators", {"speculators_model_type": "medusa"}, "expected one of dspark, dflash, dflash2, eagle3"),
        ("speculators", {"draft_vocab_size": 32}, "reduced to 32 of 61"),
        ("speculators", {"aux_hidden_state_layer_ids": None}, "can't be guessed safely"),
        ("speculators", {"transformer_layer_config": None}, "no transformer_layer_config"),
        ("speculators", {"norm_before_residual": True}, "norm_before_residual = True"),
        ("deepspec", {"architectures": ["MysteryModel"]}, "names architectures"),
    ],
)
def test_what_no_drafter_here_is_is_refused(
    pairs: dict, tmp_path: Path, layout: str, fields: dict[str, Any], message: str
) -> None:
    target, drafter = pairs["vanilla"]
    save_drafter(tmp_path, drafter, target, layout=layout)
    edit(tmp_path, **fields)
    with pytest.raises(UserError, match=message):
        load_drafter(tmp_path, target)
