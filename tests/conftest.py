"""What all tests share: the CPU, no network, and PyTorch only where the extra `parity` is installed."""

import gc
import importlib.util
import os
from collections.abc import Iterator

import pytest

from tests.xla import FAST_COMPILER

# Before anything imports jax. Tests that simulate several devices or processes start programs of their own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_FLAGS", FAST_COMPILER)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the extra, parity tests are reported as skipped with the command that runs them; .ci/run installs it."""
    if importlib.util.find_spec("torch") is None:
        for item in items:
            if item.get_closest_marker("parity"):
                item.add_marker(pytest.mark.skip(reason="PyTorch is not installed: make parity-env"))


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs() -> Iterator[None]:
    """Every compiled program holds memory maps; a worker that keeps those of all test files runs out of them (65,530 by
    default), and the compiler then dies with a segmentation fault."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
