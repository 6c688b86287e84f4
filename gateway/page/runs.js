// @ts-check
/**
 * What the page knows of runs: folded from a snapshot and from the stream, and bounded, so that the page can stay open
 * for a week at thousands of runs per second. Nothing here touches the document; times are milliseconds.
 */

import { Usual, first } from "./rates.js";
import { instant } from "./time.js";

/** @typedef {"on time" | "at risk" | "late" | "no deadline" | "done" | "failed" | "canceled"} Word */
/** @typedef {{kind: string, message: string}} Failure */
/** @typedef {{native: string | null, site: string | null}} Job its native id and its site, as far as they are known */
/** @typedef {{function: string, state: string, attempts: number, job: Job | null}} Step */
/** @typedef {{level: number, function: string, of: number}} Fidelity */
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
 * @property {Fidelity | null} fidelity of the answer, where its function has variants
 * @property {string} verdict of the quote
 * @property {number | null} usual the quote's p90, in seconds
 * @property {Map<string, Step>} steps invocations and batch jobs that have not ended
 * @property {number} stepsEnded
 * @property {number} stepsTotal
 * @property {string} said the last line of its log, or what it said about its progress
 * @property {number | null} fraction how far it says it is
 * @property {string} saidBy the invocation that said so
 * @property {boolean} whole it was followed from its beginning, or asked for since
 * @property {number} seenAt when this page first heard of it
 * @property {number} heardAt when it last did
 */

const OPEN_MAX = 150;
const ENDED_MAX = 50;
const STEPS_MAX = 32;
const MESSAGE_CHARS_MAX = 4000;
const FINAL = new Set(["succeeded", "failed", "canceled", "dead", "completed"]);
const RANK = { accepted: 1, running: 2, succeeded: 3, failed: 3, canceled: 3 };

export class Runs {
  /** @type {Map<string, Run>} in order of arrival */
  open = new Map();
  /** @type {Map<string, Run>} */
  ended = new Map();
  /** @type {Map<string, string>} the status of each site, by its name */
  sites = new Map();
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
    run.heardAt = at;
    run.whole ||= !known && data.state === "accepted";
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
    if (this.ended.size > ENDED_MAX) this.ended.delete(this.newestEnded()[ENDED_MAX].id);
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

  /** @param {any} data of an `invocation` event @param {number} at */
  takeStep(data, at) {
    const run = this.open.get(String(data.run_id));
    if (!run) return;
    run.heardAt = at;
    const id = String(data.invocation_id);
    const known = run.steps.get(id);
    if (FINAL.has(data.state)) {
      run.steps.delete(id);
      if (run.saidBy === id) [run.said, run.fraction] = ["", null];
      run.stepsEnded += 1;
      run.stepsTotal = Math.max(run.stepsTotal, run.stepsEnded + run.steps.size);
      return;
    }
    if (!known && run.steps.size >= STEPS_MAX) run.steps.delete(first(run.steps));
    run.steps.set(id, step(data));
    run.stepsTotal = Math.max(run.stepsTotal, run.stepsEnded + run.steps.size);
  }

  /** @param {any} data of a `job` event @param {number} at */
  takeJob(data, at) {
    if (!data.state) return; // its wrapper was heard, which changes nothing
    const known = this.open.get(String(data.run_id))?.steps.get(String(data.job_id));
    this.takeStep({ ...asStep({ native_id: known?.job?.native, site: known?.job?.site, ...data }), run_id: data.run_id }, at);
  }

  /** @param {any} data of a `progress` or `log` event @param {number} at */
  takeNote(data, at) {
    const run = this.open.get(String(data.run_id));
    if (!run) return;
    run.heardAt = at;
    const by = String(data.invocation_id ?? "");
    if (by !== run.saidBy) [run.saidBy, run.said, run.fraction] = [by, "", null];
    const text = data.note ?? data.text;
    if (text) run.said = String(text).slice(0, 300);
    if (typeof data.fraction === "number") run.fraction = data.fraction;
  }

  clear() {
    this.open.clear();
    this.ended.clear();
    this.overflown = false;
  }

  /** @param {any[]} views of a snapshot @param {number} at */
  takeAll(views, at) {
    for (const data of views) this.take({ ...data, invocations: undefined }, at);
  }

  /** @param {string} id of a run that the platform does not know any more */
  forget(id) {
    this.open.delete(id);
    this.ended.delete(id);
  }

  /**
   * The next run to ask the platform about, of those that can be seen: what the stream or the snapshot left out of it
   * is missing, or it has been silent for so long that its end may have been missed.
   * @param {number} rows @param {number} at @param {number} silenceMs
   */
  doubtful(rows, at, silenceMs) {
    const open = this.byUrgency().slice(0, rows);
    const ended = this.newestEnded().slice(0, rows);
    return (
      open.find((run) => !run.whole) ??
      ended.find((run) => !run.whole && (run.spent === null || run.acceptedAt === null)) ??
      open.find((run) => at - run.heardAt > silenceMs)
    );
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
    return [...this.ended.values()].reverse().sort((a, b) => (b.endedAt ?? 0) - (a.endedAt ?? 0));
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
    fidelity: null,
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
    heardAt: at,
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
  run.fidelity = data.fidelity ?? run.fidelity;
  run.verdict = data.quote?.verdict ?? run.verdict;
  run.usual = data.quote?.p90_s ?? run.usual;
  if (data.error) {
    const { kind, message } = data.error;
    run.error = { kind: String(kind), message: String(message).slice(0, MESSAGE_CHARS_MAX) };
  }
  if (data.state === "succeeded" && !data.error) run.error = null; // what failed on the way was made good
  if (data.retracted_by) run.error = { kind: "retracted", message: `by the run ${data.retracted_by}` };
  if (data.invocations) takeSteps(run, data);
  else run.stepsTotal = Math.max(run.stepsTotal, (data.invocations_total ?? 0) + (data.jobs_total ?? 0));
}

/** @param {Run} run @param {any} data a whole view of the run */
function takeSteps(run, data) {
  const all = [...data.invocations, ...(data.jobs ?? []).map(asStep)];
  const open = all.filter((one) => !FINAL.has(one.state));
  run.stepsTotal = (data.invocations_total ?? all.length) + (data.jobs_total ?? 0);
  run.stepsEnded = all.length - open.length;
  run.steps.clear();
  for (const one of open.slice(0, STEPS_MAX)) run.steps.set(one.invocation_id, step(one));
}

/** @param {any} data @returns {Step} */
const step = (data) => ({
  function: String(data.function),
  state: String(data.state),
  attempts: data.attempts ?? 0,
  job: data.job ?? null,
});

/** @param {any} job */
const asStep = (job) => ({
  invocation_id: job.job_id,
  function: `job ${job.native_id ?? ""}`.trim(),
  state: job.state,
  job: { native: job.native_id ?? null, site: job.site ?? null },
});

/** @param {Run} run the lower, the more urgent */
function urgency(run) {
  if (run.answeredAt !== null) return Number.MAX_VALUE;
  return run.deadline ?? Number.MAX_SAFE_INTEGER;
}
