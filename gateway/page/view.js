// @ts-check
/**
 * Draws what `Runs` and `Rates` hold. Text goes in as text nodes only, so whatever a route, an error or an answer says,
 * it is shown and never obeyed. A node is made once per run and then changed where it differs.
 */

import { Problem, ask, readSome } from "./api.js";
import { clock, given, left, took } from "./time.js";

/** @typedef {import("./runs.js").Run} Run */
/** @typedef {import("./runs.js").Runs} Runs */
/** @typedef {import("./runs.js").Rates} Rates */

const OPEN_ROWS = 25;
const ENDED_ROWS = 15;
const REGISTERED_ROWS = 50;
const ANSWER_BYTES_MAX = 20_000;
/** A run is drawn as in flight once it is this old: shorter ones would only flicker. */
const DRAWN_AFTER_MS = 400;
/** For so long a late run leads the page; then one that can still be in time does. */
const LATE_LEADS_MS = 60_000;

/** The parts of the time ledger in the order of the path. */
const PARTS = [
  ["gateway_s", "gateway"],
  ["lane_s", "lane"],
  ["stage_in_s", "stage in"],
  ["queue_s", "queue"],
  ["run_s", "run"],
  ["stage_out_s", "stage out"],
  ["commit_s", "commit"],
];

/** @param {string} id */
export const byId = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/** @param {Element} node @param {string} text */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** @param {string} tag @param {string} [name] @param {string} [text] */
function make(tag, name = "", text = "") {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text) node.textContent = text;
  return node;
}

/**
 * Give `list` one child per item, in order. A child that is open or has the focus stays although its item is gone:
 * nothing is pulled away from under a reader.
 * @template T
 * @param {HTMLElement} list @param {T[]} items @param {(item: T) => string} key
 * @param {(item: T) => HTMLElement} create @param {(node: HTMLElement, item: T) => void} update
 */
function sync(list, items, key, create, update) {
  /** @type {Map<string, HTMLElement>} */
  const have = new Map();
  const wanted = new Set(items.map(key));
  for (const node of /** @type {HTMLElement[]} */ ([...list.children])) {
    const id = node.dataset.key ?? "";
    if (wanted.has(id)) have.set(id, node);
    else if (!node.querySelector("details[open]") && !node.contains(document.activeElement)) node.remove();
  }
  let cursor = list.firstElementChild;
  for (const item of items) {
    const id = key(item);
    const node = have.get(id) ?? create(item);
    node.dataset.key = id;
    update(node, item);
    while (cursor && !wanted.has(/** @type {HTMLElement} */ (cursor).dataset.key ?? "")) cursor = cursor.nextElementSibling;
    if (node === cursor) cursor = cursor.nextElementSibling;
    else list.insertBefore(node, cursor);
  }
}

// ------------------------------------------------------------------ 1. the headline

/** @param {Runs} runs @param {number} at */
export function drawHeadline(runs, at) {
  const open = runs.byUrgency().filter((run) => at - run.seenAt >= DRAWN_AFTER_MS);
  const waiting = open.filter((one) => one.answeredAt === null);
  const run = waiting.find((one) => one.deadline === null || at - one.deadline < LATE_LEADS_MS) ?? waiting[0] ?? runs.newestEnded()[0] ?? runs.byUrgency()[0];
  const word = run ? runs.word(run, at) : "";
  byId("headline").dataset.word = word;
  say(byId("word"), run?.state === "succeeded" && word === "on time" ? "done" : word);
  if (run) sentence(run, at);
  else say(byId("says"), "No runs yet.");
  say(byId("more"), run ? [where(run), rest(runs, at)].filter(Boolean).join(" · ") : "Send the first: headrace trigger ROUTE");
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
  return [": answered in ", took(lifetime(run)), spare(run) && `, ${spare(run)}`];
}

/** @param {Runs} runs @param {number} at how the other open runs are */
function rest(runs, at) {
  /** @type {Record<string, number>} */
  const counts = {};
  for (const run of runs.open.values()) counts[runs.word(run, at)] = (counts[runs.word(run, at)] ?? 0) + 1;
  const said = ["late", "at risk", "on time", "no deadline"].filter((word) => counts[word]);
  return runs.open.size > 1 ? `in flight: ${said.map((word) => `${counts[word]} ${word}`).join(", ")}` : "";
}

/** @param {Run} run */
const ended = (run) => run.endedAt !== null;
/** @param {Run} run */
const began = (run) => run.acceptedAt ?? run.seenAt;
/** @param {Run} run seconds */
const lifetime = (run) => run.took ?? ((run.endedAt ?? began(run)) - began(run)) / 1000;

