"""Chooses a pruned draft vocabulary: the tokens that a drafter may draft, from answers of its target.

    python -m train.draft_vocabulary --target .cache/real_target --conversations runs/x/conversations.jsonl \\
        --size 12288 --output runs/x/vocabulary.json
    python -m train.fit --config NAME --drafter.draft-vocabulary runs/x/vocabulary.json

A drafter's head and Markov table then have rows for these tokens alone. Output is not affected: other tokens still come
from the target, but are never drafted. The most frequent tokens of the conversations are taken, then the lowest ids,
which byte-level BPE gives to the most frequent pieces of its own corpus. The share of tokens kept is measured on every
second answer, with a choice made from the rest, since a choice is biased on the answers that it was made from.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_jax.checkpoints.huggingface import load_tokenizer, read_hf_config, resolve_folder
from dspark_jax.config.cli import parse, program
from dspark_jax.data.conversations import ConversationRecord, file_rows, parse_rows
from dspark_jax.errors import UserError
from dspark_jax.files import write_json
from dspark_jax.report import listing
from dspark_jax.targets.registry import read_target_config


@dataclass(frozen=True)
class VocabularySettings:
    """Chooses a pruned draft vocabulary."""

    target: str
    """Folder, GGUF file or hub id of the target."""
    conversations: tuple[Path, ...]
    """Conversations with the target's own answers."""
    output: Path
    """JSON file for the ids, as --drafter.draft-vocabulary takes it."""
    size: int = 32_000
    """Tokens that may be drafted."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"--size is {self.size}; at least 1 was expected.")


@program
def main(argv: list[str]) -> None:
    settings = parse(VocabularySettings, argv, description=__doc__)
    folder = resolve_folder(settings.target)
    whole = read_target_config(read_hf_config(folder)).vocab_size
    if settings.size > whole:
        raise UserError(f"--size is {settings.size}; the target has {whole} tokens.")

    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer files; add tokenizer.json.")

    # Each answer is counted once; shares and choice are sums over these counts.
    counted = [(domain, count_tokens(tokenizer, text)) for domain, text in answers(settings.conversations)]
    if not counted:
        raise UserError("The conversations hold no answers; give those that the target has answered.")

    shares = kept_shares(counted, settings.size)
    # The final choice uses every answer; the shares above do not, so they are a cautious estimate.
    ids = choose((tokens for _, tokens in counted), settings.size)
    write_json(settings.output, {"size": len(ids), "kept": shares, "ids": ids}, indent=0)
    print(
        listing({"tokens": len(ids), "of": whole} | {f"kept, {name}": f"{share:.2%}" for name, share in shares.items()})
    )


def answers(files: Sequence[Path]) -> Iterable[tuple[str, str]]:
    """Yields (domain, text) of every assistant turn."""
    for file in files:
        for record in parse_rows(file_rows(file)):
            if not isinstance(record, ConversationRecord):
                raise UserError(record.reason)
            for message in record.messages:
                if message["role"] == "assistant":
                    yield str(record.extra.get("domain", "all")), message["content"]


def count_tokens(tokenizer: Any, text: str) -> Counter[int]:
    """Counts the tokens of an answer, including the end of the turn, which has to be drafted too."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Counter([*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])


def choose(counts: Iterable[Counter[int]], size: int) -> list[int]:
    """The `size` most frequent ids, filled up with the lowest ones; ascending."""
    total: Counter[int] = Counter()
    for counted in counts:
        total.update(counted)

    # Ties by id, so that the choice does not depend on the order of counting.
    chosen = dict.fromkeys(token for token, _ in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:size])
    lowest = 0
    while len(chosen) < size:
        chosen.setdefault(lowest)
        lowest += 1

    return sorted(chosen)


def kept_shares(counted: Sequence[tuple[str, Counter[int]]], size: int) -> dict[str, float]:
    """Share of tokens, by domain and over all, that a choice from every second answer keeps of the others."""
    kept = set(choose((tokens for _, tokens in counted[::2]), size))
    held, whole = Counter[str](), Counter[str]()
    # A single answer is measured on itself: there is no other.
    for domain, tokens in counted[1::2] or counted:
        # Once, where the domain itself is called "all".
        for name in dict.fromkeys((domain, "all")):
            held[name] += sum(count for token, count in tokens.items() if token in kept)
            whole[name] += tokens.total()
    return {name: held[name] / whole[name] for name in sorted(whole)}


if __name__ == "__main__":
    main()
