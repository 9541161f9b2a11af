"""`infer.studies.figures`: the page in docs/ is what the results say, missing ones are named and measured once."""

import json
import shutil
from pathlib import Path

import pytest

from dspark_jax.errors import UserError
from infer.studies import figures_steps
from infer.studies.figures import main, paper_gain, render
from infer.studies.figures_paper import PAPER
from infer.studies.figures_steps import PAIRS, FiguresSettings, measured, run, steps

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_in_docs_is_what_the_results_say(tmp_path: Path) -> None:
    main(["--output", str(tmp_path), "--results", str(DOCS / "results")])
    assert (tmp_path / "README.md").read_text() == (DOCS / "figures" / "README.md").read_text(), (
        "run python -m infer.studies.figures"
    )
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {path.name for path in (DOCS / "figures").glob("*.png")} and plots


def test_the_papers_gains() -> None:
    """16 to 18 % over DFlash and 27 to 31 % over Eagle3, as the paper says of its means."""
    assert all(len(taus) == 3 for rows in PAPER.values() for taus in rows.values())
    assert 0.16 < paper_gain("dflash") < 0.18 and 0.27 < paper_gain("eagle3") < 0.31


def test_missing_results_are_named_with_their_command(tmp_path: Path) -> None:
    settings = FiguresSettings(tmp_path, tmp_path / "none")
    page = render(settings)
    for pair in PAIRS:
        for name in (pair.compare, pair.curves, pair.evaluate, pair.load):
            assert f"(results/{name})" in page and " ".join(steps(settings)[name][1:]) in page
    # Eight figures of two pairs.
    assert page.count("Not measured yet") == 16


def test_only_what_is_missing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = FiguresSettings(tmp_path / "page", tmp_path, work=tmp_path / "work")
    ran: list[list[str]] = []

    def program(words: list[str]) -> None:
        ran.append(words)
        folder = settings.work / "v4_load"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"closed": {}}))

    monkeypatch.setattr(figures_steps, "run", program)
    words = steps(settings)["v4_load.json"]
    for _ in range(2):
        measured(settings, "v4_load.json", words)
    assert ran == [words] and json.loads((tmp_path / "v4_load.json").read_text()) == {"closed": {}}


def test_a_simulated_load_waits_for_its_rounds_and_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one program reads of another stays in the folder of work, and is measured once as well."""
    settings, ran = FiguresSettings(tmp_path / "page", tmp_path, work=tmp_path / "work"), list[str]()

    def program(words: list[str]) -> None:
        folder = Path(words[words.index("--output") + 1])
        ran.append(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.json", "traces.npz"):
            (folder / name).write_text("{}")

    monkeypatch.setattr(figures_steps, "run", program)
    names = ("real_profile/metrics.json", "real_traces/traces.npz", "load_real.json")
    order = [name for name in steps(settings) if name in names]
    for _ in range(2):
        for name in order:
            measured(settings, name, steps(settings)[name])
    assert ran == ["real_profile", "real_traces", "load_real"]
    assert {path.name for path in tmp_path.glob("*.json")} == {"load_real.json"}

    # Where the load is there, what it was read from need not be.
    shutil.rmtree(settings.work)
    for name in order:
        measured(settings, name, steps(settings)[name])
    assert len(ran) == 3


def test_a_program_that_fails_is_named() -> None:
    with pytest.raises(UserError, match="ended with status"):
        run([shutil.which("false") or "false", "-m", "x"])
