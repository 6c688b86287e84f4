// @ts-check
/**
 * Server-sent events read with `fetch`, because `EventSource` cannot send the token, and a connection to them that
 * comes back by itself.
 */

import { Problem, ask } from "./api.js";

/** @typedef {{event: string, data: string}} Message */

const WAIT_MS_MIN = 500;
const WAIT_MS_MAX = 15_000;
const SILENT_MS_MAX = 40_000;

/** Cuts text into messages as the HTML standard says, wherever the pieces begin and end. */
export class Cutter {
  /** Where to go on after all that was given out; a block without data may move it too. */
  lastId = "";
  #rest = "";
  #id = "";
  #event = "";
  /** @type {string[]} */
  #data = [];

  /**
   * @param {string} text
   * @returns {Message[]} those that are complete
   */
  feed(text) {
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop() ?? "";
    /** @type {Message[]} */
    const out = [];
    for (const line of lines) this.#line(line, out);
    return out;
  }

  /** @param {string} line @param {Message[]} out */
  #line(line, out) {
    if (line === "") {
      this.lastId = this.#id;
      if (this.#data.length) out.push({ event: this.#event || "message", data: this.#data.join("\n") });
      this.#event = "";
      this.#data = [];
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1));
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#event = value;
    else if (field === "id") this.#id = value;
  }
}

/** One subscription that reconnects for ever, from where it was, until the token is refused or it is closed. */
export class Feed {
  /** Instant of the last bytes, on this computer's clock. */
  heardAt = 0;
  connected = false;
  #lastId = "";
  #closing = new AbortController();

  /**
   * @param {string} path
   * @param {{
   *   opened: () => Promise<void>,
   *   messages: (batch: Message[]) => void,
   *   refused: (problem: Problem) => void,
   *   changed: () => void,
   * }} hooks `opened` runs at each fresh start, before any message of it is given out; `changed` when `connected` has
   */
  constructor(path, hooks) {
    this.path = path;
    this.hooks = hooks;
  }

  close() {
    this.#closing.abort();
  }

  async run() {
    const signal = this.#closing.signal;
    for (let wait = WAIT_MS_MIN; !signal.aborted; wait = Math.min(wait * 2, WAIT_MS_MAX)) {
      const before = this.heardAt;
      try {
        await this.#connection();
      } catch (error) {
        if (signal.aborted) break;
        if (error instanceof Problem && [401, 403].includes(error.status)) return this.hooks.refused(error);
      }
      this.#connect(false);
      if (this.heardAt !== before) wait = WAIT_MS_MIN;
      // Spread out, so that a hundred open pages do not all knock in the same moment after a restart.
      await pause(wait * (0.75 + Math.random() / 2), signal);
    }
  }

  async #connection() {
    // After a long time away the backlog is of no use to a reader of now: take a new snapshot instead.
    if (Date.now() - this.heardAt > 30_000) this.#lastId = "";
    const attempt = new AbortController();
    const stop = () => attempt.abort();
    this.#closing.signal.addEventListener("abort", stop);
    const opening = setTimeout(stop, SILENT_MS_MAX);
    const watch = setInterval(() => this.connected && Date.now() - this.heardAt > SILENT_MS_MAX && stop(), 1000);
    try {
      /** @type {Record<string, string>} */
      const headers = { Accept: "text/event-stream" };
      if (this.#lastId) headers["Last-Event-ID"] = this.#lastId;
      // Subscribed first and snapshot second: what happens between the two is in the stream, not lost.
      const response = await ask(this.path, { signal: attempt.signal, headers });
      if (!this.#lastId) await this.hooks.opened();
      clearTimeout(opening);
      this.#connect(true);
      await this.#read(response);
    } finally {
      clearTimeout(opening);
      clearInterval(watch);
      this.#closing.signal.removeEventListener("abort", stop);
      attempt.abort();
    }
  }

  /** @param {Response} response */
  async #read(response) {
    const cutter = new Cutter();
    const decoder = new TextDecoder();
    const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      this.heardAt = Date.now();
      const batch = cutter.feed(decoder.decode(value, { stream: true }));
      this.#lastId = cutter.lastId || this.#lastId;
      if (batch.length) this.hooks.messages(batch);
    }
  }

  /** @param {boolean} yes */
  #connect(yes) {
    if (yes) this.heardAt = Date.now();
    if (yes === this.connected) return;
    this.connected = yes;
    this.hooks.changed();
  }
}

/** @param {number} ms @param {AbortSignal} signal @returns {Promise<void>} */
function pause(ms, signal) {
  return new Promise((go) => {
    const timer = setTimeout(go, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), go()), { once: true });
  });
}
