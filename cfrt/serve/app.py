"""The server: HTTP, WebSocket and WebRTC over the same sessions. What a visitor sends is checked before it is used, and
every error is an answer (`cfrt.serve.refusal`), never a traceback."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, Query, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from .. import __version__
from ..encoders import COMFORTABLE_SIDE
from ..errors import CfrtError
from . import formats, messages
from .broadcast import Viewer
from .guard import Guard, answer
from .limits import Limits, Meter
from .live import Live
from .metrics import exposition
from .refusal import Refusal, of_library
from .registry import Registry
from .rtc import Peers
from .session import Make, Session

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"

SEND_BUFFER = 64 << 10
"""Bytes that the kernel keeps for a connection; left to itself it keeps megabytes, minutes of a small video: a slow
viewer would see the distant past, and what it misses would never be dropped."""

ABOUT = """
A prompt becomes a live video stream; every stream here can be watched by many and steered while it plays.

Ids of streams cannot be guessed: whoever has one may watch and steer that stream. A server that was started with a
token wants it as `Authorization: Bearer TOKEN` or `?token=TOKEN`. Errors are
`{"error": {"message", "expected", "got", "do"}}`. The page's WebSocket, `/streams/{id}/live`, is described in
docs/serve.md, as are all limits.
"""

ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": messages.ErrorBody, "description": HTTPStatus(code).phrase}
    for code in (401, 404, 410, 413, 422, 429, 503)
}


def create_app(
    make: Make,
    card: dict[str, Any],
    *,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: frozenset[str] | None = None,
    addresses: list[str] | None = None,
) -> FastAPI:
    """An ASGI application.

    make: (prompt, seed=, image=) -> Stream.
    card: what `GET /model` answers (`messages.ModelCard` without its limits).
    token: what visitors must show; None lets everybody in.
    hosts: names that the server may be called by, None for any.
    addresses: where WebRTC's media is sent from, None for every interface.
    """
    limits = limits or Limits()
    sessions, peers = Registry(make, limits), Peers(addresses)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(sessions.sweep())
        yield
        sweeper.cancel()
        await peers.close()
        await sessions.close()

    app = FastAPI(
        title="cfrt serve",
        version=__version__,
        description=ABOUT,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere; ours is page/api.html
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.sessions = sessions
    _answer_errors(app)
    _routes(app, sessions, peers, limits, messages.ModelCard(**card, limits=asdict(limits)))
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.add_middleware(Guard, limits=limits, token=token, hosts=hosts)
    return app


def settings(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    """How uvicorn runs it."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,  # addresses may hold tokens
        server_header=False,
        timeout_graceful_shutdown=2,
        ws_max_size=2 * Limits.message_bytes,  # ours is the one with words
        ws_per_message_deflate=False,  # JPEG does not shrink
    )


