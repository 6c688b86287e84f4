// @ts-check
/** Draws the headline, what is in flight, the last minute and what is registered. */

import { byId, make, say, sync } from "./dom.js";
import { began, ended, failure, lifetime, mostly, spare, worth } from "./results.js";
import { given, left, took } from "./time.js";

/** @typedef {import("./runs.js").Run} Run */
/** @typedef {import("./runs.js").Runs} Runs */
/** @typedef {import("./rates.js").Rates} Rates */

export const OPEN_ROWS = 25;
const REGISTERED_ROWS = 50;
/** A run is drawn as in flight once it is this old: shorter ones would only flicker. */
const DRAWN_AFTER_MS = 400;
/** For so long a late run leads the page; then one that can still be in time does. */
const LATE_LEADS_MS = 60_000;

// ---- the headline

/** @param {Runs} runs @param {number} at @param {number} quiet seconds without news, if that is too long */
export function drawHeadline(runs, at, quiet) {
  const waiting = drawable(runs, at).filter((one) => one.answeredAt === null);
  const run = waiting.find((one) => one.deadline === null || at - one.deadline < LATE_LEADS_MS) ?? waiting[0] ?? runs.newestEnded()[0] ?? runs.byUrgency()[0];
  const word = !run ? "" : quiet && !ended(run) ? "unknown" : runs.word(run, at);
  byId("headline").dataset.word = word;
  say(byId("word"), run?.state === "succeeded" && word === "on time" ? "done" : word);
  if (run) sentence(run, at);
  else say(byId("says"), "No runs yet.");
  if (quiet) say(byId("more"), `No news from the platform for ${left(quiet)}: this is what was known then.`);
  else say(byId("more"), run ? [where(run, runs.sites), rest(runs, at)].filter(Boolean).join(" · ") : "Send the first: headrace trigger ROUTE");
}

/** @param {Run} run @param {number} at */
function sentence(run, at) {
  const [middle, number, end] = ended(run) ? outcome(run) : promise(run, at);
  const says = byId("says");
  const text = `Run on route ${run.route}${middle}${number}${end}`;
  if (says.textContent === text) return;
  says.replaceChildren("Run on route ", make("strong", "", run.route), middle, make("strong", "number", number), end);
}

/** @param {Run} run @param {number} at @returns {[string, string, string]} */
function promise(run, at) {
  if (run.deadline === null) return [": running for ", left((at - began(run)) / 1000), ", no deadline"];
  const s = (run.deadline - at) / 1000;
  return s >= 0 ? [": due in ", left(s), ""] : [": was due ", left(-s), " ago"];
}

/** @param {Run} run @returns {[string, string, string]} */
function outcome(run) {
  if (run.state !== "succeeded") return [`: ${run.state} after `, took(lifetime(run)), ""];
  return [": answered in ", took(lifetime(run)), [spare(run), worth(run)].map((said) => said && `, ${said}`).join("")];
}

/** @param {Runs} runs @param {number} at how the other open runs are */
function rest(runs, at) {
  /** @type {Record<string, number>} */
  const counts = {};
  for (const run of runs.open.values()) counts[runs.word(run, at)] = (counts[runs.word(run, at)] ?? 0) + 1;
  const said = ["late", "at risk", "on time", "no deadline"].filter((word) => counts[word]);
  return runs.open.size > 1 ? `in flight: ${said.map((word) => `${counts[word]} ${word}`).join(", ")}` : "";
}

/** @param {Run} run which function has it, and how far it is @param {Map<string, string>} sites */
function where(run, sites) {
  if (ended(run)) return failure(run) || mostly(run);
  const steps = [...run.steps.values()];
  const step = steps.find((one) => one.state === "running" || one.state === "active") ?? steps[0];
  const parts = [];
  if (worth(run)) parts.push(`answered at ${worth(run)}, a better answer is on its way`);
  else if (run.answeredAt !== null) parts.push("answered, follow-ups go on");
  if (step) parts.push(`${step.function} ${step.job ? atSite(step.state, step.job, sites) : doing(step)}`);
  else if (run.answeredAt === null) parts.push(`${run.function} ${run.state === "accepted" ? "waits for a worker" : run.state}`);
  if (run.stepsTotal > 1) parts.push(`${run.stepsEnded} of ${run.stepsTotal} done`);
  if (run.fraction !== null) parts.push(`${Math.round(run.fraction * 100)} %`);
  if (run.said) parts.push(run.said);
  return parts.join(", ");
}

/** @param {import("./runs.js").Step} step */
function doing(step) {
  if (step.state !== "queued") return step.attempts > 1 ? `${step.state}, attempt ${step.attempts}` : step.state;
  return step.attempts > 0 ? `failed, waits for attempt ${step.attempts + 1}` : "waits for a worker";
}

/** @type {Record<string, string>} */
const JOB = { new: "waits for", queued: "is in the queue of", held: "is held at", active: "running at" };

