"""A small synthetic cache, for training runs where none has been built."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.data.cache_writer import CacheWriter
from dspark_jax.data.records import CacheSpec, Sample
from dspark_jax.data.tokenizers import tokenizer_hash
from dspark_jax.targets.attention import CausalRows
from dspark_jax.targets.target import Target


def write_synthetic_cache(
    folder: Path, target: Target, layer_ids: tuple[int, ...], *, records: int, length: int, seed: int
) -> None:
    """Writes records of random tokens, their second halves supervised, with the target's real hidden states.

    An existing cache is kept; an interrupted one is finished.

    Args:
        folder: of the cache.
        target: described; its parameters are loaded here and released.
        layer_ids: layers to tap.
        records: how many.
        length: tokens of each.
        seed: of the tokens.
    """
    spec = CacheSpec(
        target_name=target.name,
        target_sha256=target.config_sha256,
        layer_ids=layer_ids,
        hidden_size=target.config.hidden_size,
        tokenizer_hash=None if target.tokenizer is None else tokenizer_hash(target.tokenizer),
        chat_template="none: random tokens",
        max_length=length,
        min_loss_tokens=0,
        num_sources=records,
        dtype="float32",
    )
    with CacheWriter(folder, spec) as writer:
        if writer.complete:
            return

        # All records in one pass: they are few and short by their purpose.
        model = load_target(target.name, dtype="float32", tokenizer=False)
        # Random tokens, real states: losses and shapes are as in a run on text, and no text is needed.
        tokens = np.random.default_rng(seed).integers(0, target.config.vocab_size, (records, length), np.int32)
        taps, hidden = jax.device_get(_hidden_states(model, layer_ids, jnp.asarray(tokens)))
        mask = (np.arange(length) >= length // 2).astype(np.uint8)

        # The tokens follow from the seed, so an interrupted cache is continued with the same ones.
        for index in range(writer.next_source, records):
            writer.add(index, Sample(index, tokens[index], mask, taps[index], hidden[index]))
        writer.finish()


def _hidden_states(target: Target, layer_ids: tuple[int, ...], tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    @partial(jax.jit)
    def run(params: dict, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        out = target.model(params)(tokens, positions, CausalRows(), layer_ids)
        return out.taps, out.hidden

    return run(target.params, tokens)
