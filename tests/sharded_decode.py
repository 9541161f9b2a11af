"""Program of test_loop, test_paged and test_targets: a target split over 8 simulated devices, against the same on one.

python -m tests.sharded_decode load|generate|pages
"""

import os
import sys

from tests.xla import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ["JAX_PLATFORMS"] = "cpu"

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.huggingface import load_target, save_target
from dspark_jax.decoding.dispatch import run_rounds
from dspark_jax.planning.compiled import collective_parts, copies
from dspark_jax.planning.rounds import LoopText
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.requests import Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.sharding import ShardingRules, make_mesh
from dspark_jax.targets.pages import is_paged
from tests.decoding_tiny import prompts, tiny_pair

RULES = {
    "fsdp": ShardingRules(),
    "heads": ShardingRules(embed=None, heads="fsdp", kv_heads="data", mlp="fsdp", vocab="fsdp"),
}
SHAPES: dict[str, Any] = {"hidden_size": 32, "vocab_size": 2048, "intermediate_size": 40, "head_dim": 10}


def write(folder: Path) -> None:
    target, drafter = tiny_pair(**SHAPES)
    save_target(folder / "target", target.hf_config, target.params, "float32")
    save_drafter(folder / "drafter", drafter, target, dtype="float32")


def check_load(folder: Path) -> None:
    """Every device holds its part of a split parameter and no more, and the parts are the parameter."""
    mesh, whole = make_mesh(data=2, fsdp=4), flatten_dict(load_target(folder / "target").params)
    for name, rules in RULES.items():
        split = 0
        for path, array in flatten_dict(load_target(folder / "target", mesh=mesh, rules=rules).params).items():
            np.testing.assert_array_equal(array, whole[path])
            parts = {str(shard.index): shard.data.nbytes for shard in array.addressable_shards}
            assert sum(parts.values()) == array.nbytes, (name, path)
            on_devices = sum(shard.data.nbytes for shard in array.addressable_shards)
            split += len(parts) > 1
            assert on_devices == array.nbytes * 8 // len(parts), (name, path)
        assert split >= (len(whole) if name == "fsdp" else 15) - 7, (name, split)


def check_generate(folder: Path) -> None:
    cuts: list[dict[str, Any]] = [{}, {"top_p": 0.8}, {}, {"top_k": 40, "top_p": 0.9}, {}]
    requests = [
        Request(p, SamplingParams(12, float(i % 2), seed=i, repetition_penalty=1.0 + i % 3 / 4, logprobs=i, **cuts[i]))
        for i, p in enumerate(prompts(5, SHAPES["vocab_size"]))
    ]
    # Of one shape wherever it is used: compiling is what takes time here.
    config = EngineConfig(8, 40, "fixed", rounds_per_dispatch=2)
    single = load_target(folder / "target")
    expected = generate(single, load_drafter(folder / "drafter", single), requests, engine=config)
    mesh = make_mesh(data=2, fsdp=4)
    for rules in RULES.values():
        target = load_target(folder / "target", mesh=mesh, rules=rules)
        drafter = load_drafter(folder / "drafter", target, mesh=mesh, rules=rules)
        found = generate(target, drafter, requests, engine=config)
        assert [g.tokens for g in found] == [g.tokens for g in expected]
        noted, alone = ([[n.logprob for n in g.logprobs] for g in made] for made in (found, expected))
        np.testing.assert_allclose(noted, alone, atol=1e-4)
        engine = Engine(target, drafter, config)
        engine.submit(0, requests[0])
        engine.step()
        for leaf in jax.tree.leaves((engine.state.target_cache, engine.state.draft)):
            assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // 8}
    # With a tensor axis fewer groups share the slots, and the caches are split by head as the layers are.
    mesh = make_mesh(data=4, tensor=2)
    target = load_target(folder / "target", mesh=mesh)
    engine = Engine(target, load_drafter(folder / "drafter", target, mesh=mesh), config)
    for i, request in enumerate(requests[:4]):
        engine.submit(i, request)
    done: dict[int, Any] = {}
    while not engine.idle:
        done |= {p.index: p.generation for p in engine.step() if p.generation is not None}
        for leaf in jax.tree.leaves((engine.state.target_cache, engine.state.draft)):
            assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // 8}
    assert [done[i].tokens for i in range(4)] == [g.tokens for g in expected[:4]]
    check_text(engine)


