/** `floor(clamp(127.5 x + 128, 0, 255))` in f32, as `dmd_runtime::quantize`: rounds half up. */
export function quantize(x) {
  const value = Math.fround(Math.fround(x * 127.5) + 128);
  return Math.floor(Math.min(255, Math.max(0, value)));
}
