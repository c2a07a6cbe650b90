// The page: streams side by side, one of them in hand, and everything that steers it.

import { call, keep, kept, readAddress, withToken, writeAddress } from "./api.js";
import { Chart } from "./chart.js";
import { Film } from "./film.js";
import { bindKeys } from "./keys.js";
import { View } from "./view.js";

const $ = (id) => document.getElementById(id);
const HISTORY = 20;
const views = [];
let card;
let current = null;
let theme = kept("theme", null);
let past = kept("prompts", []);
let pastAt = -1;
const chart = new Chart($("chart"));
const film = new Film((units) => steer({ rewind: units }));

// -------------------------------------------------------------------- streams

async function start() {
  paintTheme();
  smooth(kept("smooth", false));
  const ids = readAddress();
  try {
    card = await call("GET", "model");
  } catch (error) {
    return toast(error.message, true);
  }
  $("card").textContent = `${card.model} · ${card.engine} · ${card.precision} · ${card.width}×${card.height} · ${card.fps} fps`;
  $("picture").hidden = !card.starts_from_picture;
  listPrompts($("presets"), card.presets, true);
  listHistory();
  const known = await Promise.all(ids.map((id) => call("GET", `streams/${encodeURIComponent(id)}`).catch(() => null)));
  known.filter(Boolean).forEach(({ id }) => adopt(id));
  if (!views.length) await fresh(kept("prompts", [])[0] ?? card.presets[0] ?? "a red circle moving left", 0);
}

/** A new stream of a prompt, in hand. */
async function fresh(prompt, seed) {
  const born = performance.now();
  try {
    const { id } = await call("POST", "streams", { prompt, seed });
    adopt(id).born = born;
  } catch (error) {
    toast(error.message, true);
  }
}

function adopt(id) {
  const view = new View(id, card, { byWebRTC: kept("webrtc", true) });
  view.addEventListener("state", () => view === current && showState());
  view.addEventListener("stats", () => view === current && showStats());
  view.addEventListener("unit", () => view === current && (film.draw(), chart.draw()));
  view.addEventListener("way", () => view === current && showWay());
  view.addEventListener("problem", ({ detail }) => toast(detail));
  view.addEventListener("gone", () => replace(view));
  view.element.addEventListener("pointerdown", () => hold(view));
  view.element.addEventListener("focus", () => hold(view));
  view.element.querySelector(".close").addEventListener("click", () => drop(view));
  views.push(view);
  $("screens").append(view.element);
  view.connect();
  hold(view);
  arrange();
  return view;
}

/** A stream that the server no longer has: the same prompt and seed once more, in its place. */
async function replace(view) {
  if (view.state?.error && view.firstFrame === null) return toast(view.state.error, true); // it would fail again
  const { prompt, seed } = view.state ?? { prompt: card.presets[0], seed: 0 };
  drop(view, false);
  await fresh(prompt, seed);
  toast("The server no longer has this stream. Here is a new one of the same prompt and seed.");
}

function drop(view, ended = true) {
  views.splice(views.indexOf(view), 1);
  view.close();
  if (ended) call("DELETE", `streams/${view.id}`).catch(() => {});
  if (view === current && views.length) hold(views[0]);
  arrange();
}

function hold(view) {
  if (view === current) return;
  current = view;
  for (const other of views) other.element.setAttribute("aria-current", other === view);
  film.show(view);
  chart.show(view);
  showState();
  showWay();
}

function arrange() {
  const screens = $("screens");
  const columns = Math.min(views.length, 2);
  screens.toggleAttribute("data-many", views.length > 1);
  screens.style.setProperty("--columns", columns);
  screens.style.setProperty("--share", 1 / Math.ceil(views.length / Math.max(columns, 1)));
  writeAddress(views.map(({ id }) => id));
}

/** Sends a wish to the stream in hand; its answer or null. */
async function steer(wish) {
  try {
    return await current.control(wish);
  } catch (error) {
    toast(error.message);
    return null;
  }
}

// -------------------------------------------------------------------- what is shown

