"""The points of the study of drafters, and how each differs from the target's DSpark recipe.

All points share recipe, data, feature layers, sequences a step, steps and seeds; they differ in kind, depth and block.
"""

import dataclasses
from typing import Literal, get_args

from dspark_jax.config.cli import load_config
from dspark_jax.config.schema import TrainConfig
from dspark_jax.config.sweep import Diff, apply_diff

Part = Literal["main", "depth", "block", "next", "losses"]
PARTS: tuple[Part, ...] = get_args(Part)
PAPER: tuple[Part, ...] = ("main", "depth", "block")
"""Parts whose figures the paper has."""
DEPTHS = (1, 2, 3)
BLOCKS = (4, 8, 12, 16)
BLOCK = 7
"""γ outside the curve over block lengths."""
LAST = 0.8
"""The share of a training's steps behind which its figures are taken."""
HEADLESS: Diff = {
    "drafter.markov_rank": 0,
    "drafter.enable_confidence_head": False,
    "drafter.confidence_head_with_markov": False,
}
# Only DSpark and DFlash can leave words out, where the recipe does.
WHOLE_VOCABULARY: Diff = {"drafter.draft_vocabulary": ""}
CONVOLUTION: Diff = {"drafter.conv_kernel_size": 2}
CROSS_ENTROPY: Diff = {"loss.ce_alpha": 1.0, "loss.l1_alpha": 0.0, "loss.confidence_alpha": 0.0}
LK: Diff = {"loss.ce_alpha": 0.0, "loss.l1_alpha": 0.0, "loss.lk_alpha": 1.0}
REACH: Diff = {"loss.confidence_weights": "reach"}
SHARED_LOSS: dict[str, Diff] = {
    "own": {},
    # No confidence term, which trains the backbone too: what differs between drafters is then their shape alone.
    "lk": {**LK, "loss.confidence_alpha": 0.0},
}
"""Loss of all points of a study, over each contestant's."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A kind of drafter in the study.

    Attributes:
        label: for tables and plots.
        diff: changes to the recipe.
        single: has one layer, whatever the depth of the others.
        block: γ outside the curve over block lengths; None: the study's.
        last_layer: is fed by the target's last layer, as it was devised, and not by the layers that the others share.
    """

    label: str
    diff: Diff
    single: bool = False
    block: int | None = None
    last_layer: bool = False


CONTESTANTS: dict[str, Contestant] = {
    "dspark": Contestant("DSpark", {}),
    "dflash": Contestant("DFlash", {"drafter.kind": "dflash", **HEADLESS, **CROSS_ENTROPY}),
    # Its loss is its own, a soft cross-entropy over the steps of its rollout (docs/algorithm.md, rule 56).
    "eagle3": Contestant("Eagle3", {"drafter.kind": "eagle3", **HEADLESS, **WHOLE_VOCABULARY}, single=True),
    "mtp1": Contestant(
        "MTP-1",
        {"drafter.kind": "mtp", **HEADLESS, **CROSS_ENTROPY, **WHOLE_VOCABULARY},
        single=True,
        block=1,
        last_layer=True,
    ),
    "dspark_rnn": Contestant("DSpark RNN", {"drafter.markov_head_type": "rnn"}),
    # Later drafters: the convolution alone, and all of DFlash 2, whose base logits choose the candidates.
    "dspark_conv": Contestant("DSpark + convolution", CONVOLUTION),
    "dflash2": Contestant(
        "DFlash 2",
        {
            "drafter.markov_head_type": "selector",
            "drafter.enable_confidence_head": False,
            "drafter.confidence_head_with_markov": False,
            "drafter.sample_from_anchor": False,
            "loss.confidence_alpha": 0.0,
            "loss.selector_target": "law",
            **CONVOLUTION,
        },
    ),
    # DSpark with another loss than the recipe's.
    "dspark_pace": Contestant("D-PACE weights", {"loss.slot_weights": "d_pace"}),
    "dspark_lk": Contestant("LK loss", LK),
    "dspark_length": Contestant(
        "accepted length", {"loss.ce_alpha": 0.0, "loss.l1_alpha": 0.0, "loss.length_alpha": 1.0}
    ),
    "dspark_reach": Contestant("confidence by reach", REACH),
    "dspark_lk_reach": Contestant("LK loss, confidence by reach", {**LK, **REACH}),
}
MAIN = ("dspark", "dflash", "eagle3", "mtp1")
DEEP = ("dspark", "dflash")
LONG = ("dflash", "dspark", "dspark_rnn")
NEXT = ("dspark", "dspark_conv", "dflash2")
LOSSES = ("dspark", "dspark_pace", "dspark_lk", "dspark_length", "dspark_reach", "dspark_lk_reach")


@dataclasses.dataclass(frozen=True)
class StudyPoint:
    """One training run of the study."""

    drafter: str
    depth: int
    block: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.drafter},depth={self.depth},block={self.block},seed={self.seed}"

    def config(self, recipe: str, common: Diff, target_layers: int, copies: bool) -> TrainConfig:
        """The point's training configuration.

        Args:
            recipe: name of the target's DSpark configuration.
            common: fields shared by all points.
            target_layers: number of the target's layers.
            copies: start the draft layers as copies of the last target layers.
        """
        contestant = CONTESTANTS[self.drafter]
        first = target_layers - self.depth if copies else target_layers
        # An empty range starts the layers at random.
        own: Diff = {
            "name": self.name,
            "seed": self.seed,
            "data.seed": self.seed,
            "drafter.num_layers": self.depth,
            "drafter.block_size": self.block,
            "drafter.init_target_layers": tuple(range(first, target_layers)),
        }
        # An MTP module continues the target's own last state; the shared layers would handicap it.
        if contestant.last_layer:
            own["drafter.target_layer_ids"] = (target_layers - 1,)

        return apply_diff(load_config(recipe), {**contestant.diff, **common, **own})


def study_points(part: Part, depth: int, seeds: int, block: int = BLOCK) -> list[StudyPoint]:
    """The points of one part, at the study's depth and block length where the part does not vary them."""
    if part == "main":
        return [point(name, depth, block, seed) for seed in range(seeds) for name in MAIN]
    if part == "depth":
        return [point(name, layers, block) for name in DEEP for layers in DEPTHS]
    if part == "block":
        # One seed a point: the curves are read by their course, the main comparison by its intervals.
        return [dataclasses.replace(point(name, depth, block), block=length) for length in BLOCKS for name in LONG]
    return [point(name, depth, block) for name in (NEXT if part == "next" else LOSSES)]


def point(name: str, depth: int, block: int, seed: int = 0) -> StudyPoint:
    """A contestant's point in a study of this depth and block length."""
    contestant = CONTESTANTS[name]
    return StudyPoint(name, 1 if contestant.single else depth, contestant.block or block, seed)
