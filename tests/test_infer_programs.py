"""`infer.generate` and `infer.bench` from beginning to end, and their answers to bad input: a sentence, exit code 2."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import save_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.drafters.registry import Drafter, drafter_hf_config, read_config, skeleton
from dspark_jax.errors import UserError
from dspark_jax.evaluation.acceptance import Acceptance
from dspark_jax.evaluation.timing import Timed, alternate, median_ratio, median_speed
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import drain
from dspark_jax.serving.requests import Generation, Progress
from dspark_jax.sharding import split
from infer.bench import TransformersDecoder
from infer.bench import main as bench
from infer.generate import Answers
from infer.generate import main as generate
from tests.decoding_tiny import random_leaves
from tests.tiny import write_tiny_target

Program = Callable[[list[str]], Any]
SHORT = ["--max-new-tokens", "8"]


def write_drafter(target_folder: Path, folder: Path) -> None:
    target = load_target(target_folder)
    config = drafter_hf_config(
        target.hf_config, num_layers=1, target_layer_ids=(-1, 0), mask_token_id=3, block_size=3, markov_rank=8,
        dtype="float32",
    )  # fmt: skip
    graphdef, abstract = split(skeleton(config))
    params = random_leaves(config, abstract, 0.2, 1)
    save_drafter(folder, Drafter("new", read_config(config), graphdef, params, config), target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target and its drafter, three others they don't go with, and prompts of two domains."""
    folder = tmp_path_factory.mktemp("infer")
    write_tiny_target(folder / "target")
    for name, changes in (
        ("deeper", {"num_hidden_layers": 3}),
        ("vocabulary", {"vocab_size": 320}),
        ("retrained", {"seed": 5}),
    ):
        write_tiny_target(folder / name, **changes)
        write_drafter(folder / name, folder / f"{name}_drafter")
    write_drafter(folder / "target", folder / "drafter")
    rows = [
        {"id": "sum", "messages": [{"role": "user", "content": "What is the sum of three and four?"}]},
        {"id": "list", "messages": [{"role": "user", "content": "list"}, {"role": "assistant", "content": "no"}]},
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [{"turns": [text, "and then?"]} for text in ("Return the length of the list.", "one", "two words")]
    (folder / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    return folder


def refused(program: Program, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Its one sentence; nothing else is said."""
    with pytest.raises(SystemExit) as stop:
        program([str(word) for word in argv])
    assert stop.value.code == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.startswith("Device: ")]
    assert said.out == "" and len(lines) == 1 and "Traceback" not in said.err
    return lines[0]


# infer.generate


def test_generate_streams_and_writes_the_same(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = [
        "--target",
        str(folder / "target"),
        "--prompt",
        "What is the sum?",
        "--output",
        str(tmp_path / "a" / "out"),
    ]
    generate([*prompt, *SHORT])
    shown = capsys.readouterr().out
    plain = json.loads((tmp_path / "a" / "out").read_text())
    assert shown.startswith(plain["text"]) and "1 requests, " in shown and "accepted length 1.00" in shown
    assert 1 <= len(plain["tokens"]) <= 8 and plain["finish_reason"] in ("stop", "length")
    generate([*prompt, *SHORT, "--drafter", str(folder / "drafter"), "--policy", "fixed"])
    speculative = json.loads((tmp_path / "a" / "out").read_text())
    assert speculative["tokens"] == plain["tokens"] and len(speculative["verified_at"]) == 3


def test_generate_reads_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(folder / "chat.jsonl"), str(folder / "code.jsonl")]
    out = tmp_path / "answers.jsonl"
    sampling = ["--temperature", "1", "--top-p", "0.9", "--seed", "4", "--slots", "2"]
    generate(["--target", str(folder / "target"), "--prompts", *files, "--output", str(out), *SHORT, *sampling])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    rows.sort(key=lambda row: row["index"])
    assert [row["id"] for row in rows] == ["sum", "list", "code-1", "code-2", "code-3"]
    assert [row["domain"] for row in rows] == ["chat"] * 2 + ["code"] * 3
    assert "--- code-3\n" in capsys.readouterr().out


def test_an_interrupt_keeps_the_answers_that_have_ended(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers.jsonl"
    ended: list[Generation] = []

    def interrupted(engine: Engine) -> Iterator[Progress]:
        for progress in drain(engine):
            yield progress
            ended.extend([progress.generation] if progress.generation is not None else [])
            if len(ended) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr("infer.generate.drain", interrupted)
    argv = ["--target", folder / "target", "--prompts", folder / "code.jsonl", "--output", out, "--slots", "1", *SHORT]
    with pytest.raises(SystemExit) as stop:
        generate([str(word) for word in argv])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert stop.value.code == 130 and [tuple(row["tokens"]) for row in rows] == [g.tokens for g in ended]
    assert "2 of 3 answers had ended; they are in" in capsys.readouterr().err


def test_a_file_of_answers_has_one_writer(tmp_path: Path) -> None:
    """The second leaves what the first has written."""
    out = tmp_path / "answers.jsonl"
    with Answers(out, []):
        out.write_text("an answer\n")
        with pytest.raises(UserError, match="Another process is writing the answers"), Answers(out, []):
            pass
        assert out.read_text() == "an answer\n"
    with Answers(out, []):
        assert out.read_text() == ""


GENERATE: dict[str, tuple[list[str], str]] = {
    "no prompt": (["--target", "{}/target"], "Give what to decode in one way"),
    "two ways": (
        ["--target", "{}/target", "--prompt", "a", "--prompts", "{}/chat.jsonl"],
        "Give what to decode in one way",
    ),
    "missing target": (["--target", "{}/nothing", "--prompt", "a"], "is not a folder; give a model folder"),
    "missing drafter": (["--target", "{}/target", "--drafter", "{}/no", "--prompt", "a"], "is not a folder"),
    "drafter is a target": (
        ["--target", "{}/target", "--drafter", "{}/target", "--prompt", "a"],
        "names architectures ['Qwen3ForCausalLM']; expected one of Qwen3DSparkModel",
    ),
    "another vocabulary": (
        ["--target", "{}/target", "--drafter", "{}/vocabulary_drafter", "--prompt", "a"],
        "Vocabulary mismatch: the drafter has 320 tokens, the target 300",
    ),
    "another depth": (
        ["--target", "{}/target", "--drafter", "{}/deeper_drafter", "--prompt", "a"],
        "Target/drafter mismatch: the drafter's num_target_layers is 3, the target has 2",
    ),
    "another target of the same sizes": (
        ["--target", "{}/target", "--drafter", "{}/retrained_drafter", "--prompt", "a"],
        "Target/drafter mismatch: the drafter's frozen embed_tokens.weight is not",
    ),
    "long prompt": (
        ["--target", "{}/target", "--prompt", "one two three " * 90],
        "Shorten the prompt",
    ),
    "too many new tokens": (
        ["--target", "{}/target", "--prompt", "a", "--max-new-tokens", "600"],
        "has a context of 512. Ask for at most",
    ),
    "temperature": (["--target", "{}/target", "--prompt", "a", "--temperature", "-1"], "temperature = -1.0, which"),
    "verify length": (["--target", "{}/target", "--prompt", "a", "--verify-length", "-2"], "verify_length = -2, which"),
    "option": (["--target", "{}/target", "--promt", "a"], "Unknown option --promt: did you mean --prompt"),
    "value": (["--target", "{}/target", "--prompt", "a", "--slots", "many"], "slots"),
    "dtype": (["--target", "{}/target", "--prompt", "a", "--dtype", "float16"], "dtype"),
    "missing file": (["--target", "{}/target", "--prompts", "{}/no.jsonl"], "no.jsonl"),
    "empty file": (["--target", "{}/target", "--prompts", "{}/empty.jsonl"], "holds no prompt"),
    "not JSON": (["--target", "{}/target", "--prompts", "{}/broken.jsonl"], "broken.jsonl"),
    "no messages": (["--target", "{}/target", "--prompts", "{}/odd.jsonl"], "expected the field 'messages'"),
    "turns": (["--target", "{}/target", "--prompts", "{}/turns.jsonl"], "expected a list of texts"),
    "no slots": (
        ["--target", "{}/target", "--prompt", "a", "--slots", "0"],
        "The engine has slots = 0, which is out of range; expected 1 or more.",
    ),
    "policy": (["--target", "{}/target", "--prompt", "a", "--policy", "causal-ish"], "policy"),
    "mesh": (["--target", "{}/target", "--prompt", "a", "--mesh", "tensor=3"], "tensor=3 does not fit"),
    "axes": (["--target", "{}/target", "--prompt", "a", "--mesh", "8"], "sizes of data, fsdp, tensor and expert"),
    "stop text": (["--target", "{}/target", "--prompt", "a", "--stop", ""], "expected texts that are not empty"),
    "an old name": (["--target", "{}/target", "--prompts-file", "a"], "Unknown option --prompts-file: did you mean --"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate_refuses(case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"messages": [\n')
    (folder / "odd.jsonl").write_text('{"text": "a"}\n')
    (folder / "turns.jsonl").write_text('{"turns": [1]}\n')
    argv, message = GENERATE[case]
    argv = [word.replace("{}", str(folder)) for word in argv] + ["--output", str(tmp_path / "made" / "out.jsonl")]
    assert message in refused(generate, argv, capsys)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# infer.bench


def test_bench_measures_and_writes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--target", folder / "target", "--drafter", folder / "drafter", "--output", tmp_path / "bench", *SHORT]
    argv += ["--prompts", folder / "chat.jsonl", folder / "code.jsonl", "--repeats", "2", "--limit", "2"]
    argv += ["--policy", "fixed"]  # a policy that measures may leave drafting off here
    bench([str(word) for word in argv])
    metrics = json.loads((tmp_path / "bench" / "metrics.json").read_text())
    assert set(metrics["temperatures"]) == {"t0", "t1"} and metrics["settings"]["limit"] == 2
    rows = metrics["temperatures"]["t0"]
    assert {name: row["prompts"] for name, row in rows.items()} == {"chat": 2, "code": 2, "all": 4}
    for name, row in rows.items():
        assert row["identical"] == row["prompts"] and row["differences"] == [], name
        assert len(row["ratios"]) == 2 and np.median(row["ratios"]) == pytest.approx(row["speculative_over_plain"])
        assert 1.0 <= row["tau"] <= 4.0 and len(row["conditional"]) == 3
    assert "identical" not in metrics["temperatures"]["t1"]["all"]
    assert (tmp_path / "bench" / "conditional_acceptance.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "temperature 0" in shown and "identical" in shown and "4/4" in shown


@pytest.mark.parity
def test_bench_against_transformers(folder: Path, tmp_path: Path) -> None:
    argv = ["--target", folder / "target", "--against", "transformers", "--output", tmp_path, *SHORT]
    bench([str(word) for word in [*argv, "--prompts", folder / "chat.jsonl", "--repeats", "1"]])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["identical"] == metrics["prompts"] == 2 and metrics["plain_over_transformers"] > 0
    assert metrics["dtype"] == "float32"


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_runs_in_the_dtype_of_the_target(folder: Path, dtype: str) -> None:
    model = TransformersDecoder.load(str(folder / "target"), dtype, 8).model
    assert {str(weight.dtype) for weight in model.parameters()} == {f"torch.{dtype}"}


BENCH: dict[str, tuple[list[str], str]] = {
    "nothing to compare": (["--prompts", "{}/chat.jsonl"], "There is nothing to compare: give --drafter DIR"),
    "no prompts": (["--drafter", "{}/drafter"], "--prompts"),
    "missing prompts": (["--drafter", "{}/drafter", "--prompts", "{}/no.jsonl"], "no.jsonl"),
    "another drafter": (["--drafter", "{}/deeper_drafter", "--prompts", "{}/chat.jsonl"], "Target/drafter mismatch"),
    "option": (["--drafter", "{}/drafter", "--prompts", "{}/chat.jsonl", "--repeat", "2"], "did you mean --repeats"),
    "long": (
        ["--drafter", "{}/drafter", "--prompts", "{}/chat.jsonl", "--max-new-tokens", "512"],
        "has a context of 512",
    ),
    "no repeats": (["--drafter", "{}/drafter", "--prompts", "{}/chat.jsonl", "--repeats", "0"], "repeats and"),
}


@pytest.mark.parametrize("case", BENCH)
def test_bench_refuses(case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = BENCH[case]
    argv = [word.replace("{}", str(folder)) for word in argv]
    argv += ["--target", str(folder / "target"), "--output", str(tmp_path / "bench")]
    assert message in refused(bench, argv, capsys)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# What is counted


def generation(
    tokens: int, rounds: int, verified: tuple[int, ...], accepted: tuple[int, ...], judged: tuple[int, ...]
) -> Generation:
    committed = rounds + sum(accepted)
    return Generation(0, (1,), tuple(range(tokens)), "", "length", rounds, committed, verified, accepted, judged)


def test_acceptance_rates_by_position() -> None:
    ended = generation(1, 0, (0, 0, 0), (0, 0, 0), (0, 0, 0))
    found = Acceptance.of([generation(7, 4, (4, 4, 2), (3, 1, 1), (4, 3, 1)), ended])
    assert (found.rounds, found.tau) == (4, 9 / 4)
    assert found.unconditional == (3 / 4, 1 / 4, 1 / 2)
    assert found.conditional == (3 / 4, 1 / 3, 1.0)
    plain = Acceptance.of([generation(5, 4, (), (), ())])
    assert (plain.tau, plain.unconditional, plain.conditional) == (1.0, (), ())


def test_figures_are_medians_over_alternations() -> None:
    order: list[str] = []

    def decoder(name: str, speeds: list[float]) -> Callable[[], Timed]:
        left = iter([1.0, *speeds])

        def run() -> Timed:
            order.append(name)
            return Timed((generation(12, 0, (), (), ()),), 12 / next(left))

        return run

    runs = alternate({"a": decoder("a", [10, 50, 30]), "b": decoder("b", [5, 10, 20])}, 3)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert median_speed(runs["a"]) == pytest.approx(30) and median_ratio(runs["a"], runs["b"]) == pytest.approx(2)
