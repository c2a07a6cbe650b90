// Keyboard shortcuts: single keys, out of the way of writing and of the browser's own.

const KEYS = {
  " ": "pause",
  ".": "step",
  0: "restart",
  b: "branch",
  r: "record",
  n: "dice",
  s: "smooth",
  f: "fullscreen",
  t: "theme",
  "/": "write",
  "?": "help",
};

export function bindKeys(actions) {
  addEventListener("keydown", (event) => {
    const { key, target, shiftKey, ctrlKey, altKey, metaKey, repeat } = event;
    if (ctrlKey || altKey || metaKey || repeat || document.querySelector("dialog[open]")) return;
    if (target.closest("textarea, input, select")) return;
    if (key === " " && target.closest("button, a")) return; // it presses what has the focus
    if (key === "ArrowLeft") actions.back(shiftKey ? 5 : 1);
    else if (key === "[" || key === "]") actions.turn(key === "]" ? 1 : -1);
    else if (/^[1-9]$/.test(key)) actions.preset(Number(key));
    else if (key.toLowerCase() in KEYS) actions[KEYS[key.toLowerCase()]]();
    else return;
    event.preventDefault();
  });
}
