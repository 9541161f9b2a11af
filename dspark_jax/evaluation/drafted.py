"""Shows an answer by the origin of its tokens: drafted and accepted, or the target's own."""

from collections.abc import Callable, Sequence
from itertools import groupby

from dspark_jax.decoding.state import RoundRecord
from dspark_jax.drafters.registry import Drafter
from dspark_jax.errors import UserError
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import drain
from dspark_jax.serving.requests import Prompt, Request
from dspark_jax.serving.sampling import SamplingParams
from dspark_jax.serving.settings import EngineConfig
from dspark_jax.targets.target import Target

Piece = tuple[str, bool]
"""A stretch of an answer's text, and whether its tokens were drafted."""


def drafted_pieces(
    target: Target, drafter: Drafter, prompt: Prompt, sampling: SamplingParams, engine: EngineConfig
) -> list[Piece]:
    """Decode one prompt and split its answer where drafted tokens and the target's own meet.

    Args:
        target: the model that decides; it needs a tokenizer.
        drafter: proposes.
        prompt: text, token ids or messages.
        sampling: settings of the request.
        engine: policy and capacity; `longest` must be set.
    Returns:
        Pieces in order, whose texts joined are the answer.
    Raises:
        UserError: a target without a tokenizer, or a prompt that cannot be decoded.
    """
    if target.tokenizer is None:
        raise UserError(f"{target.name} has no tokenizer files, so its answers have no text; add tokenizer.json.")

    # The first token comes from prefill.
    origins = [False]

    def note(_: tuple[int | None, ...], records: RoundRecord) -> None:
        rounds = zip(records.accepted[:, 0].tolist(), records.committed[:, 0].tolist(), strict=True)
        for accepted, committed in rounds:
            # A round commits its accepted drafts and one token of the target's, unless the answer ends before that.
            origins.extend(i < accepted for i in range(committed))

    made = Engine(target, drafter, engine, sampling, recorder=note)
    made.submit(0, Request(prompt))
    done = [progress.generation for progress in drain(made) if progress.generation is not None][0]

    # A stop token is no part of the text.
    tokens = done.tokens[:-1] if done.finish_reason == "stop" else done.tokens
    return pieces(target.tokenizer.decode, tokens, origins)


def pieces(decode: Callable[[Sequence[int]], str], tokens: Sequence[int], origins: Sequence[bool]) -> list[Piece]:
    """Texts of the runs of tokens of one origin; a character that two runs share belongs to the later one."""
    found: list[Piece] = []
    said, end = "", 0
    for drafted, run in groupby(zip(tokens, origins, strict=False), key=lambda pair: pair[1]):
        end += len(list(run))
        # Decoded from the start, since a token's text can depend on the one before; bytes that form no whole
        # character yet are shown as U+FFFD, and left to the next run.
        text = decode(tokens[:end]).rstrip("\ufffd")
        if len(text) > len(said):
            found.append((text[len(said) :], drafted))
            said = text

    return found
