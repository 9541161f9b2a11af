"""Golden checks of DeepSeek-V4: the target, rollback by length alone, DSpark's stages, MTP-1, stored formats.

Tolerances are the case's own (meta.json). Ids, selected experts and entries must be equal.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.checkpoints.drafters import load_drafter, shared_tables
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.low_bit import decode_fp4, decode_fp8, e8m0_values
from dspark_jax.drafters.deepseek_v4.window import ring_positions
from dspark_jax.targets.attention import CachedBlock, CausalRows
from dspark_jax.targets.deepseek_v4.fake_quant import rotate_by_hadamard, round_index_rows, round_keys
from dspark_jax.targets.target import Target
from tests import golden_decode
from tests.forced import forced_blocks

Result = tuple[str, float, float, bool]
CACHE_SIZE = 512


class Vectors:
    """The arrays of a case, and comparisons at its tolerances."""

    def __init__(self, case: Path):
        self.arrays = np.load(case / "vectors.npz")
        tolerances = json.loads((case / "meta.json").read_text())["tolerances"]
        self.atol, self.rtol = tolerances["atol"], tolerances["rtol"]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays.files

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def groups(self, prefix: str) -> list[str]:
        """`target/p0`, `target/p1`, .. of the prefix `target/`."""
        names = [name for name in self.arrays.files if name.startswith(prefix) and name.count("/") == 2]
        return sorted({name.rsplit("/", 1)[0] for name in names})

    def close(self, name: str, found: Any, atol: float | None = None) -> Iterator[Result]:
        """Nothing for an array that the case leaves out."""
        if name in self:
            yield from self.close_to(name, found, self[name], atol)

    def close_to(self, name: str, found: Any, expected: Any, atol: float | None = None) -> Iterator[Result]:
        """Within atol + rtol |expected|: the error that is nearest to its tolerance."""
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        if found.shape != expected.shape:
            yield f"{name} shape {found.shape} for {expected.shape}", float("inf"), self.atol, False
            return
        error = np.abs(found - expected)
        allowed = (self.atol if atol is None else atol) + self.rtol * np.abs(expected)
        worst = np.unravel_index(np.argmax(error - allowed), error.shape)
        yield name, float(error[worst]), float(allowed[worst]), bool(np.all(error <= allowed))

    def exact(self, name: str, found: Any) -> Iterator[Result]:
        if name not in self:
            return
        found, expected = np.asarray(found), self[name]
        same = found.shape == expected.shape and bool(np.array_equal(found, expected))
        yield name, 0.0 if same else 1.0, 0.0, same


def check_target(case: Path) -> Iterator[Result]:
    """`target/*`, `rollback/*` and `greedy/*` of each folder that holds the target."""
    vectors = Vectors(case)
    for folder in ("target", "hf"):
        if (case / folder / "config.json").exists():
            target = load_target(case / folder, dtype="float32", tokenizer=False)
            label = "" if folder == "target" else f"{folder}: "
            for check in (_check_prompts, _check_rollback, _check_greedy):
                yield from ((label + name, *rest) for name, *rest in check(vectors, target))


def _check_prompts(vectors: Vectors, target: Target) -> Iterator[Result]:
    taps = tuple(target.hf_config.get("dspark_target_layer_ids") or ())

    @jax.jit
    def run(params: dict, ids: jax.Array) -> Any:
        model = target.model(params)
        positions = jnp.arange(ids.shape[1])[None]
        out = model(ids, positions, CausalRows(), taps)
        return model.logits(out.hidden), out.hidden, out.taps, list(model.blocks(ids, positions, CausalRows()))

    for group in vectors.groups("target/"):
        ids = jnp.asarray(vectors[f"{group}/input_ids"][None], jnp.int32)
        logits, hidden, tapped, blocks = run(target.params, ids)
        yield from vectors.close(f"{group}/logits", logits[0])
        yield from vectors.close(f"{group}/last_hidden", hidden[0])
        if taps:
            yield from vectors.close(f"{group}/taps", tapped[0])
        yield from vectors.close(f"{group}/streams", jnp.stack([block.streams[0] for block in blocks]))
        experts = np.sort(np.stack([block.experts[0] for block in blocks]), axis=-1)
        yield from vectors.exact(f"{group}/experts", experts)
        for layer, block in enumerate(blocks):
            if f"{group}/layer{layer}_entries" in vectors:
                found = attended_entries(
                    np.asarray(block.attended[0]), vectors[f"{group}/layer{layer}_entries"].shape[1]
                )
                yield from vectors.exact(f"{group}/layer{layer}_entries", found)


def attended_entries(attended: np.ndarray, width: int) -> np.ndarray:
    """[T, width] indices of the attended entries [T, N], ascending, -1 padded."""
    rows = np.full((len(attended), width), -1)
    for row, seen in zip(rows, attended, strict=True):
        index = np.flatnonzero(seen)
        row[: len(index)] = index
    return rows


class Decoder:
    """A request decoded in blocks of up to `width` rows, of which any number is kept."""

    def __init__(self, target: Target, width: int, size: int = CACHE_SIZE):
        self.target, self.width, self.size, self.length = target, width, size, 0
        self.cache: Any = None

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Logits [T, V] of a prompt, all of which is kept."""
        fixed = self.target.graphdef, self.width, self.size
        logits, self.cache = _prefill(*fixed, self.target.params, jnp.asarray(ids[None], jnp.int32))
        self.length = len(ids)
        return np.asarray(logits[0])

    def feed(self, ids: np.ndarray, kept: int) -> np.ndarray:
        """Logits of rows behind what is kept; the first `kept` of them stay."""
        block = np.zeros((1, self.width), np.int32)
        block[0, : len(ids)] = ids
        start = jnp.asarray([self.length], jnp.int32)
        graphdef, params = self.target.graphdef, self.target.params
        logits, self.cache = _step(graphdef, params, self.cache, jnp.asarray(block), start)
        self.length += kept
        return np.asarray(logits[0, : len(ids)])


