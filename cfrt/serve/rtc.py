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
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCRtpSender, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from .broadcast import Viewer
from .messages import Offer
from .refusal import Refusal
from .session import Session

log = logging.getLogger(__name__)

CLOCK = 90_000
"""RTP's clock for video, Hz."""

CODECS = ("VP8", "rtx")
"""What every browser reads (RFC 7742, 5), and sending a lost packet again."""

PATIENCE = 15.0
"""Seconds in which a connection must come about."""


class LiveTrack(MediaStreamTrack):
    """A viewer as a track of video that is encoded already."""

    kind = "video"

    def __init__(self, viewer: Viewer, session: Session) -> None:
        super().__init__()
        assert viewer.codec is not None
        self.viewer, self._codec = viewer, viewer.codec
        self.film, self._fps = session.films[self._codec], session.fps
        self._last: int | None = None  # number of the last frame sent

    async def recv(self) -> av.Packet:
        while (shot := await self.viewer.shot()) is not None and self.readyState == "live":
            coded = shot.vp8.get(self._codec)
            if coded is None:  # it was on show before anybody watched it this way
                coded = await asyncio.to_thread(self.film.still, shot.frame.pixels, shot.tick)
            if not coded.follows(self._last):
                self.film.ask()
                continue
            self._last = coded.number
            packet = av.Packet(coded.data)
            packet.pts, packet.time_base = round(shot.tick * CLOCK / self._fps), Fraction(1, CLOCK)
            return packet
        self.stop()
        raise MediaStreamError


class Peers:
    """The connections of a server."""

    def __init__(self, addresses: list[str] | None) -> None:
        """addresses: where media is sent from; None for every interface."""
        self._addresses = addresses
        self._open: set[RTCPeerConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, session: Session, offer: Offer) -> Offer:
        """A connection for the session's video. Refusal when the offer cannot be read or wants no video."""
        viewer = Viewer("webrtc", codec="vp8 stamped" if offer.stamped else "vp8")
        session.enter(viewer)
        peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._open.add(peer)
        track = LiveTrack(viewer, session)
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
        video = peer.addTransceiver(track, "sendonly")
        video.setCodecPreferences([one for one in RTCRtpSender.getCapabilities("video").codecs if one.name in CODECS])
        # aiortc's own would ask an encoder that is not used.
        video.sender._send_keyframe = track.film.ask  # type: ignore[method-assign]
        await peer.setRemoteDescription(RTCSessionDescription(without_candidates(offer.sdp), "offer"))
        if video.mid is None:
            do = "addTransceiver('video', {direction: 'recvonly'}) before createOffer()"
            raise Refusal(422, expected="an offer to receive video", got="one without", do=do)
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


def without_candidates(sdp: str) -> str:
    """A session description without the addresses that it names."""
    return re.sub(r"(?m)^a=(candidate:.*|end-of-candidates)\r?\n?", "", sdp)


def _unreadable(error: Exception) -> Refusal:
    expected = "a session description (SDP) that knows VP8"
    return Refusal(422, expected=expected, got=type(error).__name__, do="send createOffer()'s")
