// @ts-check
/**
 * What the page knows of runs: folded from a snapshot and from the stream, and bounded, so that the page can stay open
 * for a week at thousands of runs per second. Nothing here touches the document; times are milliseconds.
 */

import { instant } from "./time.js";

/** @typedef {"on time" | "at risk" | "late" | "no deadline" | "done" | "failed" | "canceled"} Word */
/** @typedef {{kind: string, message: string}} Failure */
/** @typedef {{function: string, state: string}} Step */
/**
 * @typedef {object} Run
 * @property {string} id
 * @property {string} route
 * @property {string} function
 * @property {string} state
 * @property {number | null} acceptedAt
 * @property {number | null} deadline
 * @property {boolean | null} met
 * @property {number | null} answeredAt
 * @property {number | null} endedAt
 * @property {number | null} took seconds from acceptance to the answer
 * @property {Record<string, number> | null} spent the time ledger
 * @property {Failure | null} error
 * @property {string} verdict of the quote
 * @property {number | null} usual the quote's p90, in seconds
 * @property {Map<string, Step>} steps invocations that have not ended
 * @property {number} stepsEnded
 * @property {number} stepsTotal
 * @property {string} said the last line of its log, or what it said about its progress
 * @property {number | null} fraction how far it says it is
 * @property {string} saidBy the invocation that said so
 * @property {boolean} whole nothing of it is missing
 * @property {number} seenAt when this page first heard of it
 */

const OPEN_MAX = 150;
const ENDED_MAX = 50;
const STEPS_MAX = 32;
const ROUTES_MAX = 64;
const SAMPLES_MAX = 50;
const MESSAGE_CHARS_MAX = 4000;
const FINAL = new Set(["succeeded", "failed", "canceled", "dead"]);
const RANK = { accepted: 1, running: 2, succeeded: 3, failed: 3, canceled: 3 };

export class Runs {
  /** @type {Map<string, Run>} in order of arrival */
  open = new Map();
  /** @type {Map<string, Run>} in order of their ends */
  ended = new Map();
  /** Some open runs are not held any more. */
  overflown = false;
  #usual = new Usual();

  /**
   * Take in a run, or what changed of it; fields that are absent stay as they are.
   * @param {any} data as in `GET /v1/runs/{id}` or a `run` event
   * @param {number} at
   * @returns {{began: boolean, ended: boolean, run: Run}}
   */
  take(data, at) {
    const id = String(data.run_id);
    const known = this.open.get(id) ?? this.ended.get(id);
    const run = known ?? blank(id, at);
    const wasFinal = FINAL.has(run.state);
    merge(run, data);
    if (FINAL.has(run.state)) {
      if (!wasFinal) this.#end(run, at);
    } else if (!known) {
      this.open.set(id, run);
      if (this.open.size > OPEN_MAX) this.#dropLeastUrgent();
    }
    return { began: !known, ended: !wasFinal && FINAL.has(run.state), run };
  }

