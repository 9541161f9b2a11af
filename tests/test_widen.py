"""`infer.studies.widen`: wider MLPs, the same answers, and a drafter that drafts for them as before."""

from pathlib import Path

import jax
import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.serving.generate import generate
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.joined import apart
from infer.studies.widen import main, widened
from tests.decoding_tiny import next_logits, prompts
from tests.families_tiny import write_family
from tests.test_infer_programs import refused, write_drafter
from tests.tiny import write_tiny_target

CONFIG = EngineConfig(2, policy="fixed", smallest_prompt_bucket=32, buckets=(8,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("widen")
    write_tiny_target(folder / "target")
    write_drafter(folder / "target", folder / "drafter")
    return folder


def argv(folder: Path, out: Path, units: int = 200, target: str = "target") -> list[str]:
    words = ["--target", folder / target, "--intermediate-size", units, "--output", out]
    return [str(word) for word in words]


def test_a_wider_pair_makes_the_same_tokens(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drafts, acceptance and all, from files."""
    main([*argv(folder, tmp_path / "wide"), "--drafter", str(folder / "drafter")])
    made = [(folder / "target", folder / "drafter"), (tmp_path / "wide" / "target", tmp_path / "wide" / "drafter")]
    found = []
    for place, drafts in made:
        target = load_target(place)
        rows = prompts(3, target.config.vocab_size)
        found.append(generate(target, load_drafter(drafts, target), rows, SamplingParams(10, temperature=1.0), CONFIG))
    for old, new in zip(*found, strict=True):
        assert (old.tokens, old.text, old.accepted_at) == (new.tokens, new.text, new.accepted_at)
    wide = load_target(made[1][0])
    matrices = apart(wide.params, wide.config)["layers"]
    assert wide.config.intermediate_size == 200 and matrices[1]["mlp"]["gate_weight_df"].shape[1] == 200
    assert wide.stop_tokens == load_target(made[0][0]).stop_tokens
    units = np.asarray(matrices[0]["mlp"]["up_weight_df"])
    assert np.all(np.any(units != 0, axis=0)), "a unit of zeros might be left out by somebody's compiler"
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(wide.params)):,}" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_every_dense_family_is_widened(family: str, tmp_path: Path) -> None:
    """Biases, other activations and norms behind the MLP included: the same logits of every position."""
    target = load_target(write_family(tmp_path, family), tokenizer=False)
    wide = widened(target, 3 * target.config.intermediate_size + 1)
    rows = np.random.default_rng(0).integers(0, target.config.vocab_size, (2, 16))
    old, new = (next_logits(one, rows) for one in (target, wide))
    np.testing.assert_allclose(new, old, atol=1e-4)
    np.testing.assert_array_equal(np.argmax(new, axis=-1), np.argmax(old, axis=-1))


def test_widen_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "MLPs of 64 units; expected at least as many, got 63" in refused(
        main, argv(folder, tmp_path / "a", 63), capsys
    )
    write_family(tmp_path / "moe", "moe")
    assert "has mixtures of experts" in refused(main, argv(tmp_path, tmp_path / "a", 99, "moe"), capsys)
    assert not (tmp_path / "a").exists()
    assert "holds something already" in refused(main, argv(folder, tmp_path / "moe"), capsys)
