"""Weights in 8 bits: what they round, that a pair of such weights is decoded losslessly, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.huggingface import load_target, save_target
from dspark_jax.errors import UserError
from dspark_jax.serving.generate import generate
from dspark_jax.serving.requests import Generation
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.eight_bits import Bits, CodedMatrix, coded, in_eight_bits
from dspark_jax.targets.target import Target
from infer import calibrate, evaluate, profile
from infer.studies import weights
from tests.decoding_tiny import prompts, tiny_pair
from tests.test_infer_programs import refused, write_drafter
from tests.tiny import write_tiny_target


@pytest.mark.parametrize(("bits", "largest"), [("int8", 127), ("fp8", 448)])
def test_each_output_is_rounded_to_the_nearest_code_under_a_scale_of_its_own(bits: Bits, largest: int) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((48, 5)) * [0.01, 1.0, 30.0, 0.0, 1e-6]).astype(np.float32)
    codes, scales = map(np.asarray, coded(weight, bits))
    assert codes.dtype.itemsize == 1
    codes = codes.astype(np.float32)
    assert np.abs(codes).max(axis=0).tolist() == [largest] * 3 + [0, largest]
    # Half a step: one of int8; of e4m3 an eighth of the number's power of two, 2^-9 below the smallest of them.
    step = 1.0 if bits == "int8" else 2.0 ** (np.floor(np.log2(np.maximum(np.abs(codes), 2.0**-6))) - 3)
    assert np.all(np.abs(codes * scales - weight) <= 0.5001 * step * scales)

    # In both dtypes the product is that of the rounded weights: codes are exact in bfloat16.
    x = jnp.asarray(rng.standard_normal((3, 2, 48)), jnp.float32)
    matrix = CodedMatrix(coded(weight, bits)[0], jnp.asarray(scales))
    np.testing.assert_allclose(x @ matrix, np.asarray(x) @ (codes * scales), rtol=1e-5, atol=1e-5)
    narrow = x.astype(jnp.bfloat16)
    expected = np.asarray(narrow, np.float32) @ (codes * scales)
    found = np.asarray(narrow @ matrix, np.float32)
    assert (narrow @ matrix).dtype == jnp.bfloat16
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_a_pair_in_eight_bits_is_decoded_as_its_target_alone(bits: Bits) -> None:
    target, drafter = tiny_pair()
    small = []
    for model in (target, drafter):
        graphdef, params = in_eight_bits(model.graphdef, model.params, model.name, bits)
        small.append(replace(model, graphdef=graphdef, params=params))  # type: ignore[type-var]
    held = [x for x in jax.tree.leaves(small[0].params["layers"]) if x.dtype.itemsize == 1]
    # Of two layers: q, k and v in one, o, gate and up in one, and down.
    assert len(held) == 8 and sum(x.size for x in held) == sum(
        x.size for x in jax.tree.leaves(target.params["layers"]) if x.ndim == 2
    )

    asked = prompts(3, target.config.vocab_size)
    ids = jnp.asarray([asked[0]])
    logits = []
    for model in (target, small[0]):
        module = model.model(model.params)
        logits.append(module.logits(module(ids, jnp.arange(ids.shape[1])[None], CausalRows()).hidden))
    error = float(jnp.abs(logits[0] - logits[1]).max())
    assert 0 < error < 0.05 * float(jnp.abs(logits[0]).max())

    sampling, config = SamplingParams(max_new_tokens=24), EngineConfig(slots=3, longest=64, policy="fixed")
    plain = generate(small[0], None, asked, sampling, config)
    drafted = generate(small[0], small[1], asked, sampling, config)
    assert [g.tokens for g in plain] == [g.tokens for g in drafted]
    assert sum(sum(g.accepted_at) for g in drafted) > 0


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_it_is_an_option_of_loading(tmp_path: Path, bits: Bits) -> None:
    folder = write_tiny_target(tmp_path / "target")
    target = load_target(folder, weights=bits)
    assert target.name == f"{folder} in {bits}" and target.params["embed_weight_vd"].dtype == jnp.float32
    assert set(target.params["layers"][0]["mlp"]["gate_up_weight_du"]) == {"codes", "scales"}
    with pytest.raises(UserError, match=f"no matrices that are kept in {bits}"):
        in_eight_bits(target.graphdef, target.params, "again", bits)


def test_programs_that_measure_a_pair_load_it_in_eight_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_target(tmp_path / "target")
    (tmp_path / "sets.jsonl").write_text('{"turns": ["what"]}\n')

    def loaded(folder: str, target: Target, *, dtype: str, weights: str) -> None:
        raise UserError(f"{target.name}: a drafter in {weights}")

    pair = ["--target", str(tmp_path / "target"), "--drafter", "d", "--output", str(tmp_path / "out")]
    for program, more in ((calibrate, ["--prompts"]), (evaluate, ["--datasets"]), (profile, [])):
        monkeypatch.setattr(program, "load_drafter", loaded)
        words = [*pair, *(word for name in more for word in (name, str(tmp_path / "sets.jsonl"))), "--weights", "fp8"]
        assert "target in fp8: a drafter in fp8" in refused(program.main, words, capsys)
    words = [*pair, "--prompts", "p.jsonl", "--weights", "int8", "--recenter", str(tmp_path / "copy")]
    assert "--recenter saves a copy of the drafter" in refused(calibrate.main, words, capsys)


@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_a_pair_in_eight_bits_is_not_saved(tmp_path: Path, bits: Bits) -> None:
    # No reader knows the codes: a folder of them would be refused when it is loaded, if at all.
    target, drafter = tiny_pair()
    _, params = in_eight_bits(drafter.graphdef, drafter.params, "it", bits)
    with pytest.raises(UserError, match=f"held in {bits}, which is not saved"):
        save_drafter(tmp_path / "drafter", replace(drafter, params=params), target)
    _, params = in_eight_bits(target.graphdef, target.params, "it", bits)
    with pytest.raises(UserError, match=f"held in {bits}, which is not saved"):
        save_target(tmp_path / "target", target.hf_config, params)
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="loaded 'stored' or in 'int8' or 'fp8', not 'int4'"):
        load_drafter(tmp_path, target, weights="int4")  # type: ignore[arg-type]


def test_they_are_compared_with_the_stored_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_target(tmp_path / "target")
    write_drafter(tmp_path / "target", tmp_path / "drafter")
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["one"]}\n{"turns": ["two words"]}\n')

    def decoded(_: Any, target: Target, drafter: Any, prompts: Any, temperature: float) -> tuple[Generation, ...]:
        # Of the pair in int8 the second answer is another.
        last = 4 + (target.name.endswith("int8") and temperature == 0)
        coded = any(x.dtype.itemsize == 1 for x in jax.tree.leaves(drafter.params))
        assert coded == (" in " in target.name) and len(prompts) == 2
        rounds = {"stored": 10, "int8": 12, "fp8": 15}[(target.name.split(" in ") + ["stored"])[1]]
        return tuple(
            Generation(i, (1,), (3, 2, last * i), "", "length", rounds, 30, (10,), (9,), (10,)) for i in range(2)
        )

    monkeypatch.setattr(weights, "decoded", decoded)
    results = tmp_path / "weights.json"
    results.write_text('{"another": {}}')
    words = ["--target", str(tmp_path / "target"), "--drafter", str(tmp_path / "drafter"), "--name", "tiny"]
    weights.main([*words, "--prompts", str(tmp_path / "prompts.jsonl"), "--results", str(results)])

    found = json.loads(results.read_text())
    assert set(found) == {"another", "tiny"}
    stored, int8, fp8 = (found["tiny"][kind] for kind in weights.KINDS)
    assert [row["t1"]["tau"] for row in (stored, int8, fp8)] == [3.0, 2.5, 2.0]
    assert [row["texts_as_stored"] for row in (stored, int8, fp8)] == [2, 1, 2] and stored["prompts"] == 2
    assert (
        stored["logits"]["tokens"] == 6
        and stored["logits"]["largest_error"] == 0 == stored["logits"]["divergence_nats"]
    )
    # Finer codes have the smaller error.
    assert 0 < int8["logits"]["divergence_nats"] < fp8["logits"]["divergence_nats"]
    assert stored["megabytes"] > int8["megabytes"] == fp8["megabytes"]
    assert "same best token" in capsys.readouterr().out
    with pytest.raises(UserError, match="expected 0 among them"):
        weights.WeightsSettings(temperatures=(1.0,))


def test_laws_are_compared_by_divergence_and_variation() -> None:
    expected, found = np.log([[0.5, 0.5]] * 2), np.log([[0.25, 0.75], [0.5, 0.5]])
    figures = weights.compared(found, expected)
    assert figures["total_variation"] == pytest.approx(0.125)
    assert figures["divergence_nats"] == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2)
    assert figures["same_best_token"] == 0.5 and figures["tokens"] == 2