  /** @param {Run} run @param {number} at */
  #end(run, at) {
    this.open.delete(run.id);
    run.endedAt ??= at;
    run.steps.clear();
    this.ended.set(run.id, run);
    if (run.state === "succeeded" && run.took !== null) this.#usual.learn(run.route, run.took);
    if (this.ended.size > ENDED_MAX) this.ended.delete(first(this.ended));
    if (this.open.size === 0) this.overflown = false;
  }

  #dropLeastUrgent() {
    let least = first(this.open);
    let latest = -Infinity;
    for (const [id, run] of this.open) {
      if (urgency(run) >= latest) [least, latest] = [id, urgency(run)];
    }
    this.open.delete(least);
    this.overflown = true;
  }

  /** @param {any} data of an `invocation` event */
  takeStep(data) {
    const run = this.open.get(String(data.run_id));
    if (!run) return;
    const id = String(data.invocation_id);
    const known = run.steps.get(id);
    if (FINAL.has(data.state)) {
      run.steps.delete(id);
      if (run.saidBy === id) [run.said, run.fraction] = ["", null];
      run.stepsEnded += 1;
      run.stepsTotal = Math.max(run.stepsTotal, run.stepsEnded + run.steps.size);
      return;
    }
    if (known?.state === "running" && data.state === "queued" && !data.error) return;
    if (!known && run.steps.size >= STEPS_MAX) run.steps.delete(first(run.steps));
    run.steps.set(id, { function: String(data.function ?? known?.function ?? ""), state: String(data.state) });
    run.stepsTotal = Math.max(run.stepsTotal, run.stepsEnded + run.steps.size);
  }

  /** @param {any} data of a `progress` or `log` event */
  takeNote(data) {
    const run = this.open.get(String(data.run_id));
    if (!run) return;
    const by = String(data.invocation_id ?? "");
    if (by !== run.saidBy) [run.saidBy, run.said, run.fraction] = [by, "", null];
    const text = data.note ?? data.text ?? data.message ?? data.line;
    if (text) run.said = String(text).slice(0, 300);
    if (typeof data.fraction === "number") run.fraction = data.fraction;
  }

  /**
   * Make the page hold what the snapshot holds and nothing else.
   * @param {any[]} newestFirst @param {number} at
   */
  reset(newestFirst, at) {
    this.open.clear();
    this.ended.clear();
    this.overflown = false;
    const byEnd = [...newestFirst].sort((a, b) => (instant(a.ended_at) ?? 0) - (instant(b.ended_at) ?? 0));
    for (const data of byEnd) this.take(data, at);
  }

  /**
   * How long runs of this route take, in seconds, if enough of them were seen.
   * @param {string} route
   */
  usual(route) {
    return this.#usual.of(route);
  }

  /**
   * One word on an open or ended run.
   * @param {Run} run @param {number} at
   * @returns {Word}
   */
  word(run, at) {
    if (run.state === "failed" || run.state === "canceled") return run.state;
    const answered = run.answeredAt !== null || run.state === "succeeded";
    if (answered) return run.met === null ? "done" : run.met ? "on time" : "late";
    if (run.deadline === null) return "no deadline";
    if (at > run.deadline) return "late";
    return this.#atRisk(run, run.deadline, at) ? "at risk" : "on time";
  }

  /**
   * At risk: the platform's quote says so, the slow ones among the last runs of the route took longer than this one
   * has in all, or nine tenths of its time are gone.
   * @param {Run} run @param {number} deadline @param {number} at
   */
  #atRisk(run, deadline, at) {
    const began = run.acceptedAt ?? run.seenAt;
    const whole = deadline - began;
    const slow = run.usual ?? this.#usual.of(run.route)?.p90;
    if (run.verdict === "at_risk" || run.verdict === "infeasible") return true;
    return (slow !== undefined && slow * 1000 > whole) || deadline - at < whole / 10;
  }

  /** Open runs, the most urgent first: those that wait for no answer any more come last. */
  byUrgency() {
    return [...this.open.values()].sort((a, b) => urgency(a) - urgency(b) || (a.acceptedAt ?? 0) - (b.acceptedAt ?? 0));
  }

  newestEnded() {
    return [...this.ended.values()].reverse();
  }
}

/** What is usual on each route: medians of its last runs. */
class Usual {
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

/** @param {string} id @param {number} at @returns {Run} */
function blank(id, at) {
  return {
    id,
    route: "",
    function: "",
    state: "accepted",
    acceptedAt: null,
    deadline: null,
    met: null,
    answeredAt: null,
    endedAt: null,
    took: null,
    spent: null,
    error: null,
    verdict: "",
    usual: null,
    steps: new Map(),
    stepsEnded: 0,
    stepsTotal: 0,
    said: "",
    fraction: null,
    saidBy: "",
    whole: false,
    seenAt: at,
  };
}

/** @param {Run} run @param {any} data */
function merge(run, data) {
  const rank = /** @type {Record<string, number>} */ (RANK);
  if (data.state in rank && rank[data.state] >= rank[run.state]) run.state = data.state;
  run.route = data.route ?? run.route;
  run.function = data.function ?? run.function;
  run.acceptedAt = instant(data.accepted_at) ?? run.acceptedAt;
  run.deadline = instant(data.deadline) ?? run.deadline;
  run.answeredAt = instant(data.answered_at) ?? run.answeredAt;
  run.endedAt = instant(data.ended_at) ?? run.endedAt;
  run.met = data.deadline_met ?? run.met;
  run.took = data.time_to_solution_s ?? run.took;
  run.spent = data.time_ledger ?? run.spent;
  run.verdict = data.quote?.verdict ?? run.verdict;
  run.usual = data.quote?.p90_s ?? run.usual;
  if (data.error) {
    const { kind, message } = data.error;
    run.error = { kind: String(kind), message: String(message).slice(0, MESSAGE_CHARS_MAX) };
  }
  if (Array.isArray(data.invocations)) takeSteps(run, data);
}

/** @param {Run} run @param {any} data a whole view of the run */
function takeSteps(run, data) {
  const open = data.invocations.filter((/** @type {any} */ one) => !FINAL.has(one.state));
  run.whole = true;
  run.stepsTotal = data.invocations_total ?? data.invocations.length;
  run.stepsEnded = data.invocations.length - open.length;
  run.steps.clear();
  for (const one of open.slice(0, STEPS_MAX)) run.steps.set(one.invocation_id, { function: one.function, state: one.state });
}

/** @param {Run} run the lower, the more urgent */
function urgency(run) {
  if (run.answeredAt !== null) return Number.MAX_VALUE;
  return run.deadline ?? Number.MAX_SAFE_INTEGER;
}

/** @param {Map<string, unknown>} map */
const first = (map) => /** @type {string} */ (map.keys().next().value);
