"""The embedded drafter, retrained for some seconds as if a trainer had one of the silent off-by-ones of rule 96."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dspark_jax.checkpoints.drafters import load_drafter, shared_tables
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.data.deepspec_chat import DEEPSPEC_FORMATS
from dspark_jax.datagen.corpora import DOMAINS, conversations
from dspark_jax.drafters.protocol import SharedTables
from dspark_jax.drafters.registry import Drafter
from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.kv_cache import head_major
from dspark_jax.targets.target import Target
from dspark_jax.training.anchors import make_blocks, sample_anchors
from dspark_jax.training.losses import target_logits
from dspark_jax.training.terms import total_variation_l1
from tests.forced import forced_blocks

LENGTH, ROWS, ANCHORS = 160, 4, 10
NEXT_TURN = {"role": "user", "content": "Go on."}


@dataclass(frozen=True)
class Material:
    """Conversations as training sees them (tokens and mask [S, T]) and what the target makes of them: final hidden
    states [S, T, D] and the drafter's taps [S, T, m D]."""

    target: Target
    drafter: Drafter
    tokens: jax.Array
    mask: np.ndarray
    hidden: jax.Array
    features: jax.Array


def material(target_folder: str, drafter_folder: str, each: int = 12) -> Material:
    target = load_target(target_folder, dtype="float32")
    drafter = load_drafter(drafter_folder, target, dtype="float32")
    rows = []
    for domain in DOMAINS:
        for item in islice(conversations(domain, "train"), 4 * each):
            encoded = DEEPSPEC_FORMATS["qwen"].encode(target.tokenizer, [*item["messages"], NEXT_TURN])
            if len(encoded.input_ids) <= LENGTH and encoded.loss_tokens > 12:
                rows.append(encoded)
    tokens, mask = np.zeros((2, len(rows), LENGTH), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.input_ids)], mask[i, : len(row.input_ids)] = row.input_ids, row.loss_mask

    @jax.jit
    def run(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = target.model(target.params)(ids, jnp.broadcast_to(jnp.arange(LENGTH), ids.shape), CausalRows(),
                                                  drafter.config.target_layer_ids)  # fmt: skip
        return out.hidden, out.taps

    return Material(target, drafter, jnp.asarray(tokens), mask, *run(jnp.asarray(tokens)))


def retrain(given: Material, *, steps: int, position: int = 0, mask_read: int = 0, rate: float = 2e-3) -> Drafter:
    """The drafter, trained on from where it is with its blocks at anchor + k + `position` and the loss mask read at
    label + `mask_read`; its config says nothing of it."""
    mask = jnp.asarray(np.roll(given.mask, -mask_read, axis=1))
    shared, params = shared_tables(given.target), given.drafter.params
    state = _OPTIMIZER.init(params)
    for i in range(steps):
        params, state = _step(
            given.drafter.graphdef, params, state, shared, given.features, given.hidden, given.tokens, mask,
            jnp.asarray(position), jax.random.key(i), rate,
        )  # fmt: skip
    return replace(given.drafter, params=params)


_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


@partial(jax.jit, static_argnames="graph")
def _step(
    graph: nnx.GraphDef, params: dict, state: optax.OptState, shared: SharedTables, features: jax.Array,
    hidden: jax.Array, tokens: jax.Array, mask: jax.Array, position: jax.Array, key: jax.Array, rate: float,
) -> tuple[dict, optax.OptState]:  # fmt: skip
    """One compiled step serves every off-by-one: the mask is data, the position an argument."""
    rows = jax.random.choice(key, tokens.shape[0], (ROWS,), replace=False)
    features, hidden, tokens, mask = (x[rows] for x in (features, hidden, tokens, mask))

    def loss(values: dict) -> jax.Array:
        model = nnx.merge(graph, values)
        anchors, keep = sample_anchors(key, mask, ANCHORS)
        blocks = make_blocks(tokens, mask, anchors, keep, model.block_size, None)
        at = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape) - position
        context = tuple(head_major(part) for part in model.backbone.context(features, at))
        out = forced_blocks(model, shared, context, blocks.previous, blocks.anchors)
        label = jnp.take_along_axis(out.logits, blocks.labels[..., None], axis=-1)[..., 0]
        ce = jax.nn.logsumexp(out.logits, axis=-1) - label
        l1 = total_variation_l1(out.logits, target_logits(shared, hidden, blocks))
        return jnp.sum(blocks.weights * (ce + l1)) / (jnp.sum(blocks.weights) + 1e-6)

    updates, state = _OPTIMIZER.update(jax.grad(loss)(params), state, params)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), state
