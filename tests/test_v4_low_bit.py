"""DeepSeek-V4's fp8 and fp4 weights kept in memory as stored: the same values, and no stack of widened experts."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from dspark_jax.checkpoints.deepseek_v4_published import save_v4_target
from dspark_jax.checkpoints.drafters import load_drafter, save_drafter, shared_tables
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.low_bit import CodeTensor, decode_fp4, encode_fp4
from dspark_jax.errors import UserError
from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.deepseek_v4.experts import clamped_swiglu
from dspark_jax.targets.expert_tiles import PackedExperts, experts_by_tile, tile_rows
from dspark_jax.targets.low_bit import CODES, SCALES, Fp4Experts, Fp8Weight, PackedMatrix
from dspark_jax.targets.moe import ExpertStack, all_experts
from tests.test_v4_checkpoint import CASE, copied, same, stored


def activation(gate: jax.Array, up: jax.Array) -> jax.Array:
    return clamped_swiglu(gate, up, 0.8)


def packed(seed: int, experts: int, out: int, size: int) -> tuple[PackedMatrix, np.ndarray]:
    """(codes of random matrices, their values [E, out, size])."""
    rng = np.random.default_rng(seed)
    made = [encode_fp4(rng.normal(size=(out, size)).astype(np.float32)) for _ in range(experts)]
    values = np.stack([decode_fp4(*one) for one in made])
    codes, scales = (np.stack(parts) for parts in zip(*made, strict=True))
    turned = codes.transpose(0, 2, 1), scales.view(np.uint8).transpose(0, 2, 1)
    return PackedMatrix(*map(jnp.asarray, turned)), values


def test_parameters_are_the_codes_of_the_files_and_their_values_the_widened_ones() -> None:
    kept = load_target(CASE, dtype="float32", tokenizer=False)
    wide = load_target(CASE, dtype="float32", tokenizer=False, weights="widened")
    model, values = nnx.merge(kept.graphdef, kept.params), flatten_dict(wide.params)
    found = 0
    for path, part in nnx.iter_modules(model):
        if isinstance(part, Fp8Weight):
            assert part.codes.dtype == jnp.float8_e4m3fn
            np.testing.assert_array_equal(np.asarray(part[...], np.float32), values[path], err_msg=str(path))
        elif isinstance(part, Fp4Experts):
            # The identity through a product gives each expert's matrix, input-first as the parameter.
            eye = jnp.eye(part.codes.shape[1] * 2, dtype=jnp.float32)
            whole = [part.matrices.at(e).product(eye) for e in range(len(part.codes))]
            np.testing.assert_array_equal(np.stack(whole), values[path], err_msg=str(path))
        found += isinstance(part, Fp8Weight | Fp4Experts)
    # Input-first: a TPU's compiler would turn it round in every dispatch.
    last = model.layers[0].attention.ob_weight_god
    assert last.codes.shape == (last[...].shape[0] * last[...].shape[1], last[...].shape[2])
    assert found == 2 * (5 + 3 + 3) + 1  # of each layer attention, shared and routed experts, and one indexer
    held = sum(leaf.nbytes for path, leaf in flatten_dict(kept.params).items() if path[-1] in (CODES, SCALES))
    assert held == sum(
        np.prod(shape, dtype=int)
        for name, (dtype, shape) in stored(CASE).items()
        if dtype in ("F8_E4M3", "I8", "F8_E8M0") and not name.startswith("mtp.")
    )


@pytest.mark.parametrize(("rows", "experts"), [(5, 12), (70, 12)])
def test_tiles_are_the_sum_over_all_experts(rows: int, experts: int) -> None:
    """Experts without a row, with one tile and, as all rows choose one, with several; ids of other devices' experts
    add nothing."""
    matrices = [packed(i, experts, *shape) for i, shape in enumerate([(32, 64), (32, 64), (64, 32)])]
    kept = PackedExperts(*(codes for codes, _ in matrices))
    wide = ExpertStack(*(jnp.asarray(values.transpose(0, 2, 1)) for _, values in matrices))
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.standard_normal((rows, 64)), jnp.float32)
    chosen = np.stack([np.append(4, rng.permutation(np.delete(np.arange(experts), 4))[:2]) for _ in range(rows)])
    weights = rng.random((rows, 3)).astype(np.float32)
    run = jax.jit(lambda ids, shares: experts_by_tile(x, shares, ids, kept, activation))
    np.testing.assert_allclose(run(chosen, weights), all_experts(x, weights, chosen, wide, activation), atol=2e-4)
    elsewhere = np.where(chosen == chosen[0, 0], experts + 1, np.where(chosen == chosen[0, 1], -2, chosen))
    here = np.where(elsewhere == chosen, weights, 0)
    np.testing.assert_allclose(run(elsewhere, weights), all_experts(x, here, chosen, wide, activation), atol=2e-4)
    assert rows == 5 or rows > 2 * tile_rows(rows * 3, experts), "one expert's rows take three tiles"


def test_no_program_holds_the_widened_experts() -> None:
    """Temporaries of many rounds over a layer whose widened stack would take 24 MiB: one expert, and the rows."""
    experts, d, f = 64, 256, 256
    shapes = [(experts, f, d), (experts, f, d), (experts, d, f)]
    codes = [jax.ShapeDtypeStruct((e, i // 2, o), jnp.int8) for e, o, i in shapes]
    scales = [jax.ShapeDtypeStruct((e, i // 32, o), jnp.uint8) for e, o, i in shapes]

    def rounds(codes: list, scales: list, x: jax.Array, chosen: jax.Array) -> jax.Array:
        stack = PackedExperts(*map(PackedMatrix, codes, scales))
        weights = jnp.full(chosen.shape, 0.5, x.dtype)
        return jax.lax.fori_loop(0, 9, lambda _, x: experts_by_tile(x, weights, chosen, stack, activation), x)

    rows = jax.ShapeDtypeStruct((48, d), jnp.bfloat16), jax.ShapeDtypeStruct((48, 6), jnp.int32)
    memory: Any = jax.jit(rounds).lower(codes, scales, *rows).compile().memory_analysis()
    widened = sum(e * o * i * 2 for e, o, i in shapes)
    assert memory.temp_size_in_bytes < widened / 8, (memory.temp_size_in_bytes, widened)


def test_pairs_compute_alike_in_both_forms() -> None:
    """Logits of a prompt, and what the drafter makes of its taps; the drafter's blocks are held as the target's are."""
    ids, lengths, found = jnp.asarray([[3, 5, 7, 11, 2, 9]], jnp.int32), jnp.asarray([6]), []
    for weights in ("stored", "widened"):
        target = load_target(CASE, dtype="float32", tokenizer=False, weights=weights)
        drafter = load_drafter(CASE, target, dtype="float32")
        kinds = {leaf.dtype.name for leaf in jax.tree.leaves(drafter.params)}
        assert ("float8_e4m3fn" in kinds and "int8" in kinds) == (weights == "stored")
        shared = shared_tables(target)

        def run(params: dict, mine: dict, target: Any = target, drafter: Any = drafter, shared: Any = shared) -> Any:
            outer, model = target.model(params), drafter.model(mine)
            out = outer(ids, jnp.arange(6)[None], CausalRows(), drafter.config.target_layer_ids)
            state = model.prefill(shared, out.taps, ids, lengths)
            return outer.logits(out.hidden), model.draft_hidden(shared, state, jnp.asarray([4]), lengths)

        found.append(jax.jit(run)(target.params, drafter.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *found)


def test_codes_are_written_back_as_they_are(tmp_path: Path) -> None:
    target = load_target(CASE, tokenizer=False)
    drafter = load_drafter(CASE, target)
    save_v4_target(tmp_path / "target", target.hf_config, target.params, "published")
    save_drafter(tmp_path / "drafter", drafter, target)
    assert stored(tmp_path / "target") | stored(tmp_path / "drafter") == stored(CASE)
    again = load_target(tmp_path / "target", tokenizer=False)
    same(again.params, target.params)
    same(load_drafter(tmp_path / "drafter", again).params, drafter.params)
    with pytest.raises(UserError, match="is held as it is stored; load the model with weights='widened'"):
        save_v4_target(tmp_path / "other", target.hf_config, target.params, "float32")


def test_what_cannot_be_kept_gets_a_sentence(tmp_path: Path) -> None:
    wide = load_target(CASE, dtype="float32", tokenizer=False, weights="widened")
    save_v4_target(tmp_path / "float", wide.hf_config, wide.params, "float32")
    folder = copied(tmp_path)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (tmp_path / "float" / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"is not quantised, though config\.json says so; load .* weights='widened'"):
        load_target(folder, tokenizer=False)
    with pytest.raises(UserError, match="'stored', 'widened' or in 'int8' or 'fp8', not 'bfloat16'"):
        load_target(CASE, weights="bfloat16")  # type: ignore[arg-type]
    for codes in (np.full((2, 2), 0x7F, np.uint8).view(ml_dtypes.float8_e4m3fn),
                  np.full((2, 2), 255, np.uint8).view(ml_dtypes.float8_e8m0fnu)):  # fmt: skip
        with pytest.raises(UserError, match="that are not finite"):
            CodeTensor(codes, "w")[0:1]
