"""Answers from a server that misbehaves: retries, what is set aside and why, resuming, and a server that is down."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dspark_jax.datagen.server as served
from train import prepare_data

Script = Callable[[str, int], Any]
"""(last user turn, how often it was asked for) -> text, or (status, body, headers), or a function of the handler."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: Script = lambda prompt, attempt: f"Answer to {prompt}"
        self.asked: list[dict] = []
        self.headers: list[Any] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def prompts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers.append(self.headers)
            attempt = self.server.prompts().count(prompt)
        answer = self.server.script(prompt, attempt)
        if callable(answer):
            answer(self)
        else:
            self.reply(*(answer if isinstance(answer, tuple) else (200, completion(answer), {})))

    def reply(self, status: int, body: str, headers: dict) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body.encode())), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


def completion(text: Any, reason: str = "stop", **message: Any) -> str:
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": reason}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(served, "FIRST_PAUSE", 0.01)
    with Server() as server:
        yield server
        server.shutdown()


def prepare(server: Server, folder: Path, rows: list[list[str]], *more: str) -> tuple[dict, dict]:
    """({id: finished row}, {id: reason}) of a run over conversations with these user turns."""
    if not (folder / "p.jsonl").exists():
        turns = [[{"role": "user", "content": text} for text in row] for row in rows]
        spoken = [[m for t in row for m in (t, {"role": "assistant", "content": "old"})] for row in turns]
        (folder / "p.jsonl").write_text("".join(json.dumps({"messages": m, "domain": "d"}) + "\n" for m in spoken))
    options = ["--server", server.url, "--server-model", "m", "--server-attempts", "3", "--server-timeout", "0.5"]
    prepare_data.main([*options, "--prompts", str(folder / "p.jsonl"), "--output", str(folder / "out.jsonl"), *more])
    aside = folder / "out.rejected.jsonl"
    rejected = [json.loads(line) for line in aside.read_text().splitlines()] if aside.exists() else []
    finished = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [int(row["id"]) for row in finished] == sorted(int(row["id"]) for row in finished)
    return {row["id"]: row for row in finished}, {row["id"]: row["reason"] for row in rejected}


