"""The mistakes that a V4 decode state makes most easily, rings a row too short and stale entries, found by rollback."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.targets.deepseek_v4 import model as model_module
from dspark_jax.targets.deepseek_v4 import state
from tests.decoding_tiny import next_logits
from tests.golden_v4 import Decoder, forget_traces
from tests.v4_tiny import VOCAB, v4_target

ORIGINAL_WRITE = state.write_entries


@pytest.fixture(autouse=True)
def traced_anew() -> Iterator[None]:
    """No decoder of a trap may be one that was traced without it, nor serve a later test."""
    forget_traces()
    yield
    forget_traces()


@contextmanager
def shorter(part: str) -> Iterator[None]:
    """A decode state in which one kind of ring is a row too short."""
    right = state.empty_state

    def wrong(config: Any, requests: int, size: int, width: int, dtype: Any) -> Any:
        made = []
        for layer, kind in zip(right(config, requests, size, width, dtype), config.layers, strict=True):
            if part == "window":
                layer = layer._replace(window=layer.window[:, 1:])
            elif part == "indexer" and kind.indexed:
                layer = layer._replace(indexer=layer.indexer._replace(raw=layer.indexer.raw[:, 1:]))
            elif part in ("CSA", "HCA") and kind.ratio and kind.indexed == (part == "CSA"):
                layer = layer._replace(main=layer.main._replace(raw=layer.main.raw[:, 1:]))
            made.append(layer)
        return tuple(made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "empty_state", wrong)
        yield


# The ratio of a layer's entries that has the part: each on a target of that layer alone, which compiles in a third of
# the time. All layers together: the rounds of test_v4_decoding, and the reference's own rollback.
RATIOS = {"window": 0, "CSA": 4, "indexer": 4, "HCA": 8}


def rollback_error(ratio: int, width: int = 4) -> float:
    """Blocks of which 0 to `width` rows are kept, against whole passes. Twice a block is dropped whole at the last row
    of a window, where the next one reads as far back as any does."""
    target, rng = v4_target(7, num_hidden_layers=1, compress_ratios=(ratio, 0, 0)), np.random.default_rng(3)
    decoder, kept = Decoder(target, width, size=64), list(rng.integers(0, VOCAB, 9))
    decoder.prefill(np.asarray(kept))
    blocks, rows = [], []
    for count in (0, 1, 0, 4, 2, 0, 3, 0, 1, 4, 0, 4, 3, 0, 2):
        block = rng.integers(0, VOCAB, width)
        blocks.append(np.pad([*kept, *block], (0, 64 - len(kept) - width)))
        rows.append((len(kept), decoder.feed(block, count)))
        kept += list(block[:count])
    whole = next_logits(target, np.asarray(blocks))
    return max(float(np.abs(found - row[at : at + width]).max()) for (at, found), row in zip(rows, whole, strict=True))


@pytest.mark.parametrize("ratio", sorted(set(RATIOS.values())))
def test_rollback_is_right_without_a_trap(ratio: int) -> None:
    assert rollback_error(ratio) < 1e-4


@pytest.mark.parametrize("part", RATIOS)
def test_a_ring_that_is_a_row_short_is_caught(part: str) -> None:
    with shorter(part):
        assert rollback_error(RATIOS[part]) > 1e-3


def test_stale_entries_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries of windows that rejected rows closed must be written again by the true ones."""

    def first_wins(entries: Any, rows: Any, slots: Any, first: Any) -> Any:
        made = ORIGINAL_WRITE(entries, rows, slots, first)
        return jnp.where(jnp.any(entries != 0, axis=-1, keepdims=True), entries, made)

    monkeypatch.setattr(state, "write_entries", first_wins)
    assert rollback_error(RATIOS["HCA"]) > 1e-3
