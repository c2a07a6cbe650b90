// One stream on the page: its connection, its screen, and what has been seen of it in the last minute.

import { call, socketAddress } from "./api.js";
import { fromMessage, Receiver } from "./video.js";

export const MINUTE = 60;
const RETRY = [500, 1000, 2000, 4000];
const GONE = [4404, 4410];

export class View extends EventTarget {
  constructor(id, card, { byWebRTC }) {
    super();
    this.id = id;
    this.card = card;
    this.byWebRTC = byWebRTC;
    this.way = "connecting";
    this.state = null;
    this.stats = null;
    this.unit = -1;
    this.thumbs = new Map(); // unit -> ImageBitmap
    this.latencies = []; // {at, ms} per unit
    this.changes = []; // {at, ms} per change of prompt, measured here
    this.starts = []; // {tick, unit}: where units start, to tell a tick's unit
    this.pending = null; // a change of prompt that is not on show yet
    this.prompt = "";
    this.frozen = null; // a thumb on show in place of the stream
    this.asked = 0;
    this.waiting = new Map(); // id of a message -> how to settle it
    this.attempts = 0;
    this.closed = false;
    this.born = performance.now();
    this.firstFrame = null;
    this.build();
  }

  build() {
    const { width, height } = this.card;
    this.element = document.createElement("figure");
    this.element.className = "screen";
    this.element.tabIndex = 0;
    this.element.style.setProperty("--aspect", width / height);
    this.element.innerHTML =
      '<canvas class="glow" width="8" height="8" aria-hidden="true"></canvas><canvas class="picture" role="img"></canvas>' +
      '<div class="veil" role="status">Connecting</div>' +
      '<figcaption><span class="tag words"></span><span class="tag time"></span></figcaption>' +
      '<button class="close" type="button" aria-label="Close this stream"><svg><use href="#i-close"/></svg></button>';
    this.canvas = this.element.querySelector(".picture");
    Object.assign(this.canvas, { width, height });
    this.context = this.canvas.getContext("2d", { alpha: false, willReadFrequently: true });
    this.glow = this.element.querySelector(".glow").getContext("2d");
    this.veil = this.element.querySelector(".veil");
  }

  emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  // ---------------------------------------------------------------- connection

