"""train.bench: what a step is counted to take beside what the compiler says, and the naive step beside the real one."""

import dataclasses
import json
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax.checkpoints.huggingface import abstract_target
from dspark_jax.config.cli import load_config
from dspark_jax.config.schema import TrainConfig
from dspark_jax.drafters.registry import read_config, skeleton
from dspark_jax.drafters.vocabulary import DraftVocabulary
from dspark_jax.planning.compiled import memory_of
from dspark_jax.planning.training import AbstractRun
from dspark_jax.roofline.decoding import round_terms
from dspark_jax.roofline.hardware import Term, floor_seconds, known_device, terms_table, total
from dspark_jax.sharding import abstract_mesh, make_mesh, split
from dspark_jax.targets.config import ExpertsConfig, TargetConfig
from train.bench import __main__ as bench
from train.bench.inputs import random_inputs
from train.bench.naive import naive_run
from train.studies.step_times import figures


def run_of(name: str, **drafter: int) -> AbstractRun:
    """A configuration on one device, its drafter's settings replaced."""
    config: TrainConfig = load_config(name)
    config = dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, **drafter))
    return AbstractRun.of(config, make_mesh(devices=jax.devices()[:1]))


@cache
def both_steps() -> dict[str, tuple[jax.stages.Compiled, dict[str, Any]]]:
    """The debug step and the naive one on 32 blocks a sequence: compiled, and the metrics of one update."""
    run = run_of("debug", num_anchors=32)
    made = {}
    for name, one in (("real", run), ("naive", naive_run(run))):
        state, borrowed = random_inputs(one)
        step = one.step.lower(state, *borrowed).compile()
        made[name] = step, jax.device_get(step(state, *borrowed)[1])
    return made


def test_the_naive_step_computes_the_same_in_more_memory() -> None:
    (real, found), (naive, expected) = both_steps().values()
    assert set(found) == set(expected) and expected["grad_norm"] > 0
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    assert memory_of(naive)["temporary"] > 1.5 * memory_of(real)["temporary"]
    assert memory_of(naive)["arguments"] == memory_of(real)["arguments"]


def test_the_floor_is_below_what_the_compiler_counts() -> None:
    """Operations within 25 %: the compiler also counts elementwise work and attention that the mask hides. It moves
    more bytes than the floor, by a factor of 2 to 12: it stores scores, logits and what it recomputes nothing of."""
    run = run_of("embedded_dspark")
    terms = bench.floor_terms(run)
    assert terms is not None
    cost = run.lower("cpu").compile().cost_analysis()
    counted = total(terms)
    assert counted.flops < cost["flops"] < 1.25 * counted.flops
    assert 2 * counted.bytes < cost["bytes accessed"] < 12 * counted.bytes


def test_terms_of_a_step_scale_as_they_should() -> None:
    config = load_config("qwen3_4b_dspark")

    def terms(rows: int, micro_batches: int) -> dict[str, Term]:
        data = dataclasses.replace(config.data, global_batch=rows, accumulation_steps=micro_batches)
        counted = bench.floor_terms(AbstractRun.of(dataclasses.replace(config, data=data), abstract_mesh(1)))
        assert counted is not None
        return {term.name: term for term in counted}

    one, together, apart = terms(1, 1), terms(2, 1), terms(2, 2)
    for name in one:
        if name not in ("optimizer", "cast of the parameters"):
            assert together[name].flops == apart[name].flops == 2 * one[name].flops
            assert one[name].bytes <= together[name].bytes <= apart[name].bytes == 2 * one[name].bytes
    # Weights are read once a micro-batch, the optimizer runs once a step.
    assert together["MLP"].bytes < apart["MLP"].bytes and one["optimizer"] == apart["optimizer"]
    # One of the six products of attention is made again, and nothing else.
    scores = one["block attention, scores"]
    assert scores.again == pytest.approx(scores.flops / 6) == total(list(one.values())).again
    assert one["target's head"].flops == 2 * 3584 * 2560 * 151936
    assert one["feature fusion"].flops == 4 * 4096 * 5 * 2560**2


def test_the_decode_floor_reads_every_weight_once() -> None:
    run = run_of("embedded_dspark")
    target = run.target.config
    drafter = run.spec.drafter
    terms = {term.name: term for term in round_terms(target, drafter, 3, 100, 2) or ()}

    def matrices(params: dict) -> int:
        return sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1)

    layers = matrices(abstract_target(target, "float32")[1]["layers"])
    assert terms["verify: projections and MLP"].bytes == 2 * layers
    assert terms["verify: projections and MLP"].flops == 2 * 3 * 5 * layers
    backbone = split(skeleton(run.drafter_hf))[1]["backbone"]
    assert terms["draft: projections and MLP"].bytes == 2 * matrices(backbone["layers"])
    cached = 3 * (100 + 5) * sum(2 * heads * size for heads, size in target.kv_shapes)
    assert terms["verify: attention over the cache"].bytes == 2 * cached
    plain = round_terms(target, None, 3, 100, 2, cut=False) or []
    assert [term.name.split(":")[0] for term in plain] == ["verify"] * 3 + ["sampling laws", "acceptance"]
    assert round_terms(target, read_config(run_of("embedded_eagle3").drafter_hf), 3, 100, 2) is None