/** @param {Run} run */
function spare(run) {
  if (run.deadline === null) return "";
  const s = (run.deadline - began(run)) / 1000 - lifetime(run);
  return run.met === false || s < 0 ? `${took(-s)} late` : `${took(s)} to spare`;
}

/** @param {Run} run why it failed, in one line */
const failure = (run) => (run.error ? `${run.error.kind}: ${run.error.message.split("\n")[0].slice(0, 200)}` : "");

/** @param {Run} run where most of its time went */
function mostly(run) {
  const most = spentParts(run.spent ?? {}).sort((a, b) => b.seconds - a.seconds)[0];
  return most ? `mostly ${most.name}, ${took(most.seconds)}` : "";
}

/** @param {Run} run which function has it, and how far it is */
function where(run) {
  if (ended(run)) return failure(run) || mostly(run);
  const steps = [...run.steps.values()];
  const step = steps.find((one) => one.state === "running") ?? steps[0];
  const parts = [];
  if (run.answeredAt !== null) parts.push("answered, follow-ups go on");
  if (step) parts.push(`${step.function} ${step.state === "queued" ? "waits for a worker" : step.state}`);
  else if (run.answeredAt === null) parts.push(`${run.function} ${run.state === "accepted" ? "waits for a worker" : run.state}`);
  if (run.stepsTotal > 1) parts.push(`${run.stepsEnded} of ${run.stepsTotal} done`);
  if (run.fraction !== null) parts.push(`${Math.round(run.fraction * 100)} %`);
  if (run.said) parts.push(run.said);
  return parts.join(", ");
}

// ------------------------------------------------------------------ 2. in flight

/** @param {Runs} runs @param {number} at */
export function drawOpen(runs, at) {
  const shown = runs.byUrgency().filter((run) => at - run.seenAt >= DRAWN_AFTER_MS);
  sync(byId("open"), shown.slice(0, OPEN_ROWS), (run) => run.id, openRow, (row, run) => tickRow(row, run, runs, at));
  const more = shown.length - OPEN_ROWS;
  say(byId("flight-count"), runs.overflown ? `over ${runs.open.size}` : String(runs.open.size));
  say(byId("open-note"), more > 0 ? `The ${OPEN_ROWS} most urgent are shown.` : shown.length ? "" : "Nothing is in flight.");
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
  say(place, where(run) + (usual ? `; usually ${took(usual.p50)}` : ""));
  const whole = run.deadline === null ? 0 : run.deadline - began(run);
  const rest = run.deadline === null ? 0 : run.deadline - at;
  if (run.deadline === null) say(due, `${left((at - began(run)) / 1000)} so far`);
  else say(due, rest >= 0 ? `${left(rest / 1000)} left of ${given(whole / 1000)}` : `${left(-rest / 1000)} over`);
  const part = whole > 0 ? Math.min(1, Math.max(0, rest / whole)) : 0;
  /** @type {HTMLElement} */ (bar.firstElementChild).style.transform = `scaleX(${part.toFixed(4)})`;
}

// ------------------------------------------------------------------ 3. last results

/** @param {Runs} runs @param {number} at */
export function drawEnded(runs, at) {
  const shown = runs.newestEnded().slice(0, ENDED_ROWS);
  sync(byId("ended"), shown, (run) => run.id, endedRow, (row, run) => fillEnded(row, run, runs.word(run, at)));
  say(byId("ended-note"), shown.length ? "" : "No run has ended yet.");
  return shown;
}

/** @param {Run} run */
function endedRow(run) {
  const row = make("li", "row");
  const details = /** @type {HTMLDetailsElement} */ (make("details"));
  const summary = make("summary");
  for (const name of ["word", "route", "took", "spare", "ledger", "ended"]) summary.append(make("span", name), " ");
  const body = make("div", "body");
  details.append(summary, body);
  details.addEventListener("toggle", () => details.open && showAnswer(body, run));
  row.append(details);
  return row;
}

/** @param {HTMLElement} row @param {Run} run @param {import("./runs.js").Word} word */
function fillEnded(row, run, word) {
  const summary = /** @type {HTMLElement} */ (row.querySelector("summary"));
  const [shape, route, time, spared, ledger, end] = /** @type {HTMLElement[]} */ ([...summary.children]);
  row.dataset.word = word;
  say(shape, word);
  say(route, run.route);
  say(time, took(lifetime(run)));
  say(spared, run.state === "succeeded" ? spare(run) : failure(run));
  say(end, run.endedAt === null ? "" : clock(run.endedAt));
  if (run.spent && !ledger.firstChild) ledger.append(stack(run.spent, mostly(run)));
}

