"""Terms of the loss by chunks of the vocabulary against those of whole rows of logits, values and gradients; kernels in
the step of several TPUs; what is refused."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice

from dspark_jax.config.cli import load_config
from dspark_jax.errors import UserError
from dspark_jax.planning.training import AbstractRun
from dspark_jax.sharding import abstract_mesh
from dspark_jax.training import vocabulary_tpu
from dspark_jax.training.terms import LossOptions, label_terms, soft_terms
from dspark_jax.training.vocabulary_chunks import row_terms
from dspark_jax.training.vocabulary_terms import Asked, RowTerms

M, D, R, V = 24, 128, 128, 600
ALL = LossOptions(0.0, 0.0, 0.0, decay_gamma=0.0, anchor_chunk=1, soft_ce_alpha=1.0, lk_alpha=1.0)
ASKED = Asked(soft=True, overlap=True, softcap=None, chunk=256, interpret=True)


def inputs(dtype: Any, markov: bool) -> tuple[Any, ...]:
    """hidden, latent, table, the target's hidden, head, labels; laws that are far from uniform."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (M, D), (M, R), (V, R), (M, D), (V, D)
    made = [jax.random.normal(*x) * 0.5 for x in zip(keys, shapes, strict=True)]
    # Values that bfloat16 has, whatever the dtype. Labels in every chunk, the first and the last id among them.
    hidden, latent, table, target, head = (x.astype(jnp.bfloat16).astype(dtype) for x in made)
    labels = jnp.asarray(np.linspace(0, V - 1, M).round(), jnp.int32)
    # A row of which no draft is ever accepted, in float32's smallest numbers.
    hidden = hidden.at[3].multiply(16)
    return hidden, *((latent, table) if markov else (None, None)), target, head, labels


def plain(hidden: Any, latent: Any, table: Any, target: Any, head: Any, labels: Any, softcap: float | None) -> RowTerms:
    """The same of whole rows of logits, by the terms that the loss has without chunks."""

    def capped(logits: Any) -> Any:
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    def times(rows: Any, table: Any) -> Any:
        return jnp.einsum("md,vd->mv", rows, table, preferred_element_type=jnp.float32)

    draft, target = capped(times(hidden, head)), capped(times(target, head))
    draft = draft if latent is None else draft + times(latent, table)
    entropy, l1 = label_terms(draft, jax.nn.softmax(target), labels)
    soft = soft_terms(draft, target, l1, None, ALL)
    own = jnp.sum(jax.nn.softmax(target) * jax.nn.log_softmax(target), axis=-1)
    return RowTerms(entropy, l1, soft["soft_ce"], own, -soft["lk"])


@pytest.fixture(autouse=True)
def blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 rows are two of the kernels' blocks, the second of which is not full."""
    monkeypatch.setattr(vocabulary_tpu, "ROWS", 16)


@cache
def both(asked: Asked | None, dtype: Any, markov: bool, softcap: float | None) -> Any:
    """(terms, gradients by hidden, latent and table); without `asked` those of the plain form in float32."""
    given = inputs(dtype, markov)

    @jax.jit
    def run(*given: Any) -> Any:
        def terms(hidden: Any, latent: Any, table: Any) -> RowTerms:
            if asked is None:
                return plain(hidden, latent, table, *given[3:], softcap)
            return row_terms(hidden, latent, table, *given[3:], asked)

        made, pull = jax.vjp(terms, *given[:3])
        # `own` is the target's alone.
        weights = RowTerms(*jax.random.normal(jax.random.key(9), (5, M)))._replace(own=jnp.zeros(M))
        return made, pull(weights)

    return jax.device_get(run(*given))


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize(("markov", "softcap"), [(True, None), (False, 3.0)])
def test_values_and_gradients_are_those_of_whole_rows(markov: bool, softcap: float | None, kernel: bool) -> None:
    """600 ids do not divide by 256. The kernels run as plain jax."""
    found = both(ASKED._replace(softcap=softcap, kernel=kernel), jnp.float32, markov, softcap)
    expected = both(None, jnp.float32, markov, softcap)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


@pytest.mark.parametrize("kernel", [False, True])
def test_in_bfloat16_nothing_but_the_rounding_of_slopes_differs(kernel: bool) -> None:
    (terms, gradients), (wanted, right) = (
        both(ASKED._replace(kernel=kernel), jnp.bfloat16, True, None),
        both(None, jnp.float32, True, None),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), terms, wanted)
    for made, exact in zip(gradients, right, strict=True):
        assert made.dtype == jnp.bfloat16
        assert np.linalg.norm(np.float32(made) - exact) < 4e-3 * np.linalg.norm(exact)


@pytest.mark.lowering
def test_each_device_of_a_mesh_runs_the_kernels_on_its_own_rows() -> None:
    """In the whole step, lowered for TPUs that are not here."""
    config = load_config("qwen3_4b_dspark")
    drafter = replace(config.drafter, num_layers=1, target_layer_ids=(1,), num_anchors=4, block_size=4)
    data = replace(config.data, global_batch=4, accumulation_steps=1, max_length=64)
    config = replace(config, drafter=drafter, vocabulary_chunk=64, data=data)
    mesh = abstract_mesh(4, 1, 4).update(abstract_device=AbstractDevice("TPU v5p", 1, "tpu"))
    text = AbstractRun.of(config, mesh).lower("tpu").as_text()
    for kernel in ("vocabulary_terms", "vocabulary_slopes"):
        # 4 blocks of 4 positions of one sequence.
        assert re.search(rf'@tpu_custom_call.*kernel_name = "{kernel}".* : \(tensor<16x2560xbf16>', text), kernel


@pytest.mark.parametrize(
    ("drafter", "mesh", "said"),
    [
        ({"kind": "eagle3", "num_layers": 1, "block_size": 2, "target_layer_ids": (0, 1, 2, 3, 4)}, 1,
         "vocabulary_chunk is 64, but a drafter of kind 'eagle3' is trained with whole rows of logits"),
        ({"markov_head_type": "selector"}, 1, "a selector chooses among whole rows"),
        ({"draft_vocabulary": "ids.json"}, 1, "a pruned draft vocabulary needs whole rows"),
        ({}, 2, "a mesh of tensor=2, expert=1 splits whole rows of logits; set it to 0"),
    ],
)  # fmt: skip
def test_what_needs_whole_rows_is_refused(
    drafter: dict[str, Any], mesh: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ids.json").write_text('{"ids": [0, 2]}')
    monkeypatch.chdir(tmp_path)
    config = load_config("qwen3_4b_dspark")
    data = replace(config.data, global_batch=2, accumulation_steps=1)
    config = replace(config, drafter=replace(config.drafter, **drafter), vocabulary_chunk=64, data=data)
    with pytest.raises(UserError, match=said):
        AbstractRun.of(config, abstract_mesh(2, -1, 1, mesh))
