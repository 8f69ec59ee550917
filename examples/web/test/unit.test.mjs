// What needs no browser: `npm test`.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";
import { describe } from "../metadata.mjs";
import { normals, pictureNoise, refine, words } from "../noise.mjs";

const FIXTURES = new URL("../../../runtime/tests/fixtures/", import.meta.url);

test("the test vectors of the noise hold here", async () => {
  const vectors = JSON.parse(await readFile(new URL("../../noise/vectors.json", FIXTURES), "utf8"));
  assert.ok(vectors.length > 0);
  for (const vector of vectors) {
    const [seed, purpose, index] = [BigInt(vector.seed), Number(vector.purpose), BigInt(vector.index)];
    const blocks = Array.from({ length: vector.words.length / 4 }, (_, block) => words(seed, purpose, index, block));
    assert.deepEqual(blocks.flat(), vector.words);
    const found = normals(seed, purpose, index, vector.normals.length);
    // The engine's own logarithm, sine and cosine: one unit in the last place of an f32 is allowed.
    found.forEach((x, i) => assert.ok(Math.abs(x - vector.normals[i]) <= 2 ** -23 * Math.max(1, Math.abs(x))));
  }
});

test("an odd number of values is a prefix", () => {
  assert.deepEqual(pictureNoise(7, 0, 5), pictureNoise(7n, 0n, 8).slice(0, 5));
});

test("a seed that a number does not hold is refused, not changed", () => {
  const largest = 2n ** 64n - 1n;
  assert.notDeepEqual(pictureNoise(largest, 0, 4), pictureNoise(largest - 1n, 0, 4));
  for (const seed of [2 ** 53, largest + 1n, -1, -1n, 0.5, NaN, "7"]) {
    assert.throws(() => pictureNoise(seed, 0, 4), /is no seed: expected a whole number from 0 to 2\^64 - 1/);
  }
});

test("a pass reads the picture before it, noised by its own stream", () => {
  // runtime/noise/ports/noise.py: normals(7, 0x101, 5, 2), added to [0.25, -0.25].
  const found = refine(7, 1, 5, Float32Array.of(0.5, -0.5), 2);
  [0.70511067, -0.04911879].forEach((x, i) => assert.ok(Math.abs(found[i] - x) <= 2 ** -22));
});

test("a file says what it is", async () => {
  const { classes, ...info } = describe(await readFile(new URL("classes-u8.onnx", FIXTURES)));
  assert.deepEqual(info, { batch: 2, channels: 3, height: 8, width: 6, output: "u8", version: info.version, sigmas: [2.5] });
  assert.equal(classes.length, 3);
  assert.deepEqual(describe(await readFile(new URL("steps-f32.onnx", FIXTURES))).sigmas, [8, 2, 0.5]);
});

test("a file whose weights lie beside it says so", async () => {
  const ours = await readFile(new URL("plain-f32.onnx", FIXTURES));
  // One more weight in its graph, with an empty entry of `external_data`.
  const outside = Uint8Array.of(...ours, (7 << 3) | 2, 4, (5 << 3) | 2, 2, (13 << 3) | 2, 0);
  assert.throws(() => describe(outside), /its weights lie in a file beside it.*export it without --external-data/);
});

test("every format says the same", async () => {
  // Written by the program when it wrote formats 1 and 2.
  const first = describe(await readFile(new URL("format-1.onnx", FIXTURES)));
  assert.deepEqual([first.batch, first.output, first.classes, first.sigmas], [1, "u8", [], [2.5]]);
  const second = describe(await readFile(new URL("format-2.onnx", FIXTURES)));
  assert.deepEqual([second.output, second.classes, second.sigmas], ["f32", ["0", "1", "2"], [10, 2.5, 0.5]]);

  // Format 3: `ModelProto.metadata_props` (14) and nothing else.
  const field = (number, bytes) => Buffer.concat([Buffer.from([number * 8 + 2, (bytes.length & 127) | 128, bytes.length >> 7]), bytes]);
  const file = (...entries) => Buffer.concat(entries.map(([key, value]) => field(14, Buffer.concat([field(1, Buffer.from(key)), field(2, Buffer.from(value))]))));
  const port = (name, type, ...shape) => ({ name, type, shape });
  const description = { version: "0.1.0", sigmas: [8, 2], classes: ["a"], inputs: [port("noise", "f32", null, 3, 8, 6), port("row", "i64", null)], outputs: [port("image", "f32", null, 3, 8, 6)] };
  const third = describe(file(["dmd.format", "3"], ["dmd", JSON.stringify(description)]));
  assert.deepEqual(third, { batch: 1, channels: 3, height: 8, width: 6, output: "f32", classes: ["a"], version: "0.1.0", sigmas: [8, 2] });
  assert.throws(() => describe(file(["dmd.format", "4"])), /newer than the page/);
});

test("what is no file of ours is refused", async () => {
  const ours = await readFile(new URL("plain-f32.onnx", FIXTURES));
  assert.throws(() => describe(new TextEncoder().encode("<!doctype html>")), /ONNX file/);
  assert.throws(() => describe(new Uint8Array()), /not a file that dmd export has written/);
  assert.throws(() => describe(ours.subarray(0, ours.length - 1)), /not a whole ONNX file/);
  assert.throws(() => describe(new Uint8Array([0x3a, 0xff])), /not a whole ONNX file/);
});
