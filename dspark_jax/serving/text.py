"""Tokens to text as they come: whole characters only, and nothing that a stop string will take back.

A character may be spread over several tokens and a token's text may depend on the token before, so tokens are decoded
in a window whose first part has been said already, and what its text has gained is what is new.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

Decode = Callable[[list[int]], str]

BROKEN = "\ufffd"
"""What tokenizers decode bytes to that are no whole character."""
WINDOW = 64
"""Tokens decoded together at most, while characters are whole."""
LONGEST_WINDOW = 4 * WINDOW
"""Beyond this, bytes that are still no character never will be one."""


@dataclass(frozen=True)
class AnswerText:
    """The text of an answer so far. Pure: `grown` returns the next.

    `window`: the last tokens, of whose text `shown` characters are decoded; `boundary`: a place in it where characters
    were whole. `held` follows `said`, and may become a stop string.
    """

    said: str = ""
    held: str = ""
    window: tuple[int, ...] = ()
    shown: int = 0
    boundary: int = 0

    def grown(self, decode: Decode, stops: Sequence[str], tokens: Sequence[int]) -> tuple["AnswerText", int | None]:
        """(the text with new tokens, how many of them a completed stop string leaves). The second is None without one;
        with one, the text ends before it."""
        text = self._decoded(decode, tokens)
        if not any(stop in text.held for stop in stops):
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
        at = min(text.held.find(stop) for stop in stops if stop in text.held)
        return replace(text, said=text.said + text.held[:at], held=""), count

    def ended(self) -> "AnswerText":
        """With all that was held back; bytes that became no whole character stay out."""
        return replace(self, said=self.said + self.held, held="")

    def _decoded(self, decode: Decode, tokens: Sequence[int]) -> "AnswerText":
        """With the new whole characters in `held`."""
        if not tokens:
            return self
        window = (*self.window, *tokens)
        fresh = decode(list(window))[self.shown :]
        whole = fresh.rstrip(BROKEN) if len(window) <= LONGEST_WINDOW else fresh
        shown, boundary = self.shown + len(whole), self.boundary
        if whole == fresh:
            if len(window) > WINDOW and boundary:
                window = window[boundary:]
                shown = len(decode(list(window)))
            boundary = len(window)
        return AnswerText(self.said, self.held + whole, window, shown, boundary)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
