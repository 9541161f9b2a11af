"""`infer.studies.modes` on made-up runs: the ways that it compares, and the figures that it writes."""

from collections.abc import Mapping
from typing import Any

import pytest

from dspark_jax.evaluation.timing import Timed
from dspark_jax.serving.prompts import EncodedPrompt
from dspark_jax.serving.requests import Generation
from infer.studies import modes
from tests.decoding_tiny import kind_pair

# Committed tokens of two prompts by 10 rounds each, and the seconds of two alternating runs.
MADE = {
    "plain, coupled": ((10, 10), (4.0, 4.0)),
    "rejection, fixed": ((20, 30), (2.0, 3.0)),
    "block, fixed": ((22, 32), (2.0, 3.0)),
    "coupled, fixed": ((18, 28), (2.5, 3.0)),
    "coupled, tree 8": ((28, 38), (1.0, 1.5)),
    "rejection, look-ahead": ((20, 20), (2.0, 2.0)),
    "coupled, retrospective": ((20, 20), (1.0, 1.0)),
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
    target, drafter = kind_pair("dspark")
    prompts = [EncodedPrompt(str(i), "math", (1, 2)) for i in range(2)]
    settings = modes.ModesSettings(repeats=2, trees=(8,), policies=("fixed", "look-ahead", "retrospective"))
    rows = modes.at_temperature(settings, target, drafter, prompts, 1.0)
    assert rows.keys() == MADE.keys()

    block, coupled, tree = (rows[name] for name in ("block, fixed", "coupled, fixed", "coupled, tree 8"))
    assert block["tau"] == 2.7 and block["tau_gain"] == pytest.approx(0.2) and block["tau_gain_error"] < 1e-9
    assert block["speed_over_rejection"] == 1.0 and coupled["speed_over_rejection"] == pytest.approx(0.9)
    assert tree["tau_over_rejection"] == pytest.approx(3.3 / 2.5) and tree["speed_over_rejection"] == 2.0
    assert rows["coupled, retrospective"]["speed_over_rejection"] == 2.0
    assert (coupled["identical"], coupled["near_ties"], "identical" in block) == (2, 0, False)

    found = modes.summary(settings, {"t1": rows}, len(prompts))
    assert found["tau_t1"] == {"dspark": 2.5, "dspark_block": 2.7, "dspark_coupled": 2.3, "tree_8_coupled": 3.3}
    assert modes.table_rows("t1", rows)[3][1:] == [
        "coupled, fixed",
        "2.30",
        "-0.20 ± 0.00",
        "15",
        "0.900",
        "2/2, 0 near-ties",
    ]
