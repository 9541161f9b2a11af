"""Plans: what a device holds, from shapes alone; every configuration lowered for TPUs that are not here."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dspark_jax.checkpoints.huggingface import abstract_target
from dspark_jax.config.cli import load_config, mesh_settings
from dspark_jax.config.schema import MeshSettings, TrainConfig
from dspark_jax.errors import UserError
from dspark_jax.planning.compiled import collectives, wide_products
from dspark_jax.planning.estimate import estimate, shard_bytes
from dspark_jax.planning.floor import step_floor
from dspark_jax.planning.liveness import peak_bytes
from dspark_jax.planning.published_targets import PUBLISHED
from dspark_jax.planning.traffic import collectives_of
from dspark_jax.planning.training import AbstractRun
from dspark_jax.roofline.hardware import known_device, total
from dspark_jax.sharding import ShardingRules, abstract_mesh, array_sharding, gathered, make_mesh
from dspark_jax.targets.registry import read_target_config
from dspark_jax.training.spec import micro_batches
from tests.lowered import lowers, planned
from train import plan
from train.bench.__main__ import preset

ROOT = Path(__file__).parents[1]
# One of every kind and of every family.
WIDE = ("embedded_mtp", "gemma4_12b_dspark", "qwen3_14b_dflash", "qwen3_4b_eagle3")


# On the largest mesh, which divides least, one of each kind and family; `python -m tests.lowered` lowers all on all,
# DeepSeek-V4's too, whose step takes half a minute to trace and has its shapes in test_v4_plans.
LOWERED = [(name, 256) for name in (*WIDE, "embedded_dflash2")] + [("qwen3_4b_dspark", 8)]


@pytest.mark.lowering
@pytest.mark.parametrize(("name", "devices"), LOWERED)
def test_configurations_lower_for_tpus(name: str, devices: int) -> None:
    assert lowers(name, devices)


@pytest.mark.lowering
def test_the_step_of_the_paper_lowers_for_tpus_and_gpus() -> None:
    run = AbstractRun.of(preset("qwen3_4b"), abstract_mesh(1))
    assert (run.batch["input_ids"].shape, run.spec.drafter.num_anchors) == ((1, 4096), 512)
    traced = run.step.trace(run.state, run.shared, run.batch)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        # The logits of 64 blocks of 7 at a time, and never those of all 512.
        assert re.search(r"<1x64x7x151936xf32>", text) and not re.search(r"x(512x7|3584)x151936x", text)


@pytest.mark.parametrize("name", WIDE)
def test_estimates_of_every_kind(name: str) -> None:
    parts = estimate(planned(name, 256))
    assert min(parts.values()) >= 0 and parts["activations"] > 0
    assert parts["total"] == sum(parts.values()) / 2


def test_an_online_run_holds_the_target_and_no_states() -> None:
    config, mesh = load_config("debug"), abstract_mesh(8, 1, 4, 2)
    stored = dataclasses.replace(config.data, accumulation_steps=0)
    made = dataclasses.replace(stored, source="online", conversations="c.jsonl", packing=True)
    offline, online = (AbstractRun.of(dataclasses.replace(config, data=data), mesh) for data in (stored, made))
    assert set(online.batch) == {"input_ids", "loss_mask", "lengths", "segments"}
    few, many = estimate(offline), estimate(online)
    assert many["batch"] < few["batch"] and few["target's other parameters"] == 0
    tables = online.shared.embed.size * 4
    assert (bytes_of(online.target_params) - tables) / 8 <= many["target's other parameters"]
    assert many["activations"] > few["activations"] and many["target's layers, gathered"] > 0
    online.lower("tpu")


def test_collectives_are_counted_from_shapes() -> None:
    config = load_config("qwen3_4b_dspark")
    data = dataclasses.replace(config.data, source="online", conversations="c.jsonl", accumulation_steps=4)
    mesh = abstract_mesh(64, -1, 8)
    run = AbstractRun.of(dataclasses.replace(config, data=data, mesh=MeshSettings(data=-1, fsdp=8)), mesh)
    found = {one.name: one for one in collectives_of(run)}

    # Parameters and gradients travel once a step, the former in bfloat16 but for W_1, the latter as they added up.
    gathered_once, summed = found["drafter's parameters"], found["gradients, to where they are stored"]
    assert (gathered_once.kind, gathered_once.times, gathered_once.devices) == ("all-gather", 1, 8)
    assert (summed.kind, summed.times) == ("reduce-scatter", 1)
    assert summed.size == pytest.approx(2 * gathered_once.size, rel=0.1)
    assert found["their parts"].size * 8 == summed.size and found["their parts"].span == 64
    # Each of 36 layers in each micro-batch: queries, keys, values and output, gate, up and down, norms.
    layer = 2560 * (2 * 32 + 2 * 8) * 128 + 3 * 2560 * 9728 + 2 * 2560
    one_by_one = found["target's layers, one by one"]
    assert one_by_one.times == 4 * 36 and one_by_one.size == pytest.approx(2 * layer, rel=1e-3)
    # A ring sends all but the device's own part; over machines, by the network.
    assert gathered_once.sent == gathered_once.size * 7 / 8
    h200 = known_device("NVIDIA H200")
    assert h200 is not None and found["their parts"].seconds(h200, 8) == found["their parts"].sent / h200.network
    assert not collectives_of(AbstractRun.of(config, abstract_mesh(1)))


def test_an_online_steps_floor_has_the_targets_pass() -> None:
    config = load_config("qwen3_4b_dspark")
    data = dataclasses.replace(config.data, global_batch=1, accumulation_steps=1, conversations="c.jsonl")
    mesh = abstract_mesh(1)
    runs = [
        AbstractRun.of(dataclasses.replace(config, data=dataclasses.replace(data, source=source)), mesh)
        for source in ("offline", "online")
    ]
    offline, online = (total(step_floor(run) or []) for run in runs)
    # Two operations for each parameter of a layer and position, and the scores of half the positions.
    layer = 2560 * (2 * 32 + 2 * 8) * 128 + 3 * 2560 * 9728
    wanted = 36 * (2 * layer * 4096 + 4 * 4096 * 4097 / 2 * 32 * 128)
    assert online.flops - offline.flops == pytest.approx(wanted)


def bytes_of(tree: object) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_what_is_stored_is_split_over_the_devices() -> None:
    run = planned("qwen3_4b_dspark", 64)
    parts, whole = estimate(run), bytes_of(run.state.params)
    # Nearly everything divides by fsdp (2), and heads, MLPs and vocabularies by tensor (2) as well.
    assert whole / 4 <= parts["parameters"] < 0.28 * whole
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=1e-3)
    assert parts["gradients"] >= 2 * parts["parameters, gathered for a step"] > 2 * parts["parameters"]
    assert parts["batch"] == bytes_of(run.batch) / 32
    assert parts["target's embedding and head"] == 151936 * 2560 * 2 / 4  # tied: one array
    replicated = estimate(planned("qwen3_4b_dspark", 64, markov_tables="replicated"))
    table = 151936 * 256 * 4
    # W_1 is whole then, and W_2, which lies with the head, is split by tensor alone.
    assert replicated["parameters"] - parts["parameters"] == (table - table / 4) + (table / 2 - table / 4)


def test_what_a_device_stores_is_what_the_compiler_takes_as_arguments() -> None:
    run = AbstractRun.of(load_config("debug"), make_mesh(devices=jax.devices()[:1]))
    memory = run.step.trace(run.state, run.shared, run.batch).lower().compile().memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(stored(estimate(run)), rel=0.01)


def test_the_estimate_is_near_what_a_gpus_compiler_takes() -> None:
    """Read for an H200 by `train.studies.compiled`: a CPU's compiler fuses less, and holds half as much again."""
    read = json.loads((ROOT / "docs/results/compiled.json").read_text())["train"]["h200"]
    parts = estimate(AbstractRun.of(preset("qwen3_4b"), abstract_mesh(1)))
    assert stored(parts) == pytest.approx(read["arguments_gib"] * 2**30, rel=0.01)
    assert 0.7 < (parts["gradients"] + parts["activations"]) / (read["temporaries_gib"] * 2**30) < 1.5


