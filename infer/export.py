r"""Converts a drafter to the layout of another server.

    python -m infer.export --drafter assets/embedded_drafter --target assets/embedded_target --layout specforge \
        --output DIR

The layout of --drafter is detected from its config.json. A drafter that a layout cannot express is refused in a
sentence, and nothing is written. The table at the end says what the known readers of the layout do with the drafter;
docs/interop.md has the runs behind it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dspark_jax.checkpoints.drafters import drafter_layout, load_drafter, save_drafter
from dspark_jax.checkpoints.folder_layout import CONFIG_FILE
from dspark_jax.checkpoints.huggingface import load_target, resolve_folder
from dspark_jax.checkpoints.known_readers import verdicts
from dspark_jax.checkpoints.manifest import MANIFEST_FILE, provenance_of, read_manifest
from dspark_jax.config.cli import parse, program
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.files import check_new_folder
from dspark_jax.report import table
from dspark_jax.storage.replica import written


@dataclass(frozen=True)
class ExportSettings:
    """Converts a drafter to another layout."""

    drafter: str
    """Folder or hub id of the drafter, in any layout."""
    target: str
    """Folder or hub id of its target."""
    output: Path
    """Folder to write; it must be empty or missing."""
    verifier: str = ""
    """Name by which readers of the files find the target, as a hub id; empty: as --target says."""
    layout: Literal["deepspec", "specforge", "speculators"] = "deepspec"
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the stored tensors; None: that of the drafter's config."""
    frozen_copies: bool = True
    """Also write the copies of the target's embedding and head that the layout's readers expect."""
    vocabulary_maps: bool = False
    """Also write d2t and t2d in the speculators layout, as the identity."""


@program
def main(argv: list[str]) -> None:
    settings = parse(ExportSettings, argv, description=__doc__)
    found = drafter_layout(settings.drafter)
    # From before the weights are loaded: files of another drafter must not mix with this one's.
    with written(settings.output, "the export", last=(CONFIG_FILE, MANIFEST_FILE)) as out:
        check_new_folder(out.folder)
        drafter = export(replace(settings, output=out.folder))
        rows = [(file.name, f"{file.stat().st_size:,} bytes") for file in sorted(out.folder.iterdir())]

    print(table(("file", f"{found.name} -> {settings.layout}"), rows))
    if known := verdicts(drafter.hf_config, settings.layout):
        print(table(("reader", "with this drafter"), known))
    if settings.layout == "speculators" and not settings.verifier and Path(settings.target).exists():
        print(f"Readers will look for the target at {settings.target}; --verifier NAME gives another name.")


def export(settings: ExportSettings) -> Drafter:
    """Loads the drafter and writes it anew; returns it."""
    out = settings.output
    # The target as well: layouts with frozen copies need its tables, and all need its sizes.
    target = load_target(settings.target, tokenizer=False)
    drafter = load_drafter(settings.drafter, target)
    # The name alone: which target it is, the files say by hashes.
    target = replace(target, name=settings.verifier or target.name)

    try:
        save_drafter(
            out,
            drafter,
            target,
            layout=settings.layout,
            dtype=settings.dtype,
            frozen_copies=settings.frozen_copies,
            vocabulary_maps=settings.vocabulary_maps,
            # What the drafter was trained on stays true of the copy.
            provenance=provenance_of(read_manifest(resolve_folder(settings.drafter, "drafter"))),
        )
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); give a folder that can.") from None

    return drafter


if __name__ == "__main__":
    main()
