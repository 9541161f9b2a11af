"""Where a drafter's training came from, for the manifest beside its weights: the cache, its answers, the loss."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dspark_jax.checkpoints.manifest import Provenance
from dspark_jax.config.schema import TrainConfig
from dspark_jax.data.chat import template_id, tokenizer_hash
from dspark_jax.data.pipeline import open_cache
from dspark_jax.data.records import CacheSpec
from dspark_jax.data.tokenised import Tokenised
from dspark_jax.data.views import Packed, Truncated
from dspark_jax.training.run import RunPlan

SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")


def provenance_of(plan: RunPlan) -> Provenance:
    """Of a run: its cache's, or where its own target reads conversations, these."""
    config, data = plan.config, plan.config.data
    if data.source == "offline":
        cache = Path(data.cache or plan.folder / "cache")
        return provenance(config, cache, open_cache(cache).spec)
    answers, source = answers_of([Path(data.conversations)]), plan.batches.source
    while isinstance(source, Packed | Truncated):
        source = source.source
    if not isinstance(source, Tokenised):
        raise TypeError(f"an online run reads conversations, not {type(source).__name__}")
    about = {
        "target_name": config.target,
        "tokenizer_hash": tokenizer_hash(plan.target.tokenizer),
        "chat_template": template_id(plan.target.tokenizer, data.thinking),
        "max_length": data.max_length,
        "min_loss_tokens": data.min_loss_tokens,
        "num_sources": len(source),
        "sources_sha256": source.sha256,
    }
    sources = {"conversations": data.conversations, "answers": answers, "loss": asdict(config.loss)}
    return Provenance(answers[0]["sampling"], sources | about)


def answers_of(conversations: Sequence[Path]) -> list[dict[str, Any]]:
    """For each file of conversations, its name and how its answers were drawn, where `train.prepare_data` noted it."""
    return [{"file": str(path), "sampling": _sampling(path.with_suffix(".settings.json"))} for path in conversations]


def _sampling(path: Path) -> dict[str, Any]:
    settings = _read(path).get("settings", {})
    return {name: settings[name] for name in SAMPLING if name in settings}


def provenance(config: TrainConfig, cache: Path, spec: CacheSpec) -> Provenance:
    """Of a run on this cache. `sampling` is that of the answers, if the cache's files agree on it."""
    answers = _read(cache / "build.json").get("answers", [])
    drawn = [answer.get("sampling", {}) for answer in answers]
    sampling = drawn[0] if drawn and all(one == drawn[0] for one in drawn) else {}
    kept = ("target_name", "tokenizer_hash", "chat_template", "max_length", "min_loss_tokens", "num_sources",
            "sources_sha256")  # fmt: skip
    sources: dict[str, Any] = {"cache": config.data.cache, "answers": answers, "loss": asdict(config.loss)}
    return Provenance(sampling, sources | {name: getattr(spec, name) for name in kept})


def _read(path: Path) -> dict[str, Any]:
    """A note that may be missing: training doesn't depend on it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
