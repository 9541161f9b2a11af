"""Writes a target with the answers of a given one and the cost of a larger one, together with its drafter.

    python -m infer.studies.widen --target assets/embedded_target --drafter assets/embedded_drafter \
        --intermediate-size 16384 --output runs/wide

For studies of speed and load (infer.bench, infer.studies.load) at the cost of a larger model for which there is no
drafter: the MLPs get more hidden units, copies of their own, whose results are multiplied by zero. Drafts and
acceptance do not change. Writes OUTPUT/target and OUTPUT/drafter; sts.json is not carried over.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dspark_jax.checkpoints.drafters import load_drafter, save_drafter
from dspark_jax.checkpoints.huggingface import load_target, resolve_folder, save_target, target_skeleton
from dspark_jax.checkpoints.manifest import provenance_of, read_manifest
from dspark_jax.config.cli import parse, program
from dspark_jax.errors import UserError
from dspark_jax.files import check_new_folder
from dspark_jax.report import table
from dspark_jax.sharding import split
from dspark_jax.targets.config import config_sha256, text_config
from dspark_jax.targets.joined import apart, together
from dspark_jax.targets.target import Target

WRITTEN_ANEW = ("config.json", "model.safetensors.index.json")
COPIED = (".json", ".jinja", ".txt", ".model")  # tokenizer, chat template, stop tokens


@dataclass(frozen=True)
class WidenSettings:
    """Writes a target with wider MLPs that answers as another does."""

    target: str
    """Folder or hub id of the target."""
    intermediate_size: int
    """Hidden units of the new target's MLPs."""
    output: Path
    """Folder to write target/ and drafter/ in; it must be empty or missing."""
    drafter: str = ""
    """Folder or hub id of its drafter, to be written for the new target."""


@program
def main(argv: list[str]) -> None:
    settings = parse(WidenSettings, argv, description=__doc__)
    out = settings.output
    check_new_folder(out)
    target = load_target(settings.target, tokenizer=False)
    drafter = load_drafter(settings.drafter, target) if settings.drafter else None
    # Made in memory first, so that a refusal leaves no folder behind.
    wide = widened(target, settings.intermediate_size)

    try:
        save_target(out / "target", wide.hf_config, wide.params, wide.config.dtype)
        for file in resolve_folder(settings.target).iterdir():
            # Weights and configuration are written anew; the tokenizer's files do not depend on the width.
            if file.suffix in COPIED and file.name not in WRITTEN_ANEW:
                shutil.copy(file, out / "target")
        if drafter is not None:
            provenance = provenance_of(read_manifest(resolve_folder(settings.drafter, "drafter")))
            # The drafter's manifest names the weights on disk, which exist now.
            made = replace(wide, name=str(out / "target"), folder=out / "target")
            save_drafter(out / "drafter", drafter, made, provenance=provenance)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); give a folder that can.") from None

    sizes = [f"{sum(leaf.size for leaf in flatten_dict(one.params).values()):,}" for one in (target, wide)]
    print(table(("", settings.target, str(out / "target")), [("parameters", *sizes)]))


def widened(target: Target, intermediate_size: int) -> Target:
    """The target with wider MLPs, whose added units have no effect: outputs change by rounding alone.

    Args:
        target: with dense MLPs.
        intermediate_size: hidden units of each MLP, at least as many as it has.

    Raises:
        UserError: fewer units than the target has, or mixtures of experts.
    """
    units = target.config.intermediate_size
    if target.config.experts is not None:
        raise UserError(f"{target.name} has mixtures of experts; expected a target whose MLPs are dense.")
    if intermediate_size < units:
        raise UserError(f"{target.name} has MLPs of {units} units; expected at least as many, got {intermediate_size}.")

    # Copies, not zeros: the device does the work of real values.
    repeated = np.arange(intermediate_size) % units
    params, mine = {}, apart(target.params, target.config)
    for path, leaf in flatten_dict(mine).items():
        if path[-2:-1] == ("mlp",) and path[-1].endswith("f"):  # gate and up, into the units: [d, f], biases [f]
            leaf = jnp.asarray(leaf)[..., repeated]
        elif path[-2:-1] == ("mlp",) and path[-1].endswith("fd"):  # down, out of the units: [f, d], zeros added
            leaf = jnp.pad(leaf, ((0, intermediate_size - units), (0, 0)))

        params[path] = leaf

    # Multimodal configurations nest the text model's, which alone is changed.
    whole = target.hf_config
    inner = {**text_config(whole), "intermediate_size": intermediate_size}
    hf_config = inner if text_config(whole) is whole else {**whole, "text_config": inner}
    config = replace(target.config, intermediate_size=intermediate_size)

    return replace(
        target,
        config=config,
        graphdef=split(target_skeleton(config))[0],
        params=together(unflatten_dict(params), config, target.params),
        hf_config=hf_config,
        config_sha256=config_sha256(hf_config),
        folder=None,  # its weights are in no file yet
    )


if __name__ == "__main__":
    main()
