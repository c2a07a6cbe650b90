"""A server's streams from Python. Standard library and what cfrt itself needs; no `cfrt[serve]`.

client = Client("http://127.0.0.1:8000")
with client.stream("a large red circle moving left", seed=7) as stream:
    for frame in stream.frames(seconds=4):
        show(frame.pixels)                                        # (H, W, 3) uint8
    stream.prompt("a small blue square moving up")                # from the next unit on
"""

import json
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from itertools import islice
from types import TracebackType
from typing import IO, Any, Self
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

from ..errors import CfrtError
from ..frame import Frame
from ..stream import Change
from .formats import BOUNDARY, read_jpeg

TIMEOUT = 30.0
"""Seconds without an answer after which a call fails. Frames are waited for without end: a stream may be paused."""


class ServerError(CfrtError):
    """The server has refused, or does not answer. `status` is that of HTTP, 0 without an answer."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class Client:
    """A server of `cfrt serve`."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, token: str | None = None, room: str | None = None
    ) -> None:
        """room: for servers of `cfrt.serve.ray`, what leads to one and the same replica."""
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"expected the address of a server, http://..., got {url!r}")
        self.url, self._token, self._room = url.rstrip("/"), token, room

    def stream(self, prompt: str, *, seed: int = 0) -> "RemoteStream":
        """A new stream. It plays while somebody watches."""
        made = self.call("POST", "/streams", {"prompt": prompt, "seed": seed})
        return RemoteStream(self, made["id"], self.model()["fps"])

    def join(self, name: str) -> "RemoteStream":
        """A stream that runs, by its id. ServerError (404) when there is none."""
        self.call("GET", f"/streams/{quote(name, safe='')}")
        return RemoteStream(self, name, self.model()["fps"])

    def model(self) -> dict[str, Any]:
        """What the server streams, and its limits."""
        return self.call("GET", "/model")

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One request of the HTTP API; the answer's JSON, None where there is none."""
        data = json.dumps(body).encode() if body is not None else None
        with self.open(method, path, data, "application/json") as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def open(
        self, method: str, path: str, data: bytes | None = None, kind: str = "", timeout: float | None = TIMEOUT
    ) -> HTTPResponse:
        """The answer to one request, still to be read."""
        headers = {"Content-Type": kind} if data is not None else {}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if self._room:
            headers["Cookie"] = f"room={quote(self._room, safe='')}"
        try:
            return urlopen(Request(self.url + path, data, headers, method=method), timeout=timeout)
        except HTTPError as error:
            with error:
                raise ServerError(error.code, _words(error)) from error
        except (URLError, OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerError(0, f"{self.url} does not answer ({reason}); start it with: cfrt serve") from error


class RemoteStream:
    """A stream on a server. Others may watch and steer it too. Leaving a `with` block ends it for everybody."""

    def __init__(self, client: Client, name: str, fps: float) -> None:
        self.id, self._client, self._fps = name, client, fps
        self._path = f"/streams/{quote(name, safe='')}"

    def frames(self, n: int | None = None, seconds: float | None = None) -> Iterator[Frame]:
        """Frames from now on: n of them, `seconds` of video, or until the stream ends. A slow reader misses some."""
        count = round(seconds * self._fps) if seconds is not None else n
        with self._client.open("GET", f"{self._path}/frames?format=mjpeg", timeout=None) as answer:
            for head, data in islice(_parts(answer), count):
                index, unit = int(head["x-index"]), int(head["x-unit"])
                latency, prompt = float(head["x-latency"]), unquote(head["x-prompt"])
                yield Frame(read_jpeg(data), index, index / self._fps, unit, latency, prompt)

    def prompt(self, text: str, *, blend_units: int = 0, recache: bool = False) -> Change:
        """As `cfrt.Stream.prompt`."""
        return Change(**self.steer(prompt=text, blend_units=blend_units, recache=recache)["change"])

    def pause(self) -> None:
        self.steer(paused=True)

    def resume(self) -> None:
        self.steer(paused=False)

    def step(self, units: int = 1) -> None:
        """Shows so many units, then waits."""
        self.steer(step=units)

    def rewind(self, units: int) -> int:
        """Goes back; gives the unit on show."""
        return int(self.steer(rewind=units)["unit"])

    def reseed(self, seed: int) -> None:
        """Other noise from the next unit on."""
        self.steer(seed=seed)

    def restart(self) -> None:
        """From the first frame."""
        self.steer(restart=True)

    def branch(self) -> "RemoteStream":
        """A second stream that goes on from what this one shows."""
        return RemoteStream(self._client, self._client.call("POST", f"{self._path}/branch")["id"], self._fps)

    def start_from(self, picture: bytes, kind: str = "image/png") -> None:
        """Starts anew from a picture: the bytes of a PNG, JPEG or WebP file."""
        self._client.open("POST", f"{self._path}/image", picture, kind).close()

    def steer(self, **wish: Any) -> dict[str, Any]:
        """`PATCH`; the stream's state and, after a change of prompt, `change`."""
        state: dict[str, Any] = self._client.call("PATCH", self._path, wish)
        return state

    def state(self) -> dict[str, Any]:
        """Prompt, unit, reach, viewers, measurements."""
        state: dict[str, Any] = self._client.call("GET", self._path)
        return state

    def close(self) -> None:
        """Ends it for everybody."""
        self._client.call("DELETE", self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            self.close()
        except ServerError:
            if kind is None:
                raise

    def __repr__(self) -> str:
        return f"RemoteStream({self._client.url!r}, id={self.id!r})"


def _parts(answer: IO[bytes]) -> Iterator[tuple[dict[str, str], bytes]]:
    """Heads (names in lower case) and bodies of a multipart answer, until it ends."""
    while line := answer.readline():
        if line.strip() != f"--{BOUNDARY}".encode():
            continue
        head: dict[str, str] = {}
        while line := answer.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            head[name.lower()] = value.strip()
        data = answer.read(int(head.get("content-length", 0)))
        if len(data) == int(head.get("content-length", 0)) > 0:
            yield head, data


def _words(error: HTTPError) -> str:
    """The server's own words, or HTTP's."""
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
