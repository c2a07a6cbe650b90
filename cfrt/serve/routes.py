"""The HTTP API, request by request. What these functions say of themselves is what /openapi.json and /docs say."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response, WebSocket
from fastapi.responses import FileResponse, StreamingResponse
from starlette.requests import HTTPConnection

from ..encoders import COMFORTABLE_SIDE
from . import formats, messages
from .broadcast import Viewer
from .limits import Limits, Meter
from .live import Live
from .metrics import exposition
from .registry import Registry
from .rtc import Peers
from .session import Session

PAGE = Path(__file__).parent / "page"

FILE = {"schema": {"type": "string", "format": "binary"}}
PICTURE = {
    "requestBody": {"required": True, "content": {f"image/{kind}": FILE for kind in ("png", "jpeg", "webp")}},
}
"""What OpenAPI is told of a body that FastAPI does not read."""


@dataclass(frozen=True)
class Server:
    """What all requests share; `app.state.server`."""

    sessions: Registry
    peers: Peers
    limits: Limits
    card: messages.ModelCard
    making: Meter
    steering: Meter


def shared(visitor: HTTPConnection) -> Server:
    server: Server = visitor.app.state.server
    return server


Shared = Annotated[Server, Depends(shared)]


def named(name: str, server: Shared) -> Session:
    return server.sessions.get(name)


def steered(name: str, server: Shared, visitor: HTTPConnection) -> Session:
    server.steering.pay(visitor)
    return server.sessions.get(name)


def may_make(server: Shared, visitor: HTTPConnection) -> None:
    server.making.pay(visitor)


Named = Annotated[Session, Depends(named)]
Steered = Annotated[Session, Depends(steered)]
MAY_MAKE = Depends(may_make)

pages = APIRouter(include_in_schema=False)
server_routes = APIRouter(tags=["server"])
streams = APIRouter(prefix="/streams", tags=["streams"])
watching = APIRouter(prefix="/streams/{name}", tags=["watching"])
recording = APIRouter(prefix="/streams/{name}/recording", tags=["recording"])
ROUTERS = (pages, server_routes, streams, watching, recording)


# ---------------------------------------------------------------------- pages


@pages.get("/")
async def page() -> FileResponse:
    return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})


@pages.get("/docs")
async def docs() -> FileResponse:
    return FileResponse(PAGE / "api.html", headers={"cache-control": "no-cache"})


@pages.get("/favicon.ico")
async def icon() -> FileResponse:
    return FileResponse(PAGE / "icon.svg", media_type="image/svg+xml")


# ---------------------------------------------------------------------- the server


@server_routes.get("/healthz")
async def healthz(server: Shared) -> dict[str, str | int]:
    """Is the server alive?"""
    return {"status": "ok", "streams": len(list(server.sessions))}


@server_routes.get("/metrics", response_class=Response)
async def metrics(server: Shared) -> Response:
    """Measurements in Prometheus' text format."""
    return Response(exposition(server.sessions), media_type="text/plain; version=0.0.4; charset=utf-8")


@server_routes.get("/model")
async def model(server: Shared) -> messages.ModelCard:
    """What this server streams, and its limits."""
    return server.card


# ---------------------------------------------------------------------- streams


@streams.post("", status_code=201, dependencies=[MAY_MAKE])
async def make(wish: messages.NewStream, server: Shared) -> messages.StreamState:
    """A new stream. It plays while somebody watches."""
    server.limits.check_prompt(wish.prompt)
    return told(await server.sessions.new(wish.prompt, wish.seed, wish.paused))


@streams.get("/{name}")
async def read(session: Named) -> messages.StreamState:
    """What it shows. How far one can rewind, who watches, and its measurements."""
    session.touch()
    return told(session)


@streams.patch("/{name}")
async def steer(session: Steered, wish: messages.Control, request: Request, server: Shared) -> messages.Changed:
    """Steer it: prompt, pause, step, rewind, seed, restart. `change.unit` is the first unit of a new prompt."""
    if wish.restart:
        server.making.pay(request)
    change = await asyncio.to_thread(session.control, wish)
    state = {**session.state(), "change": None if change is None else asdict(change)}
    return messages.Changed.model_validate(state, strict=False)


