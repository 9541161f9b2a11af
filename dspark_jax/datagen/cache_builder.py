"""Builds target caches: runs the target over conversations and stores its hidden states for training.

A killed build can be continued and ends with the same bytes: what runs together is a function of the training rows
alone (`capture.py`), and a resumed build computes its first window whole again.
"""

import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from tqdm import tqdm

from dspark_jax.checkpoints.huggingface import load_target, read_hf_config, resolve_folder
from dspark_jax.config.experiment_cache import cache_spec_of
from dspark_jax.config.schema import MeshSettings, TrainConfig
from dspark_jax.data.cache_writer import CacheWriter
from dspark_jax.data.chat import template_id
from dspark_jax.data.manifest import begun, require_room
from dspark_jax.data.records import CacheSpec, estimate_bytes
from dspark_jax.data.tokenised import encode_files
from dspark_jax.data.tokenizers import load_tokenizer, tokenizer_hash
from dspark_jax.datagen.capture import Capture, Layout, Padding, TrainingRow
from dspark_jax.devices import announce
from dspark_jax.distributed import connect, from_first, is_first, require_same
from dspark_jax.errors import UserError
from dspark_jax.files import require_same_settings, weights_hash, write_json, write_settings
from dspark_jax.roofline.prefill import capture_rates
from dspark_jax.sharding import mesh_of_several, require_rows
from dspark_jax.targets.config import TargetConfig, config_sha256
from dspark_jax.targets.kernels.ranges import KERNELS
from dspark_jax.targets.registry import TARGETS, read_target_config
from dspark_jax.training.provenance import answers_of


