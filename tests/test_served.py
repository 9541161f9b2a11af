"""Answers from a server that misbehaves: retries, what is set aside and why, resuming, and a server that is down."""

import asyncio
import gc
import http.server
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anyio._backends._asyncio import TaskGroup

import dspark_jax.datagen.client as client
import dspark_jax.datagen.server as served
from dspark_jax.datagen.client import ChatClient, UnansweredError, read_answer
from dspark_jax.errors import UserError
from train import prepare_data

Script = Callable[[str, int], Any]
"""(last user turn, how often it was asked for) -> text, or (status, body, headers), or a function of the handler."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up before it has read everything is part of these tests; anything else is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

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

    def drip(self, start: str, part: bytes, seconds: float) -> None:
        """Sends `start`, then `part` again and again, with a pause, until the other side hangs up."""
        self.close_connection = True
        try:
            self.wfile.write(start.encode())
            while True:
                self.wfile.write(part)
                time.sleep(seconds)
        except OSError:
            return

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
    # A busy machine may leave a thread without a turn for long: only a test of silence has a short bound.
    options = ["--server", server.url, "--server-model", "m", "--server-attempts", "3", "--server-timeout", "60"]
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
        "dropped": lambda handler: handler.connection.close(),
    }
    server.script = lambda prompt, attempt: failures[prompt] if attempt == 1 else f"Answer to {prompt}"
    finished, rejected = prepare(server, tmp_path, [[prompt] for prompt in failures])
    assert not rejected and len(finished) == len(failures)
    assert {p: server.prompts().count(p) for p in failures} == dict.fromkeys(failures, 2)


def test_a_server_that_is_silent_is_asked_again(server, tmp_path):
    silence = threading.Event()
    server.script = lambda prompt, attempt: (lambda handler: silence.wait(60)) if attempt == 1 else "At last."
    # Later answers may come too late as well, hence many attempts.
    finished, rejected = prepare(server, tmp_path, [["silent"]], "--server-timeout", "0.5", "--server-attempts", "50")
    silence.set()
    assert not rejected and len(finished) == 1 and server.prompts().count("silent") >= 2


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
    open_, most, together = 0, 0, threading.Barrier(3)

    def slowly(prompt: str, attempt: int) -> str:
        nonlocal open_, most
        with server.lock:
            open_ += 1
            most = max(most, open_)
        together.wait(60)  # the answers come in threes, or never
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
    # Both that were asked together may have ended by then.
    assert re.search(r"left [34] conversations in a row unanswered.*run again when the server answers", said, re.DOTALL)
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
    assert "All connection attempts failed" in capsys.readouterr().err


def refused(server: Server, folder: Path, rows: list[list[str]], capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The sentence of a run that must end with one; it has set nothing aside."""
    with pytest.raises(SystemExit) as stop:
        prepare(server, folder, rows, *more)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    assert (folder / "out.rejected.jsonl").read_text() == "" and (folder / "out.jsonl").read_text() == ""
    return said.splitlines()[-1]


