// The page: state, controls, and one run of the model after each change.

import { drawPixels, drawVotes, touched } from "./drawing.js";
import { lead, loadNetwork, runnerUp } from "./network.js";
import { asPng, blank, noise, oneColor, pixelsOf, withPatch } from "./picture.js";
import { outcome, threatInWords } from "./words.js";

const element = (id) => document.getElementById(id);
const numbers = ["height", "width", "top", "left"];
const state = { about: null, run: null, blob: null, name: "", image: null, clean: null, attacked: null, shown: null,
  patch: null, noise: null, paint: null };
let asked = 0; // changes so far
let running = false;

start().catch(showProblem);

async function start() {
  const about = await (await fetch("model.json")).json();
  state.about = about;
  const [height, width] = about.image_size;
  for (const stage of document.querySelectorAll(".stage")) stage.style.aspectRatio = `${width} / ${height}`;
  element("about").textContent =
    `Model ${about.model} with ${about.class_names.length} classes, ${height} × ${width} pixels, rule ${about.rule}, ` +
    `certified against any ${threatInWords(about.threat)}. It runs in this browser; no picture leaves it.`;
  [state.noise, state.paint] = [noise(width, height), blank(width, height)];
  if (about.readout) {
    element("show-votes").nextSibling.textContent = " Show the regions that see the patch";
    for (const color of document.querySelectorAll(".legend .for, .legend .against")) color.parentElement.hidden = true;
  }
  certifiedSize();
  listSamples();
  connect();
  state.run = await loadNetwork(about);
  await choose(await (await fetch(about.samples[0].file)).blob(), about.samples[0].name, 0);
}

function listSamples() {
  state.about.samples.forEach((sample, i) => {
    const button = document.createElement("button");
    const picture = document.createElement("img");
    button.type = "button";
    [picture.src, picture.alt, button.title] = [sample.file, sample.name, sample.name];
    button.setAttribute("aria-pressed", "false");
    button.append(picture);
    button.addEventListener("click", async () => {
      await choose(await (await fetch(sample.file)).blob(), sample.name, i).catch(showProblem);
    });
    element("samples").append(button);
  });
}

async function choose(blob, name, sample = -1) {
  element("main").setAttribute("aria-busy", "true");
  let found;
  try {
    found = await pixelsOf(blob, state.about.image_size, element("fit").value);
  } catch {
    element("main").setAttribute("aria-busy", String(running));
    throw new Error(`${name} cannot be read as a picture; PNG, JPEG and WebP can.`);
  }
  element("problem").hidden = true;
  [...element("samples").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === sample)));
  [state.blob, state.name, state.image, state.clean] = [blob, name, found.pixels, null];
  const [height, width] = state.about.image_size;
  const fitted = found.size.width !== width || found.size.height !== height;
  element("source").textContent =
    `${name}, ${found.size.height} × ${found.size.width} pixels` + (fitted ? `, fitted to ${height} × ${width}` : "");
  changed();
}

function connect() {
  element("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) choose(file, file.name).catch(showProblem);
    event.target.value = "";
  });
  element("fit").addEventListener("change", () => {
    const sample = [...element("samples").children].findIndex((each) => each.getAttribute("aria-pressed") === "true");
    if (state.blob) choose(state.blob, state.name, sample).catch(showProblem);
  });
  connectDrop();
  connectPointer();
  element("patch").addEventListener("keydown", onKey);
  for (const name of numbers) {
    element(name).addEventListener("change", (event) => {
      const value = Math.round(Number(event.target.value));
      setPatch(event.target.value !== "" && Number.isFinite(value) ? { ...state.patch, [name]: value } : state.patch);
    });
  }
  for (const radio of document.getElementsByName("content")) radio.addEventListener("change", () => check(radio.value));
  element("reroll").addEventListener("click", () => {
    state.noise = noise(state.about.image_size[1], state.about.image_size[0]);
    check("noise");
  });
  element("clear").addEventListener("click", () => {
    state.paint = blank(state.about.image_size[1], state.about.image_size[0]);
    check("paint");
  });
  element("color").addEventListener("input", () => {
    if (chosen() !== "paint") check("color"); // else the brush has another color, and nothing changes yet
  });
  element("show-votes").addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  element("certified-size").addEventListener("click", certifiedSize);
  element("download").addEventListener("click", download);
}

