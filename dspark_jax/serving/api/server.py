"""The process's side of the server: a socket, signals, and an end that lets running answers finish."""

import ctypes
import gc
import platform
import socket
from collections.abc import Callable

import uvicorn

from dspark_jax.errors import UserError
from dspark_jax.serving.api.app import make_app
from dspark_jax.serving.api.service import Service
from dspark_jax.serving.api.settings import ServerConfig

CUT_SECONDS = 5.0
"""For the ends of answers that were cut to reach their clients."""
M_ARENA_MAX = -8
"""glibc's name in `mallopt` for the most heaps that the threads of a process may have."""


def bind(config: ServerConfig) -> socket.socket:
    """A socket bound to the server's address, which takes connections once the server runs.

    Raises:
        UserError: no such address here, or one that is in use.
    """
    try:
        # Resolved here, before the engine is made, so that a wrong address costs no minute of compiling.
        family, kind, protocol, _, place = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"{config.host} is no address of this machine ({error.strerror}); give another host.") from None

    # Without it the port of a server that has just ended stays taken for a minute.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(place)
    except OSError as error:
        bound.close()
        raise UserError(
            f"{config.host} port {config.port} cannot be listened on ({error.strerror}); give another port."
        ) from None
    return bound


def address(bound: socket.socket) -> str:
    """http://HOST:PORT of a bound socket."""
    # IPv6 names have two more fields, and brackets in an address.
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def one_heap() -> None:
    """Let all threads allocate from one heap, which is to be called before a process has many threads; glibc only.

    By default each thread gets a heap, and the pieces that stay free in each of them add up: the process grows by some
    percent an hour although it holds nothing more.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def settle() -> None:
    """Take everything that lives by now from the garbage collector, which is to be called once a process is ready:
    weights, programs and modules are so many objects that looking through them stops all answers for a second."""
    gc.collect()
    gc.freeze()


class ApiServer(uvicorn.Server):
    """uvicorn's server, which on SIGTERM or SIGINT takes no more requests, lets running ones end, and cuts them at the
    deadline.

    Args:
        service: to be served.
        on_ready: called once requests are taken.
    """

    def __init__(self, service: Service, on_ready: Callable[[], None] = lambda: None):
        self._service = service
        drain = service.config.drain_seconds

        super().__init__(
            uvicorn.Config(
                make_app(service, on_ready),
                # Named rather than "auto", so that what is installed beside does not change the server.
                http="httptools",
                ws="none",
                lifespan="on",
                # Logging is the program's to set up, and the gate writes one line a request without query strings or
                # keys.
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                # Past the engine's own deadline: answers that it has cut must still be sent.
                timeout_graceful_shutdown=round(drain + CUT_SECONDS),
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then stop."""
        # Before uvicorn waits for open connections: the engine's deadline runs from here.
        self._service.driver.drain(self._service.config.drain_seconds)
        await super().shutdown(sockets)
