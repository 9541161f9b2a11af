"""Settings of the server itself; those of the engine are `EngineConfig`."""

import ipaddress
from dataclasses import dataclass
from typing import Literal

from dspark_jax.errors import UserError
from dspark_jax.serving.sampling import number_between, whole_number


@dataclass(frozen=True)
class ServerConfig:
    """Address, access and limits of the server."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is reachable from this machine alone."""
    port: int = 8000
    """Port to listen on. 0: a free one, which the first line names."""
    api_key: str = ""
    """Key that requests to /v1 must bear. Empty: that of the variable DSPARK_API_KEY, or none is asked for."""
    served_model_name: str = ""
    """Name of the model in requests and answers. Empty: the target's own."""
    body_limit: int = 2 << 20
    """Bytes of a request's body at most."""
    # Each answer takes a place in slots or queue.
    most_choices: int = 16
    """Answers that one request may ask for: prompts times `n`."""
    request_seconds: float = 600.0
    """Seconds after which an answer is cut and returned as far as it has come."""
    # A dropped connection frees slots that its requests hold.
    stall_seconds: float = 60.0
    """Seconds that a client may read nothing, or send nothing of its body, before it is dropped."""
    drain_seconds: float = 30.0
    """Seconds that running answers are given after SIGTERM; then they are cut."""
    demo: Literal["auto", "on", "off"] = "auto"
    """Whether the page may start synthetic users. auto: on addresses of this machine alone."""

    def checked(self) -> "ServerConfig":
        """These settings; UserError, in a sentence, for any that no server can run with."""
        # In the words of the settings, as a command line has them.
        who = "The server"
        whole_number(who, "port", self.port, 0, 65535)
        whole_number(who, "body_limit", self.body_limit, 1024)
        whole_number(who, "most_choices", self.most_choices, 1)
        for name in ("request_seconds", "stall_seconds", "drain_seconds"):
            number_between(who, name, getattr(self, name), 0.0, 1e9)

        # Servers strip header values, so that such a key could never be matched.
        if not self.api_key.isascii() or self.api_key != self.api_key.strip():
            raise UserError(
                "The API key holds spaces at its ends or characters that no header can carry; give another."
            )
        return self

    @property
    def loopback(self) -> bool:
        """Whether only programs of this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        # A name and no address. It is not resolved: what it means to the resolver may change while the server runs.
        except ValueError:
            return self.host == "localhost"

    @property
    def synthetic_users(self) -> bool:
        """Whether POST /v1/synthetic is served: whoever reaches it can keep the engine busy."""
        return self.loopback if self.demo == "auto" else self.demo == "on"
