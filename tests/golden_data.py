"""Golden checks of the data path: chat parsing and DeepSpec's target cache (docs/algorithm.md, rules 82 to 88).

Each check takes a case folder and yields (name, max_abs_err, tolerance, ok). Ids, masks, texts and bytes must be equal:
their error is the largest difference, or infinity where the shapes differ.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.data.chat import Encoded, encode_prompt
from dspark_jax.data.deepspec_cache import DeepSpecCache, DeepSpecCacheWriter
from dspark_jax.data.deepspec_chat import DEEPSPEC_FORMATS
from dspark_jax.data.pipeline import pad_batch
from dspark_jax.data.records import Sample
from dspark_jax.data.templates import render
from dspark_jax.data.tokenizers import load_tokenizer

Result = tuple[str, float, float, bool]


def exact(name: str, found: Any, expected: Any) -> Result:
    """Compares arrays, numbers or anything with == at tolerance zero."""
    try:
        a, b = np.asarray(found), np.asarray(expected)
        if a.shape == b.shape and a.dtype.kind in "iuf" and b.dtype.kind in "iuf":
            error = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))
            return name, error, 0.0, bool(np.array_equal(a, b))
    except ValueError:
        pass
    ok = bool(np.array_equal(np.asarray(found, dtype=object), np.asarray(expected, dtype=object)))
    return name, 0.0 if ok else math.inf, 0.0, ok


def check_chat(case_dir: str | Path) -> Iterator[Result]:
    """The case `chat_template`: rendered text, ids, masks, prompts and the collator, per template."""
    case = Path(case_dir)
    vectors = json.loads((case / "vectors.json").read_text())
    templates = sorted({c["template"] for c in vectors["cases"]})
    tokenizers = {name: load_tokenizer(case / f"tokenizer_{name}") for name in templates}
    for entry in vectors["cases"]:
        name, tokenizer = entry["template"], tokenizers[entry["template"]]
        label = f"{name}/{entry['name']}/{entry['max_length']}"
        parser = DEEPSPEC_FORMATS[name]
        encoded = parser.encode(tokenizer, entry["conversations"], entry["max_length"])
        yield exact(f"{label}/rendered", parser.render(tokenizer, entry["conversations"]), entry["rendered"])
        yield exact(f"{label}/input_ids", encoded.input_ids, entry["input_ids"])
        yield exact(f"{label}/loss_mask", encoded.loss_mask, entry["loss_mask"])
        masked = tokenizer.decode(encoded.input_ids[encoded.loss_mask > 0].tolist())
        yield exact(f"{label}/masked_text", masked, entry["masked_text"])
    for number, entry in enumerate(vectors.get("generation_prompts", [])):
        name = entry["template"]
        thinking = entry["enable_thinking"]  # null: the template's own default
        switches = {} if thinking is None else {"enable_thinking": thinking}
        text = render(tokenizers[name], entry["messages"], add_generation_prompt=True, **switches)
        yield exact(f"{name}/prompt{number}/rendered", text, entry["rendered"])
        ids = tokenizers[name](text, add_special_tokens=False)["input_ids"]
        if thinking is not None:
            ours = encode_prompt(tokenizers[name], entry["messages"], thinking)
            yield exact(f"{name}/prompt{number}/encode_prompt", ours, entry["input_ids"])
        yield exact(f"{name}/prompt{number}/input_ids", ids, entry["input_ids"])
    for entry in vectors.get("collator", []):
        yield from _check_collator(entry, vectors["cases"], tokenizers)


def check_target_cache(case_dir: str | Path) -> Iterator[Result]:
    """The case `target_cache`: the reader's arrays bit for bit, a padded batch, and the writer's files."""
    case = Path(case_dir)
    vectors = np.load(case / "vectors.npz")
    meta = json.loads((case / "meta.json").read_text())
    cache = DeepSpecCache(case / "cache")
    yield exact("len", len(cache), len(meta["index_records"]))
    for index, record in enumerate(meta["index_records"]):
        sample, key = cache[index], f"read/{index}"
        yield exact(f"{key}/sample_id", sample.sample_id, record["sample_id"])
        yield exact(f"{key}/input_ids", sample.input_ids, vectors[f"{key}/input_ids"])
        yield exact(f"{key}/loss_mask", sample.loss_mask, vectors[f"{key}/loss_mask"])
        for name, array in (("hidden_states", sample.features), ("last_hidden_states", sample.last_hidden)):
            found = np.ascontiguousarray(array).view(np.uint16)
            yield exact(f"{key}/target_{name}_bits", found, vectors[f"{key}/target_{name}_bits"])
    yield from _check_batches(cache, vectors)
    yield from _check_writer(cache, case / "cache", vectors, meta)


def _check_collator(entry: Mapping[str, Any], cases: list[Any], tokenizers: Mapping[str, Any]) -> Iterator[Result]:
    name = entry.get("template", "qwen")
    conversations = {c["name"]: c["conversations"] for c in cases if c["template"] == name}
    samples = [
        DEEPSPEC_FORMATS[name].encode(tokenizers[name], conversations[c], entry["max_length"])
        for c in entry["conversation_order"]
    ]
    batch = _collated(samples, entry["min_loss_tokens"])
    label = f"{name}/collator/min{entry['min_loss_tokens']}"
    if entry["batch"] is None or batch is None:
        yield exact(f"{label}/dropped", batch is None, entry["batch"] is None)
        return
    for field, expected in entry["batch"].items():
        yield exact(f"{label}/{field}", batch[field], expected)


def _collated(samples: Sequence[Encoded], min_loss_tokens: int) -> dict[str, np.ndarray] | None:
    """Right-padded with zeros, or None when every sample has fewer than `min_loss_tokens` supervised tokens."""
    kept = [s for s in samples if s.loss_tokens >= min_loss_tokens]
    if not kept:
        return None
    shape = (len(kept), max(len(s.input_ids) for s in kept))
    batch = {name: np.zeros(shape, int) for name in ("input_ids", "attention_mask", "loss_mask")}
    for row, sample in enumerate(kept):
        length = len(sample.input_ids)
        batch["input_ids"][row, :length] = sample.input_ids
        batch["attention_mask"][row, :length] = 1
        batch["loss_mask"][row, :length] = sample.loss_mask
    return batch


def _check_batches(cache: DeepSpecCache, vectors: Mapping[str, np.ndarray]) -> Iterator[Result]:
    names = {
        "input_ids": "input_ids",
        "loss_mask": "loss_mask",
        "features": "target_hidden_states",
        "last_hidden": "target_last_hidden_states",
    }
    for group in sorted({key.split("/")[0] for key in vectors if key.startswith("collate")}):
        samples = [cache[int(digit)] for digit in group.removeprefix("collate")]
        batch = pad_batch(samples, max(len(s.input_ids) for s in samples))
        for ours, theirs in names.items():
            expected = vectors[f"{group}/{theirs}"]
            yield exact(f"{group}/{theirs}", batch[ours].astype(expected.dtype), expected)
        mask = np.arange(batch["input_ids"].shape[1]) < batch["lengths"][:, None]
        yield exact(f"{group}/attention_mask", mask.astype(np.int64), vectors[f"{group}/attention_mask"])


def _check_writer(
    cache: DeepSpecCache, files: Path, vectors: Mapping[str, np.ndarray], meta: Mapping[str, Any]
) -> Iterator[Result]:
    free = {
        k: cache.manifest[k]
        for k in ("exp_name", "git_sha", "project_name", "source_jsonl_paths")
        if k in cache.manifest
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cache"
        writer = DeepSpecCacheWriter(out, cache.spec, meta["max_shard_bytes"], free)
        for index in range(len(cache)):
            arrays = [vectors[f"in/{index}/{name}"] for name in ("input_ids", "loss_mask", "target_hidden_states")]
            writer.add(Sample(index, *arrays, vectors[f"in/{index}/target_last_hidden_states"]))
        writer.finish()
        yield exact("write/files", sorted(p.name for p in out.iterdir()), sorted(p.name for p in files.iterdir()))
        for path in sorted(files.iterdir()):
            found = (out / path.name).read_bytes() if (out / path.name).exists() else b""
            yield exact(
                f"write/{path.name}", np.frombuffer(found, np.uint8), np.frombuffer(path.read_bytes(), np.uint8)
            )
