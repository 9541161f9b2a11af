"""The server over HTTP, asked by OpenAI's own client and by clients that misbehave."""

import asyncio
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import PlainTextResponse

from dspark_jax.evaluation.http_load import Asked, address_of, ask, closed_loop, figures, poisson
from dspark_jax.serving.api.logprobs import TokenNames
from dspark_jax.serving.api.middleware import Gate
from dspark_jax.serving.engine import Engine
from dspark_jax.serving.generate import generate
from dspark_jax.serving.requests import Generation
from dspark_jax.serving.sampling import SamplingParams
from infer.load import main as load
from infer.serve import main as serve_program
from infer.studies import soak
from tests.api_tiny import CONTEXT, ENGINE, Running, serve, spoken_pair
from tests.decoding_tiny import next_logits
from tests.test_lossless import p_value

MESSAGES: Any = [{"role": "user", "content": "What is the sum of three and four?"}]
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = serve(spoken_pair(tmp_path_factory.mktemp("api")))
    yield running
    running.stop()


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def slow(running: Running, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine with a pause before each step, so that requests overlap whatever the machine."""
    return slowed(running, monkeypatch)


def slowed(running: Running, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.03) -> Engine:
    engine = running.engine
    step = engine.step

    def later() -> Any:
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(engine, "step", later)
    return engine


def direct(running: Running, prompt: Any = MESSAGES, **sampling: Any) -> Generation:
    """What `generate` answers."""
    service = running.service
    (made,) = generate(service.target, None, [prompt], SamplingParams(**sampling), ENGINE)
    return made


def post(running: Running, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    return httpx.post(running.url + path, json=body, timeout=60, **options)


# Answers


def test_a_chat_is_what_the_engine_answers(running: Running, client: openai.OpenAI) -> None:
    expected = direct(running, max_new_tokens=20)
    made = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=20, temperature=0)
    (choice,) = made.choices
    assert choice.message.content == expected.text and choice.finish_reason == expected.finish_reason
    assert made.usage is not None and made.usage.completion_tokens == len(expected.tokens)
    assert made.usage.prompt_tokens == len(expected.prompt_tokens)

    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=20, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == made.usage
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == expected.finish_reason
    assert len(chunks) > 4, "a stream comes in parts"


def test_completions_take_texts_and_ids(running: Running, client: openai.OpenAI) -> None:
    ids = list(direct(running, "three and four", max_new_tokens=6).prompt_tokens)
    single = direct(running, "three and four", max_new_tokens=6).text
    other = direct(running, "list", max_new_tokens=6).text
    for prompt, expected in (
        ("three and four", [single]),
        (ids, [single]),
        (["three and four", "list"], [single, other]),
        ([ids, ids], [single, single]),
    ):
        made = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.text for choice in made.choices] == expected
    stream = client.completions.create(model="tiny", prompt=["list", ids], max_tokens=6, temperature=0, stream=True)
    texts = {0: "", 1: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: other, 1: single}


def test_stop_strings_are_cut_and_never_leak(running: Running, client: openai.OpenAI) -> None:
    whole = direct(running, max_new_tokens=40).text
    stop = whole[11:14]
    expected = whole[: whole.index(stop)]
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "temperature": 0, "stop": ["none", stop]}
    made = client.chat.completions.create(**options).choices[0]
    assert made.message.content == expected and made.finish_reason == "stop"
    told = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**options, stream=True)]
    assert "".join(told) == expected


def test_n_answers_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    def texts(n: int, seed: int | None) -> list[str | None]:
        made = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, n=n, seed=seed)
        assert [choice.index for choice in made.choices] == list(range(n))
        return [choice.message.content for choice in made.choices]

    three = texts(3, 5)
    assert len(set(three)) == 3 and texts(3, 5) == three
    assert texts(1, 5 + 2 * 2**32) == three[2:] and texts(1, 5 - 2**64 + 2**63 + 2**63) == three[:1]
    assert texts(1, None) != texts(1, None), "without a seed every request samples anew"


def test_samples_follow_the_targets_law(running: Running) -> None:
    """The joint law of two tokens at temperature 1 under top-k 3, of 640 answers: chi-square."""
    target, prompt = running.service.target, direct(running, max_new_tokens=1).prompt_tokens
    seen = []
    body = {"prompt": list(prompt), "max_tokens": 2, "top_k": 3, "n": 8, "speculation": True, "stop_token_ids": [299]}
    for seed in range(80):
        choices = post(running, body | {"seed": seed}, "/v1/completions").json()["choices"]
        seen += [[token["id"] for token in choice["speculation"]["tokens"]] for choice in choices]

    first = next_logits(target, np.asarray([prompt]))[0, -1]
    firsts = np.argsort(first)[-3:]
    later = next_logits(target, np.asarray([[*prompt, token] for token in firsts]))[:, -1]
    seconds = np.argsort(later, axis=1)[:, -3:]
    law = softmax(first[firsts])[:, None] * softmax(np.take_along_axis(later, seconds, axis=1))
    cells = [(int(np.flatnonzero(firsts == a)[0]), a, b) for a, b in seen]
    places = np.asarray([(row, int(np.flatnonzero(seconds[row] == b)[0])) for row, _, b in cells])
    assert p_value(places, law) > 1e-3


def softmax(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return grown / grown.sum(axis=-1, keepdims=True)


def test_how_tokens_came(running: Running, client: openai.OpenAI) -> None:
    """The extension of the page: texts of tokens are the text, drafts are those that rounds kept."""
    expected = direct(running, max_new_tokens=40, stop=("qqq",))
    body = {"messages": MESSAGES, "max_tokens": 40, "temperature": 0, "speculation": True, "stop": "qqq"}
    told = post(running, body).json()["choices"][0]["speculation"]
    tokens, rounds = told["tokens"], told["rounds"]
    assert [token["id"] for token in tokens] == list(expected.tokens)
    assert "".join(token["text"] for token in tokens) == expected.text
    drafts = [token for token in tokens if token["from"] == "draft"]
    assert drafts and all(1 <= token["position"] <= 4 for token in drafts) and tokens[0]["from"] == "target"
    assert sum(round["accepted_length"] for round in rounds) == len(tokens) - 1
    for played in rounds:
        accepted = [draft["accepted"] for draft in played["drafted"]]
        assert accepted == sorted(accepted, reverse=True) and len(accepted) == 4
        assert all(0 <= draft["confidence"] <= 1 for draft in played["drafted"])
        # The last round counts up to the limit of new tokens.
        assert played is rounds[-1] or all(draft["verified"] for draft in played["drafted"])
    assert len(drafts) == sum(draft["accepted"] for played in rounds for draft in played["drafted"])

    streamed = {"tokens": [], "rounds": []}
    for chunk in events(post(running, body | {"stream": True}).text):
        choice: Any = chunk["choices"][0]
        for name, items in choice.get("speculation", {}).items():
            streamed[name] += items
    assert streamed == told

    plain = post(running, body | {"policy": "plain"}).json()["choices"][0]
    assert plain["message"]["content"] == expected.text
    assert {token["from"] for token in plain["speculation"]["tokens"]} == {"target"}
    assert all(played["accepted_length"] == 1 for played in plain["speculation"]["rounds"])


def test_penalties_and_biases_are_the_engines(running: Running, client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    for known, body in (
        ({"presence_penalty": 1.5, "frequency_penalty": 0.5}, {}),
        ({}, {"repetition_penalty": 1.7}),
        ({"logit_bias": {"70": 6.0, "71": -100}}, {}),
    ):
        made = client.chat.completions.create(**options, **known, extra_body=body).choices[0].message.content
        sampling = {name: {int(k): v for k, v in value.items()} if isinstance(value, dict) else value
                    for name, value in (known | body).items()}  # fmt: skip
        assert made == direct(running, max_new_tokens=24, **sampling).text
        assert made != direct(running, max_new_tokens=24).text

    ended = post(running, options | {"logit_bias": {"2": 100}}).json()
    assert (ended["usage"]["completion_tokens"], ended["choices"][0]["finish_reason"]) == (1, "stop")
    goes_on = post(running, options | {"logit_bias": {"2": 100}, "ignore_eos": True}).json()
    assert (goes_on["usage"]["completion_tokens"], goes_on["choices"][0]["finish_reason"]) == (24, "length")


def test_logprobs_are_the_targets(running: Running, client: openai.OpenAI) -> None:
    """The same with drafts as `generate` gives without, whole and streamed; those of a cut stop string are told too."""
    whole = direct(running, max_new_tokens=24).text
    expected = direct(running, max_new_tokens=24, logprobs=3, stop=(whole[11:14],))
    options: Any = {"model": "tiny", "max_tokens": 24, "temperature": 0, "stop": whole[11:14]}
    made = client.chat.completions.create(**options, messages=MESSAGES, logprobs=True, top_logprobs=3).choices[0]
    assert made.logprobs is not None and made.logprobs.content is not None
    found = made.logprobs.content
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-4)
    assert [len(one.top_logprobs) for one in found] == [3] * len(found)
    decode = running.service.target.tokenizer.decode
    assert [one.token for one in found] == [decode([token]) for token in expected.tokens]
    assert bytes(b for one in found for b in one.bytes or []).decode(errors="replace").startswith(expected.text)

    stream = client.chat.completions.create(**options, messages=MESSAGES, logprobs=True, top_logprobs=3, stream=True)
    parts = [part.choices[0].logprobs for part in stream]
    assert [one for part in parts if part is not None for one in part.content or []] == found

    old = client.completions.create(**options, prompt=list(expected.prompt_tokens), logprobs=2).choices[0].logprobs
    assert old is not None and old.tokens == [one.token for one in found] and old.token_logprobs is not None
    assert old.token_logprobs == pytest.approx([one.logprob for one in found], abs=1e-4)
    assert old.top_logprobs is not None and all(1 <= len(top) <= 2 for top in old.top_logprobs)
    assert old.text_offset is not None and old.text_offset[0] == 0 and old.text_offset[-1] <= len(expected.text)


def test_tokens_that_are_parts_of_characters_have_their_bytes(running: Running) -> None:
    names = TokenNames(running.service.target.tokenizer)
    tokens = running.service.target.tokenizer("\u00e4\u6f22 x", add_special_tokens=False)["input_ids"]
    assert any("\ufffd" in names.of(token)[0] for token in tokens)
    assert bytes(b for token in tokens for b in names.of(token)[1] or []).decode() == "\u00e4\u6f22 x"


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# Refusals

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


# Load, and clients that misbehave


def test_a_full_queue_is_a_429_and_no_one_else_notices(running: Running, slow: Engine) -> None:
    expected = direct(running, max_new_tokens=30).text
    body = {"messages": MESSAGES, "max_tokens": 30, "temperature": 0}
    with ThreadPoolExecutor(14) as pool:
        responses = list(pool.map(lambda _: post(running, body), range(14)))
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 8
    for response in responses:
        if response.status_code == 200:
            assert response.json()["choices"][0]["message"]["content"] == expected
        else:
            assert 1 <= int(response.headers["Retry-After"]) <= 60
            assert response.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_slot(stream: bool, running: Running, slow: Engine) -> None:
    body = {
        "messages": MESSAGES,
        "max_tokens": 200,
        "temperature": 0,
        "stream": stream,
        "n": 2,
        "stop_token_ids": [299],
    }
    sock = sent(running, body)
    running.wait(lambda: slow.running == 2)
    sock.close()
    began = time.monotonic()
    running.wait(lambda: slow.running == 0)
    assert time.monotonic() - began < 3
    assert slow.idle and not running.service.driver.open_requests


def sent(running: Running, body: dict[str, Any]) -> socket.socket:
    """A connection with a request on it, of which nothing is read."""
    address = address_of(running.url)
    sock = socket.create_connection((address.host, address.port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    data = json.dumps(body).encode()
    sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    return sock


def test_slow_readers_do_not_stall_others(running: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": 200, "stream": True, "n": 2, "speculation": True}
    idle = [sent(running, body) for _ in range(2)]
    made = post(running, {"messages": MESSAGES, "max_tokens": 20, "temperature": 0})
    assert made.json()["choices"][0]["message"]["content"] == direct(running, max_new_tokens=20).text
    for sock in idle:
        sock.close()
    running.wait(lambda: running.engine.idle)


def test_a_slow_body_is_given_up(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.service, "config", replace(running.service.config, stall_seconds=0.2))
    address = address_of(running.url)
    with socket.create_connection((address.host, address.port)) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        sock.settimeout(20)
        assert b" 408 " in sock.recv(4096)


def test_an_answer_is_cut_at_the_deadline(running: Running, slow: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.service, "config", replace(running.service.config, request_seconds=0.3))
    body = {"messages": MESSAGES, "max_tokens": 200, "temperature": 0, "stop_token_ids": [299]}
    choice = post(running, body).json()["choices"][0]
    whole = direct(running, max_new_tokens=200, stop_tokens=(299,)).text
    assert choice["finish_reason"] == "length" and choice["stop_reason"] == "deadline"
    assert choice["message"]["content"] and whole.startswith(choice["message"]["content"])
    streamed = events(post(running, body | {"stream": True}).text)
    assert streamed[-1]["choices"][0]["stop_reason"] == "deadline"


def test_a_failure_is_mended_and_two_are_answered_with_500(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One failure changes no answer; two in a row answer 500 to all, and a new engine takes over. Both count."""
    body = {"messages": MESSAGES, "max_tokens": 30, "temperature": 0}
    expected = direct(running, max_new_tokens=30).text
    pulse, engine = running.service.pulse, running.engine
    failures, restarts = pulse.failures, pulse.restarts
    fail(engine, monkeypatch, 1)
    assert post(running, body).json()["choices"][0]["message"]["content"] == expected
    assert (pulse.failures, pulse.restarts) == (failures + 1, restarts) and running.engine is engine

    fail(engine, monkeypatch, 2)
    with ThreadPoolExecutor(3) as pool:
        responses = list(pool.map(lambda stream: post(running, body | {"stream": stream}), (True, False, False)))
    assert {response.status_code for response in responses} == {500}
    assert all(response.json()["error"]["code"] == "engine_failed" for response in responses)
    running.wait(lambda: running.service.driver.status == "ready")
    assert running.engine is not engine and pulse.restarts == restarts + 1
    assert post(running, body).json()["choices"][0]["message"]["content"] == expected
    assert "RuntimeError" in caplog.text and "three and four" not in caplog.text
    assert "dspark_engine_restarts_total 1.0" in httpx.get(f"{running.url}/metrics").text


def fail(engine: Engine, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """So many dispatches of this engine raise; where it is twice, once three requests are in it."""
    begin, dispatch, left = type(engine)._begin, type(engine)._dispatch, [times]

    def beginning() -> None:
        while times == left[0] == 2 and engine.running + engine.waiting < 3:
            time.sleep(0.01)
        begin(engine)

    def failing(rounds: int) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError(f"out of memory, in {MESSAGES[0]['content']}")
        dispatch(engine, rounds)

    monkeypatch.setattr(engine, "_begin", beginning)
    monkeypatch.setattr(engine, "_dispatch", failing)


def test_the_log_has_no_prompt(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    post(running, {"messages": [{"role": "user", "content": "Xylophone"}], "max_tokens": 3})
    post(running, {"messages": [{"role": "user", "content": "Xylophone"}], "max_tokens": "Xylophone"})
    assert "POST /v1/chat/completions 200" in caplog.text and "Xylophone" not in caplog.text


# Figures


def test_metrics_count_what_happened(running: Running, client: openai.OpenAI) -> None:
    def value(name: str, **labels: str) -> float:
        text = httpx.get(f"{running.url}/metrics").text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    asked = {"endpoint": "/v1/chat/completions", "status": "200"}
    names = (
        "dspark_generated_tokens_total",
        "dspark_time_to_first_token_seconds_count",
        "dspark_inter_token_seconds_count",
    )
    before = [value("dspark_requests_total", **asked), *map(value, names)]
    made = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, temperature=0)
    assert made.usage is not None
    tokens = made.usage.completion_tokens
    after = [value("dspark_requests_total", **asked), *map(value, names)]
    *counted, between = [b - a for a, b in zip(before, after)]
    # The tokens that come together with the first have no time between them.
    assert counted == [1, tokens, 1] and tokens - 5 * 2 <= between < tokens
    assert value("dspark_slots") == 4 and value("dspark_ready") == 1 and value("dspark_running_requests") == 0
    assert value("dspark_accepted_drafts_total") < value("dspark_verified_drafts_total")


def test_speculation_figures_and_synthetic_users(running: Running) -> None:
    def figures_since(index: int) -> dict[str, Any]:
        return httpx.get(f"{running.url}/v1/speculation?since={index}").json()

    start = figures_since(0)
    assert start["policy"] == {"name": "fixed", "why": "fixed: as asked"} and start["model"] == "tiny"
    assert start["synthetic"] == {"allowed": True, "users": 0, "most": 6} and start["slots"] == 4
    last = start["recent"]["index"]
    assert httpx.post(f"{running.url}/v1/synthetic", json={"users": 3}).json() == {"users": 3}
    running.wait(lambda: figures_since(last)["recent"]["tokens_per_second_per_user"] > 0)
    running.wait(lambda: any(point["running"] == 3 for point in figures_since(last)["points"]))
    points = figures_since(last)["points"]
    assert [point["index"] for point in points] == list(range(last, last + len(points)))
    busy = [point for point in points if point["accepted_length"] is not None]
    assert busy and all(1 <= point["accepted_length"] <= 5 and point["drafting_share"] == 1 for point in busy)
    assert all(point["verified_per_round"] <= 5 for point in busy)

    for body, headers, status in (
        ({"users": 7}, {}, 400), ({"users": -1}, {}, 400), ({"users": True}, {}, 400), ({}, {}, 400),
        ({"users": 0}, {"Content-Type": "text/plain"}, 415),
    ):  # fmt: skip
        assert httpx.post(f"{running.url}/v1/synthetic", content=json.dumps(body),
                          headers={"Content-Type": "application/json"} | headers).status_code == status  # fmt: skip
    assert httpx.post(f"{running.url}/v1/synthetic", json={"users": 0}).status_code == 200
    running.wait(lambda: running.engine.idle)


# The end


def test_an_end_lets_running_answers_finish(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = serve(spoken_pair_of(running), drain_seconds=30.0)
    engine = slowed(ending, monkeypatch)
    body = {"messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(post, ending, body)
        ending.wait(lambda: engine.running == 1)
        ending.server.should_exit = True
        ending.wait(lambda: ending.service.driver.status == "draining")
        assert made.result().json()["choices"][0]["message"]["content"] == direct(running, max_new_tokens=40).text
    ending.stop()
    with pytest.raises(httpx.ConnectError):
        post(ending, body)


def test_an_end_cuts_what_runs_too_long(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = serve(spoken_pair_of(running), drain_seconds=0.2)
    engine = slowed(ending, monkeypatch, 0.1)
    body = {"messages": MESSAGES, "max_tokens": 200, "temperature": 0, "stream": True, "stop_token_ids": [299]}
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(post, ending, body)
        ending.wait(lambda: engine.running == 1)
        ending.stop()
        assert events(made.result().text)[-1]["choices"][0]["stop_reason"] == "deadline"


def spoken_pair_of(running: Running) -> Any:
    return running.service.target, running.service.driver.engine.drafter  # type: ignore[union-attr]


# Programs and documents


def test_the_load_client_times_tokens(running: Running) -> None:
    address = address_of(f"{running.url}/v1")
    body = {"messages": MESSAGES, "max_tokens": 20, "temperature": 0}

    async def both() -> tuple[tuple[list[Asked], float], tuple[list[Asked], float], Asked]:
        closed = await closed_loop(lambda _: ask(address, body), 3, 6)
        return closed, await poisson(lambda _: ask(address, body), 100.0, 3), await ask(address, body, "/v1/nothing")

    (done, seconds), (arrived, _), lost = asyncio.run(both())
    expected = direct(running, max_new_tokens=20)
    for asked in [*done, *arrived]:
        assert asked.text == expected.text and asked.tokens == len(expected.tokens)
        assert len(asked.gaps) < asked.tokens and asked.first_token and asked.finish_reason == expected.finish_reason
    found = figures([*done, lost], seconds)
    assert (found["requests"], found["refused"], found["failed"]) == (7, 1, 0)
    assert found["tokens"] == 6 * len(expected.tokens)


def test_serve_refuses_in_a_sentence(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    port = running.url.rsplit(":", 1)[1]
    for words, said in (
        (["--port", port], f"127.0.0.1 port {port} cannot be listened on"),
        (["--host", "no.such.host.invalid"], "is no address of this machine"),
        (["--port", "70000"], "The server has port = 70000"),
        (["--api-key", "\u00fc"], "The API key holds"),
        (["--prot", "1"], "Unknown option --prot: did you mean --port"),
    ):
        with pytest.raises(SystemExit) as stop:
            serve_program(words)
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_the_load_program(running: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    load(["--server", running.url, "--users", "2", "--rates", "50", "--requests", "4", "--max-tokens", "8",
          "--prompts", str(questions), "--output", str(tmp_path / "out")])  # fmt: skip
    printed = capsys.readouterr().out
    assert "2 users" in printed and "50/s" in printed
    runs = json.loads((tmp_path / "out" / "metrics.json").read_text())["runs"]
    assert [run["requests"] for run in runs] == [4, 4] and all(run["inter_token_ms"] for run in runs)


def test_a_short_soak(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The soak's clients against this server; its own run has 64 of them, for minutes."""
    questions = tmp_path / "q.jsonl"
    texts = ("the sum of three", "the list", "a function")
    questions.write_text("".join(json.dumps({"messages": [{"role": "user", "content": t}]}) + "\n" for t in texts))
    monkeypatch.setattr(soak, "asset", lambda _: questions)
    settings_ = soak.SoakSettings(clients=6, seconds=2.0, max_tokens=24)
    found = soak.Soak(settings_, address_of(running.url), os.getpid())
    asyncio.run(found.run())
    metrics = found.metrics()
    assert metrics["compared"] > 0 and metrics["different"] == metrics["wrong"] == metrics["left_running"] == 0
    assert metrics["did"]["undisturbed"] == metrics["compared"] and "sampled" in metrics["did"]
    found._check(0, Asked(status=200, text="something else"))
    assert "another answer than alone" in found.faults()[0]


@pytest.mark.parametrize("number", range(len(re.findall(r"^curl ", (DOCS / "serving.md").read_text(), re.MULTILINE))))
def test_the_curl_examples_run(number: int, running: Running) -> None:
    text = (DOCS / "serving.md").read_text().replace("\\\n", " ")
    command = re.findall(r"^curl .*", text, re.MULTILINE)[number].replace("http://127.0.0.1:8000", running.url)
    done = subprocess.run(["bash", "-c", command + " --silent --show-error --fail"], capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout, (command, done.stderr)


def test_threads_that_submit_at_once_get_their_own_answers(running: Running) -> None:
    texts = ["three", "list", "sum", "function"]
    expected = [direct(running, text, max_new_tokens=10).text for text in texts]
    found: dict[int, str] = {}

    def one(number: int) -> None:
        body = {"prompt": texts[number], "max_tokens": 10, "temperature": 0}
        found[number] = post(running, body, "/v1/completions").json()["choices"][0]["text"]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[number] for number in range(4)] == expected
    assert running.service.longest == CONTEXT


def test_the_page_is_served_and_loads_nothing_from_elsewhere(running: Running) -> None:
    page = httpx.get(f"{running.url}/")
    assert page.status_code == 200 and "<title>" in page.text
    assert page.headers["Content-Security-Policy"].startswith("default-src 'self'")
    for name in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert name.startswith("#") or httpx.get(f"{running.url}/{name}").status_code == 200, name
