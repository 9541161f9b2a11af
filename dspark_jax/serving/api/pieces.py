"""The text of an answer, divided among its tokens, for clients that ask for details of each."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark_jax.serving.text import AnswerText, Decode


@dataclass
class TokenTexts:
    """Texts of single tokens that, joined, are the answer's text.

    A token that only begins a character has no text; the token that completes the character has all of it. Tokens whose
    text is held back, because it may become a stop string, are held back too.
    """

    decode: Decode
    _text: AnswerText = AnswerText()
    _held: deque[tuple[int, str]] = field(default_factory=deque)
    _released: int = 0  # characters

    def add(self, tokens: Sequence[int]) -> None:
        """Take new tokens of the answer."""
        for token in tokens:
            before = len(self._text.said)
            # Without stop strings all whole characters are said at once.
            self._text, _ = self._text.grown(self.decode, (), [token])
            self._held.append((token, self._text.said[before:]))

    def release(self, said: int, ended: bool) -> list[tuple[int, str]]:
        """(id, text) of the tokens that are final.

        Args:
            said: characters of the answer that are final.
            ended: whether no more follow: then all tokens are released, and text behind `said` is cut off.
        """
        found = []
        while self._held:
            token, text = self._held[0]
            # In order: a later token is never released before an earlier one that is held back.
            if self._released + len(text) > said and not ended:
                break
            # At the end a stop string cuts through a token's text, or takes all of it.
            text = text[: max(said - self._released, 0)]
            self._released += len(text)
            found.append((token, text))
            self._held.popleft()
        return found