@streams.delete("/{name}", status_code=204)
async def close(session: Steered, server: Shared) -> None:
    """Ends it for everybody."""
    await server.sessions.remove(session)


@streams.post("/{name}/branch", status_code=201, dependencies=[MAY_MAKE])
async def branch(session: Steered, server: Shared) -> messages.StreamState:
    """A second stream of the same past. It goes on from what this one shows: two futures of one past."""
    return told(await server.sessions.branch(session))


@streams.post("/{name}/image", dependencies=[MAY_MAKE], openapi_extra=PICTURE)
async def start_from_picture(session: Steered, request: Request, server: Shared) -> messages.StreamState:
    """Start it anew from a picture. The body is a PNG, JPEG or WebP file; prompt and seed stay."""
    size, most = (server.card.height, server.card.width), server.limits.image_pixels
    image = await asyncio.to_thread(formats.picture, await request.body(), size, most)
    await asyncio.to_thread(session.start_from, image)
    return told(session)


def told(session: Session) -> messages.StreamState:
    return messages.StreamState.model_validate(session.state(), strict=False)


# ---------------------------------------------------------------------- watching


@watching.get("/frames", response_class=StreamingResponse)
async def frames(
    session: Named,
    server: Shared,
    format: Literal["mp4", "mjpeg"] = "mp4",
    scale: Annotated[int | None, Query(ge=1, le=16, description="mp4: enlarge by this factor")] = None,
) -> StreamingResponse:
    """The video from now on. Fragmented mp4 (H.264) for players, or multipart JPEG for <img>."""
    viewer = Viewer(format, codec="jpeg" if format == "mjpeg" else None)
    session.enter(viewer)
    leave = partial(session.leave, viewer)
    if format == "mjpeg":
        return Watching(mjpeg(viewer), f"multipart/x-mixed-replace; boundary={formats.BOUNDARY}", leave)
    if scale is None:
        scale = max(1, -(-COMFORTABLE_SIDE // min(server.card.height, server.card.width)))
    return Watching(mp4(viewer, session.fps, scale), "video/mp4", leave)


@watching.post("/webrtc")
async def webrtc(session: Steered, offer: messages.Offer, server: Shared) -> messages.Offer:
    """Watch by WebRTC. A browser's offer to receive video in, the answer out; no trickle, no STUN."""
    return await server.peers.answer(session, offer)


@watching.websocket("/live")
async def live(socket: WebSocket, name: str) -> None:
    server = shared(socket)
    await Live(socket, server.sessions, server.steering, server.making).run(name)


class Watching(StreamingResponse):
    """A response without end whose viewer leaves however it ends, even when it never began."""

    def __init__(self, body: AsyncIterator[bytes], media_type: str, leave: Callable[[], None]) -> None:
        super().__init__(body, media_type=media_type, headers={"cache-control": "no-store"})
        self._leave = leave

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def mjpeg(viewer: Viewer) -> AsyncIterator[bytes]:
    while (shot := await viewer.shot()) is not None:
        yield formats.part(shot.jpeg, shot.frame)


async def mp4(viewer: Viewer, fps: float, scale: int) -> AsyncIterator[bytes]:
    film = formats.Fragments(fps, scale)
    try:
        while (shot := await viewer.shot()) is not None:
            yield await asyncio.to_thread(film.add, shot.frame.pixels, shot.tick)
    finally:
        film.finish()


# ---------------------------------------------------------------------- recording


@recording.post("", status_code=201)
async def start_recording(session: Steered) -> messages.RecordingState:
    """Record what is shown from now on. It replaces the last recording and stops by itself at its limit."""
    return messages.RecordingState.model_validate(session.record().state(), strict=False)


@recording.post("/stop")
async def stop_recording(session: Steered) -> messages.RecordingState:
    """End the recording. Then it can be downloaded."""
    recorder = session.recording()
    await recorder.stop()
    session.tell()
    return messages.RecordingState.model_validate(recorder.state(), strict=False)


@recording.get("", response_class=FileResponse)
async def download_recording(session: Named) -> FileResponse:
    """The finished recording, mp4."""
    return FileResponse(session.recording().file(), media_type="video/mp4", filename="cfrt.mp4")
