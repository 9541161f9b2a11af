"""Bad input to the data programs: one sentence on stderr, exit code 2, nothing written or lost."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from jax.sharding import Mesh

from dspark_jax.config.cli import load_config
from dspark_jax.data import manifest
from dspark_jax.data.target_cache import TargetCache
from dspark_jax.datagen.cache_builder import CacheSettings
from dspark_jax.errors import UserError
from dspark_jax.sharding import abstract_mesh, require_rows
from tests import sharded_data
from tests.tiny import write_tiny_target
from train import build_cache, prepare_data

ROOT = Path(__file__).parents[1]

GOOD = {"messages": [{"role": "user", "content": "Add 3 and 4."}, {"role": "assistant", "content": "It is 7."}]}
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("target") / "tiny")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the program: good.jsonl stands in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text("".join(json.dumps({"id": str(i), **GOOD}) + "\n" for i in range(3)))
    return tmp_path


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a program that must refuse, and gives its sentence."""

    def run(program: Callable, *words: object) -> str:
        before = _content(folder)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            program([str(word) for word in words])
        printed = capsys.readouterr()
        assert stop.value.code == 2
        assert printed.out == ""
        said = [line for line in printed.err.splitlines() if not line.startswith("Device: ")]
        assert len(said) == 1 and "Traceback" not in said[0]
        assert _content(folder) == before
        return said[0]

    return run


def prepare(target: Path, *more: object, prompts: str = "good.jsonl", output: str = "out.jsonl") -> list[object]:
    return [prepare_data.main, "--target", target, "--prompts", prompts, "--output", output, *more]


def cache(target: Path, *more: object, conversations: str = "good.jsonl", layers: str = "0 1") -> list[object]:
    options = ["--conversations", conversations, "--layers", *layers.split(), "--output", "cache", "--max-length", 64]
    return [build_cache.main, "--target", target, *options, *more]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "absent.jsonl cannot be read (No such file or directory)"),
        ("", "absent.jsonl holds no conversations"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n{"messages": [\n', "absent.jsonl line 2: not JSON"),
        ('{"prompt": "a"}\n', "absent.jsonl line 1: found 'prompt', expected the field 'messages'"),
    ],
)
def test_conversation_files(text, said: str, target: Path, folder: Path, refused: Refused):
    if text is not None:
        (folder / "absent.jsonl").write_text(text)
    assert said in refused(*prepare(target, prompts="absent.jsonl"))
    assert said in refused(*cache(target, conversations="absent.jsonl"))


def test_unknown_options_are_answered_with_the_closest(target: Path, refused: Refused):
    assert "--temprature: did you mean --temperature" in refused(*prepare(target, "--temprature", 1))
    assert "--max-shard-gb: did you mean --max-shard-mb" in refused(*cache(target, "--max-shard-gb", 1))


def test_targets_that_do_not_load(target: Path, folder: Path, refused: Refused):
    for command in (prepare, cache):
        assert "/absent is not a folder" in refused(*command(folder / "absent"))
    torn = {"tokenizer.json": "not JSON", "model.safetensors": "not a whole safetensors file"}
    for name, said in torn.items():
        copy = shutil.copytree(target, folder / f"torn-{name}")
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[: len(whole) // 2])
        for command in (prepare, cache):
            assert said in refused(*command(copy))
    for name in ("config.json", "tokenizer.json"):
        copy = shutil.copytree(target, folder / f"without-{name}")
        (copy / name).unlink()
        (copy / "tokenizer_config.json").unlink()
        for command in (prepare, cache):
            refused(*command(copy))


def test_a_tokenizer_of_another_model(folder: Path, refused: Refused):
    narrow = write_tiny_target(folder / "narrow", vocab_size=64)
    assert "outside the target's vocabulary of 64" in refused(*cache(narrow))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--embedded-prompts", "code"], "Give the prompts in one way"),
        (["--temperature", "-1"], "--temperature >= 0"),
        (["--top-p", "1.5"], "--top-p in (0, 1]"),
        (["--slots", "0"], "--slots is 0; at least 1"),
        (["--chat-format", "qwen"], "--chat-format"),
        (["--max-context", "100000"], "the target's context 512"),
    ],
)
def test_options_of_prepare_data(words, said: str, target: Path, refused: Refused):
    assert said in refused(*prepare(target, *words))


