"""The server over HTTP under load: clients that misbehave, failures, its end; the programs and examples that ask it."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from dspark_jax.errors import UserError
from dspark_jax.evaluation.http_load import Asked, address_of, ask, closed_loop, figures, poisson
from dspark_jax.serving.api.channel import Channel, Wakeups
from dspark_jax.serving.api.errors import ApiError
from dspark_jax.serving.engine import Engine
from infer.load import main as load
from infer.serve import main as serve_program
from infer.studies import soak
from infer.studies.overhead_clients import Round, client_process
from infer.studies.server_overhead import timed
from tests.api_tiny import CONTEXT, MESSAGES, Running, direct, events, post, serve, slowed

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def slow(running: Running, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine with a pause before each step, so that requests overlap whatever the machine."""
    return slowed(running, monkeypatch)


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

    def failing(*given: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError(f"out of memory, in {MESSAGES[0]['content']}")
        dispatch(engine, *given)

    monkeypatch.setattr(engine, "_begin", beginning)
    monkeypatch.setattr(engine, "_dispatch", failing)


def test_the_log_has_no_prompt(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    post(running, {"messages": [{"role": "user", "content": "Xylophone"}], "max_tokens": 3})
    post(running, {"messages": [{"role": "user", "content": "Xylophone"}], "max_tokens": "Xylophone"})
    assert "POST /v1/chat/completions 200" in caplog.text and "Xylophone" not in caplog.text


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


def test_the_overhead_clients_count_what_others_read(running: Running) -> None:
    """The study's clients, in a process of their own: as many tokens as the answers have, on connections kept open."""
    rows = [MESSAGES, [{"role": "user", "content": "the list"}]]
    with client_process(address_of(running.url), rows, 12) as clients:
        found = clients.run(2, 5)
    first, second = (len(direct(running, messages, max_new_tokens=12).tokens) for messages in rows)
    assert found.tokens == 3 * first + 2 * second
    assert found.events >= 5 * 4 and found.cpu_seconds > 0 and found.seconds > 0
    asked = client_process(address_of(running.url), rows, 10**6)
    with asked as clients, pytest.raises(UserError, match="The clients failed: .*this server holds 256"):
        clients.run(2, 5)


def test_a_dispatch_wakes_the_event_loop_once() -> None:
    async def woken() -> tuple[int, list[Any]]:
        loop, calls = asyncio.get_running_loop(), list[Any]()
        wakeups = Wakeups()
        channels = [Channel(wakeups) for _ in range(5)]
        call = loop.call_soon_threadsafe

        def counted(*given: Any) -> Any:
            calls.append(given)
            return call(*given)

        def put() -> None:
            for channel in channels:
                channel.put(1, ApiError(500, "x"))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "call_soon_threadsafe", counted)
            thread = threading.Thread(target=put)
            thread.start()
            thread.join()
        # A second batch calls again.
        found = [await channel.take() for channel in channels]
        channels[0].put(2, ApiError(500, "y"))
        return len(calls), [*found, await channels[0].take()]

    calls, found = asyncio.run(woken())
    assert calls == 1 and [[index for index, _ in batch] for batch in found] == [[1]] * 5 + [[2]]


def test_what_a_run_used_is_divided_among_threads() -> None:
    made = timed(lambda: Round(100, 20, 0.5, 0.01))
    assert (made.tokens_per_second, made.tokens_per_event) == (200, 5) and made.cpu_ms["clients"] == 0.1
    parts = ("engine", "event loop", "workers", "runtime")
    assert made.cpu_ms["process"] == pytest.approx(sum(made.cpu_ms[name] for name in parts))


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
    assert not found.wrong, found.wrong
    assert metrics["compared"] > 0 and metrics["left_running"] == 0
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


def test_threads_of_a_server_share_one_heap():
    """Pieces that stay free in a heap for each thread would let a server grow by 7 % in five minutes."""
    script = """
import ctypes, os, sys, threading
from dspark_jax.serving.api.server import one_heap

libc = ctypes.CDLL(None)
libc.fdopen.restype = libc.malloc.restype = ctypes.c_void_p

def heaps():
    # glibc's report of itself has a line for each heap.
    read, write = os.pipe()
    stream = ctypes.c_void_p(libc.fdopen(write, b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    return os.read(read, 1 << 16).count(b"<heap nr=")

if sys.argv[1] == "shared":
    one_heap()
before, barrier = heaps(), threading.Barrier(5)

def allocate():
    barrier.wait()
    libc.malloc(1000)
    barrier.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
barrier.wait()
barrier.wait()
print(heaps() - before)
"""
    grown = {
        kind: int(
            subprocess.run([sys.executable, "-c", script, kind], capture_output=True, check=True, timeout=60).stdout
        )
        for kind in ("shared", "own")
    }
    assert grown["shared"] == 0 < grown["own"]
