// The page in a headless Chromium, against the pictures that dmd-runtime makes of the same files and seeds.
// `cargo xtask web-test` prepares the folder that DMD_WEB_TEST names:
//
//   f32.onnx, u8.onnx        one generator, the second with a batch of 2
//   f32-7.npy, f32-8.npy     16 pictures of seeds 7 and 8, all classes in turn
//   f32-7-class.npy          16 pictures of seed 7, all of class 1
//   u8-7.npy                 16 pictures of seed 7 from u8.onnx
//   external.onnx            the generator with its weights in a file beside it
//   steps.onnx, steps-7.npy  a generator of three passes, and 16 pictures of seed 7 from it

import assert from "node:assert/strict";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { quantize } from "../quantize.mjs";
import { serve } from "../serve.mjs";
import { launch } from "./chromium.mjs";
import { readNpy } from "./npy.mjs";

const FOLDER = process.env.DMD_WEB_TEST;
const file = (name) => join(FOLDER, name);

/** The largest difference between the raw values of two engines, as the exporter's own check has it. */
const TOLERANCE = 1e-4;

let [server, browser, origin] = [];

before(async () => {
  const models = { "/f32.onnx": file("f32.onnx"), "/u8.onnx": file("u8.onnx"), "/steps.onnx": file("steps.onnx"), "/external.onnx": file("external.onnx"), "/none.onnx": file("f32-7.npy") };
  server = await serve(0, models);
  origin = `http://127.0.0.1:${server.address().port}`;
  browser = await launch();
  const window = { width: 820, height: 1000, deviceScaleFactor: 1, mobile: false };
  await browser.call("Emulation.setDeviceMetricsOverride", window);
});

after(async () => {
  await browser?.close();
  server?.close();
});

const DRAWN = `/^[0-9.]+ ms per picture/.test(document.getElementById("status").textContent)`;

async function openPage(model) {
  await browser.open(`${origin}/?model=${model}`);
  await browser.until(DRAWN);
}

/** Sets a control as a user does, and waits until the grid is drawn anew. */
async function set(id, value) {
  await browser.evaluate(`{
    document.getElementById("status").textContent = "";
    const control = document.getElementById(${JSON.stringify(id)});
    control.value = ${JSON.stringify(value)};
    control.dispatchEvent(new Event("change", { bubbles: true }));
  }`);
  await browser.until(DRAWN);
}

/** The RGBA bytes on every canvas of the grid. */
function canvases() {
  return browser.evaluate(`Array.from(document.querySelectorAll("#grid canvas"), (canvas) =>
    Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data))`);
}

/** The pictures of an .npy file as RGBA bytes. */
async function expected(name) {
  const { shape, values } = await readNpy(file(name));
  const [n, channels, height, width] = shape;
  assert.equal(channels, 3);
  const area = height * width;
  const value = (picture, pixel, c) => (c === 3 ? 255 : quantize(values[(picture * 3 + c) * area + pixel]));
  const bytes = (picture) => Array.from({ length: area * 4 }, (_, i) => value(picture, i >> 2, i & 3));
  return Array.from({ length: n }, (_, picture) => bytes(picture));
}

/** Whether two grids are the same to one step of a byte, with all but a few bytes equal. */
function assertSame(found, wanted) {
  assert.equal(found.length, wanted.length);
  const [a, b] = [found.flat(), wanted.flat()];
  assert.equal(a.length, b.length);
  const differences = a.map((x, i) => Math.abs(x - b[i]));
  assert.ok(differences.every((d) => d <= 1), "a byte is off by more than one step");
  const off = differences.filter((d) => d > 0).length;
  assert.ok(off <= a.length / 1000, `${off} of ${a.length} bytes are off by one step`);
}

test("a file of several passes shows the runtime's pictures", async () => {
  await openPage("steps.onnx");
  await set("seed", "7");
  assertSame(await canvases(), await expected("steps-7.npy"));
});

test("the grid of a seed shows the runtime's pictures", async () => {
  await openPage("f32.onnx");
  await set("seed", "7");
  assertSame(await canvases(), await expected("f32-7.npy"));
  const { data } = await browser.call("Page.captureScreenshot");
  await writeFile(file("page.png"), Buffer.from(data, "base64"));
});

