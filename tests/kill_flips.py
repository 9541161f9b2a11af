"""Flips random bits in every kind of file that a training run reads or writes, and looks at what comes of each.

    python -m tests.kill_flips --times 500 [--seed N] [--scratch DIR]

A flip is right when it is refused or passed over with a sentence, or when it changes nothing that is read. It is wrong
when something else is read without a word (SILENT) or an error escapes that is no sentence (TRACE). Prints a table of
kinds and a verdict; exits 1 when a flip is wrong.
"""

import argparse
import contextlib
import io
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dspark_jax.checkpoints.drafters import load_drafter
from dspark_jax.checkpoints.huggingface import load_target
from dspark_jax.checkpoints.target_tables import describe_target
from dspark_jax.config.cli import load_config, parse
from dspark_jax.data.pipeline import open_cache
from dspark_jax.errors import UserError
from dspark_jax.report import table
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.run import Run
from dspark_jax.training.run_folder import MetricsLog, require_same_inputs, require_same_run
from dspark_jax.training.synthetic_cache import write_synthetic_cache
from tests.tiny import write_tiny_target
from train.fit import main as fit

OUTCOMES = ("sentence", "the same", "SILENT", "TRACE")


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        files: which files of a scratch folder are of it, as a pattern.
        read: what is read of a scratch folder, comparable with ==; prints to stderr what it passes over.
    """

    name: str
    files: str
    read: Callable[[Path], Any]


def arguments(folder: Path) -> list[str]:
    drafter = "--drafter.target-layer-ids 0 1 --drafter.block-size 3 --drafter.num-anchors 4 --drafter.markov-rank 4"
    data = "--data.global-batch 4 --data.accumulation-steps 1 --data.max-length 24 --epochs 9 --max-steps 4"
    places = ["--target", folder / "target", "--data.cache", folder / "cache", "--run-dir", folder / "run"]
    words = ("--config", "debug", *places, *drafter.split(), *data.split(), "--checkpoint.every-steps", 2)
    return [str(word) for word in words]


def config_of(folder: Path) -> Any:
    return parse(load_config("debug"), arguments(folder)[2:])


def make(folder: Path) -> None:
    """A target, a cache, and a whole run on both."""
    target = write_tiny_target(folder / "target", num_hidden_layers=3)
    write_synthetic_cache(folder / "cache", describe_target(target), (0, 1), records=16, length=24, seed=0)
    fit(arguments(folder))


def read_cache(folder: Path) -> Any:
    cache = open_cache(folder / "cache")
    return [{name: value.tobytes() for name, value in cache[index].arrays().items()} for index in range(len(cache))]


def read_run(folder: Path) -> Any:
    """What a resumed run makes sure of before its first step."""
    run = Run.of(config_of(folder))
    require_same_inputs(run.folder, run.inputs)
    return run.total_steps, run.step.drafter_hf


def read_config(folder: Path) -> Any:
    require_same_run(folder / "run", config_of(folder))


def read_log(folder: Path, digest: str) -> Any:
    with MetricsLog(folder / "run", 4, digest) as log:
        return log.records


def read_drafter(folder: Path) -> Any:
    drafter = load_drafter(folder / "run" / "drafter", load_target(folder / "target"))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(drafter.params)]


def kinds(folder: Path) -> list[Kind]:
    """All kinds, with what is read of them in the undamaged folder closed over where it is dear to make."""
    abstract = Run.of(config_of(folder)).step.abstract
    with contextlib.redirect_stderr(io.StringIO()), MetricsLog(folder / "run", 4) as log:
        digest = log.digest()

    def read_checkpoints(folder: Path) -> Any:
        with Checkpoints(folder / "run" / "checkpoints", 9) as checkpoints:
            restored = checkpoints.restore_latest(abstract)
        assert restored is not None
        step, state, extra = restored
        leaves = jax.tree.leaves((state.params, state.opt_state, jax.random.key_data(state.key)))
        return step, [np.asarray(leaf).tobytes() for leaf in leaves], extra

    return [
        Kind("checkpoint", "run/checkpoints/4/**/*", read_checkpoints),
        Kind("cache shard", "cache/shard-*", read_cache),
        Kind("cache index", "cache/samples.idx", read_cache),
        Kind("cache manifest", "cache/manifest.json", read_run),
        Kind("target weights", "target/*.safetensors", read_run),
        Kind("target config", "target/config.json", read_run),
        Kind("run's configuration", "run/config.json", read_config),
        Kind("run's inputs", "run/inputs.json", read_run),
        Kind("run's log", "run/metrics.jsonl", lambda folder: read_log(folder, digest)),
        Kind("drafter", "run/drafter/*", read_drafter),
    ]


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def outcome(kind: Kind, folder: Path, whole: Any) -> tuple[str, str]:
    """(one of OUTCOMES, what was said) of reading a damaged folder."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = kind.read(folder)
    except UserError as error:
        return "sentence", str(error)
    except Exception as error:  # what escapes is what this program looks for
        return "TRACE", f"{type(error).__name__}: {error}"
    if found == whole:
        return "the same", ""
    return ("sentence" if said.getvalue().strip() else "SILENT"), said.getvalue()


@contextlib.contextmanager
def spoiled(scratch: Path, path: Path, rng: random.Random) -> Iterator[None]:
    """The scratch folder with one bit of one file flipped; all of it is as it was afterwards."""
    flip(path, rng)
    try:
        yield
    finally:
        run = scratch / "work"
        shutil.rmtree(run)
        shutil.copytree(scratch / "whole", run)


def flip_and_read(scratch: Path, times: int, seed: int) -> dict[str, Counter[str]]:
    """Outcomes by kind, `times` flips in all, the kinds in turn."""
    work, rng = scratch / "work", random.Random(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        make(work)
    shutil.copytree(work, scratch / "whole")
    every = kinds(work)
    wholes = {kind.name: kind.read(work) for kind in every}
    shutil.rmtree(work)
    shutil.copytree(scratch / "whole", work)

    counts: dict[str, Counter[str]] = {kind.name: Counter() for kind in every}
    for number in range(times):
        kind = every[number % len(every)]
        file = rng.choice([path for path in sorted(work.glob(kind.files)) if path.is_file() and path.stat().st_size])
        name = file.relative_to(work)
        with spoiled(scratch, file, rng):
            what, said = outcome(kind, work, wholes[kind.name])
        counts[kind.name][what] += 1
        if what in ("SILENT", "TRACE"):
            print(f"{what} {kind.name}, {name}: {' '.join(said.split())[:200]}", flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, help="flips in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="an empty folder to work in and keep; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        counts = flip_and_read(scratch.resolve(), options.times, options.seed)
    rows = [[name, *(str(found[what]) for what in OUTCOMES)] for name, found in counts.items()]
    print(table(["file", *OUTCOMES], rows))
    wrong = sum(found["SILENT"] + found["TRACE"] for found in counts.values())
    print(f"{options.times} flips: {f'{wrong} WRONG' if wrong else 'no silent difference, no traceback'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