def forget_traces() -> None:
    """For tests that change what a decoder is made of: the next one is traced anew."""
    _prefill.clear_cache()
    _step.clear_cache()


# Of the module and not of a decoder, so that decoders of one target share what is traced and compiled.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(graphdef: nnx.GraphDef, width: int, size: int, params: dict, ids: jax.Array) -> Any:
    model: Any = nnx.merge(graphdef, params)
    out = model(ids, jnp.arange(ids.shape[1])[None], CausalRows())
    cache = model.empty_cache(1, size, width, jnp.float32)
    at = jnp.zeros((1,), jnp.int32)
    return model.logits(out.hidden), model.insert(cache, out.kv, at, at, at + ids.shape[1])


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(graphdef: nnx.GraphDef, params: dict, cache: Any, block: jax.Array, starts: jax.Array) -> Any:
    model: Any = nnx.merge(graphdef, params)
    positions = starts[:, None] + jnp.arange(block.shape[1])
    out = model(block, positions, CachedBlock(cache, starts))
    return model.logits(out.hidden), model.append(cache, out.kv, starts)


def _check_rollback(vectors: Vectors, target: Target) -> Iterator[Result]:
    if "rollback/logits" not in vectors:
        return
    fed, kept = vectors["rollback/fed_counts"], vectors["rollback/kept_counts"]
    decoder = Decoder(target, int(fed.max()))
    decoder.prefill(vectors["rollback/prompt_ids"])
    blocks = np.split(vectors["rollback/fed_ids"], np.cumsum(fed)[:-1])
    found = [decoder.feed(block, int(count)) for block, count in zip(blocks, kept, strict=True)]
    yield from vectors.close("rollback/logits", np.concatenate(found))


def _check_greedy(vectors: Vectors, target: Target) -> Iterator[Result]:
    for group in vectors.groups("greedy/"):
        prompt, expected = vectors[f"{group}/prompt_ids"], vectors[f"{group}/output_ids"]
        decoder = Decoder(target, 1)
        tokens = [*prompt, int(np.argmax(decoder.prefill(prompt)[-1]))]
        while len(tokens) < len(expected):
            tokens.append(int(np.argmax(decoder.feed(np.asarray(tokens[-1:]), 1)[0])))
        yield from vectors.exact(f"{group}/output_ids", tokens)