def test_turns_are_asked_for_in_order_with_the_answers_so_far(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    extra = '{"chat_template_kwargs": {"enable_thinking": false}}'
    finished, rejected = prepare(
        server, tmp_path, [["one", "two"]], "--server-extra", extra, "--seed", "2", "--top-k", "5"
    )
    texts = ["one", "Answer to one", "two", "Answer to two"]
    roles = ["user", "assistant"] * 2
    expected = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    assert finished == {"0": {"id": "0", "domain": "d", "messages": expected, "finish_reason": "stop", "tokens": 6}}
    assert not rejected
    assert [body["messages"] for body in server.asked] == [expected[:1], expected[:3]]
    body = server.asked[0]
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("m", 0.7, 0.95, 192)
    assert body["top_k"] == 5 and body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["seed"] != server.asked[1]["seed"] and server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in "".join(p.read_text() for p in tmp_path.iterdir())


def test_what_fails_for_a_while_is_asked_for_again(server, tmp_path):
    failures = {
        "busy": (503, "busy", {}),
        "slow down": (429, "{}", {"Retry-After": "0"}),
        "garbled": (200, '{"choices": [', {}),
        "half": (200, '{"choices": []}', {}),
        "torn": (200, "short", {"Content-Length": "100"}),
        "silent": lambda handler: time.sleep(0.8),
        "dropped": lambda handler: handler.connection.close(),
    }
    server.script = lambda prompt, attempt: failures[prompt] if attempt == 1 else f"Answer to {prompt}"
    finished, rejected = prepare(server, tmp_path, [[prompt] for prompt in failures])
    assert not rejected and len(finished) == len(failures)
    assert {p: server.prompts().count(p) for p in failures} == dict.fromkeys(failures, 2)


def test_what_is_set_aside_and_why(server, tmp_path):
    answers = {
        "fine": "Fine.",
        "broken": (500, "no luck", {}),
        "empty": " \n",
        "null": None,
        "filtered": (200, completion("x", "content_filter"), {}),
        "thoughtful": (200, completion("x", reasoning_content="hm"), {}),
        "too long": (400, '{"error": "maximum context length is 8"}', {}),
    }
    server.script = lambda prompt, attempt: answers[prompt]
    finished, rejected = prepare(server, tmp_path, [[prompt] for prompt in answers])
    assert list(finished) == ["0"]
    assert rejected["1"] == "turn 1: no answer in 3 attempts, the last: HTTP 500: no luck"
    assert rejected["2"] == rejected["3"] == "turn 1: the answer is empty."
    assert rejected["4"] == "turn 1: the answer ended with 'content_filter'; stop or length was expected."
    assert "reasoning apart from it; turn thinking off by --server-extra" in rejected["5"]
    assert 'refused the request (HTTP 400: {"error": "maximum context length is 8"})' in rejected["6"]
    assert [server.prompts().count(prompt) for prompt in answers] == [1, 3, 1, 1, 1, 1, 1]


def test_an_answer_cut_by_the_limit_ends_its_conversation_and_is_marked(server, tmp_path):
    server.script = lambda prompt, attempt: (200, completion("half an ans\ufffd", "length"), {})
    finished, _ = prepare(server, tmp_path, [["one", "two"]])
    last = {"role": "assistant", "content": "half an ans", "truncated": True}
    assert finished["0"]["messages"][1:] == [last] and finished["0"]["finish_reason"] == "length"


def test_conversations_are_asked_for_side_by_side_within_the_bound(server, tmp_path):
    open_, most = 0, 0

    def slowly(prompt: str, attempt: int) -> str:
        nonlocal open_, most
        with server.lock:
            open_ += 1
            most = max(most, open_)
        time.sleep(0.05)
        with server.lock:
            open_ -= 1
        return "ok"

    server.script = slowly
    finished, _ = prepare(server, tmp_path, [[str(i)] for i in range(12)], "--server-concurrency", "3")
    assert len(finished) == 12 and most == 3


def test_a_run_against_a_server_that_goes_down_is_continued(server, tmp_path, capsys):
    """What was finished stays and is not asked for again; nothing is set aside for the server's absence."""
    rows = [[str(i)] for i in range(20)]
    server.script = lambda prompt, attempt: "ok" if int(prompt) < 8 else (502, "", {})
    with pytest.raises(SystemExit):
        prepare(server, tmp_path, rows, "--server-concurrency", "2")
    said = capsys.readouterr().err
    assert "left 3 conversations in a row unanswered" in said and "run again when the server answers" in said
    assert (tmp_path / "out.rejected.jsonl").read_text() == ""
    server.script = lambda prompt, attempt: "later"
    server.asked.clear()
    finished, rejected = prepare(server, tmp_path, rows, "--server-concurrency", "2")
    assert not rejected and len(finished) == 20 and not {str(i) for i in range(8)} & set(server.prompts())
    assert finished["7"]["messages"][1]["content"] == "ok" and finished["8"]["messages"][1]["content"] == "later"


@pytest.mark.parametrize(("status", "said"), [(401, "OPENAI_API_KEY"), (404, "no such address or model")])
def test_a_server_that_will_not_answer_anyone_ends_the_run(status, said, server, tmp_path, capsys):
    server.script = lambda prompt, attempt: (status, "sorry", {})
    with pytest.raises(SystemExit) as stop:
        prepare(server, tmp_path, [["a"], ["b"]])
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert len(server.asked) <= 2


def test_no_server_and_other_settings(server, tmp_path, capsys):
    prepare(server, tmp_path, [["a"]])
    with pytest.raises(SystemExit):
        prepare(server, tmp_path, [["a"]], "--temperature", "1")
    assert "begun with temperature = 0.7, this run has 1.0" in capsys.readouterr().err
    server.shutdown()
    server.server_close()
    (tmp_path / "new").mkdir()
    with pytest.raises(SystemExit):
        prepare(server, tmp_path / "new", [["a"]])
    assert "Connection refused" in capsys.readouterr().err
