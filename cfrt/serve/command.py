"""The command `cfrt serve`."""

import socket
import sys
from dataclasses import dataclass
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from ..errors import CfrtError

if TYPE_CHECKING:
    from .session import Make

ANYWHERE = ("0.0.0.0", "::", "")
"""Hosts that mean every interface."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a page where prompts become live video, and an API for programs (its docs: /docs)."""

    host: str = "127.0.0.1"
    """Address to listen at, for the page and for its media. The default can be reached from this machine alone;
    0.0.0.0 opens the server to the network, and then it asks for a token."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    token: str | None = None
    """What visitors must show. Default: nothing on this machine alone, a random one otherwise."""
    model: str = "tiny"
    """An embedded model (see `cfrt models`) or the folder of one."""
    engine: str = "auto"
    """How to run it (see `cfrt doctor`)."""
    device: str = "auto"
    """cpu, cuda or cuda:N. Default: what the engine can do nothing without, else the CPU."""
    precision: str = "auto"
    """fp32, bf16, int8, fp16 or fp64; auto takes what is fastest on this machine and good enough."""
    threads: int = 1
    """CPU threads of each stream."""
    streams: int = 8
    """Streams at the same time, at most."""
    viewers: int = 32
    """Viewers of one stream, at most."""
    idle: Annotated[float, arg(metavar="SECONDS")] = 600.0
    """A stream that nobody has watched for so long is closed."""
    allow_host: tuple[str, ...] = ()
    """Further names that a server on this machine alone may be called by, behind a proxy for instance."""

    def run(self) -> None:
        self._check()
        try:
            import uvicorn

            from .app import create_app, listen, settings
            from .guard import loopback
            from .limits import Limits
        except ImportError as error:
            raise CfrtError(f"cfrt serve needs {error.name}; pip install 'cfrt[serve]'") from error
        alone = loopback(self.host)
        token = self.token or (None if alone else token_urlsafe(16))
        make, card = self._streams()
        app = create_app(
            make,
            card,
            limits=Limits(streams=self.streams, viewers=self.viewers, idle_seconds=self.idle),
            token=token,
            hosts=frozenset({"localhost", "127.0.0.1", "::1", self.host, *self.allow_host}) if alone else None,
            addresses=None if self.host in ANYWHERE else [_address(self.host)],
        )
        config = settings(app, self.host, self.port)
        bound = listen(config)
        port = bound.getsockname()[1]
        where = "localhost" if self.host in ANYWHERE else f"[{self.host}]" if ":" in self.host else self.host
        print(f"cfrt serve: http://{where}:{port}/{f'#token={token}' if token else ''}", flush=True)
        print(
            f"{card['model']} ({card['engine']}, {card['precision']}); the API: /docs; Ctrl-C ends it", file=sys.stderr
        )
        uvicorn.Server(config).run(sockets=[bound])

    def _check(self) -> None:
        for name, value, most in (("streams", self.streams, 1000), ("viewers", self.viewers, 10_000)):
            if not 1 <= value <= most:
                raise CfrtError(f"expected --{name} from 1 to {most}, got {value}")
        if not 0 <= self.port <= 65535:
            raise CfrtError(f"expected --port from 0 to 65535, got {self.port}")
        if not self.idle > 0:
            raise CfrtError(f"expected --idle above 0 seconds, got {self.idle}")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise CfrtError("expected --token to be printable ASCII")

    def _streams(self) -> "tuple[Make, dict[str, Any]]":
        from .making import streams

        options = {name: getattr(self, name) for name in ("model", "engine", "device", "precision", "threads")}
        return streams(**options)


def _address(host: str) -> str:
    """The number behind a name. CfrtError when there is none."""
    try:
        return str(socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)[0][4][0])
    except OSError as error:
        raise CfrtError(f"expected --host to be an address of this machine, got {host!r}: {error.strerror}") from error