def test_embedded_prompts(target: Path, refused: Refused):
    command = [prepare_data.main, "--target", target, "--output", "out.jsonl", "--embedded-prompts"]
    assert "expected one of code, chat, math" in refused(*command, "poetry", "--limit", 1)
    assert "math prompts have no end: give --limit" in refused(*command, "math")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-length", "1024"], "the target's context 512"),
        (["--batch", "0"], "--batch is 0; at least 1"),
        (["--layers", "0", "two"], "--layers"),
        (["--layers", "0", "7"], "names layer 7; the target has the layers 0 to 1"),
        (["--layers", "1", "0"], "strictly increasing"),
        (["--layers", "-2", "0"], "from -1 (embeddings) on"),
        (["--min-loss-tokens", "60"], "None of the 3 training rows has 60 supervised tokens"),
    ],
)
def test_options_of_build_cache(words, said: str, target: Path, refused: Refused):
    assert said in refused(*cache(target), *words)


def test_the_cache_of_an_experiment(target: Path, folder: Path, refused: Refused):
    """What the experiment says need not be typed again, and can be; what it leaves open is asked for."""
    named = ["--config", "debug", "--target", target]
    assert "No conversations were given" in refused(build_cache.main, *named)
    assert "No output was given" in refused(build_cache.main, *named, "--conversations", "good.jsonl")
    assert "configuration debgu: did you mean debug?" in refused(build_cache.main, "--config", "debgu")
    options = ["--conversations", "good.jsonl", "--output", "cache", "--layers", -1, 0]
    build_cache.main([str(word) for word in (*named, *options)])
    spec, config = TargetCache(folder / "cache").spec, load_config("debug")
    assert spec.layer_ids == (-1, 0) and spec.max_length == config.data.max_length
    settings = CacheSettings.of_experiment(load_config("qwen3_4b_dspark"))
    config = load_config("qwen3_4b_dspark")
    assert settings.layers == config.drafter.target_layer_ids and settings.target == config.target
    assert (settings.max_length, settings.codec) == (config.data.max_length, config.data.codec)
    assert (settings.compute_dtype, str(settings.output)) == (config.compute_dtype, config.data.cache)


def test_answers_given_after_another_prompt(target: Path, folder: Path, refused: Refused):
    recorded = {"settings": {"weights_xxh3": "x", "thinking": True}}
    (folder / "good.settings.json").write_text(json.dumps(recorded))
    assert "good.jsonl was answered with thinking on; give --thinking." in refused(*cache(target))
    recorded["settings"]["thinking"] = False
    (folder / "good.settings.json").write_text(json.dumps(recorded))
    assert "answered with thinking off; give --no-thinking" in refused(*cache(target, "--thinking"))


