// The last minute under the video: a strip of pictures, the prompts that held, and the slider that rewinds.

import { clock } from "./view.js";

const $ = (id) => document.getElementById(id);
const HUES = 6;

export class Film {
  /** `rewind(units)` is called when the visitor has chosen how far to go back. */
  constructor(rewind) {
    this.view = null;
    this.calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.slider = $("rewind");
    this.slider.addEventListener("input", () => this.look());
    this.slider.addEventListener("change", () => this.choose(rewind));
    this.slider.addEventListener("blur", () => this.leave());
    new ResizeObserver(() => this.draw()).observe($("thumbs"));
  }

  /** Which stream it shows. */
  show(view) {
    this.view = view;
    this.slider.min = -view.span;
    this.leave();
    this.draw();
  }

  get reach() {
    return Math.min(this.view.state?.reach ?? 0, this.view.span);
  }

  // ---------------------------------------------------------------- rewinding

  look() {
    const back = Math.min(-this.slider.value, this.reach);
    this.slider.value = -back;
    const seconds = back * this.view.card.unit_seconds;
    const text = back ? `${seconds.toFixed(seconds < 10 ? 2 : 1)} s back` : "now";
    this.slider.setAttribute("aria-valuetext", text);
    const bubble = $("bubble");
    bubble.hidden = !back;
    bubble.textContent = `−${clock(seconds)}  ${this.promptAt(this.view.unit - back)}`.slice(0, 60);
    const { clientWidth: width } = this.slider;
    const half = bubble.offsetWidth / 2;
    bubble.style.left = `${Math.max(half, Math.min(width - half, width * (1 - back / this.view.span)))}px`;
    this.view.preview(back ? this.view.unit - back : null, this.promptAt(this.view.unit - back));
  }

  choose(rewind) {
    const back = -this.slider.value;
    this.leave();
    if (back > 0) rewind(back);
  }

  leave() {
    this.slider.value = 0;
    this.slider.setAttribute("aria-valuetext", "now");
    $("bubble").hidden = true;
    this.view?.preview(null);
  }

  promptAt(unit) {
    const marks = this.view.state?.timeline ?? [];
    return marks.findLast((mark) => mark.unit <= unit)?.prompt ?? "";
  }

  // ---------------------------------------------------------------- drawing

  draw() {
    const { view } = this;
    if (!view) return;
    if (this.calm && view.unit % 8 && view.thumbs.size > 8) return;
    this.drawThumbs();
    this.drawMarks();
    $("gone").style.width = `${Math.max(0, 100 * (1 - this.reach / view.span))}%`;
  }

  drawThumbs() {
    const { view } = this;
    const canvas = $("thumbs");
    const scale = devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth * scale, canvas.clientHeight * scale].map(Math.round);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    context.imageSmoothingEnabled = false;
    const side = (height * view.card.width) / view.card.height;
    const stride = Math.max(1, Math.round((side / width) * view.span));
    const last = Math.floor(view.unit / stride) * stride;
    for (let start = last; start > view.unit - view.span - stride; start -= stride) {
      let thumb = null;
      for (let unit = start; unit < start + stride && !thumb; unit++) thumb = view.thumbs.get(unit);
      const x = width * (1 - (view.unit + 1 - start) / view.span);
      if (thumb) context.drawImage(thumb, x, 0, (stride / view.span) * width + 1, height);
    }
  }

  drawMarks() {
    const { view } = this;
    const first = view.unit + 1 - view.span;
    const marks = view.state?.timeline ?? [];
    const shown = marks
      .map((mark, i) => ({ ...mark, number: i, end: marks[i + 1]?.unit ?? Infinity }))
      .filter((mark) => mark.end > first && mark.unit <= view.unit);
    const list = $("marks");
    while (list.children.length > shown.length) list.lastChild.remove();
    while (list.children.length < shown.length) {
      const item = document.createElement("div");
      item.setAttribute("role", "listitem");
      list.append(item);
    }
    shown.forEach(({ unit, end, prompt }, i) => {
      const item = list.children[i];
      const left = Math.max(0, unit - first) / view.span;
      const right = Math.min(view.unit + 1, end);
      item.style.left = `calc(${100 * left}% + ${left ? 1 : 0}px)`;
      item.style.width = `calc(${(100 * (right - Math.max(unit, first))) / view.span}% - 2px)`;
      item.style.background = `var(--p${hue(marks, unit)})`;
      if (item.textContent !== prompt) item.textContent = item.title = prompt;
    });
  }
}

/** Colour of a prompt: in turn, so that neighbours differ. */
function hue(marks, unit) {
  const prompts = [...new Set(marks.map((mark) => mark.prompt))];
  return prompts.indexOf(marks.findLast((mark) => mark.unit === unit)?.prompt) % HUES;
}
