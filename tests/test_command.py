"""The command `dspark`, where programs are found, and the line that a program starts with."""

import importlib
import re
from pathlib import Path

import jax
import pytest

from dspark_jax import command
from dspark_jax.checkpoints.huggingface import resolve_folder
from dspark_jax.config.cli import load_config
from dspark_jax.devices import announce, unused_accelerator, usual_dtype
from dspark_jax.errors import UserError
from dspark_jax.files import make_output
from dspark_jax.programs import MAIN, ROOT, found_programs, program_command, source
from dspark_jax.serving.sampling import SamplingParams


def test_every_program_is_one_subcommand_with_a_line() -> None:
    programs = found_programs()
    files = {file for wing in ("train", "infer") for file in (ROOT / wing).rglob("*.py") if MAIN in file.read_text()}
    assert {source(module) for module in programs.values()} == files and len(programs) == len(files)
    overview = command.overview(programs).splitlines()
    for name, module in programs.items():
        line = next(line for line in overview if line.split()[:1] == [name])
        assert len(line.split()) > 3, f"{module} needs a docstring whose first sentence says what it does"
    assert programs["bench"] == "infer.bench" and programs["train-bench"] == "train.bench"
    assert programs["embedded-target"] == "train.embedded.target" and programs["load-study"] == "infer.studies.load"


def test_a_subcommand_is_run_or_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, code, said in (
        (["--help"], None, "usage: dspark"),
        (["build_cache", "--help"], 0, "--conversations"),
        (["calibrte"], 2, "dspark has no subcommand calibrte: did you mean calibrate or calibration?"),
        (["fit", "--config", "embeded_dspark"], 2, "Unknown configuration embeded_dspark: did you mean"),
    ):
        if code is None:
            command.main(argv)
        else:
            with pytest.raises(SystemExit) as stop:
                command.main(argv)
            assert stop.value.code == code
        printed = capsys.readouterr()
        assert said in printed.out + printed.err


def test_wings_import_their_own_files_relatively() -> None:
    """In a wheel they are dspark_jax.programs.train and so on; an absolute import would work in a checkout alone."""
    for folder in ("train", "infer", "configs"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^\s*(from|import) (train|infer|configs)\b", file.read_text(), re.MULTILINE), file


def test_an_exit_code_is_handed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["verify", str(resolve_folder("embedded", "drafter"))]) == 0
    (tmp_path / "strange").mkdir()
    assert command.main(["verify", str(tmp_path / "strange")]) == 2


def test_a_program_is_started_with_this_interpreter() -> None:
    assert program_command("train.fit", "--seed", 3)[1:] == ["-m", "train.fit", "--seed", "3"]


def test_embedded_names_the_shipped_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_folder("embedded").name == "embedded_target"
    assert resolve_folder("embedded", "drafter").name == "embedded_drafter"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()
    assert resolve_folder("embedded") == Path("embedded")  # a folder comes first, as for every other name
    with pytest.raises(UserError, match="a hub id"):
        resolve_folder("embeded")


def test_a_configuration_is_a_name_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dspark_jax.config.cli import load_config\n\ndef get_config():\n    return load_config('debug')\n"
    )
    assert load_config(str(file)) == load_config("debug")
    file.write_text("")
    for path, said in ((file, "has no get_config"), (tmp_path / "none.py", "There is no Python file")):
        with pytest.raises(UserError, match=said):
            load_config(str(path))


def test_the_first_line_names_devices_and_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert announce("bfloat16") == "bfloat16"
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.splitlines()[0] == f"Device: 1 x cpu, bfloat16, jax {jax.__version__}"


def test_a_cpu_decodes_in_float32_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usual_dtype() == announce() == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert usual_dtype() is None


def test_an_accelerator_that_jax_cannot_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert unused_accelerator(tmp_path) == ""
    (tmp_path / "dev/vfio").mkdir(parents=True)
    (tmp_path / "dev/vfio/0").touch()
    assert unused_accelerator(tmp_path) == ""  # something else is passed through
    vendor = tmp_path / "sys/bus/pci/devices/0000:00:04.0/vendor"
    vendor.parent.mkdir(parents=True)
    vendor.write_text("0x1ae0\n")
    assert "dspark-jax[tpu]" in unused_accelerator(tmp_path)
    (tmp_path / "dev/nvidia0").touch()
    assert "dspark-jax[cuda12]" in unused_accelerator(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert unused_accelerator(tmp_path) == ""


def test_an_output_is_made_and_tried_first(tmp_path: Path) -> None:
    make_output(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    make_output(tmp_path / "a", tmp_path / "c" / "metrics.json")
    assert (tmp_path / "c").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written to"):
        make_output(tmp_path / "file" / "inner")


PROGRAMS = {
    "bench": ["--drafter", "models", "--prompts", "no.jsonl"],
    "calibrate": ["--drafter", "models", "--prompts", "no.jsonl"],
    "conformance": ["--drafter", "models"],
    "evaluate": ["--drafter", "models", "--datasets", "set.jsonl"],
    "generate": ["--prompt", "a"],
    "profile": ["--drafter", "models"],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_make_their_output_before_they_load_anything(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two faults, the output's is told, although it is needed last."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "config.json").write_text("{}")
    (tmp_path / "set.jsonl").write_text('{"turns": ["a"]}\n')
    program = importlib.import_module(f"infer.{name}").main
    with pytest.raises(SystemExit) as stop:
        program(["--target", "models", *PROGRAMS[name], "--output", "file/inner/out.jsonl"])
    assert stop.value.code == 2 and "can't be written to" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program(["--target", "models", *PROGRAMS[name], "--output", "new/out"])
    assert "has model_type None" in capsys.readouterr().err and (tmp_path / "new").is_dir()


def test_what_bfloat16_may_change_is_said_where_it_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("infer.generate").main(["--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "near-tie" in said and "bfloat16" in said
    assert "near-tie" in str(SamplingParams.__doc__)
