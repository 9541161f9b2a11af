"""A tiny target and a drafter that guesses much of it right, made in memory: what tests of the decode loop run on."""

import subprocess
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from dspark_jax.checkpoints.huggingface import abstract_target
from dspark_jax.decoding.dispatch import record_rounds
from dspark_jax.decoding.penalties import Penalties
from dspark_jax.decoding.prefill import admit
from dspark_jax.decoding.round import DecodeLoop, LoopParams
from dspark_jax.decoding.sampling import SamplingArrays
from dspark_jax.decoding.state import Admission, DecodeState, RoundRecord
from dspark_jax.drafters.registry import Drafter, drafter_hf_config, read_config, skeleton
from dspark_jax.scheduling.costs import Occupancy
from dspark_jax.sharding import split
from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.joined import apart, together
from dspark_jax.targets.registry import read_target_config
from dspark_jax.targets.target import Target
from tests.drafters_tiny import target_hf_config
from tests.tiny import random_params


def tiny_target(seed: int = 0, context: float = 1.0, **config: Any) -> Target:
    """A random untied target. `context` scales what its layers add, so that a small one is nearly a bigram model."""
    hf_config = target_hf_config(num_hidden_layers=2, tie_word_embeddings=False) | config
    parsed = read_target_config(hf_config)
    flat = flatten_dict(random_params(hf_config, seed))
    for path in flat:
        if path[-1] in ("o_weight_pd", "down_weight_fd"):
            flat[path] = (flat[path] * context).astype(flat[path].dtype)
    params = jax.tree.map(jnp.asarray, unflatten_dict(flat))
    graphdef, _ = abstract_target(parsed, hf_config["dtype"])
    return Target("tiny", parsed, graphdef, params, hf_config, config_sha256(hf_config))


@cache
def tiny_pair(seed: int = 0, context: float = 0.08, block_size: int = 4, **config: Any) -> tuple[Target, Drafter]:
    """A nearly-bigram target, and a drafter whose Markov head is that bigram beside random base logits.

    No training, and yet some drafts are accepted and some are not. `config` overrides the target's config.json.
    """
    target = tiny_target(seed, context, **config)
    dtype = target.hf_config["dtype"]
    hf_config = drafter_hf_config(
        target.hf_config, num_layers=1, target_layer_ids=(-1, 0), mask_token_id=target.config.vocab_size - 1,
        block_size=block_size, dtype=dtype, markov_rank=target.config.hidden_size,
    )  # fmt: skip
    graphdef, abstract = split(skeleton(hf_config))
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), target.params)
    flat = flatten_dict(random_leaves(hf_config, abstract, 0.2, seed + 1))
    embed = wide["embed_weight_vd"]
    normed = embed / np.sqrt(np.mean(embed**2, axis=-1, keepdims=True) + target.config.rms_norm_eps)
    flat["markov_head", "w1_vr"] = normed * wide["final_norm"]["weight"]
    flat["markov_head", "w2_vr"] = wide["head_weight_vd"]
    flat["backbone", "norm", "weight"] = 0.1 * flat["backbone", "norm", "weight"]
    params = {
        path: jnp.asarray(leaf, jnp.float32 if path[0] == "confidence_head" else dtype) for path, leaf in flat.items()
    }
    return target, Drafter("bigram", read_config(hf_config), graphdef, unflatten_dict(params), hf_config)


def taps_of(kind: str, layers: int) -> tuple[int, ...]:
    """Layers that a drafter of this kind may tap in a target of so many."""
    return (layers - 1,) if kind == "mtp" else tuple(range(max(layers - 1, 1)))


@cache
def kind_pair(
    kind: str,
    block_size: int = 3,
    spread: float = 0.4,
    head: str = "vanilla",
    options: tuple[tuple[str, Any], ...] = (),
    **config: Any,
) -> tuple[Target, Drafter]:
    """A target of six tokens, and a random drafter of any kind of the registry: over so few tokens chance alone is
    right at times, and at temperature 1 often. `options` are further settings of the drafter."""
    small = {"vocab_size": 6, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "head_dim": 4}
    small |= {"num_key_value_heads": 1, "initializer_range": 0.4, "max_position_embeddings": 64}
    target = tiny_target(5, 1.0, **small | config)
    hf_config = drafter_hf_config(
        target.hf_config, kind=kind, num_layers=1, target_layer_ids=taps_of(kind, target.config.num_layers),
        mask_token_id=0, block_size=block_size, markov_rank=4, markov_head_type=head, dtype="float32",
        **dict(options),
    )  # fmt: skip
    graphdef, abstract = split(skeleton(hf_config))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), random_leaves(hf_config, abstract, spread, 1))
    return target, Drafter(kind, read_config(hf_config), graphdef, params, hf_config)