def check_formats(case: Path) -> Iterator[Result]:
    """Stored bytes to values, and the rounding of caches."""
    vectors = Vectors(case)
    e4m3 = np.dtype(jnp.float8_e4m3fn)
    if "e4m3/bytes" in vectors:
        codes = vectors["e4m3/bytes"].astype(np.uint8).view(e4m3)
        yield from vectors.close("e4m3/values", np.nan_to_num(codes.astype(np.float32), nan=-999))
    if "e8m0/bytes" in vectors:
        yield from vectors.close("e8m0/values", e8m0_values(vectors["e8m0/bytes"].astype(np.uint8)))
    for kind in ("fp8", "fp4"):
        for group in vectors.groups(f"{kind}/"):
            codes, scales = (vectors[f"{group}/{part}_bytes"].astype(np.uint8) for part in ("weight", "scale"))
            found = decode_fp8(codes.view(e4m3), scales) if kind == "fp8" else decode_fp4(codes, scales)
            rows = vectors[f"{group}/rows"] if f"{group}/rows" in vectors else slice(None)
            yield from vectors.close(f"{group}/values", found[rows])
    if "fake/kv_in" in vectors:
        yield from vectors.close("fake/kv_out", round_keys(jnp.asarray(vectors["fake/kv_in"]), 0))
    if "fake/index_in" in vectors:
        rows = jnp.asarray(vectors["fake/index_in"])
        yield from vectors.close("fake/index_rotated", rotate_by_hadamard(rows), 1e-5)
        yield from vectors.close("fake/index_out", round_index_rows(rows), 1e-5)


def check_dspark(case: Path) -> Iterator[Result]:
    """`draft/*` and the first rounds of `infer/*`: one proposal each from given taps."""
    vectors = Vectors(case)
    target = load_target(case / "target", dtype="float32", tokenizer=False)
    drafter = load_drafter(case / "target", target, dtype="float32")
    shared = shared_tables(target)

    @jax.jit
    def run(params: dict, taps: jax.Array, anchor: jax.Array) -> Any:
        model = drafter.model(params)
        length = taps.shape[1]
        positions = jnp.arange(length)[None]
        state = model.prefill(shared, taps, jnp.zeros((1, length), jnp.int32), jnp.asarray([length]))
        end = jnp.asarray([length])
        allowed = ring_positions(model.window, end) >= 0
        streams, hidden = model.stream_states(shared, state, allowed, anchor, end)
        drafts = model.draft(shared, state, anchor, end, _greedy)
        previous = jnp.concatenate([anchor[:, None], drafts.tokens[:, :-1]], axis=1)
        forced = forced_blocks(model, shared, model.train_context(shared, taps, None), previous[:, None], end[:, None])
        found = {
            "context": model.main_context(taps)[0],
            "context_kv": jnp.stack([keys[0, -model.window :] for keys in model.context_keys(taps, positions)]),
            "streams": jnp.stack([stage[0] for stage in streams]),
            "hidden": hidden[0],
            "base_logits": model.base_logits(shared, hidden)[0],
            "corrected_logits": forced.logits[0, 0],
            "confidence_logits": drafts.confidence[0],
            "draft_tokens": drafts.tokens[0],
        }
        return found, forced.confidence[0, 0]

    for group in vectors.groups("draft/"):
        anchor = jnp.asarray(vectors[f"{group}/anchor_token"].reshape(1), jnp.int32)
        found, forced = run(drafter.params, jnp.asarray(vectors[f"{group}/taps"][None]), anchor)
        for name, value in found.items():
            if name == "draft_tokens":
                yield from vectors.exact(f"{group}/{name}", value)
            else:
                yield from vectors.close(f"{group}/{name}", value)
        yield from vectors.close(f"{group}/confidence_logits", forced)


def check_mtp(case: Path) -> Iterator[Result]:
    """`mtp/*`: rows of an MTP block from given streams, at once and through the drafter's own state."""
    vectors = Vectors(case)
    target = load_target(case / "target", dtype="float32", tokenizer=False)
    drafter = load_drafter(case / "target", target, dtype="float32")
    shared = shared_tables(target)

    @jax.jit
    def run(params: dict, taps: jax.Array, tokens: jax.Array) -> Any:
        model = drafter.model(params)
        streams, hidden = model.sequence(shared, taps, tokens[:, 1:])
        rows = {"input": model.inputs(shared, taps, tokens[:, 1:]), "streams": streams, "hidden": hidden}
        return {**rows, "logits": model.logits(shared, hidden)}

    @jax.jit
    def draft(params: dict, taps: jax.Array, tokens: jax.Array) -> jax.Array:
        model, length = drafter.model(params), taps.shape[1]
        state = model.prefill(shared, taps, tokens[:, :-1], jnp.asarray([length]))
        return model.draft(shared, state, tokens[:, -1], jnp.asarray([length]), _raw).law[0, 0]

    for group in vectors.groups("mtp/"):
        taps = vectors[f"{group}/target_streams"]
        taps = jnp.asarray(taps.reshape(1, len(taps), -1))
        tokens = jnp.asarray(vectors[f"{group}/ids"][None], jnp.int32)
        for name, value in run(drafter.params, taps, tokens).items():
            yield from vectors.close(f"{group}/{name}", value[0])
        last = np.asarray(draft(drafter.params, taps, tokens))
        yield from vectors.close_to(f"{group}/logits drafted", last, vectors[f"{group}/logits"][-1])


