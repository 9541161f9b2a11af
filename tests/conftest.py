"""What all tests share: the CPU, no network, the order of files, and compiled programs while there is room for them."""

import gc
import importlib.util
import os
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.xla import FAST_COMPILER

# Before anything imports jax. Tests that simulate several devices or processes start programs of their own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_FLAGS", FAST_COMPILER)
# No line of a program names the Python that made it: a tenth of what lowering and compiling a round takes.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# As the Makefile has it; without, the first program that a test runs would choose a folder for all that follow.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# Profiles that engines measure are made once for all tests, and not kept among the user's.
os.environ.setdefault("DSPARK_JAX_CACHE", str(Path(__file__).parents[1] / ".cache" / "dspark_jax"))

# Files that take half a minute or more, the longest first: a worker that begins one last would keep the other waiting.
# `make quick` leaves them out. The last lines of a run list the CPU seconds of each, to order them by.
LONG_FILES = (
    "test_multiprocess",
    "test_scheduled_loop",
    "test_lossless",
    "test_broken_laws",
    "test_v4_decoding",
    "test_conformance",
    "test_overload",
    "test_golden",
    "test_dispatch",
    "test_coupled",
    "test_loop",
    "test_drafter_kinds",
    "test_load",
    "test_evaluate",
    "test_readme",
    "test_wheel",
    "test_page",
    "test_auto_policy",
    "test_engine_machine",
    "test_guards",
    "test_draft_vocabulary",
    "test_programs",
    "test_sweep",
    "test_api",
    "test_api_load",
    "test_kill_resume",
    "test_self_prompts",
    "test_engine_trust",
    "test_infer_programs",
    "test_prefix_reuse",
    "test_corpora",
    "test_bench",
    "test_request_controls",
    "test_fuzz_readers",
    "test_adding_a_drafter",
    "test_decode_plan",
    "test_api_refusals",
    "test_stored_runs",
    "test_regeneration",
)

# A process may hold so many memory maps, and each compiled program holds some. One that runs out dies in the compiler.
MAPS, MAPS_LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
SHARE_OF_MAPS = 0.4


@pytest.hookimpl(tryfirst=True)  # the option -m looks at the marks afterwards
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first. Without PyTorch, parity tests are reported as skipped with the command that runs them."""
    place = {name: i for i, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if item.path.stem in place:
            item.add_marker(pytest.mark.long)
    if importlib.util.find_spec("torch") is None:
        for item in items:
            if item.get_closest_marker("parity"):
                item.add_marker(pytest.mark.skip(reason="PyTorch is not installed: make parity-env"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tracing makes millions of objects that live, and the collector would look through all of them, and through what
    was imported, again and again: a third of the time that a trace takes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs() -> Iterator[None]:
    """Files share what was traced and compiled for the tiny pairs, until the memory maps of this process run short."""
    yield
    if maps_run_short():
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def shared_steps() -> Iterator[None]:
    """Runs of `train.fit` in this process whose steps are equal trace and compile one."""
    from tests.shared_steps import sharing

    with sharing():
        yield


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One server in each worker for all files that ask it over HTTP; imported, it would be a fixture of each file."""
    from tests.api_tiny import serve, spoken_pair

    running = serve(spoken_pair(tmp_path_factory.mktemp("api")))
    yield running
    running.stop()


@pytest.fixture
def client(running: Any) -> Any:
    """OpenAI's own client of the server."""
    import openai

    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)


def maps_run_short() -> bool:
    """Whether this process holds more than `SHARE_OF_MAPS` of the maps it may; True where that can't be told."""
    if not (MAPS.exists() and MAPS_LIMIT.exists()):
        return True
    with open(MAPS, "rb") as lines:
        return sum(1 for _ in lines) > SHARE_OF_MAPS * int(MAPS_LIMIT.read_text())


# CPU seconds by file: what `LONG_FILES` is ordered by, as the wall clock depends on what else the machine does.

LONG_SECONDS = 30
"""What makes a file long, on the CPU, compilation included."""
_spent: Counter[str] = Counter()
_before = [0.0]


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def pytest_runtest_setup() -> None:
    _before[0] = _before[0] or cpu_seconds()  # imports and collection are no test's


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Any:
    """A worker's report of each phase says what was spent since the last one; module fixtures are in it."""
    report = yield
    _before[0], report.cpu_seconds = (now := cpu_seconds()), now - _before[0]
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # By its id: the location of a state machine is Hypothesis's file.
    _spent[Path(report.nodeid.split("::")[0]).stem] += getattr(report, "cpu_seconds", 0.0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The files that are long, or that `LONG_FILES` calls so, longest first."""
    rows = [(name, spent) for name, spent in _spent.most_common() if spent > LONG_SECONDS or name in LONG_FILES]
    terminalreporter.section(f"CPU seconds by file, {sum(_spent.values()):.0f} in all")
    for name, spent in rows:
        terminalreporter.write_line(f"{spent:8.1f}  {name}")
