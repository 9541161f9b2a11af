"""Trains the embedded target from scratch: tokenizer, a small Qwen3 model, and the folder that ships with the project.

    python -m train.embedded.target --output assets/embedded_target --run-dir runs/embedded_target --minutes 55

The schedule follows the wall clock, so that the run ends on time on a busy machine; `--steps N` follows the step count
instead, and two such runs are identical. The same command continues a killed run from its last checkpoint; on a
finished one it only writes folder and report again.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from dspark_jax.arrays import read_arrays
from dspark_jax.checkpoints.huggingface import save_target
from dspark_jax.config.cli import parse, program
from dspark_jax.datagen.corpora import DOMAINS, conversations
from dspark_jax.devices import announce
from dspark_jax.errors import UserError
from dspark_jax.files import lock_folder, replacing, write_atomically
from dspark_jax.readers import (
    Schema,
    check_fields,
    integer,
    number,
    object_of,
    parse_json,
    read_records,
    require_object,
)
from dspark_jax.sharding import split
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.registry import read_target_config, target_module

from .optimizer import State, make_optimizer, make_step
from .packing import Encoder, Rows, batches, mixture
from .recipe import Progress, Recipe, learning_rate
from .report import evaluate, samples, write_readme
from .tokenizer import learn_tokenizer, save_tokenizer

TOKENIZER_MATH = 3000  # generated problems in the tokenizer's training text, beside all of code and chat


@dataclass
class Run:
    """A training run: its recipe, tokenizer and structure, with the current state and progress."""

    recipe: Recipe
    tokenizer: Tokenizer
    graphdef: nnx.GraphDef
    state: State
    progress: Progress

    @classmethod
    def start(cls, recipe: Recipe) -> "Run":
        """A fresh run, or one restored from the run folder's checkpoint."""
        tokenizer = _tokenizer(recipe)
        config = read_target_config(recipe.hf_config(tokenizer))
        graphdef, params = split(target_module(config, rngs=nnx.Rngs(recipe.seed)))
        state = State(params, make_optimizer(recipe.weight_decay, config).init(params))
        run = cls(recipe, tokenizer, graphdef, state, Progress())
        if run.checkpoint.exists():
            run._restore()

        return run

    @property
    def config(self) -> TargetConfig:
        """The model's architecture."""
        return read_target_config(self.recipe.hf_config(self.tokenizer))

    @property
    def checkpoint(self) -> Path:
        return self.recipe.run_dir / "checkpoint.npz"

    def fraction(self) -> float:
        """Share of the schedule that is done, from 0 to 1."""
        if self.recipe.steps:
            return self.progress.step / self.recipe.steps
        return self.progress.seconds / (60 * self.recipe.minutes)

    def data(self) -> Iterator[Rows]:
        """The remaining batches; those that an interrupted run has seen are generated again and skipped."""
        encoder = Encoder(self.tokenizer, self.recipe.context_weight)
        stream = mixture(encoder, self.recipe.shares(), self.recipe.length)
        return islice(batches(stream, self.recipe.rows, self.recipe.length), self.progress.step, None)

    def save(self) -> None:
        # Numbered leaves: the structure is that of the recipe, which is stored with them.
        leaves: dict[str, Any] = {
            f"leaf_{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.state))
        }
        header = json.dumps({"progress": self.progress._asdict(), "recipe": _identity(self.recipe)})
        # Swapped in whole: a kill while saving leaves the checkpoint before.
        with replacing(self.checkpoint) as temporary, open(temporary, "wb") as file:
            np.savez(file, header=np.frombuffer(header.encode(), np.uint8), **leaves)

    def _restore(self) -> None:
        expected = "a checkpoint of this program"
        leaves, structure = jax.tree.flatten(self.state)
        # By position: the recipe is the same, and with it the structure of the state.
        layouts = {f"leaf_{i:04d}": (str(leaf.dtype), leaf.ndim) for i, leaf in enumerate(leaves)}
        noted = read_arrays(self.checkpoint, {"header": ("uint8", 1)}, expected)["header"].tobytes()
        where = f"{self.checkpoint}, its header"
        header = require_object(parse_json(noted, where), where)
        check_fields(header, _HEADER, where, required=_HEADER)
        check_fields(header["progress"], _PROGRESS, where, required=_PROGRESS)
        if header["recipe"] != _identity(self.recipe):
            raise UserError(
                f"{self.checkpoint} belongs to a run with another recipe ({header['recipe']}); "
                "name another --run-dir or remove it."
            )

        stored = list(read_arrays(self.checkpoint, layouts, expected).values())
        if [array.shape for array in stored] != [leaf.shape for leaf in leaves]:
            raise UserError(f"{self.checkpoint} holds a state of other shapes; copy it again or remove it.")

        self.state = jax.tree.unflatten(structure, [jnp.asarray(array) for array in stored])
        self.progress = Progress(**{name: header["progress"][name] for name in Progress._fields})


_HEADER: Schema = {"progress": object_of(), "recipe": object_of()}
_PROGRESS: Schema = {"step": integer(), "tokens": integer(0, 2**62), "seconds": number(0)}
_ENTRY: Schema = {**_PROGRESS, "heldout": object_of(object_of(number()))}


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that a continued run must share: everything but the folders and the run's length."""
    free = {"output", "run_dir", "minutes", "steps", "save_minutes"}
    return {key: value for key, value in asdict(recipe).items() if key not in free}