def test_the_floor_of_a_mixture_reads_the_experts_that_rows_choose() -> None:
    dense = run_of("embedded_dspark").target.config
    layers = tuple(dataclasses.replace(layer, sparse=True) for layer in dense.layers)
    # Four experts of a quarter of the MLP's width, one of which a row chooses.
    experts = ExpertsConfig(4, 1, dense.intermediate_size // 4, normalise=True)
    sparse = dataclasses.replace(dense, layers=layers, experts=experts)
    name, router = "verify: projections and MLP", dense.num_layers * dense.hidden_size * 4
    mlp = dense.num_layers * 3 * dense.hidden_size * dense.intermediate_size

    def products(config: TargetConfig, rows: int) -> Term:
        return {term.name: term for term in round_terms(config, None, rows, 100, 2) or ()}[name]

    for rows, read in ((1, 1 / 4), (2, 7 / 16), (200, 1.0)):
        whole, chosen = products(dense, rows), products(sparse, rows)
        assert whole.bytes - chosen.bytes == pytest.approx(2 * ((1 - read) * mlp - router))
        assert whole.flops - chosen.flops == pytest.approx(2 * rows * (3 / 4 * mlp - router))


def test_a_pruned_vocabulary_shortens_the_drafters_head() -> None:
    run = run_of("embedded_dspark")
    target, whole = run.target.config, run.spec.drafter
    pruned = dataclasses.replace(whole, draft_vocabulary=DraftVocabulary.of(range(0, 512, 2), target.vocab_size))
    found, full = ({t.name: t for t in round_terms(target, d, 3, 100, 2) or ()} for d in (pruned, whole))
    assert found["draft: head"].bytes == 256 * target.hidden_size * 2 + 3 * whole.block_size * 256 * 4
    assert found["draft: Markov head"].flops * target.vocab_size == full["draft: Markov head"].flops * 256
    assert found["verify: head"] == full["verify: head"]


def test_the_floor_takes_the_slower_of_products_and_memory() -> None:
    device = known_device("NVIDIA H200")
    assert device is not None and known_device("cpu") is None
    terms = [Term("a", device.flops, 1.0), Term("b", 1.0, 2 * device.bandwidth)]
    assert floor_seconds(terms, device) == 3.0
    printed = terms_table(terms, device).splitlines()
    assert printed[1].split()[-2:] == ["1,000.000", "products"] and printed[2].split()[-2:] == ["2,000.000", "memory"]
    assert printed[3].split()[-1] == "3,000.000" and "bound" not in terms_table(terms, None)


def test_the_program_times_the_step(tmp_path, capsys) -> None:
    results = tmp_path / "bench.json"
    bench.main(["--config", "debug", "--runs", "3", "--steps-per-run", "2", "--results", str(results)])
    printed = capsys.readouterr().out
    found = json.loads(results.read_text())
    assert found["steps timed"] == "3 runs of 2" and found["skipped updates"] == 0
    least, most = found["least and most"]
    assert 0 < least <= found["seconds a step"] <= most
    assert found["tokens/s"] == pytest.approx(4 * 64 / found["seconds a step"])
    work = sum(term["flops"] for term in found["terms"])
    assert found["TFLOP/s a device"] == pytest.approx(work / found["seconds a step"] / 1e12)
    assert found["MFU"] == found["floor / time"] == "not known" and "GiB" in found["together, compiled"]
    assert "draft head" in printed and [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_the_program_counts_without_running(capsys) -> None:
    bench.main(["--preset", "qwen3_4b", "--show", "floor", "--device", "NVIDIA H200"])
    printed = capsys.readouterr().out
    assert "615,221,249" in printed and "4,096" in printed and "512 x 7" in printed
    assert "bound by" in printed and "seconds a step" not in printed
    for words, said in (
        ("--run 3", "Unknown option --run"),
        ("--config debug --runs 0", "There is nothing to measure"),
        ("--config debug --batch cache", "A batch of a cache needs data.source offline and data.cache"),
        ("--config embedded_eagle3 --show memory", "A naive step is written for DSpark and DFlash drafters"),
    ):
        with pytest.raises(SystemExit) as stop:
            bench.main(words.split())
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_turns_are_compared_with_their_neighbours() -> None:
    # The machine slows down by half in the second turn, which a ratio of medians over all turns would not see.
    row = figures([(1.0, 0.9), (2.0, 1.8), (1.0, 1.1)])
    assert (row["before"], row["after"], row["turns"]) == (1.0, 1.1, 3)
    assert row["ratio"] == pytest.approx(0.9) and row["most"] == pytest.approx(1.1)
