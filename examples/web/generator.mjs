// A generator in the browser: an exported file, a seed and a class in, pictures out. The same noise, the same labels
// and the same rounding as in dmd-runtime, so the same pictures.

import * as ort from "onnxruntime-web/wasm";
import { describe } from "./metadata.mjs";
import { pictureNoise, refine } from "./noise.mjs";
import { quantize } from "./quantize.mjs";

// Threads need a page that its server isolates (see serve.mjs); a small network is fast without them, too.
ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;

/** Opens the bytes of an exported file. */
export async function load(bytes) {
  const info = describe(bytes);
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  return { info, session };
}

/**
 * The pictures `0 .. n` of a seed, one after the other: { index, label, pixels, image, ms }. `image` holds the raw
 * values as the file gives them, `pixels` RGBA bytes for a canvas, `ms` the time of the engine for this picture, all
 * passes together.
 * Without a label, a generator with classes cycles through them.
 */
export async function* pictures({ info, session }, { seed, label, n }) {
  const { batch, channels, height, width, classes, sigmas } = info;
  const size = channels * height * width;
  for (let first = 0; first < n; first += batch) {
    const count = Math.min(batch, n - first);
    // What is left of the last batch is zero noise and label 0, and is thrown away.
    const noise = new Float32Array(batch * size);
    for (let i = 0; i < count; i++) noise.set(pictureNoise(seed, first + i, size), i * size);
    let [image, ms] = [undefined, 0];
    for (const [pass, sigma] of sigmas.entries()) {
      for (let i = 0; pass > 0 && i < count; i++) {
        noise.set(refine(seed, pass, first + i, image.data.subarray(i * size, (i + 1) * size), sigma), i * size);
      }
      const feeds = { noise: new ort.Tensor("float32", noise, [batch, channels, height, width]) };
      // A file of several passes takes a row of its tables in the place of a label.
      const row = (_, i) => pass * Math.max(1, classes.length) + (i < count ? (labelOf(info, label, first + i) ?? 0) : 0);
      const rows = BigInt64Array.from(Array.from({ length: batch }, row), BigInt);
      if (sigmas.length > 1 || classes.length > 0) {
        feeds[sigmas.length > 1 ? "row" : "label"] = new ort.Tensor("int64", rows, [batch]);
      }
      const start = performance.now();
      ({ image } = await session.run(feeds));
      ms += (performance.now() - start) / count;
    }
    for (let i = 0; i < count; i++) {
      const values = image.data.slice(i * size, (i + 1) * size);
      const index = first + i;
      yield { index, label: labelOf(info, label, index), pixels: rgba(values, info), image: values, ms };
    }
  }
}

/** The class of a picture; undefined where there are none. */
function labelOf({ classes }, label, index) {
  return classes.length > 0 ? (label ?? index % classes.length) : undefined;
}

/** One picture as RGBA bytes. f32 values are (C, H, W) around [-1, 1], bytes are (H, W, C); one channel is grey. */
function rgba(values, { channels, height, width, output }) {
  const [perChannel, perPixel] = output === "u8" ? [1, channels] : [height * width, 1];
  const byte = output === "u8" ? (x) => x : quantize;
  const pixels = new Uint8ClampedArray(height * width * 4);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) {
      pixels[4 * i + c] = byte(values[i * perPixel + (channels >= 3 ? c : 0) * perChannel]);
    }
    pixels[4 * i + 3] = channels === 4 ? byte(values[i * perPixel + 3 * perChannel]) : 255;
  }
  return pixels;
}