function connectDrop() {
  addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    const [file] = event.dataTransfer.files;
    if (file) choose(file, file.name).catch(showProblem);
  });
}

// Dragging the patch moves it or paints on it, dragging its corner changes its size, all by whole pixels of the picture.
function connectPointer() {
  const patch = element("patch");
  patch.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    const resizes = event.target === element("grip");
    const [from, box] = [{ ...state.patch }, element("stage").getBoundingClientRect()];
    const side = box.width / state.about.image_size[1];
    const paints = !resizes && chosen() === "paint";
    const dot = (now) => [Math.floor((now.clientY - box.top) / side) - from.top,
      Math.floor((now.clientX - box.left) / side) - from.left];
    let last = dot(event);
    const move = (now) => {
      if (paints) {
        stroke(last, dot(now));
        last = dot(now);
        return;
      }
      const down = Math.round((now.clientY - event.clientY) / side);
      const right = Math.round((now.clientX - event.clientX) / side);
      if (resizes) {
        const height = Math.min(from.height + down, state.about.image_size[0] - from.top);
        const width = Math.min(from.width + right, state.about.image_size[1] - from.left);
        setPatch({ ...from, height, width });
      } else setPatch({ ...from, top: from.top + down, left: from.left + right });
    };
    const end = () => {
      patch.removeEventListener("pointermove", move);
      patch.removeEventListener("pointerup", end);
      patch.removeEventListener("pointercancel", end);
    };
    if (paints) stroke(last, last);
    patch.setPointerCapture(event.pointerId);
    patch.addEventListener("pointermove", move);
    patch.addEventListener("pointerup", end);
    patch.addEventListener("pointercancel", end);
  });
}

// Every pixel between two of the patch, for a pointer may jump.
function stroke([row, col], [toRow, toCol]) {
  const steps = Math.max(1, Math.abs(toRow - row), Math.abs(toCol - col));
  for (let step = 0; step <= steps; step++) {
    const down = Math.round(row + ((toRow - row) * step) / steps);
    const right = Math.round(col + ((toCol - col) * step) / steps);
    const inside = down >= 0 && right >= 0 && down < state.patch.height && right < state.patch.width;
    if (inside) state.paint.dab(down, right, element("color").value);
  }
  changed();
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const { top, left, height, width } = state.patch;
  const next = {
    ArrowUp: { top: top - 1 },
    ArrowDown: { top: top + 1 },
    ArrowLeft: { left: left - 1 },
    ArrowRight: { left: left + 1 },
    "+": { height: height + 1, width: width + 1 },
    "=": { height: height + 1, width: width + 1 }, // the same key without shift on many keyboards
    "-": { height: height - 1, width: width - 1 },
  }[event.key];
  if (!next) return;
  event.preventDefault();
  setPatch({ ...state.patch, ...next });
}

function certifiedSize() {
  const [height, width] = state.about.threat.shapes[0];
  const [high, wide] = state.about.image_size;
  const corner = state.patch || { top: (high - height) >> 1, left: (wide - width) >> 1 };
  setPatch({ ...corner, height, width });
}

// Clipped: at least a pixel, at most the picture, and inside it.
function setPatch({ top, left, height, width }) {
  const [high, wide] = state.about.image_size;
  const clip = (value, low, most) => Math.max(low, Math.min(most, value));
  [height, width] = [clip(height, 1, high), clip(width, 1, wide)];
  const next = { top: clip(top, 0, high - height), left: clip(left, 0, wide - width), height, width };
  const same = state.patch && numbers.every((name) => next[name] === state.patch[name]);
  state.patch = next;
  const most = { height: high, width: wide, top: high - height, left: wide - width };
  for (const name of numbers) {
    element(name).max = most[name];
    element(name).value = next[name];
  }
  const style = element("patch").style;
  [style.top, style.height] = [next.top, height].map((value) => `${(100 * value) / high}%`);
  [style.left, style.width] = [next.left, width].map((value) => `${(100 * value) / wide}%`);
  element("patch").setAttribute(
    "aria-label", `Patch of ${height} × ${width} pixels, ${next.top} from the top, ${next.left} from the left`);
  if (!same) changed();
}

