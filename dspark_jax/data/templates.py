"""Rendering of chat templates: bounded in time and size, with refusals as one sentence.

A template is a foreign program: it runs in a sandbox that bounds what it makes (`template_sandbox`), with a deadline.
"""

import ctypes
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_jax.data.template_sandbox import rendered
from dspark_jax.errors import UserError

RENDER_SECONDS = 10.0
"""Deadline; a conversation of thousands of turns renders in a fraction of a second."""


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The messages as text, rendered by the tokenizer's chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: turns with "role" and "content"; handed to the template with all their fields.
        variables: template variables (`add_generation_prompt`, `enable_thinking`, ...).

    Raises:
        UserError: no template; one that is damaged, refuses these messages, never ends, or gives no usable text.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path} has no chat template; put a chat_template.jinja beside its "
            "tokenizer.json."
        )

    # Copies: a template may change the objects it is handed.
    outcome = _Rendering(tokenizer, [dict(message) for message in messages], variables).wait(RENDER_SECONDS)

    who = f"a conversation with the roles {_roles(messages)}"
    if outcome is None:
        raise UserError(f"The chat template did not end within {RENDER_SECONDS:g} seconds on {who}; mend the template.")
    if isinstance(outcome, BaseException):
        raise UserError(f"The chat template refused {who}: {_reason(outcome)}") from outcome

    # The tokenizer's Rust part would fail on it with an error that names no conversation.
    try:
        outcome.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"The chat template's text of {who} holds half of a UTF-16 surrogate pair, which no tokenizer takes."
        ) from None

    return outcome


class _Rendering:
    """One run of a template, in a thread of its own: Python code can only be stopped from another thread."""

    def __init__(self, tokenizer: Any, messages: list[dict[str, Any]], variables: Mapping[str, Any]):
        self._call = (tokenizer, messages, variables)
        self._outcome: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> Any:
        """The text, or the exception that ended the run; None where it was stopped after `seconds`."""
        self._thread.join(seconds)
        if self._thread.is_alive() and self._thread.ident is not None:
            # Raised at the thread's next bytecode, which a loop in a template reaches at once.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), ctypes.py_object(SystemExit))
            return None
        return self._outcome

    def _run(self) -> None:
        tokenizer, messages, variables = self._call
        try:
            # The variables that templates are written for; switches come last, as a caller may overwrite any.
            given = {**tokenizer.special_tokens_map, "tools": None, "documents": None, "messages": messages}
            self._outcome = rendered(tokenizer.get_chat_template(), {**given, **variables})
        except Exception as error:  # jinja's own errors, those of the template's expressions, its raise_exception
            self._outcome = error
        except SystemExit:  # stopped by `wait`
            return


def _roles(messages: Sequence[Mapping[str, Any]]) -> str:
    roles = [str(message.get("role")) for message in messages[:8]]
    return ", ".join(roles) + (", ..." if len(messages) > len(roles) else "")


def _reason(error: BaseException) -> str:
    # A template's own message may be long, have lines or half a surrogate pair; it becomes part of one sentence.
    said = " ".join(str(error).split())[:300].encode(errors="replace").decode()
    return f"{(said or type(error).__name__).rstrip('.')}."
