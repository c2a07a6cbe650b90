// How frames come to a page: by WebRTC, and over the WebSocket until that works or where it does not.
//
// Either way each frame brings its tick, the server's count of frames shown. By WebRTC it is drawn into the picture: a
// strip of sixteen black or white cells below it, read here and cut off. So the page knows which prompt it is looking at.

import { call } from "./api.js";

const CELL = 8; // pixels; cfrt/serve/film.py draws them
const PATIENCE = 4000; // ms until WebRTC is given up

/** Frames of a WebSocket message: four little-endian uint32 (index, unit, tick, latency in us), then a JPEG. */
export async function fromMessage(buffer) {
  const head = new DataView(buffer, 0, 16);
  const bitmap = await createImageBitmap(new Blob([new Uint8Array(buffer, 16)], { type: "image/jpeg" }));
  return { picture: bitmap, unit: head.getUint32(4, true), tick: head.getUint32(8, true) };
}

/** One connection that receives a stream's video. `onframe(video, height of the picture, tick)`, `onlost()`. */
export class Receiver {
  constructor(id, { onframe, onlost }) {
    this.id = id;
    this.onframe = onframe;
    this.onlost = onlost;
    this.video = Object.assign(document.createElement("video"), { muted: true, playsInline: true, autoplay: true });
    this.strip = new OffscreenCanvas(16 * CELL, CELL).getContext("2d", { willReadFrequently: true });
    this.closed = false;
  }

  async open() {
    try {
      const peer = (this.peer = new RTCPeerConnection({ iceServers: [] }));
      const { receiver } = peer.addTransceiver("video", { direction: "recvonly" });
      if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0;
      peer.ontrack = ({ track }) => {
        this.video.srcObject = new MediaStream([track]);
        this.video.play().catch(() => {});
        this.watch();
      };
      peer.onconnectionstatechange = () => ["failed", "closed"].includes(peer.connectionState) && this.lost();
      await peer.setLocalDescription(await peer.createOffer());
      const offer = { sdp: peer.localDescription.sdp, type: "offer", stamped: true };
      const { sdp, type } = await call("POST", `streams/${this.id}/webrtc`, offer);
      await peer.setRemoteDescription({ sdp, type });
      this.timer = setTimeout(() => this.lost(), PATIENCE);
    } catch {
      this.lost();
    }
  }

  watch() {
    if (!("requestVideoFrameCallback" in this.video)) return this.lost();
    const next = () => {
      if (this.closed) return;
      clearTimeout(this.timer);
      this.onframe(this.video, this.video.videoHeight - CELL, this.tick());
      this.video.requestVideoFrameCallback(next);
    };
    this.video.requestVideoFrameCallback(next);
  }

  tick() {
    const { video, strip } = this;
    strip.drawImage(video, 0, video.videoHeight - CELL, 16 * CELL, CELL, 0, 0, 16 * CELL, CELL);
    const { data } = strip.getImageData(0, CELL / 2, 16 * CELL, 1);
    let tick = 0;
    for (let bit = 0; bit < 16; bit++) tick |= (data[4 * (bit * CELL + CELL / 2)] > 127) << bit;
    return tick;
  }

  lost() {
    if (this.closed) return;
    this.close();
    this.onlost();
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    this.peer?.close();
    this.video.srcObject = null;
  }
}
