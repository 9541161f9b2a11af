"""Speculative decoding with DSpark drafters in JAX: train a drafter for a frozen target, decode with it losslessly."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dspark_jax.errors import UserError

if TYPE_CHECKING:
    from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
    from dspark_jax.checkpoints.huggingface import load_target
    from dspark_jax.drafters.registry import Drafter
    from dspark_jax.evaluation.calibrate import calibrate
    from dspark_jax.serving.engine import Engine
    from dspark_jax.serving.generate import generate, stream
    from dspark_jax.serving.requests import EngineClosed, Generation, Progress, QueueFull, Request, TokenLogprob
    from dspark_jax.serving.sampling import SamplingParams
    from dspark_jax.serving.settings import EngineConfig
    from dspark_jax.targets.target import Target
    from dspark_jax.training.fitting import fit

# The module of each public name, imported when the name is first used.
_HOMES = {
    "load_target": "checkpoints.huggingface",
    "load_drafter": "checkpoints.drafters",
    "save_drafter": "checkpoints.drafters",
    "generate": "serving.generate",
    "stream": "serving.generate",
    "fit": "training.fitting",
    "calibrate": "evaluation.calibrate",
    "Engine": "serving.engine",
    "SamplingParams": "serving.sampling",
    "EngineConfig": "serving.settings",
    "Request": "serving.requests",
    "Generation": "serving.requests",
    "Progress": "serving.requests",
    "QueueFull": "serving.requests",
    "EngineClosed": "serving.requests",
    "TokenLogprob": "serving.requests",
    "Target": "targets.target",
    "Drafter": "drafters.registry",
}

__all__ = [
    "Drafter",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "Generation",
    "Progress",
    "QueueFull",
    "Request",
    "SamplingParams",
    "Target",
    "TokenLogprob",
    "UserError",
    "__version__",
    "calibrate",
    "fit",
    "generate",
    "load_drafter",
    "load_target",
    "save_drafter",
    "stream",
]


def __getattr__(name: str) -> Any:
    """Loads a public name on first use, so that importing the package costs nothing and touches no backend."""
    if name == "__version__":
        return import_module("importlib.metadata").version("dspark-jax")
    if name not in _HOMES:
        raise AttributeError(f"module 'dspark_jax' has no attribute {name!r}")

    return getattr(import_module(f"dspark_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
