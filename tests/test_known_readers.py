"""DFlash 2 and blocks whose anchor waits in the layouts of other programs, and what those do with a given drafter."""

from pathlib import Path
from typing import Any

import jax
import pytest

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.known_readers import READS, verdicts
from dspark_jax.checkpoints.layouts import LAYOUTS
from dspark_jax.checkpoints.manifest import MANIFEST_FILE
from dspark_jax.drafters.registry import Drafter, drafter_hf_config, new_drafter
from dspark_jax.errors import UserError
from dspark_jax.targets.target import Target
from infer.export import main as export_main
from tests.drafters_tiny import HIDDEN, TAPS, VOCAB, config, edit, write_pair
from tests.test_layouts import BODY, DFLASH, DFLASH2, FROZEN, KINDS, shapes


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Target, Drafter]]:
    folder = tmp_path_factory.mktemp("pairs")
    return {name: write_pair(folder / name, **KINDS[name]) for name in KINDS if name != "no-confidence"}


SELECTOR = {
    "candidate_selector.predecessor_codebook": (VOCAB, 6),
    "candidate_selector.successor_codebook": (VOCAB, 6),
    "candidate_selector.hidden_projection.weight": (6, HIDDEN),
} | {
    f"layers.{i}.{part}_conv.{name}": shape
    for i in (0, 1)
    for part in ("attention", "mlp")
    for name, shape in {"base_kernel": (2, 2, HIDDEN), "kernel_projection.weight": (12, HIDDEN)}.items()
}


def test_dflash2_is_zlabs_and_speculators(pairs: dict, tmp_path: Path) -> None:
    """Literal names and fields, and a folder as z-lab writes it: the block's size inside alone, layers that slide."""
    target, drafter = pairs["dflash2"]
    save_drafter(tmp_path / "zlab", drafter, target, layout="specforge")
    assert shapes(tmp_path / "zlab") == BODY | SELECTOR
    written = config(tmp_path / "zlab")
    nested = {
        "block_size": 5, "mask_token_id": 5, "target_layer_ids": [-1, 1, 2], "conv_kernel_size": 2,
        "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 16,
    }  # fmt: skip
    assert written["architectures"] == ["DFlash2DraftModel"] and written["dflash_config"] == nested
    assert written["block_size"] == 5 and written["is_causal"] is False and "markov_rank" not in written
    edit(tmp_path / "zlab", block_size=None, num_anchors=None, sliding_window=7, num_target_layers=None,
         layer_types=["sliding_attention"] * 2)  # fmt: skip
    (tmp_path / "zlab" / MANIFEST_FILE).unlink()
    slid = load_drafter(tmp_path / "zlab", target)
    assert (slid.config.block_size, slid.config.context_window, slid.config.selector_top_k) == (4, 7, 16)
    for layout in LAYOUTS:
        save_drafter(tmp_path / f"slid-{layout}", slid, target, layout=layout)
        assert load_drafter(tmp_path / f"slid-{layout}", target).config == slid.config

    save_drafter(tmp_path / "spec", drafter, target, layout="speculators")
    assert shapes(tmp_path / "spec") == BODY | SELECTOR | FROZEN
    written = config(tmp_path / "spec")
    expected = {
        "architectures": ["DFlash2DraftModel"], "speculators_model_type": "dflash2", "block_size": 5,
        "aux_hidden_state_layer_ids": [0, 2, 3], "conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 6,
        "selector_top_k": 16, "sample_from_anchor": False, "sliding_window_non_causal": True, "draft_vocab_size": VOCAB,
    }  # fmt: skip
    assert expected.items() <= written.items() and "markov_rank" not in written
    assert written["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
@pytest.mark.parametrize("change", [{"enable_confidence_head": True}, {"sample_from_anchor": True}, DFLASH])
def test_parts_of_dflash2_are_kept_for_this_library(
    pairs: dict, tmp_path: Path, layout: str, change: dict[str, Any]
) -> None:
    """Their readers know all of DFlash 2 or none of it."""
    target, _ = pairs["dflash2"]
    fields = {"num_layers": 2, "target_layer_ids": TAPS, "mask_token_id": 5, "block_size": 4, "markov_rank": 6}
    hf_config = drafter_hf_config(target.hf_config, **fields | DFLASH2 | change)
    drafter = new_drafter("part", hf_config, jax.random.key(1))
    with pytest.raises(UserError, match=f"The {layout} layout has a place for convolutions and a selector as DFlash 2"):
        save_drafter(tmp_path / "x", drafter, target, layout=layout)
    assert not (tmp_path / "x").exists()
    save_drafter(tmp_path / "own", drafter, target)
    assert config(tmp_path / "own")["architectures"] == ["Qwen3DSparkExtendedModel"]
    assert load_drafter(tmp_path / "own", target).config == drafter.config


@pytest.mark.parametrize(
    ("kind", "layout", "expected"),
    [
        ("vanilla", "deepspec", {"DeepSpec": READS, "vLLM": READS, "SGLang": READS, "sglang-jax": "greedy"}),
        ("gated", "deepspec", {"DeepSpec": READS, "vLLM": "no gated head", "SGLang": READS, "sglang-jax": "vanilla"}),
        ("rnn", "speculators", {"speculators": READS, "vLLM": "no rnn head", "SGLang": "no readers of this layout"}),
        ("dflash", "speculators", {"speculators": READS, "vLLM": "an anchor that waits"}),
        ("dflash", "deepspec", {"DeepSpec": READS, "vLLM": "may crash", "SGLang": "has a Markov head"}),
        ("waiting", "speculators", {"speculators": READS, "vLLM": READS}),
        ("waiting", "specforge", {"SpecForge": READS, "vLLM": READS}),
        ("waiting", "deepspec", {"DeepSpec": "DSparkExtendedModel", "vLLM": "does not know the architecture"}),
        ("dflash2", "speculators", {"speculators": READS, "vLLM": "not tried"}),
        ("eagle3", "specforge", {"SpecForge": "query and key norms", "vLLM": "the speculators layout alone"}),
        ("eagle3", "speculators", {"speculators": READS, "vLLM": READS}),
    ],
)
def test_known_readers_say_what_they_do_with_a_drafter(
    pairs: dict, kind: str, layout: str, expected: dict[str, str]
) -> None:
    """As they did when they were run; docs/interop.md has the table."""
    found = {program.split()[0]: verdict for program, verdict in verdicts(pairs[kind][1].hf_config, layout)}
    for program, words in expected.items():
        assert words in found[program], f"{program}: {found[program]}"


def test_export_names_the_verifier_and_its_readers(
    pairs: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, drafter = pairs["waiting"]
    save_drafter(tmp_path / "own", drafter, target)
    given = ["--drafter", str(tmp_path / "own"), "--target", str(target.name), "--layout", "speculators"]
    export_main([*given, "--output", str(tmp_path / "a"), "--verifier", "acme/target"])
    assert config(tmp_path / "a")["speculators_config"]["verifier"]["name_or_path"] == "acme/target"
    said = capsys.readouterr().out
    assert "vLLM 0.32.0" in said and READS in said and "--verifier NAME" not in said
    export_main([*given, "--output", str(tmp_path / "b")])
    assert "--verifier NAME" in capsys.readouterr().out
    assert load_drafter(tmp_path / "a", target).config == drafter.config
