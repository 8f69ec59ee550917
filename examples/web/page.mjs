// The page: controls in, a grid of canvases out. What makes the pictures is generator.mjs.

import { load, pictures } from "./generator.mjs";

const at = (id) => document.getElementById(id);
const [about, controls, classes, seed, count, draw] = ["about", "controls", "class", "seed", "count", "draw"].map(at);
const [grid, status, error, file] = ["grid", "status", "error", "file"].map(at);

/** The file that is open: { info, session }. */
let generator;

/** Count what was begun, so that an older drawing or opening stops when a newer one begins. */
let [drawings, openings] = [0, 0];

/** The end of the last drawing. */
let drawn = Promise.resolve();

controls.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!controls.reportValidity()) return;
  seed.value = BigInt(seed.value) + 1n;
  redraw();
});
for (const control of [classes, seed, count]) control.addEventListener("change", redraw);
file.addEventListener("change", () => file.files[0] && open(file.files[0].name, () => file.files[0].arrayBuffer()));

const url = new URLSearchParams(location.search).get("model") ?? "model.onnx";
open(url, () => download(url));

/** Opens a file, shows what it is and draws its first pictures. */
async function open(name, read) {
  const opening = ++openings;
  await attempt(async () => {
    status.textContent = `Loading ${name}…`;
    const bytes = new Uint8Array(await read());
    const next = await load(bytes).catch((reason) => {
      throw new Error(`${name}: ${reason.message}`);
    });
    if (opening !== openings) return next.session.release();
    await replace(next);
    const { width, height, classes: names, sigmas } = generator.info;
    const passes = sigmas.length > 1 ? `${sigmas.length} passes` : "one pass";
    const kinds = names.length > 0 ? `, ${names.length} classes` : "";
    about.textContent = `Pictures from noise in ${passes}, made in this browser: ${width} × ${height} pixels${kinds}.`;
    const every = new Option(names.length > 0 ? "All in turn" : "None", "");
    classes.replaceChildren(every, ...names.map((name, label) => new Option(name, label)));
    for (const control of [seed, count, draw]) control.disabled = false;
    classes.disabled = names.length === 0;
    await redraw();
  });
}

/** Takes another file. The memory of the one before is the page's until its session is released, which nothing may be using. */
async function replace(next) {
  for (let last; last !== drawn; ) {
    drawings++;
    last = drawn;
    await last;
  }
  const before = generator;
  generator = next;
  await before?.session.release();
}

async function download(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: not found; README.md says how to export it, or open a file below`);
  return response.arrayBuffer();
}

/** Draws the grid anew, picture by picture, and says how long the engine took. */
async function redraw() {
  if (!controls.reportValidity()) return;
  const drawing = ++drawings;
  await (drawn = attempt(async () => {
    const n = Number(count.value);
    const label = classes.value === "" ? undefined : Number(classes.value);
    const canvases = lay(n);
    let total = 0;
    for await (const picture of pictures(generator, { seed: BigInt(seed.value), label, n })) {
      if (drawing !== drawings) return;
      show(canvases[picture.index], picture);
      total += picture.ms;
      // Lets the browser paint: pictures appear as they are made.
      await new Promise((painted) => setTimeout(painted));
    }
    if (drawing !== drawings) return;
    const each = (total / n).toFixed(1);
    status.textContent = `${each} ms per picture, ${total.toFixed(0)} ms for ${n === 1 ? "one" : `all ${n}`}`;
  }));
}

/** Empty canvases, as nearly a square as their number allows. */
function lay(n) {
  const { width, height } = generator.info;
  grid.style.setProperty("--columns", Math.ceil(Math.sqrt(n)));
  const canvases = Array.from({ length: n }, () => Object.assign(document.createElement("canvas"), { width, height }));
  grid.replaceChildren(
    ...canvases.map((canvas) => {
      const item = document.createElement("li");
      item.append(canvas);
      return item;
    }),
  );
  return canvases;
}

function show(canvas, { index, label, pixels }) {
  const kind = label === undefined ? "" : `, ${generator.info.classes[label]}`;
  canvas.role = "img";
  canvas.ariaLabel = `Picture ${index + 1} of seed ${seed.value}${kind}`;
  canvas.title = canvas.ariaLabel;
  canvas.getContext("2d").putImageData(new ImageData(pixels, canvas.width, canvas.height), 0, 0);
}

/** Shows what went wrong where the pictures would be. */
async function attempt(work) {
  error.hidden = true;
  try {
    await work();
  } catch (reason) {
    error.textContent = reason.message;
    error.hidden = false;
    status.textContent = generator ? "" : "No model is loaded.";
  }
}
