"""infer.studies.products on a tiny target: every kind and number of rows is measured, and every product is needed."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.huggingface import load_target
from infer.studies.products import KINDS, chain, main, random_weights
from tests.tiny import write_tiny_target


def test_every_kind_is_measured(tmp_path: Path) -> None:
    write_tiny_target(tmp_path / "target")
    result = tmp_path / "products.json"
    few = ["--rows", "1", "2", "--requests", "2", "--prompts", "8", "--repeats", "1", "--round-tokens", "4"]
    main(["--target", str(tmp_path / "target"), "--result", str(result), *few])
    found = json.loads(result.read_text())
    assert set(found["milliseconds"]) == {f"{kind}/{rows}" for kind in KINDS for rows in (1, 2)} | {"prefill/8"}
    assert all(value > 0 for value in found["milliseconds"].values())
    # A plain round is a difference of two times, which noise outweighs on a target of this size.
    assert set(found["plain_rounds"]) == {"2"} and found["prefills"]["8"]["share"] > 0


def test_every_weight_of_the_chain_is_read(tmp_path: Path) -> None:
    write_tiny_target(tmp_path)
    config = load_target(tmp_path, dtype="float32").config
    weights = random_weights(config, jnp.float32)
    assert len(weights) == 4 * config.num_layers + 1
    x = jnp.ones((2, config.hidden_size))
    made = np.asarray(chain(weights, x, jnp.float32))
    for at in range(len(weights)):
        changed = [*weights[:at], weights[at] * 2, *weights[at + 1 :]]
        assert np.any(np.asarray(chain(changed, x, jnp.float32)) != made), at