/** @param {string} state of a job @param {import("./runs.js").Job} job @param {Map<string, string>} sites */
function atSite(state, { site }, sites) {
  const status = sites.get(site ?? "") ?? "up";
  return `${JOB[state] ?? `${state} at`} ${site ?? "its site"}${status === "up" ? "" : ` (${status})`}`;
}

/** @param {Runs} runs @param {number} at those old enough to be drawn, of which enough is known, the most urgent first */
const drawable = (runs, at) => runs.byUrgency().filter((run) => run.acceptedAt !== null && at - run.seenAt >= DRAWN_AFTER_MS);

// ---- in flight

/** @param {Runs} runs @param {number} at */
export function drawOpen(runs, at) {
  const shown = drawable(runs, at);
  sync(byId("open"), shown.slice(0, OPEN_ROWS), (run) => run.id, openRow, (row, run) => tickRow(row, run, runs, at));
  const more = shown.length - OPEN_ROWS;
  say(byId("flight-count"), runs.overflown ? `over ${runs.open.size}` : String(runs.open.size));
  say(byId("open-note"), more > 0 ? `The ${OPEN_ROWS} most urgent are shown.` : shown.length ? "" : runs.open.size ? "All have just begun." : "Nothing is in flight.");
}

/** @param {Run} run */
function openRow(run) {
  const row = make("li", "row");
  const bar = make("span", "bar");
  bar.setAttribute("aria-hidden", "true");
  bar.append(make("span", "fill"));
  const route = make("span", "route", run.route);
  route.title = `Run ${run.id}`;
  row.append(make("span", "word"), " ", route, " ", make("span", "where"), " ");
  row.append(make("span", "left"), bar);
  return row;
}

/** @param {HTMLElement} row @param {Run} run @param {Runs} runs @param {number} at */
function tickRow(row, run, runs, at) {
  const [word, , place, due, bar] = /** @type {HTMLElement[]} */ ([...row.children]);
  row.dataset.word = runs.word(run, at);
  say(word, row.dataset.word);
  const usual = runs.usual(run.route);
  const hopeless = run.verdict === "infeasible" ? "; not expected in time" : "";
  say(place, where(run, runs.sites) + (usual ? `; usually ${took(usual.p50)}` : "") + hopeless);
  const whole = run.deadline === null ? 0 : run.deadline - began(run);
  const rest = run.deadline === null ? 0 : run.deadline - at;
  if (run.deadline === null) say(due, `${left((at - began(run)) / 1000)} so far`);
  else say(due, rest >= 0 ? `${left(rest / 1000)} left of ${given(whole / 1000)}` : `${left(-rest / 1000)} over`);
  const part = run.deadline === null ? (run.fraction ?? 0) : whole > 0 ? Math.min(1, Math.max(0, rest / whole)) : 0;
  /** @type {HTMLElement} */ (bar.firstElementChild).style.transform = `scaleX(${part.toFixed(4)})`;
}

// ---- the last minute

/** @param {Rates} rates @param {number} at @param {number} since when counting began */
export function drawRates(rates, at, since) {
  const minute = rates.lastMinute(at);
  for (const [id, what] of /** @type {const} */ ([["in", "began"], ["out", "ended"], ["failed", "failed"]])) {
    const sum = minute.reduce((all, second) => all + second[what], 0);
    say(byId(`rate-${id}`), String(sum));
    byId(`rate-${id}`).dataset.some = String(sum > 0);
  }
  const top = Math.max(1, ...minute.map((second) => Math.max(second.began, second.ended)));
  for (const [id, what] of /** @type {const} */ ([["in", "began"], ["out", "ended"]])) {
    const points = minute.map((second, i) => `${i},${(19 - (18 * second[what]) / top).toFixed(1)}`);
    byId(`spark-${id}`).setAttribute("points", points.join(" "));
  }
  const seconds = Math.floor((at - since) / 1000);
  say(byId("rates-note"), seconds < 60 ? `Counted since this page opened, ${left(seconds)} ago.` : "");
}

// ---- what is registered

/** @typedef {{name: string, text: string}} Line */

/** @param {Line[]} routes @param {Line[]} functions */
export function drawRegistered(routes, functions) {
  byId("routes").replaceChildren(...routes.slice(0, REGISTERED_ROWS).map(line));
  byId("functions").replaceChildren(...functions.slice(0, REGISTERED_ROWS).map(line));
  const none = routes.length + functions.length === 0;
  const many = Math.max(routes.length, functions.length) > REGISTERED_ROWS;
  say(byId("registered-note"), none ? "Nothing yet: headrace deploy FILE.py" : many ? "All: headrace routes, headrace functions" : "");
}

/** @param {Line[]} sites */
export function drawSites(sites) {
  byId("places").hidden = false;
  byId("sites").replaceChildren(...sites.slice(0, REGISTERED_ROWS).map(line));
}

/** @param {Line} item */
function line({ name, text }) {
  const row = make("li");
  row.append(make("span", "name", name), " ", make("span", "what", text));
  return row;
}
