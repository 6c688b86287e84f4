// @ts-check
/** The live page: opens the door, follows the platform, and draws at a pace that people can read. */

import { Problem, askJson, dropToken, hasToken, keepToken, takeTokenFromAddress } from "./api.js";
import { byId, say } from "./dom.js";
import { Rates } from "./rates.js";
import { drawEnded } from "./results.js";
import { Runs } from "./runs.js";
import { Feed } from "./stream.js";
import { clock, now } from "./time.js";
import { OPEN_ROWS, drawHeadline, drawOpen, drawRates, drawRegistered, drawSites } from "./view.js";

/** @typedef {import("./stream.js").Message} Message */

const CALM_MS = 250;
const BUSY_MS = 1000;
const BUSY_CHANGES = 8;
const QUIET_S_MAX = 12;
const REGISTERED_EVERY_MS = 5_000;
const SNAPSHOT_AGAIN_MS = 5_000;
const SILENCE_MS = 10_000;
const ASK_EVERY_MS = 200;

const runs = new Runs();
const rates = new Rates();
/** @type {Map<string, any>} */
const sites = new Map();
/** @type {Feed | null} */
let feed = null;
let since = now();
let pausedAt = 0;
let changes = 0;
let drawnAt = 0;
let scheduled = false;
let registeredAt = 0;
let asking = false;
let partial = false;
let snapshotAt = 0;

// ---- the door

/** @param {Problem | null} problem */
function showDoor(problem) {
  close();
  say(byId("door-why"), problem ? "The platform does not accept this token. It may belong to another platform, or be cut short." : "This page shows runs to those who hold the platform's token.");
  say(byId("h-door"), problem ? "Token not accepted" : "Token needed");
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
  const opened = new Feed("v1/stream", { opened: startAfresh, messages: takeAll, refused, changed: showStatus });
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

// ---- what comes in

/** @returns {Promise<void>} */
function startAfresh() {
  since = now();
  registeredAt = 0;
  return snapshot(true);
}

/** Take in the newest runs, and those that are open however old they are. @param {boolean} [afresh] forget all others */
async function snapshot(afresh = false) {
  snapshotAt = Date.now();
  try {
    const pages = ["limit=50", "state=running&limit=100", "state=accepted&limit=100"].map((query) => askJson(`v1/runs?${query}`));
    const found = await Promise.all(pages);
    if (afresh) runs.clear();
    for (const page of found) runs.takeAll(page.runs, now());
    partial = false;
  } catch (error) {
    // The stream does not need the read model: follow what happens now, and try for the rest again later.
    if (!(error instanceof Problem) || error.status < 500) throw error;
    partial = true;
  }
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
  } else if (event === "invocation") runs.takeStep(data, at);
  else if (event === "job") runs.takeJob(data, at);
  else if (event === "progress" || event === "log") runs.takeNote(data, at);
  else if (event === "site") takeSite(data);
  else return;
  changed();
}

/** @param {any} data a site as it is now */
function takeSite(data) {
  const name = String(data.name);
  runs.sites.set(name, String(data.status));
  drawSites([...sites.set(name, data).values()].map(siteLine));
}

/** Ask about the runs on the page of which something is missing, one at a time: the stream is for speed, this for truth. */
async function resolveDoubts() {
  if (asking || pausedAt || document.hidden || !feed?.connected) return;
  const run = runs.doubtful(OPEN_ROWS, now(), SILENCE_MS);
  if (!run) return;
  asking = true;
  run.whole = true;
  run.heardAt = now();
  try {
    runs.take(await askJson(`v1/runs/${encodeURIComponent(run.id)}`), now());
    changed();
  } catch (error) {
    if (error instanceof Problem && error.status === 404) runs.forget(run.id);
  }
  asking = false;
  setTimeout(resolveDoubts, ASK_EVERY_MS);
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
function routeLine({ name, route }) {
  const filter = Object.values(route.filter ?? {}).join(" ");
  const due = route.deadline ? `within ${route.deadline}` : "no deadline";
  return { name, text: [`to ${route.function}`, due, filter && `for ${filter}`].filter(Boolean).join(", ") };
}

/** @param {any} view */
const functionLine = ({ name, version }) => ({ name, text: version });

/** @param {any} view */
function siteLine({ name, status, detail, gpus, queue }) {
  const free = gpus?.total && gpus.free !== undefined ? `${gpus.free} of ${gpus.total} GPUs free` : "";
  const waiting = queue?.jobs ? `${queue.jobs} jobs waiting` : "";
  return { name, text: [status, detail, free, waiting].filter(Boolean).join(", ") };
}

// ---- what is drawn

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
  drawHeadline(runs, at, quiet() > QUIET_S_MAX ? quiet() : 0);
  drawOpen(runs, at);
  drawEnded(runs, at);
}

function tick() {
  showStatus();
  if (pausedAt || byId("main").hidden || document.hidden) return;
  if (!scheduled) requestAnimationFrame(draw);
  drawRates(rates, now(), since);
  void readRegistered();
  void resolveDoubts();
  if (partial && feed?.connected && Date.now() - snapshotAt > SNAPSHOT_AGAIN_MS) void snapshot().catch(() => {});
}

function showStatus() {
  if (!feed) return;
  const status = byId("status");
  const [state, text] = statusOf(quiet());
  status.dataset.state = state;
  say(status, text);
}

/** Seconds without a byte from the platform. */
const quiet = () => (feed?.heardAt ? Math.floor((Date.now() - feed.heardAt) / 1000) : 0);

/** @param {number} silent seconds @returns {[string, string]} */
function statusOf(silent) {
  // In steps of five seconds: a screen reader says it each time it changes.
  const age = silent >= 5 ? `, stale ${silent - (silent % 5)} s` : "";
  if (pausedAt) return ["paused", `Paused at ${clock(pausedAt)}`];
  if (!feed?.connected) return ["away", `${feed?.heardAt ? "Reconnecting" : "Connecting"}${age}`];
  return silent > QUIET_S_MAX ? ["stale", `No news${age}`] : ["live", partial ? "Live, earlier runs cannot be read now" : "Live"];
}

function togglePause() {
  pausedAt = pausedAt ? 0 : now();
  const button = byId("pause");
  button.setAttribute("aria-pressed", String(pausedAt > 0));
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
