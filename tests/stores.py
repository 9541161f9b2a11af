"""An S3 server on this machine: moto's, in a process of its own, slow or failing as it is told.

    with S3Server() as server:
        server.faults(every=3, status=503, seconds=0.2)

`python -m tests.stores PORT` is what the process executes. POST /-/faults sets the faults that the next requests meet,
GET /-/requests counts those that were answered, by method.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.jobs import ROOT, free_port

BUCKET = "pod"
Start = Callable[..., Any]


class Faulty:
    """moto's application behind faults: every n-th request fails before it is executed, or after, or breaks off."""

    def __init__(self, app: Callable[[dict, Start], Iterable[bytes]]):
        self._app, self._lock = app, threading.Lock()
        self._faults: dict[str, Any] = {}
        self._number, self._counts = 0, Counter[str]()

    def __call__(self, environ: dict, start: Start) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/-/faults":
            self._faults = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            start("200 OK", [])
            return [b""]
        if path == "/-/requests":
            start("200 OK", [])
            return [json.dumps(self._counts).encode()]

        with self._lock:
            self._number += 1
            self._counts[method] += 1
            every = self._faults.get("every", 0)
            failing = every and self._number % every == 0
        if failing:
            time.sleep(self._faults.get("seconds", 0))
            # In turn: an error instead of the work, and one whose work was done, so that the repetition finds it.
            if status := self._faults.get("status"):
                if self._number // every % 2:
                    list(self._app(environ, lambda *_: None))
                else:
                    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start(f"{status} Slow Down", [("Content-Length", "0")])
                return [b""]
        return self._app(environ, start)


class S3Server:
    """The server's process, and the environment variables by which programs find it; an empty bucket `pod`."""

    def __init__(self) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.variables = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    def __enter__(self) -> "S3Server":
        command = [sys.executable, "-m", "tests.stores", self.url.rpartition(":")[2]]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                self._ask(f"/{BUCKET}", "PUT")
                return self
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def become(self, stores: Path) -> None:
        """Lets this process use the server, for as long as it lives."""
        os.environ.update(on_this_machine(self, stores))

    def faults(self, every: int = 0, status: int = 0, seconds: float = 0.0) -> None:
        """Every n-th request from now on waits, and fails where a status is given; 0: none."""
        self._ask("/-/faults", "POST", json.dumps({"every": every, "status": status, "seconds": seconds}).encode())

    def requests(self) -> dict[str, int]:
        """Requests so far, by method."""
        return json.loads(self._ask("/-/requests", "GET"))

    def _ask(self, path: str, method: str, data: bytes | None = None) -> bytes:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, method=method), timeout=10) as reply:
            return reply.read()


def on_this_machine(server: S3Server, stores: Path) -> dict[str, str]:
    """The environment of a program that uses the server and keeps its copies in `stores`."""
    patience = {"DSPARK_STORE_SECONDS": "30", "DSPARK_LEASE_SECONDS": "2", "DSPARK_PUSH_SECONDS": "0"}
    return {**server.variables, **patience, "DSPARK_STORES": str(stores)}


def main() -> None:
    # Imported in the server's process alone: moto brings a web server and boto.
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "moto"
    app = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", int(sys.argv[1]), Faulty(app), threaded=True)


if __name__ == "__main__":
    main()
