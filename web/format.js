/** Numbers as a person reads them: bytes and seconds come in, texts go out. */

const BINARY = { GiB: 2 ** 30, MiB: 2 ** 20, KiB: 2 ** 10 };
const DECIMAL = { GB: 1e9, MB: 1e6, kB: 1e3 };

let scale = BINARY;

/** @param {string} units "GiB" or "GB" */
export function setUnits(units) {
  scale = units === "GB" ? DECIMAL : BINARY;
}

/**
 * @param {number} size bytes
 * @returns {string} such as "12.3 GiB"
 */
export function bytes(size) {
  const [name, unit] = Object.entries(scale).find(([, value]) => Math.abs(size) >= value) ?? ["B", 1];
  const value = size / unit;
  return `${value.toFixed(name === "B" || value >= 100 ? 0 : value >= 10 ? 1 : 2)} ${name}`;
}

/**
 * @param {number} time seconds
 * @returns {string} such as "1.25 s", "930 ms"
 */
export function seconds(time) {
  if (time >= 60) return `${Math.floor(time / 60)} min ${Math.round(time % 60)} s`;
  if (time >= 1) return `${time.toFixed(time >= 10 ? 1 : 2)} s`;
  return `${(time * 1000).toFixed(time >= 0.1 ? 0 : 1)} ms`;
}

/**
 * @param {number} value bytes a second; powers of ten, as makers state links
 * @returns {string} such as "55.3 GB/s"
 */
export function speed(value) {
  return `${(value / 1e9).toFixed(value >= 1e10 ? 1 : 2)} GB/s`;
}

/**
 * @param {number} value 0 to 1
 * @returns {string} such as "87%"
 */
export function percent(value) {
  return `${Math.round(value * 100)}%`;
}

/**
 * @param {number} when seconds since 1970
 * @returns {string} the time of day
 */
export function clock(when) {
  return new Date(when * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });
}