def _tokenizer(recipe: Recipe) -> Tokenizer:
    # Learned once a run, and kept beside the checkpoint: another Python's library would give another vocabulary.
    path = recipe.run_dir / "tokenizer.json"
    if not path.exists():
        limits = {domain: TOKENIZER_MATH if domain == "math" else None for domain in DOMAINS}
        texts = (c["messages"] for domain in DOMAINS for c in conversations(domain, "train", limits[domain]))
        recipe.run_dir.mkdir(parents=True, exist_ok=True)
        learn_tokenizer(texts).save(str(path))
    return Tokenizer.from_file(str(path))


def export(run: Run, losses: list[dict[str, Any]], final: bool) -> None:
    """Writes the Hugging Face folder beside its final place and swaps it in, so that no reader finds half a model."""
    out = run.recipe.output
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_tokenizer(run.tokenizer, partial, run.recipe.context)
    save_target(partial, run.recipe.hf_config(run.tokenizer), run.state.params, dtype="bfloat16")
    # Sampling takes long without a cache, so only the final model is shown.
    shown = samples(run.graphdef, run.state.params, run.tokenizer, run.recipe.length) if final else None
    write_readme(partial, run.recipe, run.progress, losses, shown)
    # Two renames, since a folder cannot replace one that has content.
    previous = out.with_name(out.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if out.exists():
        out.rename(previous)

    partial.rename(out)
    shutil.rmtree(previous, ignore_errors=True)


def train(run: Run, history: "History") -> None:
    """Trains to the end of the schedule, with a checkpoint, an evaluation and an export every `save_minutes`."""
    recipe = run.recipe
    step = make_step(run.graphdef, make_optimizer(recipe.weight_decay, run.config))
    clock = time.monotonic()
    saved, logged, recent = run.progress.seconds, run.progress, []

    for rows in run.data():
        rate = learning_rate(recipe, run.progress.step, run.fraction())
        run.state, loss = step(run.state, rows, jnp.float32(rate))
        # Waits for the step: the clock that the schedule follows must count its work.
        recent.append(float(loss))
        # The time since the last step, evaluations and exports between them included.
        now, clock = time.monotonic() - clock, time.monotonic()
        count, tokens, seconds = run.progress
        run.progress = Progress(count + 1, tokens + int((rows.segments > 0).sum()), seconds + now)

        # Speed since the last line, so that evaluations show in the line after them.
        if run.progress.step % 20 == 0:
            pace = (run.progress.tokens - logged.tokens) / (run.progress.seconds - logged.seconds)
            print(
                f"{100 * run.fraction():5.1f}%  step {run.progress.step:5d}  loss {np.mean(recent):.3f}  "
                f"lr {rate:.5f}  {pace:5.0f} tokens/s  {run.progress.seconds / 60:5.1f} min",
                flush=True,
            )
            logged, recent = run.progress, []

        if run.fraction() >= 1:
            break

        if run.progress.seconds - saved > 60 * recipe.save_minutes:
            # Report and model before the checkpoint: a run killed between them does these steps again and writes both
            # anew.
            saved = run.progress.seconds
            history.record(run)
            export(run, history.entries, final=False)
            run.save()

    history.record(run)
    run.save()


@dataclass
class History:
    """Held-out losses over the run, kept as JSON Lines in the run folder."""

    path: Path
    entries: list[dict[str, Any]]

    @classmethod
    def open(cls, run: Run) -> "History":
        path = run.recipe.run_dir / "heldout.jsonl"
        entries = read_records(path)
        for line, entry in enumerate(entries, start=1):
            check_fields(entry, _ENTRY, f"{path} line {line}", required=_ENTRY, cure="remove the line")

        # Entries past the restored checkpoint belong to steps that are done again.
        return cls(path, [entry for entry in entries if entry["step"] <= run.progress.step])

    def record(self, run: Run) -> None:
        losses = evaluate(run.graphdef, run.state.params, run.tokenizer, run.recipe.length)
        self.entries.append({**run.progress._asdict(), "heldout": losses})
        write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in self.entries))
        shown = "  ".join(f"{domain} {value['loss']:.3f}" for domain, value in losses.items())
        print(f"held out at step {run.progress.step}: {shown}", flush=True)


@program
def main(argv: list[str]) -> None:
    recipe = parse(Recipe, argv, description=__doc__)
    announce("float32")
    recipe.output.parent.mkdir(parents=True, exist_ok=True)
    with lock_folder(recipe.run_dir, "the run"):
        finish(recipe)


def finish(recipe: Recipe) -> None:
    """Trains to the end, from the run's checkpoint if it has one, and writes folder and report."""
    run = Run.start(recipe)
    history = History.open(run)
    if run.fraction() < 1:
        train(run, history)
    # A run killed between its last step and its report is measured now.
    if not history.entries or history.entries[-1]["step"] != run.progress.step:
        history.record(run)

    export(run, history.entries, final=True)
    print(f"{recipe.output}: {run.progress.step} steps, {run.progress.tokens / 1e6:.1f} M tokens", flush=True)


if __name__ == "__main__":
    main()