def _greedy(logits: jax.Array, offset: int) -> tuple[jax.Array, jax.Array]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), jax.nn.softmax(logits)


def _raw(logits: jax.Array, offset: int) -> tuple[jax.Array, jax.Array]:
    """The logits themselves in place of the law."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits


def checks(case: Path) -> list[Any]:
    """Those that fit what the case holds."""
    groups = {name.split("/")[0] for name in np.load(case / "vectors.npz").files}
    found: list[Any] = [check_target]
    if "draft" in groups:
        found.append(check_dspark)
    if "mtp" in groups:
        found.append(check_mtp)
    if "decode_t0" in groups:
        found.append(check_transcripts)
    if "infer" in groups:
        found.append(check_rounds)
    return found


def check_transcripts(case: Path) -> Iterator[Result]:
    """`decode_t0/*`: rounds of the compiled loop, greedy, and their summary."""
    vectors = Vectors(case)
    target = load_target(case / "target", dtype="float32", tokenizer=False)
    drafter = load_drafter(case / "target", target, dtype="float32")
    yield from golden_decode.check_transcripts("decode_t0", vectors.arrays, target, drafter)


def check_rounds(case: Path) -> Iterator[Result]:
    """`infer/r0_*`, `infer/r1_*`, ..: what a round drafts from the taps of everything before it, by whole passes."""
    vectors = Vectors(case)
    target = load_target(case / "target", dtype="float32", tokenizer=False)
    drafter = load_drafter(case / "target", target, dtype="float32")
    shared = shared_tables(target)

    @jax.jit
    def forward(params: dict, ids: jax.Array) -> Any:
        model = target.model(params)
        out = model(ids, jnp.arange(ids.shape[1])[None], CausalRows(), drafter.config.target_layer_ids)
        return model.logits(out.hidden), out.taps

    @jax.jit
    def propose(params: dict, taps: jax.Array, tokens: jax.Array, length: jax.Array) -> Any:
        model = drafter.model(params)
        state = model.prefill(shared, taps, tokens, length)
        anchor = jnp.take_along_axis(tokens, length[:, None], axis=1)[:, 0]
        out = model.draft(shared, state, anchor, length, _raw)
        hidden = None if drafter.config.block_size == 1 else model.draft_hidden(shared, state, anchor, length)
        return out, hidden, None if hidden is None else model.base_logits(shared, hidden)

    tokens = [*vectors["infer/prompt_ids"].tolist(), int(vectors["infer/anchor_token"])]
    before, width = 0, len(tokens) + 64
    rounds = sum(name.startswith("infer/r") and name.endswith("_start") for name in vectors.arrays.files)
    for r in range(rounds):
        name, start = f"infer/r{r}", len(tokens) - 1
        yield from vectors.exact(f"{name}_start", start)
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(tokens)] = tokens
        _, taps = forward(target.params, jnp.asarray(padded))
        out, hidden, base = propose(drafter.params, taps, jnp.asarray(padded), jnp.asarray([start]))
        yield from vectors.close(f"{name}_context_features", taps[:, before:start])
        yield from vectors.exact(f"{name}_sampled_tokens", out.tokens)
        yield from vectors.close(f"{name}_corrected_logits", out.law)
        yield from vectors.close(f"{name}_draft_logits", out.law[:, 0])
        if hidden is not None:
            yield from vectors.close(f"{name}_head_hidden", hidden)
            yield from vectors.close(f"{name}_base_logits", base)
            yield from vectors.close(f"{name}_confidence_logits", out.confidence)
        drafts = np.asarray(out.tokens[0]).tolist()
        block = [tokens[-1], *drafts]
        yield from vectors.exact(f"{name}_verify_input_ids", [block])
        padded[0, start : start + len(block)] = block
        logits = np.asarray(forward(target.params, jnp.asarray(padded))[0])[:, start : start + len(block)]
        yield from vectors.close(f"{name}_target_logits", logits)
        best = np.argmax(logits[0], axis=-1)
        accepted = int(np.cumprod(np.asarray(drafts) == best[:-1]).sum())
        yield from vectors.exact(f"{name}_accepted", accepted)
        yield from vectors.exact(f"{name}_next_token", int(best[accepted]))
        before = start
        tokens += [*drafts[:accepted], int(best[accepted])]
