"""The layouts of drafter folders by name. A new one is a file beside these and a line here."""

from dspark_jax.checkpoints.deepspec import DeepSpecLayout
from dspark_jax.checkpoints.folder_layout import Config, FolderLayout
from dspark_jax.checkpoints.specforge import SpecForgeLayout
from dspark_jax.checkpoints.speculators import SpeculatorsLayout
from dspark_jax.errors import UserError

LAYOUTS: dict[str, FolderLayout] = {
    layout.name: layout for layout in (DeepSpecLayout(), SpecForgeLayout(), SpeculatorsLayout())
}


def layout_named(name: str) -> FolderLayout:
    if name not in LAYOUTS:
        raise UserError(f"There is no layout {name!r}; expected one of {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def detect_layout(stored: Config) -> FolderLayout:
    """The layout whose config.json this is; DeepSpec's where no other claims it, whose reader then names the fault."""
    claims = [layout for layout in LAYOUTS.values() if layout.detects(stored)]
    return claims[0] if claims else LAYOUTS["deepspec"]