function check(value) {
  for (const radio of document.getElementsByName("content")) radio.checked = radio.value === value;
  element("patch").classList.toggle("painted", value === "paint");
  changed();
}

function chosen() {
  return [...document.getElementsByName("content")].find((radio) => radio.checked).value;
}

function content() {
  const contents = { noise: state.noise, color: oneColor(element("color").value), paint: state.paint.content };
  return contents[chosen()];
}

// One run at a time; what changed meanwhile is caught up with in one more.
async function changed() {
  asked++;
  if (!state.image || !state.run || running) return;
  running = true;
  element("main").setAttribute("aria-busy", "true");
  try {
    for (let done = -1; done !== asked; ) {
      done = asked;
      const [image, patch] = [state.image, state.patch];
      const pixels = withPatch(image, patch, content());
      const clean = state.clean || (await state.run(image));
      const attacked = await state.run(pixels);
      if (image !== state.image) continue; // another picture came meanwhile
      state.clean = clean;
      state.attacked = attacked;
      state.shown = { image, patch, pixels };
      draw();
      await new Promise(requestAnimationFrame);
    }
  } catch (error) {
    showProblem(error);
  } finally {
    running = false;
    element("main").setAttribute("aria-busy", "false");
  }
}

function draw() {
  if (!state.shown) return;
  const { image, patch, pixels } = state.shown;
  const { geometry } = state.about;
  // Where regions are pooled by attention none has a vote of its own; the reach of the patch is drawn alone.
  const none = state.clean.map[0] * state.clean.map[1];
  const [other, votes] = [{}, {}];
  for (const id of ["clean", "attacked"]) {
    other[id] = state.about.readout ? null : runnerUp(state[id]);
    votes[id] = state.about.readout ? new Array(none).fill(0) : lead(state[id], other[id]);
  }
  const strongest = Math.max(1, ...votes.clean.map(Math.abs), ...votes.attacked.map(Math.abs));
  const reach = {
    rows: touched(geometry.rows, patch.top, patch.top + patch.height),
    cols: touched(geometry.cols, patch.left, patch.left + patch.width),
  };
  for (const [id, shown] of [["clean", image], ["attacked", pixels]]) {
    const [canvas, overlay] = element(id).querySelectorAll("canvas");
    drawPixels(canvas, shown);
    overlay.hidden = !element("show-votes").checked;
    drawVotes(overlay, state.about.image_size, state[id].map, votes[id], strongest, id === "clean" ? null : reach);
    showVerdict(id, state[id], other[id], votes[id]);
  }
  const { kind, text } = outcome(state.about, patch, state.clean, state.attacked);
  element("sentence").className = `sentence ${kind}`;
  if (element("sentence").textContent !== text) element("sentence").textContent = text; // said aloud once
}

function showVerdict(id, decision, other, votes) {
  const names = state.about.class_names;
  const rows = [
    ["Answer", names[decision.label], "answer"],
    ["Certificate", decision.certified ? "yes" : "no", decision.certified ? "yes" : "no"],
    ["Margin", decision.margin.toLocaleString("en"), ""],
  ];
  if (other !== null) {
    const count = votes.filter((vote) => vote > 0).length;
    const text = `${count} of ${votes.length} regions prefer “${names[decision.label]}” to “${names[other]}”`;
    rows.push(["Votes", text, ""]);
  }
  const list = element(id).querySelector(".verdict");
  list.replaceChildren(...rows.flatMap(([name, value, style]) => {
    const [term, says] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, says.textContent, says.className] = [name, value, style];
    return [term, says];
  }));
}

async function download() {
  if (!state.shown) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await asPng(state.shown.pixels));
  link.download = "attacked.png";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function showProblem(error) {
  element("problem").textContent = error.message;
  element("problem").hidden = false;
  if (!state.run) element("sentence").textContent = "The model cannot be run in this browser.";
}
