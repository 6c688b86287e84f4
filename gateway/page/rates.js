// @ts-check
/** Sums over many runs, in bounded memory: how long they usually take, and how many come and go. */

const ROUTES_MAX = 64;
const SAMPLES_MAX = 50;

/** @param {Map<string, unknown>} map */
export const first = (map) => /** @type {string} */ (map.keys().next().value);

/** What is usual on each route: medians of its last runs. */
export class Usual {
  /** @type {Map<string, number[]>} */
  #routes = new Map();

  /** @param {string} route @param {number} seconds */
  learn(route, seconds) {
    const samples = this.#routes.get(route) ?? [];
    this.#routes.delete(route);
    this.#routes.set(route, samples);
    samples.push(seconds);
    if (samples.length > SAMPLES_MAX) samples.shift();
    if (this.#routes.size > ROUTES_MAX) this.#routes.delete(first(this.#routes));
  }

  /** @param {string} route @returns {{p50: number, p90: number} | undefined} from five runs on */
  of(route) {
    const samples = this.#routes.get(route);
    if (!samples || samples.length < 5) return undefined;
    const sorted = [...samples].sort((a, b) => a - b);
    return { p50: sorted[Math.floor(sorted.length / 2)], p90: sorted[Math.floor(sorted.length * 0.9)] };
  }
}

/** Runs that began, ended and failed in each of the last sixty seconds. */
export class Rates {
  /** @type {{at: number, began: number, ended: number, failed: number}[]} */
  #seconds = [];

  /** @param {"began" | "ended" | "failed"} what @param {number} at */
  count(what, at) {
    this.#roll(at);
    this.#seconds[this.#seconds.length - 1][what] += 1;
  }

  /** @param {number} at one entry per second, oldest first */
  lastMinute(at) {
    this.#roll(at);
    return this.#seconds;
  }

  /** @param {number} at */
  #roll(at) {
    const second = Math.floor(at / 1000);
    let last = this.#seconds.at(-1)?.at ?? second - 61;
    if (second - last > 60 || last > second) {
      this.#seconds = [];
      last = second - 60;
    }
    while (last < second) this.#seconds.push({ at: ++last, began: 0, ended: 0, failed: 0 });
    this.#seconds = this.#seconds.slice(-60);
  }
}
