"""Speculative decoding with DSpark drafters in JAX: train a drafter for a frozen target, decode with it losslessly."""

from typing import TYPE_CHECKING, Any

from dspark_jax.errors import UserError

if TYPE_CHECKING:
    from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
    from dspark_jax.checkpoints.huggingface import load_target
    from dspark_jax.serving.engine import Engine
    from dspark_jax.serving.generate import generate, stream
    from dspark_jax.serving.requests import DecodeConfig, Generation, QueueFull, Request

__all__ = [
    "DecodeConfig",
    "Engine",
    "Generation",
    "QueueFull",
    "Request",
    "UserError",
    "generate",
    "load_drafter",
    "load_target",
    "save_drafter",
    "stream",
]

_HOMES = {
    "load_target": "dspark_jax.checkpoints.huggingface",
    "load_drafter": "dspark_jax.checkpoints.drafters",
    "save_drafter": "dspark_jax.checkpoints.drafters",
    "Engine": "dspark_jax.serving.engine",
    "generate": "dspark_jax.serving.generate",
    "stream": "dspark_jax.serving.generate",
}


def __getattr__(name: str) -> Any:
    """Loads a public name on first use, so that importing the package costs nothing and touches no backend."""
    if name not in __all__:
        raise AttributeError(f"module 'dspark_jax' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "dspark_jax.serving.requests")), name)
