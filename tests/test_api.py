"""Answers and figures of the server over HTTP, read by OpenAI's own client."""

import json
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dspark_jax.serving.api.logprobs import TokenNames
from dspark_jax.serving.api.settings import ServerConfig
from dspark_jax.serving.sampling import Mode
from infer import serve
from infer.serve import ServeSettings, service_of
from tests.api_tiny import ENGINE, MESSAGES, Running, direct, events, post, started
from tests.decoding_tiny import next_logits
from tests.test_lossless import p_value


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


@pytest.mark.parametrize("mode", ["coupled", "block"])
def test_modes(mode: Mode, running: Running) -> None:
    """`dspark serve --mode`: coupled, a seed's answer is plain decoding's own; greedy ones are always."""
    target, drafter = running.service.target, running.engine.drafter
    settings = ServeSettings(mode=mode, engine=ENGINE, warm_up="none")
    served = started(service_of(settings, target, drafter, ServerConfig(port=0)))
    try:

        def texts(server: Running, **more: Any) -> list[str]:
            body = {"messages": MESSAGES, "max_tokens": 16, "temperature": 1, "seed": 3, "n": 4} | more
            return [choice["message"]["content"] for choice in post(server, body).json()["choices"]]

        made = texts(served)
        assert made == texts(served) and len(set(made)) == 4
        assert (made == texts(served, policy="plain")) == (mode == "coupled")
        assert texts(served, temperature=0, n=1) == [direct(running, max_new_tokens=16).text]
    finally:
        served.stop()


def test_a_mesh_keeps_no_prompts_by_default() -> None:
    """The engine refuses to on several devices: it was the default that stopped every server on a mesh."""
    alone, mesh = ServeSettings(), ServeSettings(mesh="tensor=8")
    asked = replace(mesh, engine=replace(mesh.engine, prefix_cache=64))
    assert [serve.engine_of(s).prefix_cache for s in (alone, mesh, asked)] == [256, 0, 64]
    assert serve.engine_of(mesh) == replace(serve.ENGINE, prefix_cache=0)


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
    last = max(start["recent"]["index"], 1)  # the first point is the one after the start
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
