"""Decoding settings of a request, and the checks that keep a bad value out of a compiled loop."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from dspark_jax.errors import UserError

Mode = Literal["rejection", "block", "coupled"]
# Both words of a Threefry key (docs/algorithm.md, rule 107).
SEEDS = 2**64


@dataclass(frozen=True)
class SamplingParams:
    """Decoding settings of one request, or of every request of a call.

    Decoding is lossless under all settings: at temperature 0 the output is token for token that of the target alone,
    above 0 it has the same law, and in mode "coupled" the same tokens too. In bfloat16 about one greedy output in
    twenty differs from plain decoding at a near-tie of two logits, since a block and a single row round differently;
    float32 resolves such ties.
    """

    max_new_tokens: int = 256
    """New tokens at most, a stop token included."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """Sample from this many tokens of highest probability. 0: off."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability. 1: off."""
    min_p: float = 0.0
    """Sample from tokens of at least this share of the highest probability. 0: off."""
    seed: int | None = None
    """0 to 2**64 - 1; all 64 bits are used. In a call of several prompts, request i draws from seed + i * 2**32.
    None: 0, so requests without a seed repeat their output in every run; vary the seed for other samples."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, which is cut before them."""
    stop_tokens: tuple[int, ...] | None = None
    """Token ids that end an answer. None: the target's end-of-sequence ids; (): none."""
    verify_length: int | None = None
    """The most drafts, or nodes of a tree, verified in a round. None: the drafter's whole block, or tree."""
    mode: Mode | None = None
    """How drafts are verified above temperature 0. rejection: one by one. block: together, so that more are accepted.
    coupled: the target draws every token from noise of seed, position and token id alone, so that the text is that of
    plain decoding in this mode. None: the engine's; an engine verifies in one mode, by default rejection."""
    ignore_eos: bool = False
    """Go on after the target's end-of-sequence ids. Stop strings, and `stop_tokens` that are given, still end it."""
    logprobs: int | None = None
    """Report each new token's log-probability under the target's raw logits (before temperature, penalties, biases and
    truncation), and so many of the most probable tokens there. 0: the token's own alone. None: off."""
    presence_penalty: float = 0.0
    """-2 to 2, subtracted from the logits of tokens that the output holds already. 0: off."""
    frequency_penalty: float = 0.0
    """-2 to 2, subtracted once for each time that the output holds the token. 0: off."""
    repetition_penalty: float = 1.0
    """0.01 to 100, divides the positive and multiplies the negative logits of tokens in prompt or output. 1: off."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """By token id, -100 to 100, added to its logit before the penalties: a mapping or pairs."""

    def checked(self, vocabulary: int, who: str) -> "SamplingParams":
        """A checked copy in plain Python numbers.

        Args:
            vocabulary: number of token ids of the target.
            who: subject of the error sentences, as in "Request 3".
        Raises:
            UserError: a value of the wrong type, not finite, or out of range.
        """
        # Every field becomes a plain Python value, so that settings compare alike wherever their numbers came from.
        whole, number = partial(whole_number, who), partial(number_between, who)
        stops = self.stop_tokens
        if stops is not None:
            stops = tuple(whole("stop_tokens", t, 0, vocabulary - 1) for t in listed("stop_tokens", stops, who))

        # An empty stop text would end every answer before its first character.
        texts = listed("stop", self.stop, who)
        for text in texts:
            if not isinstance(text, str) or not text or not is_unicode(text):
                raise UserError(f"{who} has stop = {self.stop!r}; expected texts that are not empty.")

        # Of the request alone; whether the engine verifies in that mode is `require_mode`'s question.
        if self.mode is not None and self.mode not in get_args(Mode):
            raise UserError(f"{who} has mode = {self.mode!r}; expected one of {', '.join(get_args(Mode))}.")
        if not isinstance(self.ignore_eos, bool | np.bool_):
            raise UserError(f"{who} has ignore_eos = {self.ignore_eos!r}; expected True or False.")

        # A temperature beyond the range of float32 would become infinite on the device.
        return replace(
            self,
            max_new_tokens=whole("max_new_tokens", self.max_new_tokens, 1, None),
            temperature=number("temperature", self.temperature, 0.0, float(np.finfo(np.float32).max)),
            top_k=whole("top_k", self.top_k, 0, None),
            top_p=number("top_p", self.top_p, 0.0, 1.0),
            min_p=number("min_p", self.min_p, 0.0, 1.0),
            seed=None if self.seed is None else whole("seed", self.seed, 0, SEEDS - 1),
            stop=tuple(texts),
            stop_tokens=stops,
            verify_length=None if self.verify_length is None else whole("verify_length", self.verify_length, 0, None),
            ignore_eos=bool(self.ignore_eos),
            logprobs=None if self.logprobs is None else whole("logprobs", self.logprobs, 0, None),
            presence_penalty=number("presence_penalty", self.presence_penalty, -2.0, 2.0),
            frequency_penalty=number("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            repetition_penalty=number("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            logit_bias=_biases(self.logit_bias, vocabulary, who),
        )


DEFAULT_SAMPLING = SamplingParams()


def require_mode(sampling: SamplingParams, mode: Mode | None, who: str) -> None:
    """Raise UserError for settings of another mode than the engine's; greedy decoding is the same in all."""
    # At temperature 0 all verifiers give plain decoding's tokens (docs/algorithm.md, rule 108).
    mode = mode or "rejection"
    if sampling.temperature > 0 and sampling.mode not in (None, mode):
        raise UserError(
            f"{who} has mode = {sampling.mode!r}, and this engine verifies in mode {mode!r}, which every request "
            "shares; leave the request's mode out, or give the engine's own settings that mode."
        )