def stored(parts: dict[str, int]) -> int:
    """Bytes of a step's arguments; a tied table is handed over as embedding and as head."""
    return parts["parameters"] + parts["optimizer"] + parts["batch"] + 2 * parts["target's embedding and head"]


def test_liveness_of_loops_fusions_and_last_uses() -> None:
    def size(aval: object) -> int:
        return math.prod(aval.shape)

    x = jnp.zeros((10, 10))
    # The cosine is fused into the product's operand, which is read whole; the first product dies at the second.
    assert peak_bytes(jax.make_jaxpr(lambda x: jnp.dot(jnp.cos(x) + 1, x))(x), size) == 200
    assert peak_bytes(jax.make_jaxpr(lambda x: jnp.sum(jnp.cos(x) + 1))(x), size) == 1
    assert peak_bytes(jax.make_jaxpr(lambda x: ((x @ x) @ x) @ x)(x), size) == 200

    def loop(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(lambda total, row: (total + (x @ x) @ row, total), x[0], x)

    # The first carry, the loop's two results, and in its body both products.
    assert peak_bytes(jax.make_jaxpr(loop)(x), size) == 10 + (10 + 100) + (100 + 10)


def test_rules_split_what_divides_and_gather_what_is_stored_split() -> None:
    mesh, rules = abstract_mesh(8, 1, 4, 2), ShardingRules()
    spec = array_sharding((6, 8), ("vocab", "embed"), mesh, rules)
    assert spec.shard_shape((6, 8)) == (3, 2) and gathered(spec, rules).shard_shape((6, 8)) == (3, 8)
    assert array_sharding((5, 6), ("vocab", "embed"), mesh, rules).shard_shape((5, 6)) == (5, 6)
    markov = ("markov_vocab", "rank")
    assert array_sharding((6, 8), markov, mesh, rules).shard_shape((6, 8)) == (6, 8)
    assert array_sharding((6, 8), markov, mesh, rules.sharded_markov()).shard_shape((6, 8)) == (3, 2)
    assert shard_bytes(jax.ShapeDtypeStruct((6, 8), jnp.bfloat16), spec) == 12
    with pytest.raises(UserError, match="ShardingRules puts both 'vocab' and 'heads' .* on mesh axis 'tensor'"):
        rules.spec(("vocab", "heads"))
    with pytest.raises(UserError, match="ShardingRules has no logical axis 'vocabulary'; it knows .*vocab"):
        rules.spec(("vocabulary",))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((3, 1, 1), "A mesh of data=3 x fsdp=1 x expert=1 x tensor=1 does not fit 8 devices"),
        ((-1, 3, 1), "does not fit 8 devices"),
        ((-1, 1, -1), "Only one mesh axis can be -1 .* data and tensor are"),
    ],
)
def test_meshes_that_do_not_fit(sizes: tuple[int, int, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        abstract_mesh(8, *sizes)


def test_micro_batches_follow_the_mesh() -> None:
    data = load_config("qwen3_4b_dspark").data
    assert [micro_batches(data, abstract_mesh(n, -1, 4, t)) for n, t in ((8, 1), (64, 1), (256, 1), (64, 8))] == [
        64, 8, 2, 64,
    ]  # fmt: skip
    fixed = dataclasses.replace(data, accumulation_steps=64)
    with pytest.raises(UserError, match="A micro-batch of 8 sequences .* cannot be shared by 64 devices evenly"):
        micro_batches(fixed, abstract_mesh(64, -1, 4, 1))
    with pytest.raises(UserError, match="A micro-batch of 512 sequences .* cannot be shared by 1024 devices"):
        micro_batches(data, abstract_mesh(1024))


def test_the_mesh_option() -> None:
    assert mesh_settings("data=16,fsdp=4", MeshSettings()) == MeshSettings(data=16, fsdp=4, tensor=1)
    assert mesh_settings("fsdp=-1", MeshSettings()) == MeshSettings(data=1, fsdp=-1)
    for text in ("data:16", "rows=2", "data=", "data=x"):
        with pytest.raises(
            UserError, match=f"--mesh is '{text}'; sizes of data, fsdp, tensor and expert were expected"
        ):
            mesh_settings(text, MeshSettings())


def test_the_program_prints_a_plan_and_writes_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--devices", "64", "--mesh", "data=16,fsdp=4", "--data.max-length", "1024"]
    plan.main(["--config", "qwen3_4b_eagle3", *options])
    printed = capsys.readouterr().out
    assert (
        "data 16 x fsdp 4 x expert 1 x tensor 1" in printed
        and "activations" in printed
        and "float32 products" in printed
        and "524,288" in printed
    )
    assert not list(tmp_path.iterdir())
    for words, said in (
        ("--mesh data=3 --devices 8", "does not fit 8 devices"),
        ("--device 8", "Unknown option --device"),
        ("--topology v9:2x2", "--topology is 'v9:2x2'; a kind of TPU"),
        ("--topology v5e:2x2 --devices 8", "leave out --devices"),
    ):
        with pytest.raises(SystemExit) as stop:
            plan.main(["--config", "qwen3_4b_eagle3", *words.split()])
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_published_shapes() -> None:
    """Parameter counts follow from them: 8.2 billion (Qwen3-8B), of which 6.95 not in embeddings, by its card."""
    _, shapes = abstract_target(read_target_config(PUBLISHED["Qwen/Qwen3-8B"]), "bfloat16")
    total = sum(x.size for x in jax.tree.leaves(shapes))
    assert (round(total / 1e9, 1), round((total - 2 * 151936 * 4096) / 1e9, 2)) == (8.2, 6.95)


def test_collectives_are_counted_with_their_bytes() -> None:
    program = """
      %a = f32[8,128]{1,0} all-gather(%p), dimensions={0}
      %b = (bf16[4]{0}, bf16[1024,1024]{1,0}) all-reduce-start(%q, %r)
      %c = bf16[4]{0} all-reduce-done(%b)
      %d = (f8e4m3fn[1024,1024]{1,0:T(8,128)(4,1)}, pred[1024,1024]{1,0}, token[]) all-to-all(%s, %t)
      %e = c128[256,256]{1,0} collective-permute(%u)
    """
    assert collectives(program) == {
        "all-gather": "1 of 0.0 MiB",
        "all-reduce": "1 of 2.0 MiB",
        "all-to-all": "1 of 2.0 MiB",
        "collective-permute": "1 of 1.0 MiB",
    }


def test_float32_products_are_counted_by_their_larger_operand() -> None:
    x, narrow = jnp.zeros((512, 512)), jnp.zeros((512, 512), jnp.bfloat16)
    # The operands of the third take 2 KiB each; in the fourth, one is widened.
    lowered = jax.jit(lambda x, n: (x @ x, n @ n, n.astype(jnp.float32)[:1] @ x[:, :1], n @ x)).lower(x, narrow)
    assert wide_products(lowered.as_text()) == (2, 4)
    assert wide_products(lowered.as_text(), least=2048) == (3, 4)


def test_asynchronous_collectives_are_counted_by_their_results() -> None:
    """The text of a start holds the operands' shapes before the results', in XLA's own notation."""
    program = """
      %a = (bf16[256,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) all-gather-start(%p), dimensions={0}
      %b = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-gather-done(%a)
      %c = ((f32[4]{0}, f32[8]{0}), (f32[512,512]{1,0}, f32[512,512]{1,0})) all-gather-start(%q, %r), dimensions={0}
      %d = (s8[1024,1024]{1,0}, s8[1024,1024]{1,0}, u32[], u32[]) collective-permute-start(%s)
    """
    assert collectives(program) == {"all-gather": "2 of 4.0 MiB", "collective-permute": "1 of 1.0 MiB"}


def test_recipes_of_the_paper() -> None:
    layers = {"qwen3_4b": (1, 9, 17, 25, 33), "qwen3_8b": (1, 9, 17, 25, 33), "qwen3_14b": (1, 10, 19, 28, 37),
              "gemma4_12b": (5, 17, 29, 41, 46)}  # fmt: skip
    for target, taps in layers.items():
        for kind, depth, loss in (("dspark", 5, (0.1, 0.9, 1.0)), ("dflash", 5, (1.0, 0.0, 0.0)), ("eagle3", 1, None)):
            config: TrainConfig = load_config(f"{target}_{kind}")
            drafter = config.drafter
            assert (drafter.kind, drafter.num_layers, drafter.target_layer_ids) == (kind, depth, taps)
            assert (drafter.block_size, drafter.num_anchors, config.data.accumulation_steps) == (7, 512, 0)
            terms = (config.loss.ce_alpha, config.loss.l1_alpha, config.loss.confidence_alpha)
            assert loss is None or terms == loss
            assert (config.data.global_batch, config.data.max_length, config.epochs) == (512, 4096, 10)
            assert PUBLISHED[config.target]["num_hidden_layers"] > max(taps) + 1
