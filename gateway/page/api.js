// @ts-check
/** The token, and requests to the platform with it. */

import { learnClock } from "./time.js";

const KEY = "headrace.token";

/** A request that the platform refused: `status`, one sentence, and the cure. */
export class Problem extends Error {
  /** @param {number} status @param {string} detail @param {string} hint */
  constructor(status, detail, hint) {
    super(detail);
    this.status = status;
    this.hint = hint;
  }
}

/** @param {string} text */
export const keepToken = (text) => sessionStorage.setItem(KEY, text.trim());
export const hasToken = () => Boolean(sessionStorage.getItem(KEY));
export const dropToken = () => sessionStorage.removeItem(KEY);

/**
 * Take the token out of `#token=...`, and the fragment out of the address, so that neither the history nor a copied
 * address gives it away.
 */
export function takeTokenFromAddress() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token === null) return false;
  history.replaceState(null, "", location.pathname + location.search);
  keepToken(token);
  return true;
}

/**
 * Ask the platform.
 * @param {string} path
 * @param {{signal?: AbortSignal, headers?: Record<string, string>}} [options]
 * @returns {Promise<Response>} with a status below 400
 * @throws {Problem} the platform said no
 * @throws {TypeError} the platform cannot be reached
 */
export async function ask(path, { signal, headers } = {}) {
  const token = sessionStorage.getItem(KEY) ?? "";
  // Other characters cannot be in a header: `fetch` would fail as if the platform were away.
  if (!/^[\x21-\x7e]+$/.test(token)) throw new Problem(401, "This cannot be a token.", "");
  const response = await fetch(path, {
    signal,
    headers: { ...headers, Authorization: `Bearer ${token}` },
    cache: "no-store",
    credentials: "omit",
    redirect: "error",
  });
  learnClock(response);
  if (response.status >= 400) throw await problem(response);
  return response;
}

/** @param {Response} response */
async function problem(response) {
  /** @type {any} */
  let said = {};
  try {
    said = JSON.parse((await readSome(response, 65536)).text);
  } catch {
    // Not JSON: a proxy in between answered. Its status has to do.
  }
  return new Problem(response.status, said.detail || said.title || `HTTP ${response.status}`, said.hint ?? "");
}

/** @param {string} path @returns {Promise<any>} */
export const askJson = async (path) => (await ask(path)).json();

/**
 * Read a body as text up to a limit, and leave the rest: an answer may have gigabytes.
 * @param {Response} response
 * @param {number} bytesMax
 * @returns {Promise<{text: string, bytes: number, whole: boolean}>}
 */
export async function readSome(response, bytesMax) {
  const decoder = new TextDecoder();
  const reader = response.body?.getReader();
  let text = "";
  let bytes = 0;
  while (reader) {
    const { done, value } = await reader.read();
    if (done) break;
    const room = bytesMax - bytes;
    text += decoder.decode(value.subarray(0, room), { stream: true });
    bytes += Math.min(room, value.length);
    if (value.length > room) {
      await reader.cancel();
      return { text, bytes, whole: false };
    }
  }
  return { text: text + decoder.decode(), bytes, whole: true };
}
