"""Random transformers models on PyTorch and what the parity tests compare of them, float32."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.targets.attention import CachedBlock, CausalRows
from dspark_jax.targets.kv_cache import append_rows, empty_cache
from dspark_jax.targets.target import Target

LENGTH = 24
SHAPES = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 96,
    "bos_token_id": None,
}


def saved_reference(folder: Path, model_class: Any, config: Any, query_norm: float = 1.0) -> Any:
    """A random model, saved by transformers: weights spread widely, norms and layer scalars around 1, biases around 0.

    query_norm: what the weights of q's norm are around; low where scores are not scaled, or rounding decides softmaxes.
    """
    import torch

    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            if name.endswith("q_norm.weight"):
                centre = query_norm
            weight.copy_(centre + (0.15 if weight.ndim > 1 else 0.2) * torch.randn_like(weight))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(1.0 + 0.3 * torch.randn_like(buffer))
    model.save_pretrained(folder)
    return model


def tokens(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(0, SHAPES["vocab_size"], (rows, LENGTH))


def torch_outputs(model: Any, ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """(embeddings and every layer's output, the last one after the final norm; logits)."""
    import torch

    with torch.inference_mode():
        out = model(torch.tensor(ids), output_hidden_states=True, use_cache=False)
    return [h.float().numpy() for h in out.hidden_states], out.logits.float().numpy()


def torch_greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


def outputs(target: Target, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(taps of the embedding and of every layer [B, T, L + 1, D], hidden after the final norm, logits)."""
    taps, hidden, logits = jax.device_get(_outputs(target.graphdef, target.params, jnp.asarray(ids)))
    return taps, hidden, logits


# Of the module, so that tests of one target share what is traced.
@partial(jax.jit, static_argnums=0)
def _outputs(graphdef: nnx.GraphDef, params: dict, ids: jax.Array) -> Any:
    model: Any = nnx.merge(graphdef, params)
    layers = model.config.num_layers
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    out = model(ids, positions, CausalRows(), tuple(range(-1, layers)))
    return out.taps.reshape(*ids.shape, layers + 1, -1), out.hidden, model.logits(out.hidden)


def check_cached_decoding(target: Target, expected: np.ndarray, atol: float) -> None:
    """Prefill, then chunks of several sizes at per-request lengths with a rollback: the uncached `expected` logits."""
    ids = tokens()

    @jax.jit
    def step(params: dict, cache: Any, rows: jax.Array, starts: jax.Array) -> Any:
        model = target.model(params)
        positions = starts[:, None] + jnp.arange(rows.shape[1])
        out = model(rows, positions, CachedBlock(cache, starts))
        return model.logits(out.hidden), append_rows(cache, out.kv, starts)

    cache = empty_cache(target.config.kv_shapes, 2, LENGTH + 4, jnp.float32)
    starts, widest = np.array([0, 0]), 4
    kept = [(4, 4), (1, 3), (4, 2), (2, 4), (4, 4), (3, 1), (4, 4)]  # of four rows fed, how many stay per request
    for counts in kept:
        rows = np.stack([np.pad(ids[r], (0, widest))[s : s + widest] for r, s in enumerate(starts)])
        for r, count in enumerate(counts):
            rows[r, count:] = 7  # refused drafts, overwritten by the next chunk
        logits, cache = step(target.params, cache, jnp.asarray(rows), jnp.asarray(starts))
        for r, count in enumerate(counts):
            at = int(starts[r])
            np.testing.assert_allclose(logits[r, :count], expected[r, at : at + count], atol=atol)
        starts = starts + np.array(counts)
    assert list(starts) == [22, 22]
