"""Incremental detokenisation: emits whole characters only, and no text that a stop string may still remove.

A character may be spread over several tokens, and a token's text may depend on the token before. So tokens are decoded
together with a window of earlier ones, and the new text is what the window's text has gained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

Decode = Callable[[list[int]], str]

BROKEN = "\ufffd"
"""The replacement character, to which tokenizers decode bytes that form no whole character."""
WINDOW = 64
"""The most tokens that are decoded together while characters are whole."""
LONGEST_WINDOW = 4 * WINDOW
"""From this length on, bytes that still form no character are taken to be broken for good."""


@dataclass(frozen=True)
class AnswerText:
    """The text of an answer so far. Immutable: `grown` returns the next state."""

    said: str = ""  # final
    held: str = ""  # follows `said`; may become part of a stop string
    window: tuple[int, ...] = ()  # the last tokens, decoded together
    shown: int = 0  # leading characters of the window's text that are in `said` and `held` already
    boundary: int = 0  # a place in the window at which characters were whole, so that it may be cut there

    def grown(self, decode: Decode, stops: Sequence[str], tokens: Sequence[int]) -> tuple["AnswerText", int | None]:
        """Add new tokens.

        Args:
            decode: the tokenizer's.
            stops: stop strings, none of them empty.
            tokens: the new ones.
        Returns:
            (the text; None, or the number of new tokens that are kept if they complete a stop string, before which the
            text then ends).
        """
        # All tokens of a dispatch at once; one by one only where a stop string is among them.
        text = self._decoded(decode, tokens)
        # Searching the held text is enough: nothing that could begin a stop string has been released.
        if not any(stop in text.held for stop in stops):
            # The end of the text that begins a stop string stays back: the next tokens may complete it.
            keep = max((_overlap(text.held, stop) for stop in stops), default=0)
            cut = len(text.held) - keep
            return replace(text, said=text.said + text.held[:cut], held=text.held[cut:]), None

        # The first token that completes a stop string ends the answer, however many tokens came together.
        count = 0
        while count < len(tokens):
            count += 1
            text = self._decoded(decode, tokens[:count])
            if any(stop in text.held for stop in stops):
                break

        # The earliest of them: an answer is cut before the first stop string, whichever was asked for first.
        at = min(text.held.find(stop) for stop in stops if stop in text.held)
        return replace(text, said=text.said + text.held[:at], held=""), count

    def ended(self) -> "AnswerText":
        """The final text: held text is released, bytes that never became a whole character are left out."""
        return replace(self, said=self.said + self.held, held="")

    def _decoded(self, decode: Decode, tokens: Sequence[int]) -> "AnswerText":
        """The state with the new whole characters in `held`."""
        if not tokens:
            return self

        window, boundary = (*self.window, *tokens), self.boundary
        text, end = _whole_text(decode, window)
        if end is None and len(window) <= LONGEST_WINDOW:
            text = text.rstrip(BROKEN)

        fresh, shown = text[self.shown :], max(self.shown, len(text))
        # The window is cut only between whole characters, and keeps the last tokens, whose successor may depend on
        # them.
        if end is not None or len(window) > LONGEST_WINDOW:
            end = len(window) if end is None else end
            if len(window) > WINDOW and 0 < boundary < end:
                window, end = window[boundary:], end - boundary
                shown = len(decode(list(window[:end])))
            boundary = end

        return AnswerText(self.said, self.held + fresh, window, shown, boundary)


def _whole_text(decode: Decode, window: Sequence[int]) -> tuple[str, int | None]:
    """The window's text up to its last whole character and the tokens that make it; where no cut of the last tokens
    ends at one, the text of all and None."""
    # A character has at most four bytes, so at most three tokens at the end are only the beginning of one. One that
    # falls back to bytes breaks all the characters beside it: so what is whole is found by leaving tokens out.
    for end in range(len(window), max(len(window) - 4, 0), -1):
        text = decode(list(window[:end]))
        if not text.endswith(BROKEN):
            return text, end
    return decode(list(window)), None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
