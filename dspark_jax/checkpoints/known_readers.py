"""Other programs that read drafters, and what each does with a given one: docs/interop.md has the runs behind it.

A reader that refuses a drafter does so when it starts; one that misreads it would draft badly without an error, and no
layout here lets that happen. What was not run or read is said to be so.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dspark_jax.checkpoints.folder_layout import Config
from dspark_jax.drafters.config import SELECTOR, extended
from dspark_jax.drafters.registry import kind_name

READS, UNTRIED = "reads it", "not tried"


@dataclass(frozen=True)
class Form:
    """The parts of a drafter that readers tell apart.

    Attributes:
        kind: of the registry; "dflash2" for a whole DFlash 2, "part" for a drafter that has some of its parts.
        head: type of the Markov head, "" without one.
        waits: whether the anchor's row predicts nothing.
        pruned: whether it drafts a part of the vocabulary.
        family: of its layers, "qwen3" or "gemma4".
    """

    kind: str
    head: str
    waits: bool
    pruned: bool
    family: str

    @classmethod
    def of(cls, native: Config) -> "Form":
        """The form of a drafter with this config.json in DeepSpec's layout."""
        kind, head = kind_name(native), str(native.get("markov_head_type") or "") if native.get("markov_rank") else ""
        waits = not native.get("sample_from_anchor", True)
        if extended(native) and (native.get("conv_kernel_size") or native.get("context_window") or head == SELECTOR):
            whole = head == SELECTOR and native.get("conv_kernel_size") and waits
            kind = "part" if native.get("enable_confidence_head") or not whole else "dflash2"
        family = "gemma4" if str(native.get("model_type")).startswith("gemma4") else "qwen3"
        return cls(kind, head, waits, "draft_vocabulary" in native, family)


def _refuses(why: str) -> str:
    return f"refuses it: {why}"


def _deepspec(form: Form) -> str:
    if form.pruned:
        return _refuses("it has no pruned vocabularies")
    if form.kind in ("dflash2", "part") or form.waits:
        return _refuses("it does not know the architecture DSparkExtendedModel")
    return _refuses("it has no MTP drafter") if form.kind == "mtp" else READS


def _vllm(layout: str) -> Callable[[Form], str]:
    def verdict(form: Form) -> str:
        if form.kind == "eagle3":
            if layout != "speculators":
                return _refuses("its Eagle3 reads the speculators layout alone")
            return READS if form.family == "qwen3" else UNTRIED
        if form.kind in ("mtp", "part") or (layout == "deepspec" and form.kind == "dflash2"):
            return _refuses("it does not know the architecture")
        if form.kind == "dflash2" or form.pruned or (form.waits and form.head):
            return UNTRIED
        if form.kind == "dflash":
            if form.waits:
                return READS if layout != "deepspec" else _refuses("it does not know the architecture")
            # It does not get as far as a sentence in the other layouts: rank 0 divides by zero.
            return _refuses("its DFlash has an anchor that waits, and its DSpark a Markov head (it may crash)")
        return READS if form.head == "vanilla" else _refuses(f"it has no {form.head} head")

    return verdict


def _sglang(form: Form) -> str:
    if form.kind in ("mtp", "part"):
        return _refuses("it does not know the architecture")
    if form.kind in ("dflash2", "eagle3") or form.pruned or form.waits:
        return UNTRIED
    return READS if form.head else _refuses("its DSpark has a Markov head")


def _sglang_jax(form: Form) -> str:
    if form.kind != "dspark" or form.head != "vanilla" or form.pruned or form.waits:
        return _refuses("it has DSpark with the vanilla head alone")
    return f"{READS}, greedy and without its confidence"


def _specforge(form: Form) -> str:
    if form.kind == "eagle3":
        return _refuses("its Eagle3 has no query and key norms")
    return UNTRIED if form.kind == "dflash2" else READS


READERS: dict[str, dict[str, Callable[[Form], str]]] = {
    "deepspec": {
        "DeepSpec afdfa7c": _deepspec,
        "vLLM 0.32.0": _vllm("deepspec"),
        "SGLang 0.5.23": _sglang,
        "sglang-jax 8941115": _sglang_jax,
    },
    "specforge": {
        "SpecForge 0.2.0": _specforge,
        "vLLM 0.32.0": _vllm("specforge"),
        "SGLang 0.5.23": lambda form: _refuses("it has no such Eagle3") if form.kind == "eagle3" else _sglang(form),
    },
    "speculators": {
        "speculators 0.9.0": lambda form: READS,
        "vLLM 0.32.0": _vllm("speculators"),
        "SGLang 0.5.23": lambda form: _refuses("it has no readers of this layout"),
    },
}
"""Layout -> program with its version -> what it does with a drafter."""


def verdicts(native: Config, layout: str) -> list[tuple[str, str]]:
    """(program, what it does) for each known reader of `layout`, given DeepSpec's config.json of a drafter.

    Empty for DeepSeek-V4's drafters, which have the layout that they were published in.
    """
    if str(native.get("model_type")) == "deepseek_v4":
        return []
    form, found = Form.of(native), []
    for program, judge in READERS[layout].items():
        # What was run had Qwen3's layers; only DeepSpec is known to build Gemma's.
        known = form.family == "qwen3" or program.startswith("DeepSpec")
        found.append((program, judge(form) if known else UNTRIED))

    return found