/** @param {Record<string, number>} spent the time ledger as one bar @param {string} words the same in words */
function stack(spent, words) {
  const parts = spentParts(spent);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 1");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "stack");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", words || "no time recorded");
  let x = 0;
  for (const { name, share } of parts) {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [key, value] of Object.entries({ x, y: 0, width: share * 100, height: 1 })) rect.setAttribute(key, value.toFixed(3));
    rect.setAttribute("class", `part ${name.replace(" ", "-")}`);
    svg.append(rect);
    x += share * 100;
  }
  return svg;
}

/** @param {Record<string, number>} spent */
function spentParts(spent) {
  const parts = PARTS.map(([key, name]) => ({ name, seconds: Number(spent[key]) || 0 })).filter((one) => one.seconds > 0);
  const sum = parts.reduce((all, one) => all + one.seconds, 0);
  return parts.map((one) => ({ ...one, share: one.seconds / sum }));
}

/** @param {HTMLElement} body @param {Run} run */
async function showAnswer(body, run) {
  const times = make("ul", "legend");
  times.setAttribute("aria-label", "Where the time went");
  for (const { name, seconds } of spentParts(run.spent ?? {})) {
    const item = make("li");
    item.append(make("span", `swatch ${name.replace(" ", "-")}`), `${name} ${took(seconds)}`);
    times.append(item);
  }
  const facts = make("p", "facts");
  facts.append("Run ", make("code", "", run.id), run.function ? ` of function ${run.function}` : "");
  const answer = make("pre", "answer", "Fetching the answer");
  answer.tabIndex = 0;
  answer.setAttribute("role", "region");
  answer.setAttribute("aria-label", run.error ? "Error" : "Answer");
  const note = make("p", "facts");
  body.replaceChildren(facts, ...(times.childElementCount ? [times] : []), answer, note);
  if (run.error) return say(answer, `${run.error.kind}: ${run.error.message}`);
  try {
    await fetchAnswer(run, answer, note);
  } catch (error) {
    say(answer, error instanceof Problem ? error.message : "The platform cannot be reached. Close and open this row to try again.");
    if (error instanceof Problem) say(note, error.hint);
  }
}

/** @param {Run} run @param {HTMLElement} answer @param {HTMLElement} note */
async function fetchAnswer(run, answer, note) {
  const response = await ask(`v1/runs/${encodeURIComponent(run.id)}/result`);
  const type = (response.headers.get("content-type") ?? "").split(";")[0];
  if (response.status === 202) return say(answer, "No answer yet.");
  const readable = type.endsWith("json") || type.startsWith("text/");
  const { text, bytes, whole } = await readSome(response, ANSWER_BYTES_MAX);
  say(answer, readable ? pretty(text, type, whole) : `${whole ? bytes : `more than ${bytes}`} bytes of ${type || "no stated type"}`);
  if (whole && readable) return;
  note.replaceChildren(readable ? `The first ${ANSWER_BYTES_MAX / 1000} kB. ` : "", "All of it: ", make("code", "", `headrace result ${run.id}`));
}

/** @param {string} text @param {string} type @param {boolean} whole */
function pretty(text, type, whole) {
  if (!whole || !type.endsWith("json")) return text;
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

// ------------------------------------------------------------------ 4. the last minute

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
  say(byId("rates-note"), seconds < 60 ? `Counted since this page opened, ${left(seconds)} ago.` : `Highest in one second: ${top}.`);
}

// ------------------------------------------------------------------ 5. what is registered

/** @param {{name: string, text: string}[]} routes @param {{name: string, text: string}[]} functions */
export function drawRegistered(routes, functions) {
  for (const [id, items] of /** @type {const} */ ([["routes", routes], ["functions", functions]])) {
    sync(byId(id), items.slice(0, REGISTERED_ROWS), (item) => item.name, () => {
      const row = make("li");
      row.append(make("span", "name"), " ", make("span", "what"));
      return row;
    }, (row, item) => {
      say(row.children[0], item.name);
      say(row.children[1], item.text);
    });
  }
  const hidden = Math.max(0, routes.length - REGISTERED_ROWS) + Math.max(0, functions.length - REGISTERED_ROWS);
  say(byId("registered-note"), hidden ? `${hidden} more: headrace routes, headrace functions` : routes.length + functions.length ? "" : "Nothing is registered. headrace deploy FILE.py does that.");
}
