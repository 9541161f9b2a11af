"""Configurations: every one loads, overrides reach every level, JSON is lossless, mistakes get one sentence."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from dspark_jax.config.cli import (
    config_names,
    from_json,
    load_config,
    parse,
    parse_named,
    program,
    table_of_experiments,
    to_json,
)
from dspark_jax.config.schema import DataSettings, DrafterSettings, MeshSettings, OptimizerSettings, TrainConfig
from dspark_jax.errors import UserError

ROOT = Path(__file__).parent.parent


def tiny() -> TrainConfig:
    return TrainConfig(
        name="tiny",
        target="a/target",
        drafter=DrafterSettings(num_layers=3, target_layer_ids=(-1, 4), mask_token_id=9, head_dim=24),
        data=DataSettings(cache="c", global_batch=6, accumulation_steps=3, length_buckets=(64, 4096)),
        optimizer=OptimizerSettings(betas=(0.8, 0.95), schedule="constant"),
        mesh=MeshSettings(data=2, fsdp=-1),
        max_steps=11,
        compute_dtype="float32",
    )


@pytest.mark.parametrize("name", config_names())
def test_every_configuration_loads_and_survives_json(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config
    table = name in table_of_experiments()
    header = (ROOT / "configs" / ("recipe.py" if table else f"{name}.py")).read_text().split('"""')[1]
    for part in ("Command:", "Hardware:", "Expected:", f"    {name} " if table else f"--config {name}"):
        assert part in header


def test_the_named_configurations_exist() -> None:
    wanted = {"debug", "embedded_dspark"}
    targets, kinds = ("qwen3_4b", "qwen3_8b", "qwen3_14b", "gemma4_12b"), ("dspark", "dflash", "eagle3")
    wanted |= {f"{target}_{kind}" for target in targets for kind in kinds}
    assert wanted <= set(config_names())
    assert not {"cli", "schema", "serialise"} & set(config_names())


def test_reference_recipe() -> None:
    """docs/algorithm.md, rules 40 to 48, and the released drafters' layer ids."""
    config = load_config("qwen3_14b_dspark")
    assert config.drafter.target_layer_ids == (1, 10, 19, 28, 37)
    assert load_config("qwen3_4b_dspark").drafter.target_layer_ids == (1, 9, 17, 25, 33)
    gemma = load_config("gemma4_12b_dspark").drafter
    assert (gemma.target_layer_ids, gemma.mask_token_id) == ((5, 17, 29, 41, 46), 4)
    dflash = load_config("gemma4_12b_dflash")
    assert (dflash.drafter.markov_rank, dflash.loss.ce_alpha, dflash.loss.l1_alpha) == (0, 1.0, 0.0)
    assert (config.drafter.num_layers, config.drafter.block_size, config.drafter.num_anchors) == (5, 7, 512)
    assert (config.drafter.markov_rank, config.drafter.mask_token_id) == (256, 151669)
    loss = config.loss
    assert (loss.ce_alpha, loss.l1_alpha, loss.confidence_alpha, loss.decay_gamma) == (0.1, 0.9, 1.0, 4.0)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_ratio, optimizer.weight_decay) == (6e-4, 0.04, 0.0)
    assert (optimizer.clip_norm, optimizer.betas, optimizer.eps) == (1.0, (0.9, 0.999), 1e-8)
    assert (config.data.global_batch, config.data.max_length, config.epochs) == (512, 4096, 10)
    assert config.compute_dtype == "bfloat16"


def test_json_keeps_every_non_default_value() -> None:
    config = tiny()
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config


def test_overrides_reach_every_level() -> None:
    argv = (
        "--drafter.block-size 16 --drafter.target-layer-ids -1 3 5 --drafter.no-enable-confidence-head "
        "--max-steps None --optimizer.betas 0.5 0.6 --data.cache=elsewhere "
        "--mesh.fsdp 4 --drafter.mask_token_id 3 --seed 5"
    )
    config = parse(tiny(), argv.split())
    expected = dataclasses.replace(
        tiny(),
        drafter=dataclasses.replace(
            tiny().drafter,
            block_size=16,
            target_layer_ids=(-1, 3, 5),
            enable_confidence_head=False,
            mask_token_id=3,
        ),
        optimizer=dataclasses.replace(tiny().optimizer, betas=(0.5, 0.6)),
        data=dataclasses.replace(tiny().data, cache="elsewhere"),
        mesh=MeshSettings(data=2, fsdp=4),
        max_steps=None,
        seed=5,
    )
    assert config == expected


