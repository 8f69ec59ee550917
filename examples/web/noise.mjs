// The noise of a seed, as docs/noise.md defines it: Philox4x32-10 words, made normal by Box and Muller.
//
// The integers are exact, and so is everything up to the logarithm, the sine and the cosine. Those are the browser's
// own; they differ from the runtime's in the last bit of a double, which the rounding to f32 hides nearly always.

/**
 * The unit normal noise of picture `index` of a seed, for `n` values. Seeds are whole numbers below 2^64, as BigInts
 * where a number does not hold them exactly.
 */
export function pictureNoise(seed, index, n) {
  return normals(seed, PICTURE_NOISE, index, n);
}

/**
 * What pass number `pass` (from 1) of a file of several passes reads for picture `index` of a seed: the picture so far,
 * noised to the pass's level `sigma` and divided by it.
 */
export function refine(seed, pass, index, picture, sigma) {
  const divisor = Math.fround(sigma);
  return normals(seed, REFINING_NOISE + pass, index, picture.length).map((eps, i) => eps + Math.fround(picture[i] / divisor));
}

/** `n` unit normals of the stream (seed, purpose, index). */
export function normals(seed, purpose, index, n) {
  const values = new Float32Array(n);
  for (let block = 0; 2 * block < n; block++) {
    const [a, b, c, d] = words(seed, purpose, index, block);
    // 1 - unit lies in (0, 1], so that the logarithm is finite.
    const radius = Math.sqrt(-2 * Math.log(1 - unit(a, b)));
    const angle = 2 * Math.PI * unit(c, d);
    values[2 * block] = radius * Math.cos(angle);
    if (2 * block + 1 < n) values[2 * block + 1] = radius * Math.sin(angle);
  }
  return values;
}

/** Four random words: block number `block` of the stream (seed, purpose, index). */
export function words(seed, purpose, index, block) {
  let [k0, k1] = halves(seed);
  const [low, high] = halves(index);
  let [c0, c1, c2, c3] = [block >>> 0, purpose >>> 0, low, high];
  for (let round = 0; round < 10; round++) {
    const [high0, low0] = multiply(0xd2511f53, c0);
    const [high1, low1] = multiply(0xcd9e8d57, c2);
    [c0, c1, c2, c3] = [(high1 ^ c1 ^ k0) >>> 0, low1, (high0 ^ c3 ^ k1) >>> 0, low0];
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1, c2, c3];
}

/** The purpose of the noise that becomes pictures. */
export const PICTURE_NOISE = 0;

/** The purpose of the noise between passes, plus the number of the pass. */
const REFINING_NOISE = 0x100;

/** The 64-bit product of two words, as [high, low]. Halves of 16 bits keep every sum within the integers of a double. */
function multiply(a, b) {
  const [a1, a0, b1, b0] = [a >>> 16, a & 0xffff, b >>> 16, b & 0xffff];
  const middle = a1 * b0 + ((a0 * b0) >>> 16);
  const upper = a0 * b1 + (middle & 0xffff);
  const high = a1 * b1 + Math.floor(middle / 0x10000) + Math.floor(upper / 0x10000);
  return [high >>> 0, Math.imul(a, b) >>> 0];
}

/** The top 53 bits of a 64-bit word, given as its halves, as a number in [0, 1). */
function unit(low, high) {
  return (high * 0x200000 + (low >>> 11)) / 2 ** 53;
}

/** A whole number below 2^64 as [low, high]. Another one is refused: its bits would be those of another seed. */
function halves(value) {
  if (!(typeof value === "bigint" || Number.isSafeInteger(value)) || value < 0 || value >= 2n ** 64n) {
    throw new RangeError(`${value} is no seed: expected a whole number from 0 to 2^64 - 1, from 2^53 on as a BigInt`);
  }
  const bits = BigInt(value);
  return [Number(bits & 0xffffffffn), Number((bits >> 32n) & 0xffffffffn)];
}
