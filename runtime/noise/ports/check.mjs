// Answers a line `seed purpose index n` by two: n words, and the bits of n normals.

import { createInterface } from "node:readline";
import { normals, words } from "../../../examples/web/noise.mjs";

for await (const line of createInterface({ input: process.stdin })) {
  const [seed, purpose, index, n] = line.split(" ").map(BigInt);
  const blocks = Array.from({ length: Math.ceil(Number(n) / 4) }, (_, i) => words(seed, Number(purpose), index, i));
  console.log(blocks.flat().slice(0, Number(n)).join(" "));
  console.log(new Uint32Array(normals(seed, Number(purpose), index, Number(n)).buffer).join(" "));
}
