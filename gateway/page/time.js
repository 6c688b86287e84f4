// @ts-check
/** Instants in milliseconds since 1970, durations in seconds, and both as short text. */

let offsetMs = 0;

/**
 * Learn how far this computer's clock is from the platform's, so that a countdown is right on a machine that is not.
 * The header counts whole seconds: a smaller difference is noise and is left alone.
 * @param {Response} response
 */
export function learnClock(response) {
  const server = Date.parse(response.headers.get("date") ?? "");
  if (Number.isNaN(server)) return;
  const off = server + 500 - Date.now();
  offsetMs = Math.abs(off) > 2000 ? off : 0;
}

/** The platform's now, in milliseconds. */
export const now = () => Date.now() + offsetMs;

/**
 * @param {unknown} text RFC 3339
 * @returns {number | null}
 */
export function instant(text) {
  const at = typeof text === "string" ? Date.parse(text) : NaN;
  return Number.isNaN(at) ? null : at;
}

/**
 * A measured duration with two or three digits: "4.2 ms", "1.23 s", "2 min 05 s", "1 h 03 min".
 * @param {number} seconds
 */
export function took(seconds) {
  const s = Math.max(0, seconds);
  if (s < 0.0095) return `${(s * 1000).toPrecision(2)} ms`;
  if (s < 0.9995) return `${Math.round(s * 1000)} ms`;
  if (s < 9.995) return `${s.toFixed(2)} s`;
  if (s < 59.95) return `${s.toFixed(1)} s`;
  return left(Math.round(s));
}

/**
 * A countdown in whole seconds: "under 1 s", "42 s", "2 min 05 s".
 * @param {number} seconds
 */
export function left(seconds) {
  const s = Math.floor(Math.max(0, seconds));
  if (s < 1) return "under 1 s";
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${two(Math.floor((s % 3600) / 60))} min`;
  return `${Math.floor(s / 86400)} days`;
}

/**
 * A duration that somebody chose, without what is zero: "500 ms", "30 s", "1 min", "1 h 30 min".
 * @param {number} seconds
 */
export function given(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${Number(seconds.toFixed(1))} s`;
  return left(Math.round(seconds)).replace(/ 00 (s|min)$/, "");
}

/**
 * The time of day where the reader is, with the date when it is not today.
 * @param {number} at
 */
export function clock(at) {
  // Sweden writes dates as ISO 8601 does.
  const [day, time] = new Date(at).toLocaleString("sv").split(" ");
  return new Date(now()).toLocaleString("sv").startsWith(day) ? time : `${day} ${time}`;
}

/** @param {number} n */
const two = (n) => String(n).padStart(2, "0");
