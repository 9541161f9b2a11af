"""Tiny DeepSeek-V4 pairs made in memory: every kind of layer, windows of a few tokens, drafters right at times."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dspark_jax.checkpoints.huggingface import abstract_target
from dspark_jax.drafters.deepseek_v4.config import native_config
from dspark_jax.drafters.registry import Drafter, read_config, skeleton
from dspark_jax.sharding import split
from dspark_jax.targets.config import config_sha256
from dspark_jax.targets.registry import read_target_config
from dspark_jax.targets.target import Target

VOCAB = 6


def v4_hf_config(**fields: Any) -> dict[str, Any]:
    """A window-only, a CSA and an HCA layer, the first of them hashed; two DSpark stages."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "float32",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "qk_rope_head_dim": 4,
        "q_lora_rank": 8,
        "o_groups": 2,
        "o_lora_rank": 4,
        "sliding_window": 6,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 0.8,
        "hidden_act": "silu",
        "hc_mult": 4,
        "hc_sinkhorn_iters": 5,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_theta": 5000.0,
        "compress_rope_theta": 80000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64,
        },
        "compress_ratios": [0, 4, 8, 0, 0],
        "tie_word_embeddings": False,
        "initializer_range": 0.4,
        "bos_token_id": 0,
        "eos_token_id": None,
        "dspark_block_size": 3,
        "dspark_noise_token_id": VOCAB - 1,
        "dspark_target_layer_ids": [1, 2],
        "dspark_markov_rank": 16,
    } | fields  # fmt: skip


def random_v4(abstract: dict, spread: float, seed: int, experts: int) -> dict:
    """Leaves: matrices N(0, spread), norms around 1, the rest around 0, tables of expert ids."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            rows = [rng.permutation(experts)[: leaf.shape[1]] for _ in range(leaf.shape[0])]
            return jnp.asarray(rows, leaf.dtype)
        centre = 1.0 if path[-1] in ("weight", "scale") and leaf.ndim == 1 else 0.0
        size = spread if leaf.ndim > 1 else 0.2
        return jnp.asarray(centre + size * rng.standard_normal(leaf.shape), leaf.dtype)

    return unflatten_dict({path: draw(path, leaf) for path, leaf in flatten_dict(abstract).items()})


@cache
def v4_target(seed: int = 0, context: float = 1.0, **fields: Any) -> Target:
    """`context` scales what the layers add, so that a small one is nearly a bigram model."""
    hf_config = v4_hf_config(**{name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()})
    config = read_target_config(hf_config)
    graphdef, abstract = abstract_target(config, "float32")
    flat = flatten_dict(random_v4(abstract, 0.4, seed, config.experts.count))
    for path in flat:
        if path[-1] in ("ob_weight_god", "down_weight_efd", "down_weight_fd"):
            flat[path] = flat[path] * context
    return Target("v4", config, graphdef, unflatten_dict(flat), hf_config, config_sha256(hf_config))


@cache
def v4_pair(kind: str = "dspark", context: float = 0.3, **fields: Any) -> tuple[Target, Drafter]:
    """A nearly-bigram target; DSpark's Markov head, or MTP's embedding, is that bigram beside what is their own."""
    if kind == "mtp":
        fields = {"compress_ratios": (0, 4, 8, 0)} | fields
    target = v4_target(3, context, **fields)
    native = native_config(target.hf_config, kind)
    graphdef, abstract = split(skeleton(native))
    flat = flatten_dict(random_v4(abstract, 0.3, 4, target.config.experts.count))
    if kind == "dspark":
        embed = np.asarray(target.params["embed_weight_vd"])
        normed = embed / np.sqrt(np.mean(embed**2, axis=-1, keepdims=True) + target.config.rms_norm_eps)
        flat["markov_head", "w1_vr"] = jnp.asarray(normed * np.asarray(target.params["final_norm"]["weight"]))
        flat["markov_head", "w2_vr"] = target.params["head_weight_vd"]
        flat["norm", "weight"] = 0.3 * flat["norm", "weight"]
    else:
        flat["e_proj", "weight_io"] = jnp.eye(target.config.hidden_size)
        flat["h_proj", "weight_io"] = 0.2 * flat["h_proj", "weight_io"]
        flat["enorm", "weight"] = jnp.ones_like(flat["enorm", "weight"])
        flat["norm", "weight"] = target.params["final_norm"]["weight"]
    return target, Drafter(kind, read_config(native), graphdef, unflatten_dict(flat), native)