def seed_words(sampling: SamplingParams, index: int, own: bool) -> tuple[int, int]:
    """(high, low) 32-bit words of a request's 64-bit seed (docs/algorithm.md, rule 107).

    Args:
        sampling: its settings; a seed of None counts as 0.
        index: its place in the call.
        own: whether the settings are the request's own. A seed of its own is used as it is; under a shared one each
            index gets a seed of its own.
    """
    seed = sampling.seed or 0
    # The index goes into the high word, so that neighbouring seeds of calls do not share requests' seeds.
    if not own or sampling.seed is None:
        seed = (seed + index * 2**32) % SEEDS

    # High word first, as raw keys of Threefry have it.
    return seed >> 32, seed % 2**32


def _biases(given: Any, vocabulary: int, who: str) -> tuple[tuple[int, float], ...]:
    """Pairs of (token id, bias), in order of ids and none of them twice."""
    # JSON objects and Python mappings come as mappings; settings that must be hashable come as pairs.
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    # Texts are sequences, of letters that are never meant.
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Sequence):
        raise UserError(f"{who} has logit_bias = {given!r:.80}; expected token ids with a number each.")

    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise UserError(f"{who} has {pair!r:.80} in logit_bias; expected a token id and a number.")
        token = whole_number(who, "a token of logit_bias", pair[0], 0, vocabulary - 1)
        # Two biases of one token would be added on the device, which neither of them says.
        if token in biases:
            raise UserError(f"{who} names token {token} twice in logit_bias; give it one bias.")
        biases[token] = number_between(who, f"a bias of {token}", pair[1], -100.0, 100.0)

    # Sorted, so that equal settings compare and hash as equal.
    return tuple(sorted(biases.items()))


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: lone surrogates, which broken JSON escapes leave behind, cannot."""
    # Tokenizers raise deep inside on such texts, without a word on where they came from.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def listed(name: str, value: Any, who: str) -> list[Any]:
    """The items of a sequence. Raises UserError for anything else, texts included: their letters are never meant."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        expected = "token ids" if name == "stop_tokens" else "a list of texts"
        raise UserError(f"{who} has {name} = {value!r}; expected {expected}.")
    return list(value)


def whole_number(who: str, name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int. Raises UserError unless it is a whole number (no bool) from `least` to `most`."""
    # numpy's integers pass, bool does not, although it is an int to Python.
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise UserError(f"{who} has {name} = {value!r}; expected a whole number.")
    _require_range(who, name, value, least, most)
    return int(value)


def number_between(who: str, name: str, value: Any, least: float, most: float) -> float:
    """`value` as a float. Raises UserError unless it is a finite number (no bool) from `least` to `most`."""
    # `value != value` is true of NaN alone.
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or value != value or value in (math.inf, -math.inf):
        raise UserError(f"{who} has {name} = {value!r}; expected a number.")
    _require_range(who, name, value, least, most)
    return float(value)


def _require_range(who: str, name: str, value: Any, least: float, most: float | None) -> None:
    # Range and type are two sentences, since their cures differ.
    if value < least or (most is not None and value > most):
        expected = f"{least} or more" if most is None else f"{least:g} to {most:g}"
        raise UserError(f"{who} has {name} = {value}, which is out of range; expected {expected}.")
