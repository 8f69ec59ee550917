// Reads the .npy files that `dmd sample --npy` writes: little-endian f32.

import { readFile } from "node:fs/promises";

/** The shape and the values of a file. */
export async function readNpy(path) {
  const bytes = await readFile(path);
  const start = 10 + bytes.readUInt16LE(8);
  const header = bytes.toString("latin1", 10, start);
  const shape = header.match(/'shape': \(([^)]*)\)/)[1].split(",").map(Number);
  const values = new Float32Array(bytes.buffer.slice(bytes.byteOffset + start, bytes.byteOffset + bytes.length));
  return { shape, values };
}
