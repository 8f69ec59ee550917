// What an exported file says of itself, in its metadata: runtime/src/contract once more, and the one place where. The
// engine, onnxruntime-web, does not hand the metadata over, so the few protobuf fields on the way to it are walked here;
// weights are stepped over, not read.

/** The description of a file of ours, or an Error that says why it is none. */
export function describe(bytes) {
  const metadata = new Map(entries(bytes));
  if (!metadata.has("dmd.format")) throw new Error("not a file that dmd export has written");
  const format = count("dmd.format", metadata.get("dmd.format"));
  if (format > 3) throw new Error("this file is newer than the page; update the page");
  if (weightsLieOutside(bytes)) {
    throw new Error("its weights lie in a file beside it, which a page is not given; export it without --external-data");
  }
  return format < 3 ? fromEntries(metadata) : fromJson(metadata.get("dmd"));
}

/** Format 3: one entry. Where the number of pictures is free, one at a time. */
function fromJson(json) {
  const { inputs, outputs, classes, version, sigmas } = JSON.parse(json);
  const [batch, ...sides] = inputs.find(({ name }) => name === "noise").shape;
  const [channels, height, width] = sides.map((side) => count("a side of the noise", side));
  return { batch: count("the batch", batch ?? 1), channels, height, width, output: outputs[0].type, classes, version, sigmas };
}

/** Formats 1 and 2: an entry for each thing. Files of one pass have no list of noise levels. */
function fromEntries(metadata) {
  const number = (key) => count(key, metadata.get(key));
  return {
    batch: number("dmd.batch"),
    channels: number("dmd.channels"),
    height: number("dmd.height"),
    width: number("dmd.width"),
    output: metadata.get("dmd.output"),
    classes: JSON.parse(metadata.get("dmd.classes")),
    version: metadata.get("dmd.version"),
    sigmas: JSON.parse(metadata.get("dmd.steps") ?? `[${metadata.get("dmd.sigma")}]`),
  };
}

function count(what, text) {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1) throw new Error(`${what} is ${text}, expected a count`);
  return value;
}

/** Whether a weight (`ModelProto.graph`, 7, `GraphProto.initializer`, 5) has `TensorProto.external_data`, 13. */
function weightsLieOutside(bytes) {
  const inside = (message, number) => Array.from(fields(message)).filter(([field, value]) => field === number && value);
  const weights = inside(bytes, 7).flatMap(([, graph]) => inside(graph, 5));
  return weights.some(([, weight]) => inside(weight, 13).length > 0);
}

/** The key and value of every entry of `ModelProto.metadata_props`, field 14. */
function* entries(bytes) {
  for (const [field, value] of fields(bytes)) {
    if (field !== 14 || !(value instanceof Uint8Array)) continue;
    const entry = new Map(fields(value));
    yield [text(entry.get(1)), text(entry.get(2))];
  }
}

/** The fields of a message: [number, bytes] for what has a length, [number, undefined] for any other. */
function* fields(bytes) {
  let at = 0;
  const byte = () => {
    if (at >= bytes.length) throw new Error("not a whole ONNX file");
    return bytes[at++];
  };
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const next = byte();
      value += (next & 127) * scale;
      if (next < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const length = [undefined, 8, undefined, undefined, undefined, 4][tag % 8];
    let value;
    if (tag % 8 === 0) varint();
    else if (tag % 8 === 2) {
      const size = varint();
      value = bytes.subarray(at, at + size);
      at += size;
    } else if (length) at += length;
    else throw new Error("not an ONNX file");
    if (at > bytes.length) throw new Error("not a whole ONNX file");
    yield [Math.floor(tag / 8), value];
  }
}

function text(bytes) {
  return new TextDecoder().decode(bytes);
}
