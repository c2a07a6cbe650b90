"""Live video by WebRTC (aiortc). On a server that is open to this machine alone, so is the media.

A browser offers to receive; we answer and send. aiortc offers an address of every network interface, and would send to
whatever address the other side names; here both are narrowed. We listen at the addresses that the server itself listens
at, and read none of the offer's candidates: a browser that can reach us is found by its first packet (peer-reflexive,
RFC 8445, 7.3.1.3), and nobody can make us send packets to somebody else.
"""

import asyncio
import logging
import re
from fractions import Fraction
from typing import Any

import av
import numpy as np
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from ..picture import enlarge
from .broadcast import Viewer
from .messages import Offer
from .refusal import Refusal
from .session import Session

log = logging.getLogger(__name__)

CLOCK = 90_000
"""RTP's clock for video, Hz."""

SMALLEST = 128
"""Pixels of the shorter side, by a whole factor: with half the chroma a small frame would lose its colours' edges."""

CELL, BITS = 8, 16
"""Of the strip that says which frame it is: pixels along a cell, cells. page/video.js reads it."""

PATIENCE = 15.0
"""Seconds in which a connection must come about."""


class LiveTrack(MediaStreamTrack):
    """A viewer as a track of video."""

    kind = "video"

    def __init__(self, viewer: Viewer, fps: float, *, stamped: bool) -> None:
        super().__init__()
        self.viewer, self._fps, self._stamped = viewer, fps, stamped

    async def recv(self) -> av.VideoFrame:
        shot = await self.viewer.shot()
        if shot is None or self.readyState != "live":
            self.stop()
            raise MediaStreamError
        pixels = shot.frame.pixels
        pixels = enlarge(pixels, -(-SMALLEST // min(pixels.shape[:2])))
        frame = av.VideoFrame.from_ndarray(stamped(pixels, shot.tick) if self._stamped else pixels, format="rgb24")
        frame.pts, frame.time_base = round(shot.tick * CLOCK / self._fps), Fraction(1, CLOCK)
        return frame


class Peers:
    """The connections of a server."""

    def __init__(self, addresses: list[str] | None) -> None:
        """addresses: where media is sent from; None for every interface."""
        self._addresses = addresses
        self._open: set[RTCPeerConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, session: Session, offer: Offer) -> Offer:
        """A connection for the session's video. Refusal when the offer cannot be read or wants no video."""
        viewer = Viewer("webrtc")
        session.enter(viewer)
        peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._open.add(peer)
        track = LiveTrack(viewer, session.fps, stamped=offer.stamped)
        try:
            await self._negotiate(peer, offer, track)
        except Exception as error:
            session.leave(viewer)
            await self._forget(peer)
            if isinstance(error, Refusal):
                raise
            raise _unreadable(error) from error
        task = asyncio.create_task(self._watch(peer, session, track))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return Offer(sdp=peer.localDescription.sdp, type="answer", stamped=offer.stamped)

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _negotiate(self, peer: RTCPeerConnection, offer: Offer, track: LiveTrack) -> None:
        if offer.type != "offer":
            raise Refusal(422, expected='type "offer"', got=offer.type, do="send what createOffer() gave")
        await peer.setRemoteDescription(RTCSessionDescription(without_candidates(offer.sdp), "offer"))
        wanted = [one for one in peer.getTransceivers() if one.kind == "video"]
        if not wanted:
            do = "addTransceiver('video', {direction: 'recvonly'}) before createOffer()"
            raise Refusal(422, expected="an offer to receive video", got="one without", do=do)
        wanted[0].sender.replaceTrack(track)
        wanted[0].direction = "sendonly"
        for transceiver in peer.getTransceivers():
            self._narrow(transceiver.receiver.transport.transport.iceGatherer)
        await peer.setLocalDescription(await peer.createAnswer())

    def _narrow(self, gatherer: Any) -> None:
        """Makes ICE listen at our addresses only. aiortc has no setting for it, so the question is answered for it."""
        if self._addresses is None:
            return
        connection, ours = gatherer._connection, self._addresses
        gather = connection.get_component_candidates

        async def narrowed(component: int, addresses: list[str]) -> list[Any]:
            return await gather(component=component, addresses=ours)

        connection.get_component_candidates = narrowed

    async def _watch(self, peer: RTCPeerConnection, session: Session, track: LiveTrack) -> None:
        """Until the connection or the stream ends, or the connection does not come about in time."""
        moved = asyncio.Event()
        track.on("ended", moved.set)
        peer.on("connectionstatechange", moved.set)
        try:
            async with asyncio.timeout(PATIENCE):
                while peer.connectionState in ("new", "connecting"):
                    moved.clear()
                    await moved.wait()
            while peer.connectionState == "connected" and track.readyState == "live":
                moved.clear()
                await moved.wait()
        except TimeoutError:
            log.info("a viewer's connection did not come about in %.0f s", PATIENCE)
        finally:
            track.viewer.close()
            session.leave(track.viewer)
            await self._forget(peer)

    async def _forget(self, peer: RTCPeerConnection) -> None:
        self._open.discard(peer)
        await peer.close()


def stamped(pixels: np.ndarray, tick: int) -> np.ndarray:
    """A strip below the picture: the tick's low bits as white and black cells, least first. A browser does not say
    which frame of a track it shows; this does, through any codec, and so the time from a change to its pixels can be
    measured where they are seen."""
    bits = (tick >> np.arange(BITS)) & 1
    strip = np.zeros((CELL, pixels.shape[1], 3), dtype=np.uint8)
    strip[:, : BITS * CELL] = 255 * bits.repeat(CELL)[None, :, None]
    return np.concatenate([pixels, strip])


def without_candidates(sdp: str) -> str:
    """A session description without the addresses that it names."""
    return re.sub(r"(?m)^a=(candidate:.*|end-of-candidates)\r?\n?", "", sdp)


def _unreadable(error: Exception) -> Refusal:
    return Refusal(422, expected="a session description (SDP)", got=type(error).__name__, do="send createOffer()'s")
