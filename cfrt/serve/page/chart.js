// What the stream costs, unit by unit, over the last minute; on a logarithmic scale, with real time as a dashed line.

import { MINUTE } from "./view.js";

const GRID = [1, 10, 100, 1000];
const [LOW, HIGH] = [0.5, 1500];
const PAD = { left: 34, right: 8, top: 6, bottom: 6 };

export class Chart {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.view = null;
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  show(view) {
    this.view = view;
    this.draw();
  }

  draw() {
    if (!this.view) return;
    const { canvas, context } = this;
    const scale = devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    Object.assign(canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
    context.scale(scale, scale);
    const colours = this.colours();
    const colour = (name) => colours[name];
    const now = performance.now();
    const x = (at) => width - PAD.right - ((now - at) / 1000 / MINUTE) * (width - PAD.left - PAD.right);
    const y = (ms) => {
      const part = Math.log(Math.min(HIGH, Math.max(LOW, ms)) / LOW) / Math.log(HIGH / LOW);
      return height - PAD.bottom - part * (height - PAD.top - PAD.bottom);
    };
    this.grid(width, y, colour);
    this.budget(width, y(1000 * this.view.card.unit_seconds), colour);
    this.line(this.view.latencies, x, y, colour);
    this.dots(this.view.changes, x, y, colour);
  }

  /** As the legend has them, so that they are named once; a canvas does not resolve light-dark() itself. */
  colours() {
    const legend = this.canvas.parentElement.querySelector(".legend");
    const mark = (name) => getComputedStyle(legend.querySelector(name), "::before").backgroundColor;
    const line = getComputedStyle(this.canvas.parentElement).borderTopColor;
    return { accent: mark(".k-unit"), warm: mark(".k-change"), faint: getComputedStyle(legend).color, line };
  }

  grid(width, y, colour) {
    const { context } = this;
    context.font = `10.5px ${getComputedStyle(this.canvas).getPropertyValue("--mono")}`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.lineWidth = 1;
    for (const ms of GRID) {
      context.strokeStyle = colour("line");
      context.beginPath();
      context.moveTo(PAD.left, Math.round(y(ms)) + 0.5);
      context.lineTo(width - PAD.right, Math.round(y(ms)) + 0.5);
      context.stroke();
      context.fillStyle = colour("faint");
      context.fillText(ms < 1000 ? `${ms}` : "1 s", PAD.left - 7, y(ms));
    }
  }

  budget(width, at, colour) {
    const { context } = this;
    context.strokeStyle = colour("faint");
    context.setLineDash([4, 4]);
    context.beginPath();
    context.moveTo(PAD.left, at);
    context.lineTo(width - PAD.right, at);
    context.stroke();
    context.setLineDash([]);
  }

  line(values, x, y, colour) {
    const { context } = this;
    context.strokeStyle = colour("accent");
    context.lineWidth = 1.5;
    context.lineJoin = "round";
    context.beginPath();
    let before = -Infinity;
    for (const { at, ms } of values) {
      if (x(at) < PAD.left) continue;
      if (at - before > 3000) context.moveTo(x(at), y(ms)); // a pause is a gap
      else context.lineTo(x(at), y(ms));
      before = at;
    }
    context.stroke();
  }

  dots(values, x, y, colour) {
    const { context } = this;
    context.fillStyle = colour("warm");
    for (const { at, ms } of values) {
      if (x(at) < PAD.left) continue;
      context.beginPath();
      context.arc(x(at), y(ms), 3.5, 0, 2 * Math.PI);
      context.fill();
    }
  }
}
