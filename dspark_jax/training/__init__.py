"""Training of drafters: anchors, losses, the jitted step, and the run around it. One process or many, one mesh.

`fit(config)` is the whole of it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspark_jax.training.fitting import Fitted, fit

__all__ = ["Fitted", "fit"]


def __getattr__(name: str) -> Any:
    """Loads the run on first use: the program that only starts the points of a sweep needs no jax."""
    if name not in __all__:
        raise AttributeError(f"module 'dspark_jax.training' has no attribute {name!r}")

    from dspark_jax.training import fitting

    return getattr(fitting, name)
