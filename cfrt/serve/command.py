"""The command `cfrt serve`."""

import socket
import sys
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from ..errors import CfrtError, UsageError

if TYPE_CHECKING:
    from .session import Make
    from .shelf import Shelf

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
    state: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Where streams are kept while they run, every two seconds, so that a server that was killed goes on with them.
    Default: ~/.local/state/cfrt/serve-PORT, and nowhere with --port 0."""
    forget: bool = False
    """Keep no streams: they end with the server."""

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
        with closing(listen(self.host, self.port)) as bound, self._shelf() or nullcontext() as shelf:
            app = create_app(
                make,
                card,
                limits=Limits(streams=self.streams, viewers=self.viewers, idle_seconds=self.idle),
                token=token,
                hosts=frozenset({"localhost", "127.0.0.1", "::1", self.host, *self.allow_host}) if alone else None,
                addresses=None if self.host in ANYWHERE else [_address(self.host)],
                shelf=shelf,
            )
            where = "localhost" if self.host in ANYWHERE else f"[{self.host}]" if ":" in self.host else self.host
            shown = f"#token={token}" if token else ""
            print(f"cfrt serve: http://{where}:{bound.getsockname()[1]}/{shown}", flush=True)
            what = f"{card['model']} ({card['engine']}, {card['precision']})"
            print(f"{what}; the API: /docs; Ctrl-C ends it", file=sys.stderr)
            uvicorn.Server(settings(app, self.host, self.port)).run(sockets=[bound])

    def _check(self) -> None:
        ranges = {"port": (0, 65535), "threads": (1, 1024), "streams": (1, 1000), "viewers": (1, 10_000)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise UsageError(f"expected --{name} from {least} to {most}, got {value}; see cfrt serve --help")
        if not self.idle > 0:
            raise UsageError(f"expected --idle above 0 seconds, got {self.idle}; the default is 600")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise UsageError(
                f"expected --token of printable ASCII, got {self.token!r}; leave it out and one is made at random"
            )
        if self.forget and self.state is not None:
            raise UsageError(f"expected --state or --forget, got both; leave one out (--state {self.state!r})")

    def _shelf(self) -> "Shelf | None":
        """CfrtError when what was asked for cannot be had. When the default cannot, that is said, and there is none."""
        from .. import students
        from ..weights import read_config
        from .shelf import Shelf, default, unfit

        if self.forget or (self.state is None and self.port == 0):
            return None
        folder = default(self.port) if self.state is None else Path(self.state)
        why = unfit(read_config(students.find(self.model)))
        try:
            if why is None:
                return Shelf(folder)
        except OSError as error:
            why = f"{folder}: {error.strerror or error}"
        do = "give --state a folder that can be written, or --forget"
        if self.state is not None:
            raise CfrtError(f"expected streams that can be kept in {folder}, got none: {why}; {do}")
        print(f"streams end with this server: {why}", file=sys.stderr)
        return None

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
