"use strict";
// The page's whole behaviour: labels are kept in the browser, and leave it as a file that the user saves.
const round = JSON.parse(document.getElementById("round").textContent);
const clips = [...document.querySelectorAll(".clip")];
const store = "labels " + round.key;
let labels = {};
let current = 0;
let keeps = true;

try {
  labels = JSON.parse(localStorage.getItem(store) || "{}");
} catch (error) {
  keeps = false;
}

function rounded(value) {
  return Number(Number(value).toFixed(round.digits));
}

function show(index) {
  const value = labels[index];
  const clip = clips[index];
  const slider = clip.querySelector("input");
  if (value !== undefined) slider.value = value;
  clip.classList.toggle("labelled", value !== undefined);
  clip.querySelector("output").textContent =
    value === undefined ? "no label yet" : rounded(value).toFixed(round.digits);
  slider.setAttribute("aria-valuetext", clip.querySelector("output").textContent);
}

function tell() {
  const done = Object.keys(labels).length;
  document.getElementById("done").textContent = `${done} of ${clips.length} labelled`;
  document.getElementById("bar").value = done;
  document.getElementById("warning").hidden = keeps;
}

function set(index, value) {
  if (value === undefined) {
    delete labels[index];
  } else {
    labels[index] = rounded(Math.min(round.high, Math.max(round.low, value)));
  }
  try {
    localStorage.setItem(store, JSON.stringify(labels));
  } catch (error) {
    keeps = false;
  }
  show(index);
  tell();
}

function go(index) {
  if (index < 0 || index >= clips.length) return;
  clips[current].classList.remove("current");
  current = index;
  clips[current].classList.add("current");
  clips[current].querySelector("input").focus({ preventScroll: true });
  clips[current].scrollIntoView({ block: "nearest" });
}

function next() {
  const after = clips.findIndex((_, i) => i > current && labels[i] === undefined);
  go(after >= 0 ? after : clips.findIndex((_, i) => labels[i] === undefined));
}

function quoted(text) {
  return /[",\r\n]|^\s|\s$/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
}

function table() {
  const mine = Object.keys(labels).map((i) => [round.ids[i], labels[i]]);
  return ["id,label", ...[...round.known, ...mine].map(([id, label]) => `${quoted(id)},${label}`)].join("\n") + "\n";
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([table()], { type: "text/csv" }));
  link.download = "labels.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("a, button")) return;
  const slider = clips[current].querySelector("input");
  const actions = {
    ArrowDown: () => go(current + 1),
    ArrowUp: () => go(current - 1),
    ArrowRight: () => set(current, Number(slider.value) + round.step),
    ArrowLeft: () => set(current, Number(slider.value) - round.step),
    Enter: () => { set(current, Number(slider.value)); next(); },
    Delete: () => set(current, undefined),
    Backspace: () => set(current, undefined),
  };
  const digit = /^[1-7]$/.test(event.key) ? Number(event.key) - 1 : -1;
  if (digit >= 0) {
    set(current, round.low + (digit * (round.high - round.low)) / 6);
  } else if (actions[event.key]) {
    actions[event.key]();
  } else {
    return;
  }
  event.preventDefault();
});

clips.forEach((clip, index) => {
  const slider = clip.querySelector("input");
  slider.addEventListener("input", () => set(index, Number(slider.value)));
  slider.addEventListener("focus", () => { if (index !== current) go(index); });
  clip.querySelector("button").addEventListener("click", () => { set(index, undefined); go(index); });
  show(index);
});
document.getElementById("download").addEventListener("click", download);
tell();
go(Math.max(0, clips.findIndex((_, i) => labels[i] === undefined)));