test("the raw values are the runtime's", async () => {
  const values = await browser.evaluate(`(async () => {
    const { load, pictures } = await import("./generator.mjs");
    const generator = await load(new Uint8Array(await (await fetch("f32.onnx")).arrayBuffer()));
    const all = [];
    for await (const { image } of pictures(generator, { seed: 7, n: 16 })) all.push(...image);
    return all;
  })()`);
  const { values: wanted } = await readNpy(file("f32-7.npy"));
  assert.equal(values.length, wanted.length);
  const difference = values.reduce((most, x, i) => Math.max(most, Math.abs(x - wanted[i])), 0);
  console.log(`largest difference of ${values.length} values: ${difference}`);
  assert.ok(difference <= TOLERANCE, `${difference}`);
});

test("the button draws the next seed", async () => {
  const before = await canvases();
  await browser.evaluate(`document.getElementById("status").textContent = ""; document.getElementById("draw").click()`);
  await browser.until(DRAWN);
  assert.equal(await browser.evaluate(`document.getElementById("seed").value`), "8");
  const found = await canvases();
  assert.notDeepEqual(found, before);
  assertSame(found, await expected("f32-8.npy"));
});

test("a class can be chosen", async () => {
  await set("seed", "7");
  await set("class", "1");
  assertSame(await canvases(), await expected("f32-7-class.npy"));
});

test("bytes in batches of two show the runtime's pictures", async () => {
  await openPage("u8.onnx");
  await set("seed", "7");
  assertSame(await canvases(), await expected("u8-7.npy"));
  // A number that the batch does not divide.
  await set("count", "1");
  assertSame(await canvases(), (await expected("u8-7.npy")).slice(0, 1));
});

/** Opens a file of the server as a user does, by the control for files. */
async function openFile(name) {
  await browser.evaluate(`(async () => {
    const files = new DataTransfer();
    files.items.add(new File([await (await fetch(${JSON.stringify(name)})).arrayBuffer()], ${JSON.stringify(name)}));
    document.getElementById("status").textContent = "";
    document.getElementById("file").files = files.files;
    document.getElementById("file").dispatchEvent(new Event("change"));
  })()`);
  await browser.until(DRAWN);
}

test("a file that is replaced gives its memory back", async () => {
  await openPage("f32.onnx");
  await browser.evaluate(`(async () => {
    const { InferenceSession } = await import("onnxruntime-web/wasm");
    const { release } = InferenceSession.prototype;
    globalThis.released = 0;
    InferenceSession.prototype.release = function () {
      globalThis.released++;
      return release.call(this);
    };
  })()`);
  for (const name of ["u8.onnx", "steps.onnx", "f32.onnx"]) await openFile(name);
  assert.equal(await browser.evaluate("globalThis.released"), 3);
  await set("seed", "7");
  assertSame(await canvases(), await expected("f32-7.npy"));
});

test("a seed that is too large is refused, not changed", async () => {
  await openPage("f32.onnx");
  await browser.evaluate(`{
    const seed = document.getElementById("seed");
    seed.value = (2n ** 64n).toString();
    seed.dispatchEvent(new Event("change", { bubbles: true }));
  }`);
  const alert = `!document.getElementById("error").hidden && document.getElementById("error").textContent`;
  await browser.until(alert);
  assert.match(await browser.evaluate(alert), /^18446744073709551616 is no seed/);
});

test("the page can be used without sight or mouse", async () => {
  await openPage("f32.onnx");
  const { nodes } = await browser.call("Accessibility.getFullAXTree");
  const value = (node, name) => node.properties?.find((property) => property.name === name)?.value.value;
  const focusable = nodes.filter((node) => !node.ignored && value(node, "focusable") && node.role.value !== "RootWebArea");
  assert.deepEqual(focusable.filter((node) => !node.name?.value).map((node) => node.role.value), []);
  const names = focusable.map((node) => node.name.value);
  for (const name of ["Class", "Seed", "Pictures", "New pictures", "Open another file"]) assert.ok(names.includes(name), `${names}`);
  const drawings = nodes.filter((node) => !node.ignored && node.role.value === "image").map((node) => node.name.value);
  assert.equal(drawings.length, 16);
  assert.match(drawings[0], /^Picture 1 of seed 0, .+/);
});

test("a missing and a foreign file are named", async () => {
  const alert = `!document.getElementById("error").hidden && document.getElementById("error").textContent`;
  for (const [model, message] of [["missing.onnx", /missing\.onnx: not found; README\.md says/], ["none.onnx", /none\.onnx: not/], ["external.onnx", /external\.onnx: its weights lie in a file beside it/]]) {
    await browser.open(`${origin}/?model=${model}`);
    await browser.until(alert);
    assert.match(await browser.evaluate(alert), message);
  }
});

test("the page has reported no error of its own", () => {
  assert.deepEqual(browser.problems, []);
});