def random_leaves(hf_config: dict[str, Any], abstract: dict, spread: float, seed: int) -> dict:
    """numpy leaves of a drafter: matrices N(0, spread), vectors around 1 (norms) or 0 (biases), drawn matrix by matrix
    however they are joined. Nothing is compiled for it."""
    rng, config = np.random.default_rng(seed), read_config(hf_config).backbone
    matrices = jax.eval_shape(lambda params: apart(params, config), abstract)

    def draw(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        centre = 1.0 if path[-1] == "weight" else 0.0
        return centre * (leaf.ndim == 1) + (spread if leaf.ndim > 1 else 0.1) * rng.standard_normal(leaf.shape)

    drawn = unflatten_dict({path: draw(path, leaf) for path, leaf in flatten_dict(matrices).items()})
    return together(drawn, config, abstract)


def prompts(count: int, vocab: int, seed: int = 0, longest: int = 20) -> list[tuple[int, ...]]:
    """Token ids of `count` prompts of different lengths, 1 to `longest`."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, vocab, rng.integers(1, longest + 1)).tolist()) for _ in range(count)]


def admission(
    loop: DecodeLoop, rows: Sequence[Sequence[int]], new: int, keys: np.ndarray, *, caps: Any = None, bucket: int = 32,
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
    penalties: Penalties | None = None,
) -> Admission:  # fmt: skip
    """Row i in slot i, without stop tokens."""
    count, lengths = len(rows), np.asarray([len(row) for row in rows], np.int32)
    tokens = np.zeros((count, bucket), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row

    def full(value: float, dtype: Any) -> np.ndarray:
        return np.full((count,), value, dtype)

    return Admission(
        slots=np.arange(count, dtype=np.int32),
        tokens=tokens,
        starts=full(0, np.int32),
        counts=lengths,
        final=full(True, bool),
        limit=lengths + np.int32(new),
        stop_tokens=np.full((count, loop.stop_slots), -1, np.int32),
        verify_cap=full(loop.block, np.int32) if caps is None else np.asarray(caps, np.int32),
        keys=np.asarray(keys, np.uint32),
        sampling=SamplingArrays(
            full(temperature, np.float32), full(top_k, np.int32), full(top_p, np.float32), full(min_p, np.float32)
        ),
        penalties=penalties or jax.tree.map(np.asarray, Penalties.off(count, loop.bias_slots)),
        wants_logprobs=full(False, bool),
        anchor=full(-1, np.int32),
    )


def admitted(
    loop: DecodeLoop, params: LoopParams, state: DecodeState, rows: Sequence[Sequence[int]], new: int, **how: Any
) -> DecodeState:
    """`state` with greedy rows (unless `how` says otherwise) in its slots."""
    keys = np.stack([np.arange(len(rows)), np.zeros(len(rows))], axis=1)
    return admit(loop, params, state, admission(loop, rows, new, keys, **how), True)


def one_round(
    loop: DecodeLoop, params: LoopParams, state: DecodeState, occupancy: Occupancy
) -> tuple[DecodeState, RoundRecord]:
    """A single round and its record."""
    state, records = record_rounds(loop, params, state, occupancy, 1)
    return state, jax.tree.map(lambda x: x[0], records)


def next_logits(target: Target, rows: np.ndarray) -> np.ndarray:
    """float32 logits [n, T, V] of whole token rows [n, T], without a cache."""
    return np.asarray(_next_logits(target.graphdef, target.params, jnp.asarray(rows)))


@partial(jax.jit, static_argnums=0)
def _next_logits(graphdef: nnx.GraphDef, params: dict, ids: jax.Array) -> jax.Array:
    model: Any = nnx.merge(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return model.logits(model(ids, positions, CausalRows()).hidden)


def run_python(*args: str) -> None:
    """Runs Python with these arguments in a process of its own, from the project's folder; it has to succeed."""
    folder = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, *args], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
