"""`infer.studies.modes` on made-up runs: the ways that it compares, and the figures that it writes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.errors import UserError
from dspark_jax.evaluation import timing
from dspark_jax.evaluation.timing import Timed
from dspark_jax.files import write_json
from dspark_jax.serving.generate import engine_for
from dspark_jax.serving.prompts import EncodedPrompt
from dspark_jax.serving.requests import Generation
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from infer.studies import modes
from tests.decoding_tiny import kind_pair, prompts

# Committed tokens of two prompts by 10 rounds each, and the seconds of two alternating runs.
MADE = {
    "plain, coupled": ((10, 10), (4.0, 4.0)),
    "rejection, fixed": ((20, 30), (2.0, 3.0)),
    "block, fixed": ((22, 32), (2.0, 3.0)),
    "coupled, fixed": ((18, 28), (2.5, 3.0)),
    "coupled, tree 8": ((28, 38), (1.0, 1.5)),
    "rejection, tree 6": ((24, 34), (1.0, 1.5)),
    "coupled, tree 8 by node": ((26, 36), (1.0, 1.5)),
    "rejection, look-ahead": ((20, 20), (2.0, 2.0)),
    "coupled, retrospective": ((20, 20), (1.0, 1.0)),
    "plain, greedy": ((10, 10), (4.0, 4.0)),
    "greedy, fixed": ((20, 40), (2.0, 2.0)),
    "greedy, tree 8": ((30, 50), (2.0, 2.0)),
    "greedy, tree 8 by node": ((30, 40), (2.0, 2.0)),
}


def generation(index: int, committed: int) -> Generation:
    accepted = (committed - 10, 0)
    return Generation(index, (1, 2), tuple(range(20)), "", "length", 10, committed, (10, 10), accepted, (10, 10))


def made(decoders: Mapping[str, Any], times: int) -> dict[str, list[Timed]]:
    assert times == 2
    return {
        name: [Timed(tuple(map(generation, (0, 1), MADE[name][0])), seconds) for seconds in MADE[name][1]]
        for name in decoders
        if name in MADE
    }


def test_figures_are_beside_rejections_of_the_same_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "alternate", made)
    monkeypatch.setattr(modes, "Passes", lambda way, prompts: way)
    target, drafter = kind_pair("dspark")
    prompts = [EncodedPrompt(str(i), "math", (1, 2)) for i in range(2)]
    settings = modes.ModesSettings(repeats=2, trees=(8,), policies=("fixed", "look-ahead", "retrospective"))
    rows = modes.at_temperature(settings, target, drafter, prompts, 1.0)
    assert rows.keys() == {name for name in MADE if "greedy" not in name and name != "rejection, tree 6"}

    block, coupled, tree = (rows[name] for name in ("block, fixed", "coupled, fixed", "coupled, tree 8"))
    assert block["tau"] == 2.7 and block["tau_gain"] == pytest.approx(0.2) and block["tau_gain_error"] < 1e-9
    assert block["speed_over_rejection"] == 1.0 and coupled["speed_over_rejection"] == pytest.approx(0.9)
    assert tree["tau_over_rejection"] == pytest.approx(3.3 / 2.5) and tree["speed_over_rejection"] == 2.0
    assert rows["coupled, retrospective"]["speed_over_rejection"] == 2.0
    assert (coupled["identical"], coupled["near_ties"], "identical" in block) == (2, 0, False)

    # Of a block of three drafts, six nodes are two at each level.
    whole = modes.at_temperature(replace(settings, trees=(6,), by_node=False), target, drafter, prompts, 1.0)
    assert whole["rejection, tree 6"]["tau_over_rejection"] == pytest.approx(2.9 / 2.5)
    assert not any("by node" in name for name in whole)

    greedy = modes.at_temperature(replace(settings, policies=("fixed",)), target, drafter, prompts, 0.0)
    assert greedy["greedy, tree 8"]["tau_over_rejection"] == pytest.approx(4 / 3) and len(greedy) == 4
    assert greedy["greedy, fixed"]["identical"] == 2

    found = modes.summary(settings, {"dspark": {"t1": rows, "t0": greedy}, "other": {"t1": rows}})
    assert {name: tau for name, tau in found["tau_t1"].items() if "other" not in name} == {
        "dspark": 2.5, "dspark_block": 2.7, "dspark_coupled": 2.3, "dspark_tree_8_coupled": 3.3,
        "dspark_tree_8_coupled_by_node": 3.1,
    }  # fmt: skip
    assert found["tau_t1"]["other_block"] == 2.7 and found["tau_t0"] == {
        "dspark": 3.0,
        "dspark_tree_8": 4.0,
        "dspark_tree_8_by_node": 3.5,
    }
    assert modes.table_rows("t1", rows)[3][1:] == [
        "coupled, fixed",
        "2.30",
        "-0.20 ± 0.00",
        "15",
        "0.900",
        "2/2, 0 near-ties",
    ]


def test_drafters_are_kept_beside_each_other_if_they_were_measured_alike(tmp_path: Path) -> None:
    settings = modes.ModesSettings(result=tmp_path / "next.json", name="dspark")
    assert modes.measured_alike(settings) == {}
    write_json(settings.result, modes.summary(settings, {"dspark": {"t1": {}}}))
    assert modes.measured_alike(replace(settings, name="dflash2")) == {"dspark": {"t1": {}}}
    assert modes.measured_alike(settings) == {}
    with pytest.raises(UserError, match="other per_domain, seed; give another --result"):
        modes.measured_alike(replace(settings, per_domain=3, seed=1))


def test_greedy_requests_are_verified_in_their_decoder_s_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A greedy tree of any size is one of coupled mode: without a mode it would be siblings under rejection."""
    given: list[Any] = []
    monkeypatch.setattr(timing, "generate", lambda *words, engine: given.append(words[3].mode) or [])
    timing.Decoder(*kind_pair("dspark"), SamplingParams(4, 0.0, mode="coupled"), EngineConfig(1, tree=8))([])
    assert given == ["coupled"]


def test_all_passes_of_a_way_are_decoded_by_one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass gives the tokens of `generate`, and none but the first makes an engine."""
    built: list[Any] = []
    monkeypatch.setattr(timing, "engine_for", lambda *words: built.append(engine_for(*words)) or built[-1])
    way = timing.Decoder(*kind_pair("dspark"), SamplingParams(8, 1.0, seed=3, mode="coupled"), EngineConfig(2, 32))
    given = [EncodedPrompt(str(i), "math", row) for i, row in enumerate(prompts(3, 6))]
    decode = timing.Passes(way, given)
    texts = [[g.tokens for g in found.generations] for found in (decode(), decode(), way(given))]
    assert texts[0] == texts[1] == texts[2] and len(built) == 1 and built[0].idle