  connect() {
    const socket = (this.socket = new WebSocket(socketAddress(this.id)));
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.attempts = 0;
      if (this.byWebRTC && this.firstFrame !== null) this.openReceiver();
    };
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.hear(JSON.parse(data)) : this.see(data));
    socket.onclose = ({ code }) => this.lose(code);
  }

  openReceiver() {
    this.receiver?.close();
    this.receiver = new Receiver(this.id, {
      onframe: (video, height, tick) => {
        if (this.way !== "WebRTC") {
          this.want("none");
          this.travels("WebRTC");
        }
        this.draw({ picture: video, height, tick, unit: this.unitOf(tick) });
      },
      onlost: () => {
        this.receiver = null;
        if (!this.closed && this.socket.readyState === WebSocket.OPEN) this.want("jpeg");
      },
    });
    this.receiver.open();
  }

  /** WebRTC or WebSocket, as the visitor likes. */
  switchWay(byWebRTC) {
    this.byWebRTC = byWebRTC;
    if (byWebRTC) return this.openReceiver();
    this.receiver?.close();
    this.receiver = null;
    this.want("jpeg");
  }

  travels(way) {
    if (this.way === way) return;
    this.way = way;
    this.emit("way");
  }

  want(format) {
    this.socket.send(JSON.stringify({ type: "video", format }));
  }

  lose(code) {
    this.receiver?.close();
    this.receiver = null;
    for (const { reject } of this.waiting.values()) reject(new Error("The connection was lost."));
    this.waiting.clear();
    if (this.closed) return;
    this.veil.textContent = "Reconnecting";
    this.veil.hidden = false;
    this.travels("lost");
    if (GONE.includes(code)) return this.emit("gone");
    const wait = RETRY[Math.min(this.attempts++, RETRY.length - 1)];
    setTimeout(() => this.closed || this.connect(), wait);
  }

  close() {
    this.closed = true;
    this.receiver?.close();
    this.socket?.close();
    this.element.remove();
    for (const thumb of this.thumbs.values()) thumb.close();
  }

  /** Sends a wish; resolves to {change} when the server has done it. */
  control(wish) {
    const id = ++this.asked;
    const begin = performance.now();
    return new Promise((resolve, reject) => {
      if (this.socket?.readyState !== WebSocket.OPEN) return reject(new Error("Not connected."));
      this.waiting.set(id, { resolve, reject });
      this.socket.send(JSON.stringify({ type: "control", id, ...wish }));
    }).then((done) => {
      if (done.change) this.pending = { unit: done.change.unit, begin };
      return done;
    });
  }

  post(path, body) {
    return call("POST", `streams/${this.id}/${path}`, body);
  }

  // ---------------------------------------------------------------- what comes

  hear(message) {
    const { type, id } = message;
    if (type === "done" || type === "error") {
      const waiting = this.waiting.get(id);
      this.waiting.delete(id);
      if (type === "done") waiting?.resolve(message);
      else if (waiting) waiting.reject(new Error(message.message));
      else this.emit("problem", message.message);
    } else if (type === "unit") {
      this.hearUnit(message);
    } else if (type === "stats") {
      this.stats = message;
      if (this.state) this.state.reach = message.reach;
      this.emit("stats");
    } else if (type === "state") {
      this.state = message;
      this.stats = message.stats;
      this.emit("state");
    }
  }

  hearUnit({ unit, tick, latency, prompt }) {
    this.prompt = prompt;
    this.canvas.setAttribute("aria-label", `Live video: ${prompt}`);
    if (unit <= this.unit) this.forget(unit); // rewound or restarted
    this.starts.push({ tick, unit });
    if (this.starts.length > 64) this.starts.shift();
    this.latencies.push({ at: performance.now(), ms: latency });
    if (this.latencies.length > 4 * this.span) this.latencies.shift();
  }

  get span() {
    return Math.ceil(MINUTE / this.card.unit_seconds);
  }

  unitOf(tick) {
    for (let i = this.starts.length - 1; i >= 0; i--)
      if (((tick - this.starts[i].tick) & 0xffff) < 0x8000) return this.starts[i].unit;
    return this.unit;
  }

  async see(buffer) {
    const frame = await fromMessage(buffer);
    if (this.way !== "WebRTC" || !this.receiver) {
      this.travels("WebSocket");
      this.draw({ ...frame, height: frame.picture.height });
    }
    frame.picture.close();
  }

  draw({ picture, height, unit }) {
    if (this.firstFrame === null) {
      this.firstFrame = performance.now() - this.born;
      if (this.byWebRTC) this.openReceiver(); // only now: the first frame comes fastest without it
      this.emit("stats");
    }
    this.veil.hidden = true;
    this.paint(picture, picture.videoWidth ?? picture.width, height);
    if (unit !== this.unit) this.turn(unit);
    if (!this.frozen) this.label(unit, this.prompt);
    this.canvas.dataset.unit = unit;
    if (this.pending && unit >= this.pending.unit) {
      this.changes.push({ at: performance.now(), ms: performance.now() - this.pending.begin });
      if (this.changes.length > 64) this.changes.shift();
      this.pending = null;
      this.emit("stats");
    }
  }

  label(unit, prompt) {
    this.element.querySelector(".words").textContent = prompt;
    this.element.querySelector(".time").textContent = clock(unit * this.card.unit_seconds);
  }

  paint(picture, width, height) {
    if (this.frozen) return;
    const { canvas, context } = this;
    context.imageSmoothingEnabled = width < canvas.width;
    context.drawImage(picture, 0, 0, width, height, 0, 0, canvas.width, canvas.height);
  }

  /** Another unit is on show. */
  turn(unit) {
    this.unit = unit;
    this.glow.drawImage(this.canvas, 0, 0, 8, 8);
    if (!this.frozen)
      createImageBitmap(this.canvas, { resizeHeight: Math.min(96, this.canvas.height) }).then((thumb) => {
        this.thumbs.get(unit)?.close();
        this.thumbs.set(unit, thumb);
        this.forgetBefore(unit - this.span - 16);
      });
    this.emit("unit");
  }

  /** The pictures of a past that is shared with another stream. */
  async inherit({ thumbs }) {
    for (const [unit, thumb] of thumbs) {
      const copy = await createImageBitmap(thumb).catch(() => null);
      if (copy && !this.closed && !this.thumbs.has(unit)) this.thumbs.set(unit, copy);
    }
  }

  forget(unit) {
    for (const [at, thumb] of this.thumbs) if (at >= unit) this.thumbs.delete(at) && thumb.close();
    this.starts = [];
    this.unit = unit - 1;
  }

  forgetBefore(unit) {
    for (const [at, thumb] of this.thumbs) if (at < unit) this.thumbs.delete(at) && thumb.close();
  }

  /** Shows the picture of an earlier unit while the visitor looks for it; null goes back to the stream. */
  preview(unit, prompt) {
    this.frozen = null;
    if (unit === null) return;
    let best = null;
    for (const at of this.thumbs.keys()) if (at <= unit && (best === null || at > best)) best = at;
    if (best === null) return;
    const thumb = this.thumbs.get(best);
    this.paint(thumb, thumb.width, thumb.height);
    this.label(unit, prompt);
    this.frozen = thumb;
  }
}

export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
