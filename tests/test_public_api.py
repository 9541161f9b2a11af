"""What `import dspark_jax` offers: names, signatures, docstrings. A change here is a change for every user."""

import dataclasses
import inspect
import subprocess
import sys

import pytest

import dspark_jax

SIGNATURES = {
    "load_target": "(path_or_id, dtype, mesh, rules, tokenizer, weights)",
    "load_drafter": "(path_or_id, target, dtype, mesh, rules, compare_manifest, layer_shift, weights)",
    "generate": "(target, drafter, prompts, sampling, engine)",
    "stream": "(target, drafter, prompts, sampling, engine)",
    "calibrate": "(target, drafter, prompts, sampling, engine, samples, recenter)",
    "fit": "(config)",
    "Engine": "(target, drafter, config, sampling, strategy, tables, metering, recorder)",
    "Engine.submit": "(self, index, request)",
    "Engine.cancel": "(self, index)",
    "Engine.close": "(self, grace)",
    "Engine.step": "(self)",
    "Request": "(prompt, sampling, thinking, deadline, priority)",
    "SamplingParams": (
        "(max_new_tokens, temperature, top_k, top_p, min_p, seed, stop, stop_tokens, verify_length, mode, ignore_eos, "
        "logprobs, presence_penalty, frequency_penalty, repetition_penalty, logit_bias)"
    ),
    "EngineConfig": (
        "(slots, longest, policy, tree, threshold, sts, sps, rounds_per_dispatch, buckets, smallest_prompt_bucket, "
        "prefill_chunk, prefill_budget, prefix_cache, cache_pages, page, queue, stop_slots, bias_slots, max_logprobs, "
        "return_at_once)"
    ),
    "Generation": (
        "(index, prompt_tokens, tokens, text, finish_reason, rounds, committed, verified_at, accepted_at, judged_at, "
        "drafted, timing, error, logprobs, cached_tokens)"
    ),
    "Progress": "(index, tokens, text, generation, counts, logprobs)",
}
NAMES = {
    "Drafter", "Engine", "EngineClosed", "EngineConfig", "Generation", "Progress", "QueueFull", "Request",
    "SamplingParams", "Target", "TokenLogprob", "UserError", "__version__", "calibrate", "fit", "generate",
    "load_drafter", "load_target", "save_drafter", "stream",
}  # fmt: skip


def test_the_names_are_these() -> None:
    assert set(dspark_jax.__all__) == NAMES == set(dir(dspark_jax))
    for name in NAMES:
        assert getattr(dspark_jax, name) is not None
    assert dspark_jax.__version__.count(".") >= 1
    with pytest.raises(AttributeError, match="no attribute 'DecodeConfig'"):
        _ = dspark_jax.DecodeConfig


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_these(name: str) -> None:
    found = dspark_jax
    for part in name.split("."):
        found = getattr(found, part)
    assert f"({', '.join(inspect.signature(found).parameters)})" == SIGNATURES[name]


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_every_name_says_what_it_takes_and_gives(name: str) -> None:
    found = getattr(dspark_jax, name)
    text = inspect.getdoc(found) or ""
    assert len(text) > 40, name
    if not inspect.isclass(found):
        for section in ("Args:", "Returns:", "Raises:"):
            assert section in text or (section == "Returns:" and name == "save_drafter"), f"{name} lacks {section}"


def test_importing_it_costs_nothing() -> None:
    code = "import sys, dspark_jax; print('jax' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_settings_have_one_default_and_no_mutable_one() -> None:
    for kind in (dspark_jax.SamplingParams, dspark_jax.EngineConfig):
        assert hash(kind()) == hash(kind()) and kind() == kind()
        assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(kind))
