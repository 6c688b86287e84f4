// @ts-check
/** The live page: opens the door, follows the platform, and draws at a pace that people can read. */

import { Problem, askJson, dropToken, hasToken, keepToken, takeTokenFromAddress } from "./api.js";
import { Rates, Runs } from "./runs.js";
import { Feed } from "./stream.js";
import { clock, now } from "./time.js";
import { byId, drawEnded, drawHeadline, drawOpen, drawRates, drawRegistered, say } from "./view.js";

/** @typedef {import("./stream.js").Message} Message */

const CALM_MS = 250;
const BUSY_MS = 1000;
const BUSY_CHANGES = 8;
const QUIET_S_MAX = 12;
const REGISTERED_EVERY_MS = 30_000;

const runs = new Runs();
const rates = new Rates();
/** @type {Feed | null} */
let feed = null;
let since = now();
let pausedAt = 0;
let changes = 0;
let drawnAt = 0;
let scheduled = false;
let registeredAt = 0;
let filling = false;

// ------------------------------------------------------------------ the door

/** @param {Problem | null} problem */
function showDoor(problem) {
  close();
  say(byId("door-why"), problem ? `The platform did not accept this token. ${problem.hint}`.trim() : "This page shows runs to those who hold the platform's token.");
  byId("door").hidden = false;
  byId("main").hidden = true;
  byId("pause").hidden = true;
  say(byId("status"), problem ? "Token refused" : "Token needed");
  byId("status").dataset.state = "stale";
  byId("token").focus();
}

function enter() {
  close();
  byId("door").hidden = true;
  byId("main").hidden = false;
  byId("pause").hidden = false;
  const opened = new Feed("v1/stream", { opened: snapshot, messages: takeAll, refused, changed: showStatus });
  feed = opened;
  void opened.run();
  showStatus();
}

function close() {
  feed?.close();
  feed = null;
}

/** @param {Problem} problem */
function refused(problem) {
  dropToken();
  showDoor(problem);
}

// ------------------------------------------------------------------ what comes in

async function snapshot() {
  const page = await askJson("v1/runs?limit=50");
  runs.reset(page.runs, now());
  since = now();
  registeredAt = 0;
  drawnAt = 0;
  changed();
}

/** @param {Message[]} batch */
function takeAll(batch) {
  for (const message of batch) {
    try {
      takeOne(message.event, JSON.parse(message.data));
    } catch {
      // One message that cannot be read must not stop those behind it.
    }
  }
}

/** @param {string} event @param {any} data */
function takeOne(event, data) {
  const at = now();
  if (event === "run") {
    const { began, ended, run } = runs.take(data, at);
    if (began && data.state === "accepted") rates.count("began", at);
    if (ended) rates.count("ended", at);
    if (ended && run.state === "failed") rates.count("failed", at);
  } else if (event === "invocation") runs.takeStep(data);
  else if (event === "progress" || event === "log") runs.takeNote(data);
  else return;
  changed();
}

/** Fetch what the stream left out of the newest results, one at a time, and only of those that are on the page. */
async function fillIn() {
  if (filling || pausedAt) return;
  const run = runs.newestEnded().slice(0, 10).find((one) => !one.whole && (one.spent === null || one.acceptedAt === null));
  if (!run) return;
  filling = true;
  run.whole = true;
  try {
    runs.take(await askJson(`v1/runs/${encodeURIComponent(run.id)}`), now());
    changed();
  } catch {
    // It is drawn without its time ledger.
  } finally {
    filling = false;
  }
}

async function readRegistered() {
  if (pausedAt || document.hidden || !feed?.connected || Date.now() - registeredAt < REGISTERED_EVERY_MS) return;
  registeredAt = Date.now();
  try {
    const [routes, functions] = await Promise.all([askJson("v1/routes"), askJson("v1/functions")]);
    drawRegistered(routes.routes.map(routeLine), functions.functions.map(functionLine));
  } catch {
    // The stream says whether the platform is there; the next round tries again.
  }
}

/** @param {any} view */
function routeLine(view) {
  const { name, route } = view;
  const filter = Object.values(route.filter ?? {}).join(" ");
  const due = route.deadline ? `within ${route.deadline}` : "no deadline";
  return { name, text: [`to ${route.function}`, due, filter && `for ${filter}`].filter(Boolean).join(", ") };
}

/** @param {any} view */
function functionLine(view) {
  return { name: view.name, text: `version ${view.version}` };
}

// ------------------------------------------------------------------ what is drawn

/** Draw soon: at once where little happens, once a second where nobody could read faster anyway. */
function changed() {
  changes += 1;
  if (scheduled || pausedAt) return;
  scheduled = true;
  const every = changes > BUSY_CHANGES ? BUSY_MS : CALM_MS;
  setTimeout(() => requestAnimationFrame(draw), Math.max(0, drawnAt + every - Date.now()));
}

function draw() {
  scheduled = false;
  if (pausedAt || byId("main").hidden) return;
  drawnAt = Date.now();
  changes = 0;
  const at = now();
  drawHeadline(runs, at);
  drawOpen(runs, at);
  drawEnded(runs, at);
}

function tick() {
  showStatus();
  if (pausedAt || byId("main").hidden || document.hidden) return;
  if (!scheduled) requestAnimationFrame(draw);
  drawRates(rates, now(), since);
  void readRegistered();
  void fillIn();
}

function showStatus() {
  if (!feed) return;
  const status = byId("status");
  const quiet = Math.floor((Date.now() - feed.heardAt) / 1000);
  const [state, text] = statusOf(quiet);
  status.dataset.state = state;
  say(status, text);
}

/** @param {number} quiet seconds without a byte @returns {[string, string]} */
function statusOf(quiet) {
  // In steps of five seconds: a screen reader says it each time it changes.
  const age = feed?.heardAt ? `, stale ${quiet - (quiet % 5)} s` : "";
  if (pausedAt) return ["paused", `Paused at ${clock(pausedAt)}`];
  if (!feed?.connected) return ["away", `${feed?.heardAt ? "Reconnecting" : "Connecting"}${quiet >= 5 ? age : ""}`];
  return quiet > QUIET_S_MAX ? ["stale", `No news${age}`] : ["live", "Live"];
}

function togglePause() {
  pausedAt = pausedAt ? 0 : now();
  const button = byId("pause");
  button.setAttribute("aria-pressed", String(pausedAt > 0));
  byId("main").dataset.paused = String(pausedAt > 0);
  drawnAt = 0;
  draw();
  tick();
}

byId("pause").addEventListener("click", togglePause);
byId("door").addEventListener("submit", (event) => {
  event.preventDefault();
  const field = /** @type {HTMLInputElement} */ (byId("token"));
  keepToken(field.value);
  field.value = "";
  enter();
});
addEventListener("hashchange", () => takeTokenFromAddress() && enter());
document.addEventListener("visibilitychange", tick);

takeTokenFromAddress();
if (hasToken()) enter();
else showDoor(null);
setInterval(tick, 1000);
