"""Block drafters in the speculators layout against the speculators library itself: its loading, its forward, its loss.

Anchors are given to the library, whose own choice is random. `make parity-env` installs it.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter, shared_tables
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.drafters.registry import Drafter, drafter_hf_config, read_config, skeleton
from dspark_jax.sharding import split
from dspark_jax.targets.target import Target
from dspark_jax.training.terms import LossOptions, selector_terms
from tests.decoding_tiny import random_leaves
from tests.forced import Forced, forced_blocks
from tests.parity import LENGTH, SHAPES, tokens
from tests.test_layouts import DFLASH, DFLASH2
from tests.test_parity import reference

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(find_spec("speculators") is None, reason="speculators is not installed: make parity-env"),
]

# The library's forward on its own differs by as much between its two attention implementations.
ATOL = 1e-4
ANCHORS, BLOCK, TAPS = (2, 7, 13), 4, (-1, 0, 1)
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "dflash": DFLASH,
    "waiting": DFLASH | {"sample_from_anchor": False},
    "dflash2": DFLASH2,
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("speculators")
    reference(folder, {})
    return load_target(folder, dtype="float32")


def stored(folder: Path, target: Target, fields: dict[str, Any]) -> Drafter:
    """A random drafter, saved in the library's layout and read again."""
    given = {"num_layers": 2, "target_layer_ids": TAPS, "mask_token_id": 5, "block_size": BLOCK, "markov_rank": 6}
    hf_config = drafter_hf_config(target.hf_config, dtype="float32", **given | fields)
    graphdef, abstract = split(skeleton(hf_config))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_leaves(hf_config, abstract, 0.2, 3))
    drafter = Drafter("random", read_config(hf_config), graphdef, params, hf_config)
    save_drafter(folder, drafter, target, layout="speculators")
    return load_drafter(folder, target)


def library_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library's model of a folder, float32, with eager attention and anchors that are given."""
    import torch
    from speculators import SpeculatorModel, SpeculatorModelConfig
    from speculators.models.dflash import core

    config = SpeculatorModelConfig.from_pretrained(str(folder))
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(str(folder), config=config, dtype=torch.float32).eval()
    chosen = torch.tensor(ANCHORS), torch.ones(len(ANCHORS), dtype=torch.bool)
    monkeypatch.setattr(core, "select_anchors", lambda *_: chosen)
    return model


def library_rows(model: Any, ids: np.ndarray, taps: np.ndarray, last: np.ndarray) -> dict[str, np.ndarray]:
    """What the library computes of each row of the blocks: hidden states, logits, the target's, confidence logits and a
    selector's candidates with their scores and cross-entropy."""
    import torch
    from speculators.models.dflash2.metrics import _candidate_cross_entropy, selector_training_candidates

    given = {"hidden_states": taps, "input_ids": ids, "verifier_last_hidden_states": last}
    rows = {name: torch.as_tensor(array) for name, array in given.items()}
    ones = torch.ones(ids.shape, dtype=torch.long)
    with torch.no_grad():
        hidden, logits, targets, _, index = model._backbone_forward(
            **rows, loss_mask=ones, document_ids=0 * ones, max_anchors=len(ANCHORS)
        )
        made = {"hidden": hidden, "logits": logits, "targets": targets}
        block = rows["input_ids"][0, index].view(len(ANCHORS), -1)
        waits = not model.config.sample_from_anchor
        before = torch.cat([block[:, :1], block[:, :-1]], dim=1) if waits else block
        states = hidden.view(*block.shape, -1)

        if getattr(model, "markov_head", None) is not None:
            embedded = model.markov_head.prev_embeddings(before)
            bias = model.markov_head.block_bias(prev_token_ids=before, hidden_states=states, prev_emb=embedded)
            made["logits"] = logits + bias.view(logits.shape)
            made["confidence"] = model.confidence_head(torch.cat([states, embedded], dim=-1)).view(1, -1)
        if hasattr(model, "candidate_selector"):
            choose = model.candidate_selector
            made["candidates"], made["scores"] = choose.select(logits, hidden, before.reshape(1, -1))
            trained, label, _ = selector_training_candidates(made["candidates"], targets.argmax(dim=-1))
            scores = choose.score_candidates(logits, hidden, before.reshape(1, -1), trained)
            made["selector"] = _candidate_cross_entropy(scores, label)

    skipped = 1 if waits else 0
    return {name: x.view(*block.shape, *x.shape[2:])[:, skipped:].numpy() for name, x in made.items()}


def own_rows(drafter: Drafter, target: Target, ids: np.ndarray, taps: np.ndarray) -> Forced:
    index = np.array(ANCHORS)[:, None] + np.arange(BLOCK)

    @jax.jit
    def run(params: dict) -> Forced:
        model = drafter.model(params)
        previous = jnp.asarray(ids[0, index])[None]
        return forced_blocks(model, shared_tables(target), model.context(taps), previous, jnp.asarray([ANCHORS]))

    return jax.device_get(run(drafter.params))


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_computes_the_same(
    kind: str, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = stored(tmp_path / "drafter", target, KINDS[kind])
    ids, rng = tokens(1), np.random.default_rng(2)
    taps, last = (rng.standard_normal((1, LENGTH, n * SHAPES["hidden_size"])).astype(np.float32) for n in (3, 1))
    library = library_rows(library_model(tmp_path / "drafter", monkeypatch), ids, taps, last)
    own = own_rows(drafter, target, ids, taps)

    np.testing.assert_allclose(own.hidden[0], library["hidden"], atol=ATOL)
    np.testing.assert_allclose(own.logits[0], library["logits"], atol=ATOL)
    if own.confidence is not None:
        np.testing.assert_allclose(own.confidence[0], library["confidence"], atol=ATOL)
    if own.selector is None:
        return

    np.testing.assert_array_equal(own.selector.candidates[0], library["candidates"])
    np.testing.assert_allclose(own.selector.scores[0], library["scores"], atol=ATOL)
    law = jax.nn.softmax(jnp.asarray(library["targets"]))[None]
    selector = jax.tree.map(jnp.asarray, own.selector)
    _, terms = selector_terms(selector, jnp.asarray(own.logits), law, LossOptions(anchor_chunk=1))
    np.testing.assert_allclose(terms["selector"][0], library["selector"], atol=ATOL)
    # Labels inside and outside of the candidates were both compared.
    assert 0 < np.mean(terms["recall"]) < 1