function showState() {
  const state = current?.state;
  if (!state) return;
  const { paused, recording, notes, seed, prompt } = state;
  press($("pause"), paused, paused ? "Play" : "Pause", paused ? "i-play" : "i-pause");
  press($("record"), recording?.running ?? false, recording?.running ? "Stop" : "Record");
  $("notes").textContent = notes.join("; ");
  if (document.activeElement !== $("seed")) $("seed").value = seed;
  if (document.activeElement !== $("prompt") || !$("prompt").value) $("prompt").value = prompt;
  for (const button of document.querySelectorAll(".prompts button"))
    button.setAttribute("aria-current", button.dataset.prompt === prompt);
  film.draw();
  showStats();
}

function press(button, pressed, label, icon) {
  button.setAttribute("aria-pressed", pressed);
  button.querySelector("span").textContent = label;
  if (icon) button.querySelector("use").setAttribute("href", `#${icon}`);
}

function showStats() {
  const { stats, firstFrame, changes } = current;
  if (!stats) return;
  const measured = changes.at(-1)?.ms ?? stats.change_to_pixel.p50;
  for (const [id, ms] of [["first", firstFrame], ["p50", stats.unit.p50], ["p99", stats.unit.p99], ["change", measured], ["overhead", stats.overhead.p50]])
    number($(`t-${id}`), ms);
  $("t-dropped").textContent = stats.dropped;
  Object.assign($("t-change").dataset, { ms: measured ?? "", count: changes.length });
}

function number(element, ms) {
  if (ms === null || ms === undefined) return (element.textContent = "–");
  const text = ms < 10 ? ms.toFixed(1) : Math.round(ms);
  element.replaceChildren(String(text), Object.assign(document.createElement("small"), { textContent: "ms" }));
}

function showWay() {
  const pill = $("link");
  pill.dataset.state = { connecting: "", lost: "lost" }[current.way] ?? "live";
  pill.querySelector("span").textContent = { connecting: "connecting", lost: "reconnecting" }[current.way] ?? current.way;
}

