"""Storage of hidden states: unscaled floats, or 8-bit codes with a float32 scale for each token and layer.

A layer's states of one token share a scale, the largest magnitude over the codec's largest code: layers differ by
orders of magnitude, and so do tokens. int8 spaces its codes evenly, float8_e4m3 by magnitude, which suits states with
a few large entries. Both directions take numpy or jax.numpy, so that training batches are decoded, and new states
encoded, on the device.

Axes: *n any leading axes of tokens, m tapped layers, D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

STATES = ("features", "last_hidden", "scales")
"""Arrays of a sample or batch that come from the target; `scales` [*n, m + 1] (last hidden's last) only with codes."""


@dataclass(frozen=True)
class Codec:
    """`code` stands in record headers; `largest` is the largest code's magnitude, None where states are not scaled."""

    code: int
    dtype: np.dtype
    largest: float | None = None

    @property
    def scaled(self) -> bool:
        return self.largest is not None


CODECS: dict[str, Codec] = {
    "bfloat16": Codec(1, np.dtype(ml_dtypes.bfloat16)),
    "float32": Codec(2, np.dtype(np.float32)),
    "float8_e4m3": Codec(3, np.dtype(ml_dtypes.float8_e4m3fn), 448.0),
    "int8": Codec(4, np.dtype(np.int8), 127.0),
}


def encode_states(features: Any, last_hidden: Any, codec: Codec, xp: ModuleType = np) -> dict[str, Any]:
    """Encodes features [*n, m D] and last hidden states [*n, D] for storage.

    Args:
        features: the tapped layers, concatenated on the last axis.
        last_hidden: after the target's final norm.
        codec: an entry of `CODECS`.
        xp: numpy or jax.numpy.

    Returns:
        The arrays named in `STATES`, in the codec's dtype; scales float32 [*n, m + 1] only where the codec has them.
        Half-way values go to the even code.
    """
    if codec.largest is None:
        return {
            "features": features.astype(codec.dtype, copy=False),
            "last_hidden": last_hidden.astype(codec.dtype, copy=False),
        }

    # The last hidden state is one more layer with a scale of its own.
    states = xp.concatenate([features, last_hidden], axis=-1).astype(xp.float32)
    width, size = features.shape[-1], last_hidden.shape[-1]
    # [*n, m + 1, D]
    states = states.reshape(*states.shape[:-1], width // size + 1, size)
    top = xp.max(xp.abs(states), axis=-1, keepdims=True)
    # A product, since compilers differ in how they divide by a constant. A layer of zeros gets a scale that can divide.
    scales = xp.where(top > 0, top * np.float32(1 / codec.largest), 1.0).astype(xp.float32)
    # A scale that was rounded down would carry the largest state past the largest code.
    values = xp.clip(states / scales, -codec.largest, codec.largest)
    values = xp.rint(values) if np.issubdtype(codec.dtype, np.integer) else values
    # [*n, (m + 1) D] again, the stored layout.
    codes = values.astype(codec.dtype).reshape(*states.shape[:-2], width + size)

    return {"features": codes[..., :width], "last_hidden": codes[..., width:], "scales": scales[..., 0]}


def decode_states(stored: Mapping[str, Any], dtype: Any, xp: ModuleType = np) -> dict[str, Any]:
    """Inverse of `encode_states`: features and last hidden states in `dtype`; those without scales are unchanged."""
    # Unscaled floats are used as they are stored; the caller's dtype is for codes.
    if "scales" not in stored:
        return {name: stored[name] for name in ("features", "last_hidden")}
    scales = stored["scales"]
    return {
        "features": _scaled(stored["features"], scales[..., :-1], dtype, xp),
        "last_hidden": _scaled(stored["last_hidden"], scales[..., -1:], dtype, xp),
    }


def _scaled(codes: Any, scales: Any, dtype: Any, xp: ModuleType) -> Any:
    # The product is float32, rounded to `dtype` once: [*n, layers, D] * [*n, layers, 1].
    wide = codes.astype(xp.float32).reshape(*scales.shape, codes.shape[-1] // scales.shape[-1]) * scales[..., None]
    return wide.reshape(codes.shape).astype(dtype)