def test_conversation_that_the_template_cannot_render_names_its_line(target, folder, refused):
    turned = {"messages": GOOD["messages"][::-1]}
    (folder / "turned.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(turned) + "\n")
    assert "turned.jsonl line 2: The conversation's first turn" in refused(*cache(target, conversations="turned.jsonl"))


def test_disk_too_small(target: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manifest.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "GB free" in refused(*cache(target))


def test_estimate_is_no_less_than_the_cache_and_writes_nothing(target, folder, capsys):
    before = _content(folder)
    main, *words = cache(target, "--estimate")
    main(list(map(str, words)))
    assert _content(folder) == before
    lines = capsys.readouterr().out.splitlines()
    printed = dict(line.split() for line in lines if "," not in line.split("  ")[0])
    # What a chip captures at most, and what it then has to write: of full rows, and of these in both layouts.
    assert len([line for line in lines if line.endswith("GB/s")]) == 9
    assert len([line for line in lines if line.startswith("padding, rows ") and line.endswith(" %")]) == 2
    estimate = int(printed["bytes"].replace(",", ""))
    main(list(map(str, words[:-1])))
    assert estimate >= sum(len(data) for name, data in _content(folder).items() if name.startswith("cache/shard"))


def test_other_settings_on_the_same_cache(target: Path, folder: Path, refused: Refused):
    main, *words = cache(target)
    main(list(map(str, words)))
    for option, value, field in (
        ("--codec", "float32", "dtype"),
        ("--rows", "packed", "rows"),
        ("--batch", 2, "batch"),
    ):
        assert f"was begun with {field} = " in refused(*cache(target, option, value))
    (begun := folder / "cache" / "build.json").write_text(begun.read_text().replace('"rows"', '"layout"'))
    assert "earlier version, which had no setting rows (this run has 'by-length')" in refused(*cache(target))
    begun.write_text(begun.read_text().replace('"layout"', '"rows"'))
    assert "was begun with layer_ids = [0, 1], this run has [1]" in refused(*cache(target, layers="1"))
    longer = {"messages": GOOD["messages"] * 2}
    (folder / "longer.jsonl").write_text(3 * (json.dumps(longer) + "\n"))
    assert "was begun with sources_sha256 = " in refused(*cache(target, conversations="longer.jsonl"))


def test_output_that_is_not_a_cache(target: Path, folder: Path, refused: Refused):
    (folder / "cache").mkdir()
    (folder / "cache" / "thesis.tex").write_text("years of work")
    assert "is not a cache and not empty (it holds thesis.tex)" in refused(*cache(target))


def test_other_settings_on_the_same_answers(
    target: Path,
    folder: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(prepare_data, "regenerate", lambda *_: ({"conversations": 0}, Counter()))
    main, *words = prepare(target)
    main(list(map(str, words)))
    assert (folder / "out.settings.json").exists()
    assert "begun with temperature = 0.7, this run has 1.0" in refused(*prepare(target, "--temperature", 1))
    assert "begun with seed = 0, this run has 5" in refused(*prepare(target, "--seed", 5))
    retrained = write_tiny_target(folder / "retrained", seed=1)
    assert "begun with weights_xxh3 = " in refused(*prepare(retrained))
    (folder / "good.jsonl").write_text(json.dumps(GOOD) + "\n")
    assert "begun with prompts_sha256 = " in refused(*prepare(target))


def test_answers_of_another_program_are_kept(target: Path, folder: Path, refused: Refused):
    (folder / "out.jsonl").write_text("not ours\n")
    assert "out.jsonl exists and was not begun by this program" in refused(*prepare(target))


def _content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_target_over_several_devices_answers_and_fills_the_cache_alike(target: Path, folder: Path):
    """Each process loads the target over all its devices, a part on each; both give what one device gives."""
    shutil.copytree(target, folder / "target")
    prompts = [{"messages": [{"role": "user", "content": f"Add {i} and 4."}]} for i in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    sharded_data.main(folder, 1)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.sharded_data", str(folder), "4"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert (folder / "1" / "c.jsonl").read_bytes() == (folder / "4" / "c.jsonl").read_bytes()
    one, four = (TargetCache(folder / devices / "cache") for devices in ("1", "4"))
    assert len(one) == len(four) == 6
    for i in range(6):
        np.testing.assert_array_equal(one[i].input_ids, four[i].input_ids)
        np.testing.assert_allclose(one[i].features, four[i].features, atol=2e-5)


def test_rows_that_the_devices_cannot_share():
    with pytest.raises(UserError, match="--batch is 6, which 4 devices cannot share evenly"):
        require_rows("--batch", 6, cast(Mesh, abstract_mesh(4, 1, 4)))
    require_rows("--batch", 8, cast(Mesh, abstract_mesh(4, 1, 4)))
