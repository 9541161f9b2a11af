"""Pairs with random weights in published shapes, made on the device: no download, and no host that must hold them."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from dspark_jax.checkpoints.huggingface import DTYPES, abstract_target
from dspark_jax.drafters.config import DSparkConfig
from dspark_jax.drafters.registry import Drafter, drafter_hf_config, read_config, skeleton
from dspark_jax.planning.decoding import PlanOptions, abstract_drafter, planned_pair
from dspark_jax.sharding import split
from dspark_jax.targets.config import TargetConfig, config_sha256
from dspark_jax.targets.registry import read_target_config
from dspark_jax.targets.target import Target

SPREAD = 0.02
"""Standard deviation of weights, as before training: logits stay finite, and products are not of zeros."""
_TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "dtype": "float32",
}


@dataclass(frozen=True)
class Shape:
    """A pair's shapes, and how it is measured.

    Attributes:
        config: configuration of the pair; empty: the tiny one.
        training: options of train.bench.
        requests: numbers of requests decoded at once.
        longest: positions of a request.
        dtype: of weights and activations.
        blocks: block lengths at which the sequential head is timed.
        cases: golden cases of tests/data.
    """

    config: str
    training: tuple[str, ...]
    requests: tuple[int, ...] = (1, 8, 32, 128)
    longest: int = 2048
    dtype: str = "bfloat16"
    blocks: tuple[int, ...] = (4, 8, 12, 16)
    cases: tuple[str, ...] = ("sampling", "qwen3_dspark_vanilla", "qwen3_dspark_noconfmarkov", "qwen3_eagle3_train")


SHAPES = {
    "4b": Shape("qwen3_4b_dspark", ("--preset", "qwen3_4b", "--runs", "5")),
    "8b": Shape(
        "qwen3_8b_dspark",
        ("--config", "qwen3_8b_dspark", "--data.global-batch", "1", "--data.accumulation-steps", "1", "--runs", "3"),
    ),
    # For a CPU and for tests: every part runs, no figure says anything.
    "tiny": Shape(
        "", ("--config", "debug", "--runs", "2", "--warm-up", "1", "--steps-per-run", "1"),
        (2,), 128, "float32", (2, 4), ("sampling",),
    ),
}  # fmt: skip


def random_pair(shape: Shape) -> tuple[Target, Drafter]:
    """The pair of a shape on the device."""
    if not shape.config:
        return _tiny_pair()
    options = PlanOptions(config=shape.config, dtype=shape.dtype)  # type: ignore[arg-type]
    target, drafter = planned_pair(options, None)
    assert drafter is not None
    params = (filled(target.params, 1), filled(drafter.params, 2))
    return replace(target, params=params[0]), replace(drafter, params=params[1])


def target_config(shape: Shape) -> TargetConfig:
    """The target's configuration alone, without weights."""
    if not shape.config:
        return read_target_config(_TINY)
    return planned_pair(PlanOptions(config=shape.config), None)[0].config


def with_block(target: Target, drafter: Drafter, block: int, rank: int) -> Drafter:
    """A drafter of the same layers with blocks of another length, and a Markov head of that rank or none (0). Its
    parameters are made anew, since some shapes depend on both."""
    made = drafter.config
    assert isinstance(made, DSparkConfig)
    dims = made.backbone
    return _new_drafter(
        target,
        num_layers=dims.num_layers, target_layer_ids=made.target_layer_ids, mask_token_id=made.mask_token_id,
        intermediate_size=dims.intermediate_size, num_attention_heads=dims.num_heads,
        block_size=block, markov_rank=rank, confidence_head_with_markov=rank > 0,
        dtype=str(drafter.params["backbone"]["norm"]["weight"].dtype),
    )  # fmt: skip


def filled(tree: Any, seed: int) -> Any:
    """Random arrays in place of shapes: matrices N(0, 0.02), norms 1; integers 0."""
    flat = flatten_dict(tree)
    # One small program for each shape, and never two copies of all weights.
    keys = jax.random.split(jax.random.key(seed), len(flat))
    return unflatten_dict({path: _filled(key, x.shape, x.dtype) for key, (path, x) in zip(keys, flat.items())})


@partial(jax.jit, static_argnums=(1, 2))
def _filled(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    return SPREAD * jax.random.normal(key, shape, dtype) if len(shape) > 1 else jnp.ones(shape, dtype)


def _tiny_pair() -> tuple[Target, Drafter]:
    config = read_target_config(_TINY)
    graphdef, shapes = abstract_target(config, "float32")
    target = Target("tiny", config, graphdef, filled(shapes, 1), _TINY, config_sha256(_TINY))
    settings = {"num_layers": 1, "target_layer_ids": (-1, 0), "mask_token_id": 3, "markov_rank": 8, "block_size": 2}
    return target, _new_drafter(target, dtype="float32", **settings)


def _new_drafter(target: Target, *, dtype: str, **settings: Any) -> Drafter:
    hf_config = drafter_hf_config(target.hf_config, dtype=dtype, **settings)
    module = skeleton(hf_config)
    params = filled(abstract_drafter(module, None, DTYPES[dtype]), 2)
    return Drafter("random", read_config(hf_config), split(module)[0], params, hf_config)
