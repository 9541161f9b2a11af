"""Settings of train.prepare_data, checked at construction."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dspark_jax.config.schema import MeshSettings
from dspark_jax.errors import UserError
from dspark_jax.readers import parse_json
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig

Companion = Literal[
    "settings.json", "rejected.jsonl", "metrics.json", "prompts.jsonl", "prompts.settings.json", "candidates.jsonl"
]  # fmt: skip
"""The files written beside OUTPUT.jsonl, by the ending of their names."""


@dataclass(frozen=True)
class PrepareSettings:
    """Regenerates the answers of conversations with the target."""

    output: Path
    """The JSONL file to write, one finished conversation a line."""
    target: str = ""
    """Folder or hub id of the target, which is decoded locally."""
    server: str = ""
    """Instead of --target: address of an OpenAI-compatible server of it, as in http://host:8000/v1. A key is read from
    OPENAI_API_KEY."""
    server_model: str = ""
    """Name of the model on that server."""
    server_concurrency: int = 16
    """Concurrent requests."""
    server_timeout: float = 300.0
    """Limit of one answer in seconds."""
    server_attempts: int = 5
    """Attempts for each answer, with growing pauses, before its conversation is set aside."""
    server_extra: str = "{}"
    """JSON object of further request fields, as in {"chat_template_kwargs": {"enable_thinking": false}}."""
    prompts: tuple[Path, ...] = ()
    """Conversation files in JSONL, JSON or Parquet; with several, ids are prefixed with the file's name."""
    dataset: str = ""
    """Hub id of a dataset, or a local folder in the hub's layout."""
    dataset_config: str | None = None
    """Configuration of the dataset, where it has several."""
    dataset_split: str = "train"
    """Split of the dataset, or a slice of one: train[:10%]."""
    embedded_prompts: str = ""
    """Instead: prompts that come with the project, as domains of code, chat and math, separated by commas."""
    self_prompts: int = 0
    """Instead: number of prompts that the target writes itself, into OUTPUT.prompts.jsonl."""
    domains: Path | None = None
    """Domains of the target's own prompts: JSONL with {"domain": NAME, "system": [...], "openers": [...]} per line.
    None: math, code and chat."""
    exclude: tuple[Path, ...] = ()
    """JSONL files of evaluation sets or conversations whose prompts are excluded from the target's own."""
    split: Literal["train", "heldout"] = "train"
    """Side of the held-out split to answer; --heldout splits files and datasets."""
    heldout: float = 0.0
    """Share of the prompts of files and datasets that is held out, chosen by the first prompt's text alone."""
    dedup: bool = True
    """Set aside conversations with the prompts of an earlier one."""
    bad_rows: Literal["stop", "set-aside"] = "stop"
    """Treatment of a row that is no conversation: end the run, or set the row aside."""
    limit: int = 0
    """Conversations taken of each file, dataset or embedded domain; 0: all (math has no end and needs a limit)."""
    temperature: float = 0.7
    """0: greedy."""
    top_p: float = 0.95
    """1: off."""
    top_k: int = 0
    """0: off."""
    max_new_tokens: int = 192
    """Longest answer, in tokens; a cut one ends its conversation and is marked as truncated."""
    max_context: int = 0
    """Positions of a conversation at most; longer prompts are set aside. 0: the target's context."""
    slots: int = 16
    """Conversations decoded at once."""
    rounds_per_dispatch: int = 16
    """Rounds decoded before ended conversations are replaced."""
    seed: int = 0
    """Determines, with a conversation's place in the input, its random numbers; also the order of embedded prompts."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the target's weights and activations; None: that of its config."""
    mesh: MeshSettings = MeshSettings(data=1, fsdp=-1)
    """Layout of the target over several devices."""
    thinking: bool = False
    """Let the chat template open with thinking."""

    def __post_init__(self) -> None:
        # All of it at construction: a wrong option must not cost the loading of a target.
        if bool(self.target) == bool(self.server):
            raise UserError("Say who answers in one way: --target FOLDER_OR_ID, or --server URL --server-model NAME.")
        if self.server and not self.server_model:
            raise UserError("--server needs --server-model, the model's name on that server.")

        # Exactly one origin of prompts: ids and places of several would depend on their mixture.
        if sum(map(bool, (self.prompts, self.dataset, self.embedded_prompts, self.self_prompts))) != 1:
            raise UserError(
                "Give the prompts in one way: --prompts FILE.jsonl, --dataset ID, --embedded-prompts code,chat,math or "
                "--self-prompts NUMBER."
            )

        if self.self_prompts and not self.target:
            raise UserError("--self-prompts needs --target: a server does not continue a user's turn.")
        if (self.domains or self.exclude) and not self.self_prompts:
            raise UserError("--domains and --exclude are for prompts that the target writes; give --self-prompts too.")
        if self.limit == 0 and "math" in self.embedded_domains:
            raise UserError("The embedded math prompts have no end: give --limit, the number of each domain's prompts.")

        # The sentences name options as they are typed.
        counts = ("max_new_tokens", "slots", "rounds_per_dispatch", "server_concurrency", "server_attempts")
        for name, least in (("limit", 0), ("self_prompts", 0), *((name, 1) for name in counts)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; at least {least} was expected.")

        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_context < 0:
            raise UserError("Expected --temperature >= 0, --top-p in (0, 1], --top-k >= 0 and --max-context >= 0.")
        if self.server_timeout <= 0 or not 0 <= self.heldout < 1:
            raise UserError("Expected --server-timeout > 0 and --heldout in [0, 1).")
        if self.split == "heldout" and not (self.embedded_prompts or self.heldout):
            raise UserError("--split heldout needs --heldout, the part of the prompts that is held out.")

        self.extra_fields  # noqa: B018 - read once here, so that bad JSON is refused at the start

    @property
    def embedded_domains(self) -> list[str]:
        return [domain.strip() for domain in self.embedded_prompts.split(",")] if self.embedded_prompts else []

    @property
    def extra_fields(self) -> dict[str, Any]:
        # As strict as a file: a name that stands twice, or NaN, would reach the server otherwise.
        fields = parse_json(self.server_extra.encode("utf-8", "surrogatepass"), "--server-extra")
        if not isinstance(fields, dict):
            raise UserError(f"--server-extra is {self.server_extra!r}; a JSON object was expected.")
        return fields

    @property
    def described(self) -> str:
        """Origin of the prompts, for messages."""
        if self.prompts:
            return ", ".join(map(str, self.prompts))
        if self.dataset:
            return f"{self.dataset} {self.dataset_split}"
        return f"The embedded split {self.split!r} of {self.embedded_prompts}"

    def beside(self, kind: Companion) -> Path:
        """OUTPUT.kind, e.g. conversations.rejected.jsonl."""
        return self.output.with_name(f"{self.output.name.removesuffix('.jsonl')}.{kind}")

    def companions(self) -> list[str]:
        """Names of all files that are written beside the output."""
        return [self.beside(kind).name for kind in get_args(Companion)]

    def recorded(self) -> dict[str, Any]:
        """The options that determine the output: stored beside it and compared when it is continued."""
        common = ("temperature", "top_p", "top_k", "max_new_tokens", "seed", "thinking", "dedup")
        # Slots too: the width of the compiled program decides the last bits of its sums.
        here = ("max_context", "slots", "dtype")
        served = ("server_model", "server_extra")
        return {name: getattr(self, name) for name in common + (served if self.server else here)}

    def sampling(self) -> SamplingParams:
        return SamplingParams(self.max_new_tokens, self.temperature, self.top_k, self.top_p, seed=self.seed)

    def engine(self) -> EngineConfig:
        return EngineConfig(
            self.slots,
            policy="plain",
            rounds_per_dispatch=self.rounds_per_dispatch,
            smallest_prompt_bucket=64,  # one program for most prompts: compiling another costs more than the padding
        )