def check_pages(folder: Path) -> None:
    """Pages split by kv head: the answers of one device, each device has every page of its heads, and no round copies
    or exchanges a pool. Requests have to leave for want of pages, and go on."""
    requests = [
        Request(p, SamplingParams(20, float(i % 2), seed=i)) for i, p in enumerate(prompts(6, SHAPES["vocab_size"]))
    ]
    config = EngineConfig(4, 40, "fixed", rounds_per_dispatch=2, cache_pages=9, page=8)
    single = load_target(folder / "target")
    drafter = load_drafter(folder / "drafter", single)
    expected = generate(single, drafter, requests, engine=replace(config, cache_pages=0))

    mesh = make_mesh(data=4, tensor=2)
    target = load_target(folder / "target", mesh=mesh)
    engine = Engine(target, load_drafter(folder / "drafter", target, mesh=mesh), config)
    for i, request in enumerate(requests):
        engine.submit(i, request)
    done: dict[int, Any] = {}
    while not engine.idle:
        done |= {p.index: p.generation for p in engine.step() if p.generation is not None}
        caches = engine.state.target_cache, engine.state.draft
        for cache in (x for x in jax.tree.leaves(caches, is_leaf=is_paged) if is_paged(x)):
            for pool in jax.tree.leaves(cache.layers):
                assert {shard.data.shape for shard in pool.addressable_shards} == {(9, 8, pool.shape[2] // 2)}
            assert cache.tables.sharding.is_fully_replicated
    assert [done[i].tokens for i in range(6)] == [g.tokens for g in expected] and engine.memory.preempted

    limits = jax.numpy.int32(8), jax.numpy.asarray(False)
    program = run_rounds.lower(engine.loop, engine.params, engine.state, engine.occupancy, *limits).compile()
    text = program.as_text() or ""
    exchanged = {shape for line in text.splitlines() for shape, _ in collective_parts(line)}
    assert exchanged and not [shape for shape in exchanged if shape[:2] == (9, 8)]
    pools = [leaf for leaf in jax.tree.leaves((engine.state.target_cache, engine.state.draft)) if leaf.ndim == 3]
    assert pools and not copies(text, {leaf.sharding.shard_shape(leaf.shape) for leaf in pools})


def check_text(engine: Engine) -> None:
    """A round on a tensor axis sorts nothing, and exchanges no row of logits and no cache, in any of its branches."""
    limits = jax.numpy.int32(8), jax.numpy.asarray(False)
    program = run_rounds.lower(engine.loop, engine.params, engine.state, engine.occupancy, *limits).compile()
    text = program.as_text() or ""
    exchanged = {shape for line in text.splitlines() for shape, _ in collective_parts(line)}
    # Packed rows move between groups of slots, each with the part of its logits that the device has.
    assert exchanged and not [shape for shape in exchanged if SHAPES["vocab_size"] in shape]
    assert not [shape for shape in exchanged if len(shape) == 4 and engine.loop.size in shape]
    assert " sort(" not in text
    caches = jax.tree.leaves((engine.state.target_cache, engine.state.draft))
    assert not copies(text, {leaf.sharding.shard_shape(leaf.shape) for leaf in caches})
    found = LoopText.of(text, SHAPES["hidden_size"])
    greedy, sampled = found.round(greedy=True), found.round(greedy=False)
    assert 0 < greedy.rows == sampled.rows and 0 < greedy.others < sampled.others


if __name__ == "__main__":
    assert jax.device_count() == 8
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        {"load": check_load, "generate": check_generate, "pages": check_pages}[sys.argv[1]](Path(name))
