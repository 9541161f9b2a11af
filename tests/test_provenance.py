"""The manifest of a trained drafter says how its answers were drawn and what it was trained on."""

import json
from pathlib import Path

from dspark_jax.data.records import CacheSpec
from dspark_jax.training.provenance import answers_of, cache_provenance


def spec() -> CacheSpec:
    return CacheSpec("target", "a" * 64, (0, 2), 32, "b" * 64, "qwen", 128, 2, 7, sources_sha256="c" * 64)


def test_sampling_comes_from_the_answers(tmp_path: Path) -> None:
    drawn = {"temperature": 0.7, "top_p": 0.95, "top_k": 0, "max_new_tokens": 64, "seed": 3}
    for name in ("a", "b"):
        (tmp_path / f"{name}.settings.json").write_text(json.dumps({"settings": drawn | {"slots": 8}}))
    answers = answers_of([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert answers == [{"file": str(tmp_path / f"{name}.jsonl"), "sampling": drawn} for name in ("a", "b")]
    (tmp_path / "build.json").write_text(json.dumps({"settings": {}, "answers": answers}))
    found = cache_provenance(tmp_path, "cache", spec(), {"ce_alpha": 0.1}, {"target weights": "e" * 32})
    assert found.sampling == drawn and found.sources["sources_sha256"] == "c" * 64
    assert found.sources["answers"] == answers and found.sources["loss"]["ce_alpha"] == 0.1
    assert found.sources["inputs"] == {"target weights": "e" * 32}


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    assert answers_of([tmp_path / "foreign.jsonl"]) == [{"file": str(tmp_path / "foreign.jsonl"), "sampling": {}}]
    assert cache_provenance(tmp_path, "cache", spec(), {"ce_alpha": 0.1}, {"target weights": "e" * 32}).sampling == {}
    mixed = [{"file": "a", "sampling": {"temperature": 0.7}}, {"file": "b", "sampling": {"temperature": 1.0}}]
    (tmp_path / "build.json").write_text(json.dumps({"answers": mixed}))
    assert cache_provenance(tmp_path, "cache", spec(), {"ce_alpha": 0.1}, {"target weights": "e" * 32}).sampling == {}
