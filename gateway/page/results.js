// @ts-check
/** Runs that have ended: how long they took, where the time went, and their answers, fetched when somebody looks. */

import { Problem, ask, readSome } from "./api.js";
import { byId, make, say, sync } from "./dom.js";
import { clock, took } from "./time.js";

/** @typedef {import("./runs.js").Run} Run */
/** @typedef {import("./runs.js").Runs} Runs */

const ENDED_ROWS = 15;
const ANSWER_BYTES_MAX = 20_000;

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

// ---- words

/** @param {Run} run */
export const ended = (run) => run.endedAt !== null;
/** @param {Run} run */
export const began = (run) => run.acceptedAt ?? run.seenAt;
/** @param {Run} run seconds */
export const lifetime = (run) => run.took ?? ((run.endedAt ?? began(run)) - began(run)) / 1000;

/** @param {Run} run */
export function spare(run) {
  if (run.deadline === null) return "";
  const s = (run.deadline - began(run)) / 1000 - lifetime(run);
  return run.met === false || s < 0 ? `${took(-s)} late` : `${took(s)} to spare`;
}

/** @param {Run} run how good its answer is, where it is not the full one */
export function worth(run) {
  if (!run.fidelity || run.fidelity.level === 0) return "";
  return `level ${run.fidelity.level} of ${run.fidelity.of - 1} by ${run.fidelity.function}`;
}

/** @param {Run} run why it failed, in one line */
export const failure = (run) => (run.error ? `${run.error.kind}: ${run.error.message.split("\n")[0].slice(0, 200)}` : "");

/** @param {Run} run where most of its time went */
export function mostly(run) {
  const most = spentParts(run.spent ?? {}).sort((a, b) => b.seconds - a.seconds)[0];
  return most ? `mostly ${most.name}, ${took(most.seconds)}` : "";
}

// ---- rows

/** @param {string} name of a part @param {string} [more] */
function swatch(name, more = "") {
  const item = make("li");
  item.append(make("span", `swatch ${name.replace(" ", "-")}`), name + more);
  return item;
}

/** @param {Runs} runs @param {number} at */
export function drawEnded(runs, at) {
  const shown = runs.newestEnded().slice(0, ENDED_ROWS);
  sync(byId("ended"), shown, (run) => run.id, endedRow, (row, run) => fillEnded(row, run, runs.word(run, at)));
  if (shown.length && !byId("parts").firstChild) byId("parts").append(...PARTS.map(([, name]) => swatch(name)));
  say(byId("ended-note"), shown.length ? "" : "No run has ended yet.");
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
  say(spared, run.state === "succeeded" ? [spare(run), worth(run)].filter(Boolean).join(", ") : failure(run));
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
    times.append(swatch(name, ` ${took(seconds)}`));
  }
  const facts = make("p", "facts");
  facts.append("Run ", make("code", "", run.id), run.function ? ` of function ${run.function}` : "");
  if (worth(run)) facts.append(`, answered at ${worth(run)}`, run.error ? ` because the full one failed: ${failure(run)}` : "");
  const answer = make("pre", "answer", "Fetching the answer");
  answer.tabIndex = 0;
  answer.setAttribute("role", "region");
  const failed = run.error && run.state !== "succeeded";
  answer.setAttribute("aria-label", failed ? "Error" : "Answer");
  const note = make("p", "facts");
  body.replaceChildren(facts, ...(times.childElementCount ? [times] : []), answer, note);
  if (failed) return say(answer, `${run.error?.kind}: ${run.error?.message}`);
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
  say(answer, readable ? (type.endsWith("json") ? lay(text) : text) : `${whole ? bytes : `more than ${bytes}`} bytes of ${type || "no stated type"}`);
  if (whole && readable) return;
  note.replaceChildren(readable ? `The first ${ANSWER_BYTES_MAX / 1000} kB. ` : "", "All of it: ", make("code", "", `headrace result ${run.id}`));
}

/**
 * JSON, indented, with a list of plain values on one line. Each literal stays as it is written, because a number that
 * went through JavaScript might come out as another; and a text that was cut off is laid out as well.
 * @param {string} text
 */
function lay(text) {
  const token = /\[(?:[^[\]{}"]|"(?:[^"\\]|\\.)*")*\]|\{\s*\}|"(?:[^"\\]|\\.)*"?|[[\]{},:]|[^\s[\]{},:"]+/g;
  const pad = () => "\n".padEnd(1 + 2 * Math.min(depth, 40));
  let depth = 0;
  let out = "";
  for (const [part] of text.matchAll(token)) {
    if (part === "[" || part === "{") depth++, (out += part + pad());
    else if (part === "]" || part === "}") depth--, (out += pad() + part);
    else if (part === ",") out += part + pad();
    else if (part === ":") out += ": ";
    else out += part.startsWith("[") ? part.replace(/("(?:[^"\\]|\\.)*")|\s*,\s*/g, (_, string) => string ?? ", ") : part;
  }
  return out;
}
