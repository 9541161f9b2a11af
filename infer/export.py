r"""Converts a drafter to the layout of another server.

    python -m infer.export --drafter assets/embedded_drafter --target assets/embedded_target --layout specforge \
        --output DIR

The layout of --drafter is detected from its config.json; docs/interop.md lists the readers of each layout. A drafter
that a layout cannot express is refused in a sentence, and nothing is written.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dspark_jax.checkpoints.drafters import drafter_layout, load_drafter, save_drafter
from dspark_jax.checkpoints.folder_layout import CONFIG_FILE
from dspark_jax.checkpoints.huggingface import load_target, resolve_folder
from dspark_jax.checkpoints.manifest import MANIFEST_FILE, provenance_of, read_manifest
from dspark_jax.config.cli import parse, program
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
        export(replace(settings, output=out.folder))
        rows = [(file.name, f"{file.stat().st_size:,} bytes") for file in sorted(out.folder.iterdir())]

    print(table(("file", f"{found.name} -> {settings.layout}"), rows))


def export(settings: ExportSettings) -> None:
    """Loads the drafter and writes it anew."""
    out = settings.output
    # The target as well: layouts with frozen copies need its tables, and all need its sizes.
    target = load_target(settings.target, tokenizer=False)
    drafter = load_drafter(settings.drafter, target)

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


if __name__ == "__main__":
    main()
