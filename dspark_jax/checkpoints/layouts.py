"""The layouts of drafter folders by name. A new layout is a file beside these and one line here."""

from pathlib import Path
from typing import Any

from dspark_jax.checkpoints.deepspec import DeepSpecLayout
from dspark_jax.checkpoints.folder_layout import CONFIG_FILE, Config, FolderLayout
from dspark_jax.checkpoints.specforge import SpecForgeLayout
from dspark_jax.checkpoints.speculators import SpeculatorsLayout
from dspark_jax.drafters.config import check_drafter_fields
from dspark_jax.errors import UserError
from dspark_jax.readers import Schema, check_fields, integer, list_of, object_of, optional, read_object, text
from dspark_jax.targets.config import TargetConfig
from dspark_jax.targets.deepseek_v4.config import refuse_later_versions
from dspark_jax.targets.fields import refuse_quantisation, refuse_rotations

LAYOUTS: dict[str, FolderLayout] = {
    layout.name: layout for layout in (DeepSpecLayout(), SpecForgeLayout(), SpeculatorsLayout())
}

# Objects in which other layouts keep fields that DeepSpec keeps at top level.
NESTED = ("dflash_config", "eagle_config", "transformer_layer_config")
_LAYER_IDS = list_of(integer(0, 1024), least=1)
_STORED: Schema = {
    **dict.fromkeys(NESTED, optional(object_of())),
    "speculators_model_type": text(),
    "aux_hidden_state_layer_ids": _LAYER_IDS,
    "eagle_aux_hidden_state_layer_ids": _LAYER_IDS,
}


def layout_named(name: str) -> FolderLayout:
    """The layout of that name; UserError listing the names otherwise."""
    if name not in LAYOUTS:
        raise UserError(f"There is no layout {name!r}; expected one of {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def detect_layout(stored: Config) -> FolderLayout:
    """The layout whose config.json this is; DeepSpec's if none claims it, whose reader then names the fault."""
    # The first claim decides; files of one layout carry no other's marks.
    claims = [layout for layout in LAYOUTS.values() if layout.detects(stored)]
    return claims[0] if claims else LAYOUTS["deepspec"]


def read_stored_config(folder: Path) -> tuple[Config, FolderLayout]:
    """(config.json of a drafter's folder as stored, its layout).

    Raises:
        UserError: the file cannot be read; a field, nested ones included, has a type or range that no drafter has; or
            it asks for a rotation of keys and queries that is not implemented.
    """
    path = folder / CONFIG_FILE
    stored = read_object(path, expected="the config.json of a drafter")
    # First: such a folder is quantised too, for which it would be refused without its name.
    refuse_later_versions(stored, str(path))

    # Types and ranges first, so that the layouts' readers may index and compute without checks of their own.
    check_fields(stored, _STORED, str(path))
    check_drafter_fields(stored, str(path))

    # Nested objects are checked too: `to_native` lifts their fields to top level without looking at them.
    for name in NESTED:
        if stored.get(name):
            check_drafter_fields(stored[name], f"{path}, under {name},")

    # On the stored file: translation may drop the very field that asks for another rotation.
    refuse_rotations(stored, str(path))
    for values in (stored, *(stored.get(name) or {} for name in NESTED)):
        refuse_quantisation(values, str(path))

    return stored, detect_layout(stored)


def native_config(stored: Config, layout: FolderLayout, target: TargetConfig) -> dict[str, Any]:
    """DeepSpec's config.json of a drafter stored in `layout`; UserError where a field is missing or out of place."""
    try:
        return layout.to_native(stored, target)
    except KeyError as missing:
        raise UserError(
            f"The drafter's config.json has no field {missing}, which the {layout.name} layout needs; copy it again."
        ) from None
