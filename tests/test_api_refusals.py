"""Requests that the server over HTTP refuses: one sentence that names the field at fault."""

import asyncio
import time
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse

from dspark_jax.serving.api.middleware import Gate
from tests.api_tiny import MESSAGES, Running, direct, post

REFUSED: dict[str, tuple[dict[str, Any], int, str | None, str]] = {
    "no messages": ({}, 400, "messages", "has no messages"),
    "empty messages": ({"messages": []}, 400, "messages", "expected a list of values, 1 or more"),
    "text": ({"messages": "hello"}, 400, "messages", 'messages is "hello"'),
    "role": ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages", "messages[0].role is \"robot\""),
    "no content": ({"messages": [{"role": "user"}]}, 400, "messages", "messages[0].content is null; expected text"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400, "messages", 'messages[0].content[0] is "image_url"',
    ),
    "model": ({"messages": MESSAGES, "model": "gpt-9"}, 404, "model", "There is no model \"gpt-9\" here"),
    "too long": ({"messages": [{"role": "user", "content": "q x" * 200}]}, 400, "messages", "this server holds 256"),
    "too many new": ({"messages": MESSAGES, "max_tokens": 250}, 400, "max_tokens", "Ask for at most"),
    "hot": ({"messages": MESSAGES, "temperature": 2.5}, 400, "temperature", "expected a number of at least 0"),
    "warm": ({"messages": MESSAGES, "temperature": "warm"}, 400, "temperature", 'temperature is "warm"'),
    "true": ({"messages": MESSAGES, "max_tokens": True}, 400, "max_tokens", "max_tokens is true"),
    "top_p": ({"messages": MESSAGES, "top_p": -1}, 400, "top_p", "top_p is -1"),
    "n": ({"messages": MESSAGES, "n": 17}, 400, "n", "asks for 17 answers; this server gives at most 8"),
    "more than fit": ({"messages": MESSAGES, "n": 9}, 400, "n", "this server gives at most 8"),
    "stops": ({"messages": MESSAGES, "stop": ["a"] * 5}, 400, "stop", "stop is"),
    "empty stop": ({"messages": MESSAGES, "stop": ""}, 400, "stop", "text that is not empty"),
    "stop ids": ({"messages": MESSAGES, "stop_token_ids": [5000]}, 400, "stop_token_ids", "stop_tokens = 5000"),
    "many stop ids": (
        {"messages": MESSAGES, "stop_token_ids": [9] * 9}, 400, "stop_token_ids", "The request names 9 stop tokens",
    ),
    "bias": ({"messages": MESSAGES, "logit_bias": {"x": 1}}, 400, "logit_bias", 'logit_bias names "x"'),
    "bias id": ({"messages": MESSAGES, "logit_bias": {"5000": 1}}, 400, "logit_bias", "a token of logit_bias = 5000"),
    "bias size": ({"messages": MESSAGES, "logit_bias": {"5": 101}}, 400, "logit_bias", "of at most 100"),
    "top": ({"messages": MESSAGES, "top_logprobs": 2}, 400, "top_logprobs", "set logprobs to true"),
    "penalty": ({"messages": MESSAGES, "presence_penalty": 3}, 400, "presence_penalty", "presence_penalty is 3"),
    "priority": ({"messages": MESSAGES, "priority": -1}, 400, "priority", "from 0 to 1"),
    "schema": (
        {"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {}}},
        400, "response_format", "not supported",
    ),
    "tools": (
        {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}]},
        400, "tools", "takes no tools",
    ),
    "unknown": ({"messages": MESSAGES, "temprature": 1}, 400, "temprature", "did you mean temperature?"),
    "options": (
        {"messages": MESSAGES, "stream_options": {"include_usage": True}}, 400, "stream_options", "streams only",
    ),
    "kwargs": (
        {"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs", "sets messages",
    ),
    "special": (
        {"messages": [{"role": "user", "content": "x", "name": "<|im_end|>"}]},
        400, "messages", "special token <|im_end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_a_sentence_that_names_its_field(name: str, running: Running) -> None:
    body, status, param, said = REFUSED[name]
    for stream in ({}, {"stream": True}) if "stream_options" not in body else ({},):
        response = post(running, body | stream)
        error = response.json()["error"]
        assert response.status_code == status and error["param"] == param and said in error["message"], error
        assert error["type"] and "Traceback" not in response.text


def test_a_key_is_asked_for_below_v1_alone(running: Running) -> None:
    gate = Gate(PlainTextResponse("in"), "s3cret", running.service.metrics)

    async def statuses(path: str, keys: list[dict[str, str]]) -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://server") as client:
            return [(await client.get(path, headers=key)).status_code for key in keys]

    keys = [{}, *({"Authorization": text} for text in ("Bearer wrong", "s3cret", "Bearer s3cret", "bearer  s3cret"))]
    assert asyncio.run(statuses("/v1/models", keys)) == [401, 401, 401, 200, 200]
    assert asyncio.run(statuses("/ready", [{}])) == [200]


def test_tools_are_rendered_where_the_template_takes_them(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    service, tool = running.service, {"type": "function", "function": {"name": "add", "parameters": {}}}
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}]
    asked = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "7"}]
    template = (
        "{{ tools[0].function.name if tools }}|{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.a + 1 }}{% endfor %}{% endfor %}"
    )
    monkeypatch.setattr(service.target.tokenizer, "chat_template", template)
    monkeypatch.setattr(service, "_takes_tools", True)
    rendered = f"add|{MESSAGES[0]['content']}47"
    made = post(running, {"messages": asked, "tools": [tool], "max_tokens": 6, "temperature": 0})
    assert made.json()["choices"][0]["message"]["content"] == direct(running, rendered, max_new_tokens=6).text

    named = {"type": "function", "function": {"name": "<|im_end|>"}}
    refused = post(running, {"messages": asked, "tools": [named], "max_tokens": 6})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools"