def test_parse_named_takes_the_configuration_and_the_rest() -> None:
    config = parse_named(["--seed", "3", "--config=debug", "--drafter.num-layers", "2"])
    debug = load_config("debug")
    assert config == dataclasses.replace(debug, seed=3, drafter=dataclasses.replace(debug.drafter, num_layers=2))
    assert parse_named([], default="debug") == debug


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a small program."""

    prompt: str
    count: int = 4
    stream: bool = False


def test_a_plain_dataclass_of_options() -> None:
    assert parse(Options, ["--prompt", "hi", "--stream"]) == Options("hi", 4, True)
    with pytest.raises(UserError, match="--prompt"):
        parse(Options, ["--count", "3"])


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--drafter.blok-size 3", "Unknown option --drafter.blok-size: did you mean --drafter.block-size"),
        ("--block-size 3", "Unknown option --block-size: did you mean --drafter.block-size"),
        ("--zzzzzz 3", "Unknown option --zzzzzz; --help lists the options."),
        ("--drafter.block-size many", "Error parsing --drafter.block-size: .*'many'"),
        ("--drafter.block-size", "Missing value for argument '--drafter.block-size'"),
        ("--compute-dtype float8", "invalid choice 'float8' for argument '--compute-dtype'"),
        ("--drafter.block-size 0", "drafter.block_size is 0; at least 1 was expected."),
        ("--drafter.target-layer-ids 5 3", r"drafter.target_layer_ids is \(5, 3\); .* ascending"),
        ("--drafter.target-layer-ids -2", r"drafter.target_layer_ids is \(-2,\)"),
        ("--drafter.markov-rank 0", "confidence_head_with_markov is True; False"),
        ("--data.global-batch 7", r"data.global_batch is 7; a positive multiple of data.accumulation_steps \(3\)"),
        ("--data.length-buckets 64 128", r"data.length_buckets is \(64, 128\)"),
        ("--mesh.data -1", r"mesh is \(-1, -1, 1, 1\); at most one axis"),
        ("--optimizer.warmup-ratio 1.5", "optimizer.warmup_ratio is 1.5"),
        ("stray", "Unrecognized options: stray"),
    ],
)
def test_mistakes_on_the_command_line(argv: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        parse(tiny(), argv.split())
    message = str(caught.value)
    assert "\n" not in message and not re.search("[│╭╰─]", message) and message.endswith((".", "?"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"drafter": {"blok_size": 3}}, "Unknown field drafter.blok_size: did you mean drafter.block_size?"),
        ({"qqqq": 3}, "Unknown field qqqq: known fields: name, target"),
        ({"seed": "5"}, "Field seed is '5'; int was expected."),
        ({"seed": True}, "Field seed is True; int was expected."),
        ({"max_steps": 1.5}, "Field max_steps is 1.5; int was expected."),
        (
            {"compute_dtype": "float8"},
            r"Field compute_dtype is 'float8'; Literal\['bfloat16', 'float32'\] was expected.",
        ),
        ({"optimizer": {"betas": [0.9]}}, r"Field optimizer.betas is \[0.9\]; tuple\[float, float\] was expected."),
        ({"drafter": {"target_layer_ids": [1, "x"]}}, r"Field drafter.target_layer_ids\[1\] is 'x'; int was expected."),
        ({"drafter": 3}, "drafter is 3; a JSON object"),
        ({"drafter": {"block_size": -1}}, "drafter.block_size is -1; at least 1 was expected."),
    ],
)
def test_mistakes_in_json(change: dict, sentence: str) -> None:
    values = to_json(tiny())
    for name, value in change.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=sentence):
        from_json(TrainConfig, values)


def test_json_names_a_missing_field_and_fills_in_defaults() -> None:
    values = to_json(tiny())
    del values["epochs"]
    assert from_json(TrainConfig, values).epochs == 10
    del values["drafter"]["num_layers"]
    with pytest.raises(UserError, match="Field drafter.num_layers is missing"):
        from_json(TrainConfig, values)


def test_unknown_configuration() -> None:
    with pytest.raises(UserError, match="Unknown configuration embeded_dspark: did you mean embedded_dspark?"):
        load_config("embeded_dspark")
    with pytest.raises(UserError, match="Unknown configuration schema"):
        load_config("schema")
    with pytest.raises(UserError, match="No configuration was named"):
        parse_named(["--seed", "3"])


def test_program_turns_errors_into_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def body(argv: list[str]) -> str:
        if argv == ["user"]:
            raise UserError("The file x\n is missing.")
        if argv == ["stop"]:
            raise KeyboardInterrupt
        if argv == ["path"]:
            Path("a" * 300).exists()
        if argv == ["bug"]:
            raise ValueError("ours")
        return "done"

    main = program(body)
    assert main([]) == "done"
    long = f"{'a' * 300} cannot be used (File name too long); give another path.\n"
    cases = [("user", 2, "The file x is missing.\n"), ("stop", 130, "Interrupted.\n"), ("path", 2, long)]
    for argument, code, sentence in cases:
        with pytest.raises(SystemExit) as caught:
            main([argument])
        assert caught.value.code == code
        assert capsys.readouterr() == ("", sentence)
    with pytest.raises(ValueError, match="ours"):  # a bug of ours keeps its traceback
        main(["bug"])


def test_as_a_process() -> None:
    """Exit codes and streams as a shell sees them, argv taken from the process."""
    code = (
        "from dspark_jax.config.cli import parse_named, program; program(lambda argv: print(parse_named(argv).seed))()"
    )

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)

    good = run("--config", "debug", "--seed", "41")
    assert (good.returncode, good.stdout) == (0, "41\n")
    bad = run("--config", "debug", "--drafter.blok-size", "3")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)
    assert "did you mean --drafter.block-size" in bad.stderr
    assert "embedded_dspark" in run("--help").stdout
    assert "--drafter.block-size INT" in run("--config", "debug", "--help").stdout


def test_output_that_can_not_be_written_is_no_traceback() -> None:
    """A reader that leaves, a full disk behind stdout, and a terminal of another encoding."""
    code = "from dspark_jax.config.cli import program; program(lambda argv: print('é🙂' * 40_000))()"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}

    def run(stdout: int | IO[bytes]) -> tuple[int, str]:
        command = [sys.executable, "-c", code]
        done = subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, env=environment)
        if done.stdout is not None:
            done.stdout.close()
        said = done.stderr.read().decode() if done.stderr else ""
        return done.wait(60), said

    assert run(subprocess.PIPE) == (141, "")
    with open("/dev/full", "wb") as full:
        code = code.replace("40_000", "2")  # all of it in the buffer, until the end
        assert run(full) == (2, "The disk takes no more (No space left on device): make room and run again.\n")
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, "\\xe9\\U0001f642" * 2 + "\n")
