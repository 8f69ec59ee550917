// What an exported file says of itself: the `dmd.*` entries of its metadata. onnxruntime-web does not hand them over,
// so the few protobuf fields on the way to them are walked here; weights are stepped over, not read.

/** The description of a file of ours, or an Error that says why it is none. */
export function describe(bytes) {
  const metadata = new Map(entries(bytes));
  if (!metadata.has("dmd.format")) throw new Error("not a file that dmd export has written");
  const number = (key) => {
    const value = Number(metadata.get(key));
    if (!Number.isInteger(value) || value < 1) throw new Error(`${key} is ${metadata.get(key)}, expected a count`);
    return value;
  };
  if (number("dmd.format") > 2) throw new Error("this file is newer than the page; update the page");
  if (weightsLieOutside(bytes)) {
    throw new Error("its weights lie in a file beside it, which a page is not given; export it without --external-data");
  }
  return {
    batch: number("dmd.batch"),
    channels: number("dmd.channels"),
    height: number("dmd.height"),
    width: number("dmd.width"),
    output: metadata.get("dmd.output"),
    classes: JSON.parse(metadata.get("dmd.classes")),
    version: metadata.get("dmd.version"),
    /** The noise level of each pass; files of one pass have no list. */
    steps: JSON.parse(metadata.get("dmd.steps") ?? `[${metadata.get("dmd.sigma")}]`),
  };
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
