"""Programs kept between processes: where, and that an engine started after infer.compile compiles nothing."""

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import jax
import pytest

from dspark_jax import compilation
from dspark_jax.checkpoints.drafters import save_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.compilation import Compilations, checkout_environment, drop_torn, keep_compiled
from dspark_jax.config.cli import program
from dspark_jax.drafters.registry import drafter_hf_config, new_drafter
from dspark_jax.planning.ahead import EnginePrograms
from dspark_jax.serving.settings import EngineConfig
from infer import compile as ahead
from tests.tiny import write_tiny_target

ROOT = Path(__file__).parents[1]
SIZES = ["--slots", "1", "--longest", "60", "--policy", "look-ahead", "--prefix-cache", "1", "--prefill-chunk", "32"]
STARTED = """
import json, sys
from dspark_jax.compilation import Compilations, keep_compiled
keep_compiled(sys.argv[1])
with Compilations() as seen:
    from dspark_jax import EngineConfig, Request, SamplingParams, load_drafter, load_target
    from dspark_jax.serving.engine import Engine
    target = load_target(sys.argv[2], dtype="float32")
    drafter = load_drafter(sys.argv[3], target, dtype="float32")
    config = EngineConfig(1, 60, "look-ahead", prefix_cache=1, prefill_chunk=32, rounds_per_dispatch=4)
    engine = Engine(target, drafter, config)
    for i, length in enumerate((8, 40, 40)):
        engine.submit(i, Request((5,) * length, SamplingParams(12, temperature=float(i % 2), logprobs=2)))
    while not engine.idle:
        if engine.waiting == 0:
            engine.recorder = lambda *record: None
        engine.step()
print(json.dumps([seen.compiled, seen.read]))
"""


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """jax's settings, and the environment's, as they were before."""
    names = {**compilation._THRESHOLDS, compilation._FOLDER: None, compilation._ENABLED: None}
    for name in names:
        # Set first, so that the end of the test undoes what the program sets.
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    before = {name.lower(): getattr(jax.config, name.lower()) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


@pytest.mark.subprocesses
def test_an_engine_after_infer_compile_compiles_nothing(tmp_path: Path) -> None:
    target = load_target(write_tiny_target(tmp_path / "target", num_hidden_layers=1))
    config = drafter_hf_config(
        target.hf_config, num_layers=1, target_layer_ids=(-1,), mask_token_id=3, markov_rank=8, block_size=2
    )  # fmt: skip
    save_drafter(tmp_path / "drafter", new_drafter("new", config, jax.random.key(0)), target)
    kept, pair = str(tmp_path / "kept"), [str(tmp_path / "target"), str(tmp_path / "drafter")]

    # Profiles are the start's own: the first one measures, with programs that must have been compiled too.
    env = {**os.environ, "DSPARK_JAX_CACHE": str(tmp_path / "cache")}
    words = ["--target", pair[0], "--drafter", pair[1], *SIZES, "--compilation-cache", kept]
    for more in ([sys.executable, "-m", "infer.compile", *words], [sys.executable, "-c", STARTED, kept, *pair]):
        done = subprocess.run(more, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    compiled, read = json.loads(done.stdout)
    assert compiled == 0 and read >= 8


def test_trees_are_compiled_beside_the_chains_that_auto_compares_them_with(tmp_path: Path) -> None:
    target = load_target(write_tiny_target(tmp_path, num_hidden_layers=1), tokenizer=False)
    config = drafter_hf_config(
        target.hf_config, num_layers=1, target_layer_ids=(-1,), mask_token_id=3, markov_rank=8, block_size=2
    )  # fmt: skip
    drafter = new_drafter("new", config, jax.random.key(0))
    programs = EnginePrograms(target, drafter, EngineConfig(1, 60, "auto", tree=4), "coupled", None)
    loops = {name.split(": ")[0] for name, _ in programs.all()}
    assert loops == {"loading", "auto, trees", "auto", "plain"}


def test_a_program_names_a_folder(tmp_path: Path, settings: None, capsys: pytest.CaptureFixture[str]) -> None:
    @program
    def main(argv: list[str]) -> tuple[list[str], str | None]:
        return argv, jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None

    # By the option, which is no word of the program's own; by the environment; for one user, none of them; not at all.
    assert main(["--x", "1", "--compilation-cache", str(tmp_path / "a")]) == (["--x", "1"], str(tmp_path / "a"))
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    with Compilations() as seen:
        jax.jit(lambda x: x * 3.25 + len(str(tmp_path)))(1.0)
    assert seen.compiled >= 1 and compilation.kept_programs(tmp_path / "a")
    assert main([])[1] == str(tmp_path / "a") == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert main(["--compilation-cache=off"])[1] is None and main([])[1] is None

    (tmp_path / "file").write_text("")
    for place, said in ((tmp_path / "file", "is no folder"), (tmp_path / "file" / "x", "is no folder")):
        with pytest.raises(SystemExit):
            main(["--compilation-cache", str(place)])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ahead.main(["--compilation-cache", "off"])
    assert "There is nowhere to keep the programs" in capsys.readouterr().err


def test_without_a_word_it_is_the_users_folder(tmp_path: Path, settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_JAX_CACHE", str(tmp_path / "cache"))
    keep_compiled(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache" / "compiled")
    # Nothing is made before there is a program to keep.
    assert not (tmp_path / "cache").exists()


def test_programs_stored_in_part_are_dropped(tmp_path: Path) -> None:
    whole = zlib.compress(bytes(1000))
    for name, content in {
        "a-cache": whole,
        "b-cache": whole[:-3],
        "c-cache": b"",
        "d-cache": b"(other",
        "e": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    assert [file.name for file in drop_torn(tmp_path)] == ["b-cache", "c-cache"]
    assert {file.name for file in tmp_path.iterdir()} == {"a-cache", "d-cache", "e"}


@pytest.mark.parametrize(
    "version, given, expected",
    [
        ("0.0.42.1", "", "--xla_tpu_enable_deduplicated_calls=true"),
        ("0.0.48", "--xla_a=1", "--xla_a=1 --xla_tpu_enable_deduplicated_calls=true"),
        ("0.0.50", "--xla_tpu_enable_deduplicated_calls=false", "--xla_tpu_enable_deduplicated_calls=false"),
        ("0.0.50", "--noxla_tpu_enable_deduplicated_calls", "--noxla_tpu_enable_deduplicated_calls"),
        ("0.0.41", "", ""),
        ("0.1.dev20250301+nightly", "", ""),
        (None, "", ""),
    ],
)
def test_a_tpus_compiler_shares_equal_parts(
    settings: None, version: str | None, given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is installed, knows how, and was not told otherwise: other programs' keys stay as they are."""

    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(compilation.metadata, "version", installed)
    monkeypatch.setenv(compilation.TPU_FLAGS, given)
    monkeypatch.setattr(compilation, "_GIVEN", given or None)
    program(lambda argv: None)(["--compilation-cache", "off"])
    assert os.environ[compilation.TPU_FLAGS] == expected
    # Another checkout's process decides for itself.
    assert checkout_environment(Path("/before")).get(compilation.TPU_FLAGS, "") == given