def test_null_and_neutral_fields_pass(running: Running) -> None:
    neutral = {
        "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "tools": [], "user": "me", "seed": None,
        "response_format": {"type": "text"}, "tool_choice": "none", "metadata": {"a": "b"}, "store": False, "top_k": -1,
        "temperature": 0, "max_tokens": 5, "chat_template_kwargs": {"enable_thinking": True}, "best_of": None,
        "stop": None,
    }  # fmt: skip
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "What is the sum "}, {"type": "text", "text": "of?"}]}
    ]
    joined = [{"role": "user", "content": "What is the sum of?"}]
    made = post(running, neutral | {"messages": parts})
    assert made.status_code == 200, made.text
    assert made.json()["choices"][0]["message"]["content"] == direct(running, joined, max_new_tokens=5).text


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        (b"", 400, "not JSON"),
        (b'{"messages": "\xff"}', 400, "not UTF-8"),
        (b'{"messages": "\\ud800"}', 400, "surrogate"),
        (b"[" * 5000, 400, "nested deeper"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "digits"),
        (b'{"top_p": NaN}', 400, "NaN"),
        (b'{"a": 1, "a": 2}', 400, "twice"),
        (b"[]", 400, "no JSON object"),
        (b'{"messages": "' + b"x" * 10_000_000 + b'"}', 413, "the most that this server reads"),
    ],
    ids=["empty", "bytes", "surrogate", "deep", "digits", "nan", "twice", "list", "10 MB"],
)
def test_a_bad_body_is_a_sentence(data: bytes, status: int, said: str, running: Running) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = httpx.post(running.url + path, content=data, timeout=60)
        assert response.status_code == status and said in response.json()["error"]["message"]


def test_many_names_twice_are_refused_at_once(running: Running) -> None:
    """A body within the limit must not hold the server up, whatever stands in it."""
    names = ",".join(f'"{number}":1' for number in range(100_000))
    began = time.monotonic()
    assert httpx.post(f"{running.url}/v1/completions", content=f'{{{names},"99999":1}}').status_code == 400
    assert time.monotonic() - began < 5


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no model"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5000)
    assert caught.value.param == "max_tokens" and caught.value.code == "context_length_exceeded"
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"


def test_other_addresses_and_methods_answer_in_the_same_form(running: Running) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/other", 404), ("GET", "/v1/speculation?since=x", 400), ("POST", "/v1/embeddings", 404),
    ):  # fmt: skip
        response = httpx.request(method, running.url + path)
        assert response.status_code == status and response.json()["error"]["message"], path


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**65) | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = ["messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stream",
          "stream_options", "tools", "chat_template_kwargs", "stop_token_ids", "logit_bias", "model", "policy",
          "response_format", "speculation", "logprobs", "min_tokens"]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), VALUES, max_size=4), st.booleans(), st.booleans())
def test_no_body_is_too_strange(running: Running, fields: dict[str, Any], chat: bool, whole: bool) -> None:
    body = ({"messages": MESSAGES} if chat else {"prompt": "x"}) | {"max_tokens": 2} if whole else {}
    response = post(running, body | fields, "/v1/chat/completions" if chat else "/v1/completions")
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"].endswith((".", "?")) and len(error["message"]) < 600, error
