"""Kills a cache-writing process with SIGKILL at random moments and compares what it ends with to an undisturbed run.

python -m tests.kill_cache --times 10
"""

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dspark_jax.data.cache_writer import CacheWriter
from dspark_jax.data.records import CacheSpec, Sample

SOURCES = 60
SHARD_BYTES = 20_000
SPEC = CacheSpec(
    target_name="tiny",
    target_sha256="a" * 64,
    layer_ids=(-1, 2),
    hidden_size=16,
    tokenizer_hash="b" * 64,
    chat_template="qwen",
    max_length=64,
    min_loss_tokens=2,
    num_sources=SOURCES,
)


def make_sample(index: int, spec: CacheSpec = SPEC) -> Sample | None:
    """The sample of a source, a pure function of its index; every fifth is dropped."""
    if index % 5 == 4:
        return None
    rng = np.random.default_rng(index)
    length = int(rng.integers(3, 40))
    features = rng.normal(size=(length, spec.feature_size)).astype(np.float32)
    last_hidden = rng.normal(size=(length, spec.hidden_size)).astype(np.float32)
    return Sample(index, rng.integers(0, 99, length), rng.integers(0, 2, length), features, last_hidden)


def write_cache(folder: Path, spec: CacheSpec = SPEC, pause: float = 0.0, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes or continues the cache of `make_sample`, `pause` seconds a source."""
    with CacheWriter(folder, spec, shard_bytes) as writer:
        for index in range(writer.next_source, spec.num_sources):
            writer.add(index, make_sample(index, spec))
            time.sleep(pause)
        writer.finish()


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def kill_and_compare(scratch: Path, times: int, seed: int, pause: float = 0.01) -> tuple[int, bool]:
    """Builds caches with a process that is killed at random moments, until `times` kills have happened.

    Returns:
        How many caches were finished in spite of it, and whether each has the bytes of an undisturbed run.
    """
    rng, killed, built, same = random.Random(seed), 0, 0, True
    write_cache(scratch / "undisturbed")
    while killed < times:
        folder = scratch / f"killed{built}"
        while not _run_child(folder, pause, rng.uniform(0, SOURCES * pause / 2) if killed < times else None):
            killed += 1
        built += 1
        same = same and digest(folder) == digest(scratch / "undisturbed")
    return built, same


def _run_child(folder: Path, pause: float, kill_after: float | None) -> bool:
    """Runs the writer; True when it finished, False when it was killed after so many seconds."""
    command = [sys.executable, "-m", "tests.kill_cache", "--child", str(folder), "--pause", str(pause)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout is not None
        child.stdout.readline()  # imports are done: from here on it writes
        if kill_after is not None:
            time.sleep(kill_after)
            child.send_signal(signal.SIGKILL)
        code = child.wait()
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the writer ended with {code}")
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help="write this cache (what is killed)")
    parser.add_argument("--pause", type=float, default=0.01, help="seconds a source")
    args = parser.parse_args()
    if args.child:
        print("writing", flush=True)
        write_cache(args.child, pause=args.pause)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        built, same = kill_and_compare(Path(folder), args.times, args.seed)
    print(f"killed {args.times} times over {built} caches: {'the same bytes' if same else 'DIFFERENT bytes'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
