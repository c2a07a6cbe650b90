"""Beyond one machine: the server of this package as a Ray Serve deployment, each replica with an engine of its own.

    RAY_SERVE_SESSION_ID_HEADER_KEY=cookie serve run cfrt.serve.ray:app replicas=2

A stream lives in the replica that made it, so whoever watches it must come to that replica. What belongs together is
a *room*, a cookie: Ray's own consistent hashing sends one room to one replica, HTTP and WebSocket alike. A visitor
without a room is given one, and the page's address names it (`/?room=...`), so that a link leads to the same replica.

Placement, restarts, scaling and health are Ray's. When a replica dies its streams die with it; its rooms go to the
others, where a page makes its streams anew, as after any restart.
"""

import os
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from re import fullmatch
from secrets import token_urlsafe
from typing import Any
from urllib.parse import parse_qs

from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.responses import RedirectResponse

from .guard import App, Receive, Scope, Send
from .limits import Limits

HEADER = "RAY_SERVE_SESSION_ID_HEADER_KEY"
"""Ray's setting: which header says what belongs together. Read by its proxies, so it is set where Ray is started."""

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
ROOM = r"[\w-]{1,64}"


def deployment(
    *,
    replicas: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    limits: Limits | None = None,
    token: str | None = None,
    addresses: list[str] | None = None,
    **options: Any,
) -> serve.Application:
    """What `ray.serve.run` runs.

    cpus, gpus: what Ray reserves for each replica.
    addresses: where a replica sends WebRTC's media from, None for every interface of its node.
    options: of `cfrt.Stream`: model, engine, device, precision, threads.
    """
    limits = limits or Limits()

    def build() -> App:
        """Runs in the replica: the engine, and all that belongs to it, is made there."""
        from .app import create_app
        from .making import streams

        make, card = streams(**options)
        return Rooms(create_app(make, card, limits=limits, token=token, addresses=addresses))

    return serve.deployment(
        serve.ingress(build)(),
        name="cfrt",
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=limits.streams * limits.viewers + 64,  # a viewer is a request that does not end
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER, request_router_kwargs={"num_fallback_replicas": 0}
        ),
    ).bind()


def app(arguments: dict[str, str]) -> serve.Application:
    """For `serve run cfrt.serve.ray:app KEY=VALUE ...`; the keys are those of `deployment`."""
    kinds = {"replicas": int, "cpus": float, "gpus": float, "threads": int}
    if os.environ.get(HEADER) != "cookie":
        raise ValueError(f"expected {HEADER}=cookie where Ray is started, or rooms go anywhere")
    return deployment(**{key: kinds.get(key, str)(value) for key, value in arguments.items()})


class Rooms:
    """Gives visitors of the page a room and keeps it in the page's address."""

    def __init__(self, inner: App) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/":
            return await self._inner(scope, receive, send)
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("room", [""])[0]
        room = asked if fullmatch(ROOM, asked) else _room(scope["headers"]) or token_urlsafe(9)
        if room != asked:
            await RedirectResponse(f"/?room={room}")(scope, receive, send)
        else:
            await self._inner(scope, receive, _keeping(room, send))


def _room(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The room in a request's cookie, or none."""
    for name, value in headers:
        if name == b"cookie":
            try:
                jar = SimpleCookie(value.decode("latin-1"))
            except CookieError:
                continue
            if "room" in jar and fullmatch(ROOM, jar["room"].value):
                return jar["room"].value
    return ""


def _keeping(room: str, send: Send) -> Send:
    cookie = (b"set-cookie", f"room={room}; Path=/; HttpOnly; SameSite=Strict".encode())

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), cookie]}
        await send(message)

    return sending
