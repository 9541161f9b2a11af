"""Chat messages of a request, in the form that the chat renderer takes: every content one text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_jax.data.chat import ROLES
from dspark_jax.readers import shown
from dspark_jax.serving.api.errors import bad_request

KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")
"""Fields beside role and content that templates read."""
IGNORED = {"refusal", "annotations", "audio", "function_call", "id"}
"""Fields of OpenAI's own answers, which come back in histories; they must be empty."""


def messages_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages, checked.

    Args:
        messages: a list of objects.
    Raises:
        ApiError: a 400 that names the message and the field.
    """
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    # A template may render a role that it does not know as another.
    if message.get("role") not in ROLES:
        raise bad_request(
            f"{where}.role is {shown(message.get('role'))}; expected one of {', '.join(ROLES)}.", "messages"
        )

    # A field that is dropped in silence would change the conversation. Clients send the fields of earlier answers back
    # whole, so that empty ones of OpenAI's pass.
    for name, value in message.items():
        if name not in ("role", "content", *KEPT) and not (name in IGNORED and not value):
            raise bad_request(f"{where} has a field {shown(name)} that is not supported; leave it out.", "messages")

    found = {"role": message["role"], "content": _content(message, where)}
    for name in KEPT:
        if message.get(name):
            found[name] = (
                _tool_calls(message[name], where) if name == "tool_calls" else _text(message[name], where, name)
            )
    return found


def _content(message: Mapping[str, Any], where: str) -> str:
    content = message.get("content")
    # An answer that only calls tools has no text.
    if content is None and message.get("tool_calls"):
        return ""
    # A text is the common case; a list of parts is OpenAI's form for images too, which cannot be read here.
    if not isinstance(content, list):
        return _text(content, where, "content")

    for place, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            said = shown(kind) if isinstance(kind, str) and kind != "text" else "no part with a text"
            raise bad_request(
                f"{where}.content[{place}] is {said}; only parts of the type text can be read.", "messages"
            )
    return "".join(part["text"] for part in content)


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise bad_request(f"{where}.{name} is {shown(value)}; expected text.", "messages")
    return value


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls of functions, their arguments as objects: OpenAI sends them as a text of JSON, templates write JSON."""
    if not isinstance(calls, list):
        raise bad_request(f"{where}.tool_calls is {shown(calls)}; expected a list.", "messages")

    found = []
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_request(f"{where}.tool_calls[{place}] calls no function by name.", "messages")

        # A history may carry them in either form; some templates index into the object.
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            # Deep nesting overflows the parser's stack before it is found to be wrong.
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise bad_request(f"{where}.tool_calls[{place}] has arguments that are no JSON object.", "messages")
        found.append({**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found