def listen(config: uvicorn.Config) -> socket.socket:
    """The socket that uvicorn serves, taking connections from now on. CfrtError when it cannot be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    try:
        bound.bind((config.host, config.port))
        bound.listen(config.backlog)
    except OSError as error:
        bound.close()
        do = "choose another --port, or 0 for a free one"
        raise CfrtError(f"cannot listen at {config.host}:{config.port}: {error.strerror or error}; {do}") from error
    return bound


def _routes(app: FastAPI, sessions: Registry, peers: Peers, limits: Limits, card: messages.ModelCard) -> None:
    making = Meter(limits.creations_per_minute / 60, burst=limits.creations_per_minute / 3)
    steering = Meter(limits.messages_per_second, burst=2 * limits.messages_per_second)

    def session(name: str) -> Session:
        return sessions.get(name)

    def steered(request: Request, name: str) -> Session:
        steering.pay(request)
        return sessions.get(name)

    def may_make(request: Request) -> None:
        making.pay(request)

    Named = Annotated[Session, Depends(session)]
    Steered = Annotated[Session, Depends(steered)]
    MayMake = Depends(may_make)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "api.html", headers={"cache-control": "no-cache"})

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> FileResponse:
        return FileResponse(PAGE / "icon.svg", media_type="image/svg+xml")

    @app.get("/healthz", tags=["server"])
    async def healthz() -> dict[str, str | int]:
        """Is the server alive?"""
        return {"status": "ok", "streams": len(list(sessions))}

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(exposition(sessions), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/model", tags=["server"])
    async def model() -> messages.ModelCard:
        """What this server streams, and its limits."""
        return card

    @app.post("/streams", status_code=201, tags=["streams"], dependencies=[MayMake])
    async def make_stream(wish: messages.NewStream) -> messages.StreamState:
        """A new stream. It plays while somebody watches."""
        check_length(wish.prompt, limits)
        made = await sessions.new(wish.prompt, wish.seed, wish.paused)
        return messages.StreamState.model_validate(made.state(), strict=False)

    @app.get("/streams/{name}", tags=["streams"])
    async def read_stream(session: Named) -> messages.StreamState:
        """What it shows, how far one can rewind, who watches, and its measurements."""
        session.touch()
        return messages.StreamState.model_validate(session.state(), strict=False)

    @app.patch("/streams/{name}", tags=["streams"])
    async def steer_stream(request: Request, session: Steered, wish: messages.Control) -> messages.Changed:
        """Steer it: prompt, pause, step, rewind, seed, restart. `change.unit` is the first unit of a new prompt."""
        if wish.restart:
            making.pay(request)
        change = await asyncio.to_thread(session.control, wish)
        told = None if change is None else asdict(change)
        return messages.Changed.model_validate({**session.state(), "change": told}, strict=False)

    @app.delete("/streams/{name}", status_code=204, tags=["streams"])
    async def close_stream(session: Steered) -> None:
        """Ends it for everybody."""
        await sessions.remove(session)

    @app.post("/streams/{name}/branch", status_code=201, tags=["streams"], dependencies=[MayMake])
    async def branch_stream(session: Steered) -> messages.StreamState:
        """A second stream that goes on from what this one shows: two futures of one past."""
        twin = await sessions.branch(session)
        return messages.StreamState.model_validate(twin.state(), strict=False)

    @app.post("/streams/{name}/image", tags=["streams"], dependencies=[MayMake], openapi_extra=_picture_body(limits))
    async def start_from_picture(request: Request, session: Steered) -> messages.StreamState:
        """Starts it anew from a picture (the body: PNG, JPEG or WebP), with the present prompt and seed."""
        size = (card.height, card.width)
        image = await asyncio.to_thread(formats.picture, await request.body(), size, limits.image_pixels)
        await asyncio.to_thread(session.start_from, image)
        return messages.StreamState.model_validate(session.state(), strict=False)

    @app.get("/streams/{name}/frames", tags=["watching"], response_class=StreamingResponse)
    async def frames(
        session: Named,
        format: Literal["mp4", "mjpeg"] = "mp4",
        scale: Annotated[int | None, Query(ge=1, le=16, description="mp4: enlarge by this factor")] = None,
    ) -> StreamingResponse:
        """The video from now on: fragmented mp4 (H.264) for players, or multipart JPEG for <img>."""
        viewer = Viewer(format, jpeg=format == "mjpeg")
        session.enter(viewer)
        if format == "mjpeg":
            media_type, body = f"multipart/x-mixed-replace; boundary={formats.BOUNDARY}", mjpeg(viewer)
        else:
            smallest = min(card.height, card.width)
            factor = max(1, -(-COMFORTABLE_SIDE // smallest)) if scale is None else scale
            media_type, body = "video/mp4", mp4(viewer, session.fps, factor)
        return Watching(body, media_type=media_type, leave=lambda: session.leave(viewer))

    @app.post("/streams/{name}/webrtc", tags=["watching"])
    async def webrtc(session: Steered, offer: messages.Offer) -> messages.Offer:
        """WebRTC: a browser's offer to receive video in, the answer out. No trickle, no STUN."""
        return await peers.answer(session, offer)

    @app.websocket("/streams/{name}/live")
    async def live(socket: WebSocket, name: str) -> None:
        await Live(socket, sessions, steering, making).run(name)

    @app.post("/streams/{name}/recording", status_code=201, tags=["recording"])
    async def start_recording(session: Steered) -> messages.RecordingState:
        """Records what is shown from now on. It replaces the last recording and stops by itself at its limit."""
        return messages.RecordingState.model_validate(session.record().state(), strict=False)

    @app.post("/streams/{name}/recording/stop", tags=["recording"])
    async def stop_recording(session: Steered) -> messages.RecordingState:
        """Ends it; then it can be downloaded."""
        recorder = session.recording()
        await recorder.stop()
        session.tell()
        return messages.RecordingState.model_validate(recorder.state(), strict=False)

    @app.get("/streams/{name}/recording", tags=["recording"], response_class=FileResponse)
    async def download_recording(session: Named) -> FileResponse:
        """The finished recording, mp4."""
        return FileResponse(session.recording().file(), media_type="video/mp4", filename="cfrt.mp4")


# ---------------------------------------------------------------------- watching


class Watching(StreamingResponse):
    """A response without end whose viewer leaves however it ends, even when it never began."""

    def __init__(self, body: AsyncIterator[bytes], *, media_type: str, leave: Callable[[], None]) -> None:
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


# ---------------------------------------------------------------------- checks and errors


def check_length(prompt: str, limits: Limits) -> None:
    if len(prompt) > limits.prompt:
        got = f"{len(prompt)} characters"
        raise Refusal(422, expected=f"a prompt of at most {limits.prompt} characters", got=got, do="shorten it")


def _picture_body(limits: Limits) -> dict[str, Any]:
    content = {
        kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/png", "image/jpeg", "image/webp")
    }
    return {
        "requestBody": {"required": True, "content": content, "description": f"At most {limits.image_bytes} bytes."}
    }


def _answer_errors(app: FastAPI) -> None:
    """Whatever goes wrong is answered in one shape."""

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> JSONResponse:
        return answer(error)

    @app.exception_handler(CfrtError)
    async def failed(_: Request, error: CfrtError) -> JSONResponse:
        return answer(of_library(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(invalid(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        do = "see /docs for what there is"
        return answer(Refusal(error.status_code, expected="a request of this API", got=error.detail, do=do))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        mark = token_hex(4)
        log.error("error %s", mark, exc_info=error)
        do = f"the server's log has the reason, marked {mark}"
        return answer(Refusal(500, expected="no failure", got="one of the server's own", do=do))


def invalid(first: Any) -> Refusal:
    """pydantic's first complaint."""
    place = ".".join(str(step) for step in first["loc"]) or "the body"
    return Refusal(422, expected=f"{place}: {first['msg']}", got=first.get("input"), do="see /docs")