def test_a_redirect_takes_neither_prompts_nor_key_elsewhere(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Server() as other:
        server.script = lambda prompt, attempt: (307, "", {"Location": other.url + "/chat/completions"})
        said = refused(server, tmp_path, [["a"], ["b"]], capsys)
        assert f"redirects to '{other.url}/chat/completions' (HTTP 307), which is not followed" in said
        assert other.asked == [] and len(server.asked) <= 2
        other.shutdown()


def test_a_server_that_refuses_all_alike_ends_the_run(server, tmp_path, capsys):
    server.script = lambda prompt, attempt: (400, f"no {prompt}", {})
    rows = [[str(i)] for i in range(60)]
    said = refused(server, tmp_path, rows, capsys, "--server-concurrency", "4")
    assert "answered none of the first 1" in said and "all refused alike" in said and "HTTP 400" in said
    assert len(server.asked) < 30
    server.script = lambda prompt, attempt: "ok" if prompt == "7" else (400, f"no {prompt}", {})
    finished, rejected = prepare(server, tmp_path, rows, "--server-concurrency", "4")
    assert list(finished) == ["7"] and len(rejected) == 59


def test_a_few_conversations_refused_alike_end_the_run_too(server, tmp_path, capsys):
    server.script = lambda prompt, attempt: (200, completion("x", reasoning_content="hm"), {})
    assert "none of the first 3" in refused(server, tmp_path, [["a"], ["b"], ["c"]], capsys)


DRIPS = {
    "slow body": ("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n", b" ", 0.05),
    "slow headers": ("HTTP/1.1 200 OK\r\nX-Long: ", b"x", 0.05),
    "slow refusal": ("HTTP/1.1 400 Bad\r\n\r\n", b" ", 0.05),
    "endless body": ("HTTP/1.1 200 OK\r\n\r\n", b" " * 65536, 0.0),
    "endless headers": ("HTTP/1.1 200 OK\r\nX-Long: ", b"x" * 65536, 0.0),
}


@pytest.mark.parametrize("name", DRIPS)
def test_replies_that_never_end_are_bounded(name, server, monkeypatch):
    monkeypatch.setattr(client, "MOST_BYTES", 1 << 20)
    server.script = lambda prompt, attempt: lambda handler: handler.drip(*DRIPS[name])
    asked = ChatClient(server.url, seconds=0.5)
    began = time.monotonic()
    with pytest.raises((UnansweredError, UserError), match="within 0.5 seconds|longer than 1 MiB|no connection"):
        asked.ask(b'{"messages": [{"content": "a"}]}')
    assert time.monotonic() - began < 30
    asked.close()
    asked.close()
    with pytest.raises(UnansweredError, match="stopped"):
        asked.ask(b"{}")


def test_closing_ends_what_is_under_way(server):
    server.script = lambda prompt, attempt: lambda handler: handler.drip("HTTP/1.1 200 OK\r\n\r\n", b" ", 0.05)
    asked, outcome = ChatClient(server.url, seconds=60), []

    def ask() -> None:
        try:
            asked.ask(b'{"messages": [{"content": "a"}]}')
        except UnansweredError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    while not server.asked:
        time.sleep(0.01)
    asked.close()
    thread.join(60)
    assert outcome == ["the run was stopped."]


def test_closing_leaves_connection_attempts_to_the_library(server, monkeypatch, recwarn):
    """One that was cancelled before its first step would never be awaited: the warning shows that it was."""
    asked, spawn, closing = ChatClient(server.url, seconds=60), TaskGroup.start_soon, []

    def close_first(group: TaskGroup, *what: Any, **more: Any) -> Any:
        if not closing:
            closing.append(asyncio.get_running_loop().create_task(asked._cancel()))
        return spawn(group, *what, **more)

    monkeypatch.setattr(TaskGroup, "start_soon", close_first)
    with pytest.raises(UnansweredError, match="stopped"):
        asked.ask(b"{}")
    asked.close()
    gc.collect()
    assert closing and closing[0].done() and not server.asked
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]


ODD = {
    b'{"choices": ' + b"[" * 100_000: "no chat completion",
    b'{"choices": [' + b"1" * 9000 + b"]}": "no chat completion",
    b"\xff\xfe{": "no chat completion",
    b'{"choices": {"0": 1}}': "no chat completion",
    b'{"choices": [{"message": "x", "finish_reason": "stop"}]}': "no chat completion",
    b"[]": "no chat completion",
    completion("\ud800").encode(): "no chat completion",
    completion("x", "stop").replace("3", '"many"').encode(): "completion_tokens are 'many'",
    completion("x", "stop").replace("3", "-1").encode(): "completion_tokens are -1",
    completion("x", "stop").replace("3", "1e3").encode(): "completion_tokens are 1000.0",
    completion("x", "stop").replace("3", "true").encode(): "completion_tokens are True",
    completion("x", "stop").replace('{"completion_tokens": 3}', "7").encode(): "no chat completion",
    completion(["x"]).encode(): "the answer is a list",
    completion("x", ["stop"]).encode(): "the answer ended with",
    completion("").encode(): "the answer is empty",
}


@pytest.mark.parametrize("reply", ODD, ids=lambda reply: reply[:20].decode(errors="replace"))
def test_odd_replies_are_sentences(reply):
    with pytest.raises((UnansweredError, UserError), match=ODD[reply]) as caught:
        read_answer(reply)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


@pytest.mark.parametrize("named", ["²", "-1", "1e9", "soon", "99999999999", ""])
def test_odd_pauses_are_not_waited_for(named, server):
    server.script = lambda prompt, attempt: (429, "\x1b[2Jwait\x07", {"Retry-After": named})
    asked = ChatClient(server.url, seconds=5)
    with pytest.raises(UnansweredError, match="HTTP 429") as caught:
        asked.ask(b'{"messages": [{"content": "a"}]}')
    assert caught.value.pause is None and str(caught.value).isprintable()
    asked.close()


@pytest.mark.parametrize(
    "address",
    [
        "ftp://host/v1",
        "http://",
        "host:8000",
        "http://[",
        "http://a:b@host/v1",
        "http://host/v1?key=1",
        "http://host:99999999/",
    ],
)
def test_addresses_that_no_request_can_be_sent_to(address):
    with pytest.raises(UserError, match="--server is .* an address as in"):
        ChatClient(address, 1.0)


def test_a_key_that_no_header_can_carry(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "ключ")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds characters"):
        ChatClient("http://127.0.0.1:1/v1", 1.0)