let toastTimer;
function toast(text, stays = false) {
  const box = $("toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(toastTimer);
  if (!stays) toastTimer = setTimeout(() => (box.hidden = true), 6000);
}

// -------------------------------------------------------------------- prompts

function listPrompts(list, prompts, numbered) {
  list.replaceChildren(
    ...prompts.map((prompt, i) => {
      const button = Object.assign(document.createElement("button"), { type: "button" });
      button.dataset.prompt = prompt;
      if (numbered) button.append(Object.assign(document.createElement("kbd"), { textContent: i + 1 }));
      button.append(prompt);
      button.addEventListener("click", () => say(prompt));
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
}

function listHistory() {
  $("recent-list").hidden = !past.length;
  listPrompts($("recent"), past, false);
}

async function say(prompt) {
  $("prompt").value = prompt;
  const blend_units = Math.min(64, Math.round($("blend").value / card.unit_seconds));
  const wish = { prompt, blend_units, recache: $("recache").checked };
  if (!(await steer(wish))) return;
  past = [prompt, ...past.filter((other) => other !== prompt)].slice(0, HISTORY);
  pastAt = -1;
  keep("prompts", past);
  listHistory();
}

function recall(step) {
  pastAt = Math.max(-1, Math.min(past.length - 1, pastAt + step));
  $("prompt").value = pastAt < 0 ? (current.state?.prompt ?? "") : past[pastAt];
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = $("prompt").value.trim();
  if (prompt) say(prompt);
});

$("prompt").addEventListener("keydown", (event) => {
  const { key, shiftKey, isComposing } = event;
  if (isComposing) return;
  const several = $("prompt").value.includes("\n");
  if (key === "Enter" && !shiftKey) $("composer").requestSubmit();
  else if (key === "ArrowUp" && !several) recall(1);
  else if (key === "ArrowDown" && !several) recall(-1);
  else if (key === "Escape") $("prompt").blur();
  else return;
  event.preventDefault();
});

// -------------------------------------------------------------------- controls

const pause = () => steer({ paused: !current.state?.paused });
const step = () => steer({ step: 1 });
const restart = () => steer({ restart: true });
const back = (seconds) => {
  const units = Math.min(Math.round(seconds / card.unit_seconds), current.state?.reach ?? 0);
  if (units > 0) steer({ rewind: units });
};

async function branch() {
  try {
    const trunk = current;
    const { id } = await trunk.post("branch");
    adopt(id).inherit(trunk);
  } catch (error) {
    toast(error.message);
  }
}

async function record() {
  const running = current.state?.recording?.running;
  try {
    await current.post(running ? "recording/stop" : "recording");
    if (running) Object.assign(document.createElement("a"), { href: withToken(`streams/${current.id}/recording`), download: "cfrt.mp4" }).click();
  } catch (error) {
    toast(error.message);
  }
}

async function reseed(seed) {
  if (Number.isSafeInteger(seed) && seed >= 0) await steer({ seed });
  else toast("A seed is a whole number from 0 to 9007199254740991.");
}
const dice = () => reseed(Math.floor(Math.random() * 1e6));

function smooth(on) {
  $("screens").toggleAttribute("data-smooth", on);
  $("crisp").setAttribute("aria-checked", !on);
  $("smooth").setAttribute("aria-checked", on);
  keep("smooth", on);
}

function paintTheme() {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}
function nextTheme() {
  theme = { null: "light", light: "dark", dark: null }[theme];
  keep("theme", theme);
  paintTheme();
  chart.draw();
  toast(`${{ null: "As the system", light: "Light", dark: "Dark" }[theme]} colours.`);
}

function fullscreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else current.element.requestFullscreen?.();
}

/** A picture of any kind that this browser can read, cut to the frame's shape and made small enough to send. */
async function startFrom(file) {
  try {
    const picture = await createImageBitmap(file);
    const { width, height } = card;
    const shrink = Math.min(picture.width / width, picture.height / height);
    const [w, h] = [width * shrink, height * shrink];
    const canvas = new OffscreenCanvas(2 * width, 2 * height);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, (picture.width - w) / 2, (picture.height - h) / 2, w, h, 0, 0, 2 * width, 2 * height);
    await current.post("image", await canvas.convertToBlob({ type: "image/png" }));
  } catch (error) {
    toast(error.status === undefined ? "This browser cannot read that file as a picture." : error.message);
  }
}

const actions = {
  pause,
  step,
  restart,
  branch,
  record,
  dice,
  fullscreen,
  back,
  theme: nextTheme,
  smooth: () => smooth(!$("screens").hasAttribute("data-smooth")),
  write: () => ($("prompt").focus(), $("prompt").select()),
  help: () => $("keys").showModal(),
  preset: (number) => card.presets[number - 1] && say(card.presets[number - 1]),
  turn: (by) => views[(views.indexOf(current) + by + views.length) % views.length].element.focus(),
};

for (const name of ["pause", "step", "restart", "branch", "record", "dice"]) $(name).addEventListener("click", () => current && actions[name]());
$("crisp").addEventListener("click", () => smooth(false));
$("smooth").addEventListener("click", () => smooth(true));
$("theme").addEventListener("click", nextTheme);
$("help").addEventListener("click", actions.help);
$("seed").addEventListener("change", () => reseed($("seed").valueAsNumber));
$("picture").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => $("file").files[0] && startFrom($("file").files[0]).then(() => ($("file").value = "")));
$("link").addEventListener("click", () => {
  const byWebRTC = !kept("webrtc", true);
  keep("webrtc", byWebRTC);
  for (const view of views) view.switchWay(byWebRTC);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => chart.draw());

addEventListener("paste", ({ clipboardData }) => {
  const file = [...clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) startFrom(file);
});
addEventListener("dragover", (event) => {
  if (![...event.dataTransfer.types].includes("Files") || !card?.starts_from_picture) return;
  event.preventDefault();
  $("drop").hidden = false;
});
addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || ($("drop").hidden = true));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  if (event.dataTransfer.files[0]) startFrom(event.dataTransfer.files[0]);
});

bindKeys(actions);
start();
