"""The worked example of docs/adding-a-drafter.md, as it stands there: trained, saved, loaded, decoded with."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import jax
import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter, shared_tables
from dspark_jax.checkpoints.huggingface import DTYPES
from dspark_jax.drafters.registry import DRAFTERS, DrafterKind, kind_name
from dspark_jax.serving.generate import generate
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.training.registry import make_objective
from dspark_jax.training.schedule import learning_rate_schedule, make_optimizer
from dspark_jax.training.step import init_train_state, make_train_step
from dspark_jax.training.terms import LossOptions
from tests.decoding_tiny import kind_pair, prompts
from tests.test_drafter_kinds import batch_of

DOC = Path(__file__).parents[1] / "docs" / "adding-a-drafter.md"


@pytest.fixture
def kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example, registered: the doc's file as a module, the doc's line in the registry."""
    code, line = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert len([row for row in code.splitlines() if row.strip()]) <= 50
    (tmp_path / "cell.py").write_text(code, encoding="utf-8")
    spec = spec_from_file_location("cell_example", tmp_path / "cell.py")
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cell_example", module)
    spec.loader.exec_module(module)
    (name, made), *_ = eval("{" + line + "}", {"DrafterKind": DrafterKind, **vars(module)}).items()
    monkeypatch.setitem(DRAFTERS, name, made)
    return name


def test_the_example_trains_and_decodes_losslessly(kind: str, tmp_path: Path) -> None:
    target, fresh = kind_pair(kind)
    options = LossOptions(ce_alpha=1.0, l1_alpha=0.9, confidence_alpha=0.0, decay_gamma=4.0, anchor_chunk=64)
    schedule = learning_rate_schedule(3e-2, 40, 0.1)
    adamw = make_optimizer(schedule, (0.9, 0.999), 1e-8, 0.0, 1.0)
    step = make_train_step(make_objective(fresh.hf_config, options, DTYPES["float32"]), adamw, schedule)
    state = init_train_state(fresh.hf_config, adamw, seed=0)
    taus = []
    for _ in range(30):
        state, metrics = step(state, shared_tables(target), batch_of(kind))
        taus.append(float(metrics["tau_probabilistic"]))
    assert taus[-1] > taus[0] + 0.1

    trained = type(fresh)(kind, fresh.config, fresh.graphdef, state.params, fresh.hf_config)
    save_drafter(tmp_path / "drafter", trained, target)
    drafter = load_drafter(tmp_path / "drafter", target)
    assert kind_name(drafter.hf_config) == kind
    jax.tree.map(np.testing.assert_array_equal, drafter.params, state.params)
    asked, config = prompts(12, 6, seed=4), EngineConfig(policy="fixed")
    plain, found = (generate(target, d, asked, SamplingParams(24), config) for d in (None, drafter))
    assert [g.tokens for g in found] == [g.tokens for g in plain]
    assert sum(sum(g.accepted_at) for g in found) > 0