@dataclass(frozen=True)
class CacheSettings:
    """Runs the target over conversations and writes the target cache."""

    target: str
    """Folder or hub id of the target."""
    conversations: tuple[Path, ...]
    """Conversation files in JSONL, JSON or Parquet, in this order."""
    layers: tuple[int, ...]
    """Target layers to tap, ascending: 0 is the first layer's output, -1 the embeddings."""
    output: Path
    """The cache's folder."""
    max_length: int = 512
    """Tokens that a conversation is cut to."""
    min_loss_tokens: int = 2
    """Conversations with fewer supervised tokens after the cut are dropped."""
    batch: int = 16
    """Rows that the target runs at once."""
    rows: Literal["auto", "packed", "by-length"] = "auto"
    """packed: a row of `max_length` tokens holds several conversations, none of which attends to another. by-length:
    one each, beside others of like length. auto: packed on TPUs and GPUs, whose attention skips other conversations."""
    max_shard_mb: float = 256
    """MiB after which a shard is closed; a killed run loses at most one shard's work."""
    codec: Literal["bfloat16", "float32", "float8_e4m3", "int8"] = "bfloat16"
    """Storage of hidden states; the last two take half of bfloat16's bytes, with one scale for each token and layer."""
    compute_dtype: Literal["bfloat16", "float32"] | None = None
    """Dtype of the target's weights and activations; None: that of its config."""
    mesh: MeshSettings = MeshSettings(data=1, fsdp=-1)
    """Layout of the target over several devices; they share the rows of a batch."""
    thinking: bool = False
    """Let the chat template open with thinking."""
    estimate: bool = False
    """Print the bytes of the cache and the tokens/s that chips compute at most; write nothing."""

    @classmethod
    def of_experiment(cls, config: TrainConfig) -> "CacheSettings":
        """The settings fixed by an experiment; those that it leaves open are empty."""
        cache = cache_spec_of(config)
        return cls(
            target=cache.target,
            conversations=(Path(cache.conversations),) if cache.conversations else (),
            layers=cache.layer_ids,
            output=Path(cache.folder),
            max_length=cache.max_length,
            min_loss_tokens=cache.min_loss_tokens,
            codec=cache.codec,
            compute_dtype=config.compute_dtype,
            thinking=config.data.thinking,
        )

    def check(self) -> None:
        """UserError for settings that are invalid with any target."""
        # By hand and not at construction: an experiment's settings are incomplete until the command line has spoken.
        for name, least in (("max_length", 2), ("min_loss_tokens", 1), ("batch", 1), ("max_shard_mb", 1e-3)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; at least {least} was expected.")

        if not self.conversations:
            raise UserError("No conversations were given; name at least one JSONL file after --conversations.")
        if not self.layers:
            raise UserError("No layers were given; name those to tap after --layers, as in --layers 1 3 5.")
        if self.output == Path():
            raise UserError("No output was given; name the cache's folder after --output.")

    @property
    def max_shard_bytes(self) -> int:
        return int(self.max_shard_mb * 2**20)


def make(settings: CacheSettings) -> dict[str, Any]:
    """Builds the whole cache, or with `estimate` only computes its size.

    Args:
        settings: checked here, together with the target's configuration.

    Returns:
        Counts, bytes and speed, also written to OUTPUT/metrics.json; empty in processes other than the first.

    Raises:
        UserError: conversations, target, output, devices and settings that do not fit together.
    """
    # Cheap checks first: configuration, conversations and size are judged before any weights are read.
    folder = resolve_folder(settings.target)
    hf_config = read_hf_config(folder)
    config = read_target_config(hf_config)
    check_settings(settings, config)
    tokenizer = load_tokenizer(folder)
    items, sources_sha256 = encode_sources(settings, tokenizer, config.vocab_size)

    spec = cache_spec(settings, hf_config, tokenizer, len(items), sources_sha256)
    figures = estimate(settings, spec, items)
    # Each process reads the files itself; on different copies they would compute different rows together.
    require_same({"their conversations are not the same": sources_sha256})
    if settings.estimate:
        return {**figures, **speed(settings, config, spec, items)} if is_first() else {}

    mesh = mesh_of_several(settings.mesh)
    require_rows("--batch", settings.batch, mesh)
    if mesh is not None:
        connect(mesh)

    # These decide bits of the states but no record's meaning, so they are kept beside the manifest, not in it.
    layout = layout_of(settings, config, jax.default_backend())
    made_with = {
        "weights_xxh3": weights_hash(folder),
        "compute_dtype": settings.compute_dtype or config.dtype,
        "batch": settings.batch,
        "rows": layout,
    }

    continued = require_same_settings(begun(settings.output) / "build.json", made_with, settings.output)
    require_room(settings.output, figures["bytes"], settings.max_shard_bytes)

    announce(settings.compute_dtype)
    target = load_target(folder, dtype=settings.compute_dtype, mesh=mesh, tokenizer=False)

    capture = Capture(target, spec, settings.batch, layout)
    return build(settings, capture, spec, items, None if continued else made_with)


def layout_of(settings: CacheSettings, config: TargetConfig, platform: str) -> Layout:
    """How rows are put together, "auto" decided: packed where kernels attend, and the target's family can be."""
    if settings.rows != "auto":
        return settings.rows
    return "packed" if platform in KERNELS and can_be_packed(config) else "by-length"


def can_be_packed(config: TargetConfig) -> bool:
    """Whether conversations that share a row leave each other alone: not in families with a model of their own, whose
    state is more than one key and value a token."""
    return TARGETS[config.model_type].model is None


def cache_spec(
    settings: CacheSettings, hf_config: dict[str, Any], tokenizer: Any, rows: int, sources_sha256: str
) -> CacheSpec:
    """All that decides the records of a cache; the writer refuses a folder that was begun with another spec.

    Args:
        settings: of the build.
        hf_config: the target's config.json.
        tokenizer: the target's.
        rows: training rows, dropped ones included.
        sources_sha256: the hash of these rows.
    """
    return CacheSpec(
        target_name=settings.target,
        target_sha256=config_sha256(hf_config),
        layer_ids=settings.layers,
        hidden_size=read_target_config(hf_config).hidden_size,
        tokenizer_hash=tokenizer_hash(tokenizer),
        chat_template=template_id(tokenizer, settings.thinking),
        max_length=settings.max_length,
        min_loss_tokens=settings.min_loss_tokens,
        num_sources=rows,
        dtype=settings.codec,
        sources_sha256=sources_sha256,
    )


def check_settings(settings: CacheSettings, config: TargetConfig) -> None:
    """UserError for settings that exceed this target's layers or context."""
    if (top := max(settings.layers)) >= config.tap_limit:
        raise UserError(f"--layers names layer {top}; the target has the layers 0 to {config.tap_limit - 1}.")
    if settings.max_length > config.max_positions:
        raise UserError(
            f"--max-length is {settings.max_length}, the target's context {config.max_positions}; lower it."
        )
    if settings.rows == "packed" and not can_be_packed(config):
        raise UserError(
            f"--rows is packed; targets of the kind {config.model_type} run rows of one conversation each: "
            "give --rows by-length."
        )


def estimate(settings: CacheSettings, spec: CacheSpec, items: Sequence[TrainingRow]) -> dict[str, Any]:
    """Rows, tokens and bytes of the whole cache; UserError when a build would put nothing in it."""
    kept = [item for item in items if item.kept]
    if not kept and not settings.estimate:
        raise UserError(
            f"None of the {len(items)} training rows has {settings.min_loss_tokens} supervised tokens within "
            f"{settings.max_length}; raise --max-length, or look at the answers."
        )

    # Real tokens: records are stored without padding.
    tokens = sum(item.length for item in kept)
    needed = estimate_bytes(tokens, len(kept), spec, settings.max_shard_bytes)
    counts = {"rows": len(items), "records": len(kept), "dropped": len(items) - len(kept), "tokens": tokens}
    sizes = {"bytes_per_token": spec.token_bytes, "bytes": needed}
    return counts | sizes | ({"gigabytes": f"{needed / 1e9:,.3f}"} if settings.estimate else {})


def speed(
    settings: CacheSettings, config: TargetConfig, spec: CacheSpec, items: Sequence[TrainingRow]
) -> dict[str, str]:
    """The padding of both layouts, and by counted terms what a chip captures at most: of rows that one conversation
    fills, and of these."""
    length, ways = settings.max_length, dict[str, Padding]()
    if any(item.kept for item in items):
        layouts: tuple[Layout, ...] = ("packed", "by-length") if can_be_packed(config) else ("by-length",)
        ways = {f"rows {way}": Padding.of(items, settings.batch, length, way) for way in layouts}

    shown = {f"padding, {name}": f"{100 * padding.share:.1f} %" for name, padding in ways.items()}
    full = Padding(settings.batch * length, settings.batch * length, {length: 1}, None)
    for name, padding in {"full rows": full, **ways}.items():
        rates = capture_rates(config, settings.batch, padding.passes, padding.tokens, padding.lengths)
        for chip, rate in rates.items():
            shown[f"{chip}, {name}, at most"] = f"{rate:,.0f} tokens/s, {rate * spec.token_bytes / 1e9:.2f} GB/s"
    return shown


def build(
    settings: CacheSettings, capture: Capture, spec: CacheSpec, items: Sequence[TrainingRow], new_settings: dict | None
) -> dict[str, Any]:
    """Computes and writes the missing part of the cache, one window beside the other.

    Args:
        settings: of the build.
        capture: of the target's states.
        spec: of the cache.
        items: all training rows, dropped ones included.
        new_settings: recorded in build.json before the first shard; None where they are there already.

    Returns:
        The figures that are written to metrics.json; empty in processes other than the first.
    """
    # The whole build in one stack: the writer's lock is released however it ends.
    began, made = time.perf_counter(), 0
    with ExitStack() as stack:
        writer = None
        if is_first():
            writer = stack.enter_context(CacheWriter(settings.output, spec, settings.max_shard_bytes))
            if new_settings is not None:
                begin(settings, writer, new_settings)

        # Only the first process has the folder, and all must compute the same batches.
        start = int(from_first(writer.next_source if writer else 0))
        samples = stack.enter_context(closing(capture(items, start)))
        if writer is None:
            for _ in samples:  # computed together, written by the first process
                pass
            return {}

        for index, sample in tqdm(samples, total=len(items), initial=start, unit="row"):
            writer.add(index, sample)
            made += items[index].length

        writer.finish()
        records, seconds = writer.records, time.perf_counter() - began
        metrics = {
            "rows": len(items),
            "records": records,
            "dropped": len(items) - records,
            "tokens": sum(item.length for item in items if item.kept),
            "bytes_per_token": spec.token_bytes,
            "bytes": writer.bytes_written,
            "seconds_this_run": round(seconds, 3),
            "tokens_per_second": made / seconds,
            # Of a build that stands on its disk the second is large, else the first.
            "share_waiting_for_states": capture.waited / seconds,
            "share_waiting_for_disk": capture.idle / seconds,
        }
        # Before the writer gives the folder up, which brings it to a store.
        write_json(writer.folder / "metrics.json", metrics)

    return metrics


def begin(settings: CacheSettings, writer: CacheWriter, new_settings: dict) -> None:
    """Records the settings of a new cache; UserError where the cache has shards already."""
    if writer.next_source > 0:
        raise UserError(f"{settings.output} is a cache without build.json, made elsewhere; give a new folder.")
    write_settings(writer.folder / "build.json", new_settings, answers=answers_of(settings.conversations))


def encode_sources(settings: CacheSettings, tokenizer: Any, vocabulary: int) -> tuple[list[TrainingRow], str]:
    """All training rows of the conversations, and their sha256; UserError naming file and line."""
    digest, items = hashlib.sha256(), list[TrainingRow]()
    rows = encode_files(settings.conversations, tokenizer, settings.thinking, settings.max_length, vocabulary)
    for encoded in tqdm(rows, desc="encoding", unit="row", leave=False, delay=2):
        # The length first: without it, rows cut elsewhere could give the same bytes.
        digest.update(len(encoded.input_ids).to_bytes(8, "little"))
        digest.update(encoded.input_ids.tobytes() + encoded.loss_mask.tobytes())
        items.append(TrainingRow(len(items), encoded, encoded.loss_tokens >= settings.min_loss_tokens))

    if not items:
        files = ", ".join(map(str, settings.conversations))
        raise UserError(f"{files} holds no conversations; at least one was expected.")

    return items, digest.hexdigest()
