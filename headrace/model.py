"""The words of Headrace as types: what users write and read, over HTTP and in Python.

Everything here is frozen and keyword-only. What people write by hand (routes, function options) forbids unknown
fields; what machines exchange skips them, so that old and new versions can talk.
Instants are seconds since 1970-01-01 UTC as ``float`` inside the platform and RFC 3339 text outside; durations are
seconds and carry ``_s``.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

RunState = Literal["accepted", "running", "succeeded", "failed", "canceled"]
InvocationState = Literal["queued", "running", "succeeded", "failed", "canceled", "dead"]
JobState = Literal["new", "queued", "held", "active", "completed", "failed", "canceled"]
Verdict = Literal["on_track", "at_risk", "infeasible", "unknown"]
Admission = Literal["always", "strict"]
OnLate = Literal["continue", "cancel", "degrade"]
SiteStatus = Literal["up", "down", "degraded", "unknown"]

RUN_STATES: dict[RunState, str] = {
    "accepted": "In the log, synced to disk; no function has started yet.",
    "running": "At least one of its invocations has started.",
    "succeeded": "Every invocation ended well; the answer is there. Final.",
    "failed": "An invocation was given up on; `error` says why. Final.",
    "canceled": "Somebody canceled it, or a later event took its place; late outcomes are ignored. Final.",
}
INVOCATION_STATES: dict[InvocationState, str] = {
    "queued": "In the log, waiting for a worker.",
    "running": "A worker's child runs it. Told once it has run for a moment; shorter ones go straight to their end.",
    "succeeded": "Its outcome and effects are committed. Final.",
    "failed": "It could not be done, without an attempt of its own (a member of its map failed), or it is a batch job "
    "that failed, and what was to follow then follows. Final.",
    "canceled": "Its run was canceled before it ended, or had a better answer before it began. Final.",
    "dead": "Its last allowed attempt failed; `headrace dead` lists it. Final.",
}
FINAL: frozenset[str] = frozenset({"succeeded", "failed", "canceled", "dead"})


class Event(Struct, frozen=True, kw_only=True):
    """A fact from outside, with the attributes of CloudEvents 1.0. ``data`` is decoded JSON, text or bytes.

    The pair (``source``, ``id``) names the event: sent twice, it runs once.
    """

    id: str
    source: str
    type: str
    specversion: str = "1.0"
    subject: str | None = None
    time: str | None = None
    datacontenttype: str | None = None
    dataschema: str | None = None
    data: Any = None
    extensions: dict[str, Any] = msgspec.field(default_factory=dict)


class EventFilter(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which events a route takes: each given attribute must be equal, or begin with what follows ``prefix:``."""

    type: str | None = None
    source: str | None = None
    subject: str | None = None


class Revision(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a route tells that an event replaces an earlier one of the same source, or takes it back.

    Either a ``preset`` that knows the notices of a network, or paths: an attribute of the event (``subject``) or a
    place in its JSON data (``data.superevent_id``). Events of one source with the same ``key`` are one thread;
    ``order`` (a number or an RFC 3339 instant, else the event's ``time``) says which of them is later, and one whose
    ``kind`` is among ``retraction`` takes the whole thread back.
    """

    preset: Literal["gcn", "lvk", "voevent"] | None = None
    key: str | None = None
    kind: str | None = None
    retraction: list[str] = []
    order: str | None = None


class Route(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A rule from events to a function. Without a filter it is reached by its name only.

    ``deadline`` counts from acceptance, as "60s", "10m", "1h" or "500ms". What is late goes on, is canceled, or
    (``on_late`` "degrade") is answered in time by a cheaper variant of its function. ``admission`` "strict" refuses an
    event whose answer is not expected in time. With ``newest_wins`` an event that still waits is dropped when a later
    one of the same source and subject is accepted.
    """

    function: str
    filter: EventFilter | None = None
    deadline: str | None = None
    on_late: OnLate = "continue"
    max_in_flight: int | None = None
    revision: Revision | None = None
    admission: Admission = "always"
    newest_wins: bool = False


class FunctionOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What ``@function(...)`` takes. ``timeout`` is a duration as in a route; ``retries`` follow the first attempt.

    ``variants`` names functions that answer the same payload more cheaply, the best one first.
    """

    timeout: str = "60s"
    retries: int = 0
    variants: list[str] = []


class Code(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A function's code by value.

    ``source``: ``files`` maps relative paths to text, ``module`` and ``name`` say what to call in it.
    ``pickle``: ``blob`` is a cloudpickle of the callable, ``files`` its source for reading. Opened in a worker's
    child and nowhere else.
    """

    kind: Literal["source", "pickle"]
    name: str
    module: str = ""
    files: dict[str, str] = msgspec.field(default_factory=dict)
    blob: bytes = b""
    python: str = ""


class DurationView(Struct, frozen=True, kw_only=True):
    """What is expected of a duration, in seconds, and how many were seen so far."""

    p50_s: float
    p90_s: float
    p99_s: float
    observations: int


class FunctionView(Struct, frozen=True, kw_only=True):
    """A registered function, as ``GET /v1/functions/{name}`` shows it.

    ``expected`` tells what was learned of it, as far as anything was: how long it will ``run``, how long it is from its
    start to the ``answer`` of the run, how long from its end is the ``rest`` of the way to it, and how long a first
    invocation will ``wait`` where little else waits.
    """

    name: str
    version: str
    options: FunctionOptions
    registered_at: str
    doc: str = ""
    source: str = ""
    expected: dict[str, DurationView] = {}


class RouteView(Struct, frozen=True, kw_only=True):
    """A route with its name, as ``GET /v1/routes/{name}`` shows it."""

    name: str
    route: Route


class Quote(Struct, frozen=True, kw_only=True):
    """What the platform expects, said at the door. ``unknown`` where there is no history yet."""

    verdict: Verdict = "unknown"
    p50_s: float | None = None
    p90_s: float | None = None


class TimeLedger(Struct, frozen=True, kw_only=True):
    """Where the time of a run went, in seconds along the path to its answer; the parts sum to the whole.

    ``gateway_s``: until the log had the trigger. ``lane_s``: waiting for a worker, for the next attempt, for the end of
    a delay. ``stage_in_s``: bringing payloads and data to the function. ``queue_s``: in the queue of a batch system.
    ``run_s``: running, attempts that failed included. ``stage_out_s``: keeping data. ``commit_s``: until the log had
    what an invocation did and asked for.
    """

    gateway_s: float = 0.0
    lane_s: float = 0.0
    stage_in_s: float = 0.0
    queue_s: float = 0.0
    run_s: float = 0.0
    stage_out_s: float = 0.0
    commit_s: float = 0.0

    def total_s(self) -> float:
        """Return the sum of all parts in seconds."""
        return (
            self.gateway_s
            + self.lane_s
            + self.stage_in_s
            + self.queue_s
            + self.run_s
            + self.stage_out_s
            + self.commit_s
        )


class Fidelity(Struct, frozen=True, kw_only=True):
    """How good an answer is: level 0 is the full function's, ``of - 1`` the cheapest variant's."""

    level: int
    function: str
    of: int


class ErrorInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why something failed.

    ``kind`` is load, user, memory, limit, timeout, lost, deadline, expired, unreadable, map, canceled, superseded,
    retracted, thread or answered.
    """

    kind: str
    message: str
    traceback: str = ""


class Links(Struct, frozen=True, kw_only=True):
    """Where to go from a run: relative URLs."""

    self: str
    result: str
    events: str


class RunRef(Struct, frozen=True, kw_only=True):
    """The promise given at the door: what a 202 carries."""

    run_id: str
    route: str
    state: RunState
    duplicate: bool
    accepted_at: str
    deadline: str | None
    quote: Quote
    links: Links


class EventView(Struct, frozen=True, kw_only=True):
    """The attributes of the event that started a run, without its data."""

    id: str
    source: str
    type: str
    subject: str | None = None
    time: str | None = None


class InvocationView(Struct, frozen=True, kw_only=True):
    """One call of one function in a run."""

    invocation_id: str
    parent_id: str | None
    function: str
    version: str
    state: InvocationState
    attempts: int
    queued_at: str | None
    started_at: str | None = None
    ended_at: str | None = None
    worker: str | None = None
    error: ErrorInfo | None = None


class JobMove(Struct, frozen=True, kw_only=True):
    """A batch job was taken away from ``site``, where it had not begun or was lost, and went on to another one."""

    at: str
    site: str
    why: str


class JobView(Struct, frozen=True, kw_only=True):
    """One batch job of a run. ``reason`` says why it ended as it did where its state does not say all.

    ``why`` says why it waits where its site does not take it now. ``moves`` are the newest ones from one site to
    another, oldest first.
    """

    job_id: str
    site: str
    native_id: str | None
    state: JobState
    submitted_at: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    exit_code: int | None = None
    reason: str = ""
    parent_id: str | None = None
    error: ErrorInfo | None = None
    why: str = ""
    moves: list[JobMove] = []


class ReplayView(Struct, frozen=True, kw_only=True):
    """What a run gives another go: an invocation that was given up on, and the run that failed with it."""

    run_id: str
    invocation_id: str


class AnswerLinks(Struct, frozen=True, kw_only=True, omit_defaults=True, rename="kebab"):
    """Where an answer is, and those before and after it: relative URLs."""

    self: str
    predecessor_version: str | None = None
    successor_version: str | None = None


class AnswerView(Struct, frozen=True, kw_only=True):
    """One of the answers of a run that gave several, each better than the one before."""

    invocation_id: str
    fidelity: Fidelity
    answered_at: str
    in_time: bool | None
    links: AnswerLinks


class RunView(Struct, frozen=True, kw_only=True):
    """A run as ``GET /v1/runs/{id}`` shows it, with its first 1,000 invocations and batch jobs; the totals count all.

    ``thread`` holds the keys by which its event can be revised. Then ``superseded_by`` is the run of the next revision,
    and ``retracted_by`` the run of the event that took it back. Where functions have variants, ``fidelity`` is that of
    the best answer there is, and ``answers`` holds all of them, the first one first; ``answered_at``, ``deadline_met``
    and the time to solution are about the first.
    """

    run_id: str
    route: str
    function: str
    tenant: str
    event: EventView
    state: RunState
    deadline: str | None
    deadline_met: bool | None
    accepted_at: str
    answered_at: str | None
    ended_at: str | None
    time_to_solution_s: float | None
    time_ledger: TimeLedger
    quote: Quote
    invocations: list[InvocationView]
    invocations_total: int
    jobs: list[JobView]
    error: ErrorInfo | None
    links: Links
    replay_of: ReplayView | None = None
    replayed_as: str | None = None
    thread: list[str] = []
    superseded_by: str | None = None
    retracted_by: str | None = None
    fidelity: Fidelity | None = None
    answers: list[AnswerView] = []
    jobs_total: int = 0


class Refusal(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the door would answer instead of a 202, as in a problem."""

    status: int
    title: str
    detail: str
    hint: str = ""


class ChoiceView(Struct, frozen=True, kw_only=True):
    """One way to the answer that was thought of: what runs first, and what is expected of it from acceptance on.

    ``why`` says of one that is not chosen why it is not.
    """

    function: str
    version: str
    quote: Quote
    chosen: bool
    why: str = ""


class PartView(Struct, frozen=True, kw_only=True):
    """A part of the expected time: ``ahead`` (other work that waits now), ``wait`` (the way to a worker), ``run`` (the
    first function) and ``rest`` (all that follows it, up to the answer)."""

    part: Literal["ahead", "wait", "run", "rest"]
    p50_s: float
    p90_s: float


class RouteExplanation(Struct, frozen=True, kw_only=True):
    """What one route would make of an event. All but ``why`` is empty where it does not fire.

    ``duplicate_of`` is the run that an earlier sending started. ``overruled_by`` is the run of a later revision, for
    which this one would end at once; ``overrules`` are the runs that it would end, or replace while they wait.
    ``plan`` holds the ways that were thought of, ``parts`` where the time of the chosen one is expected to go.
    """

    route: str
    fires: bool
    why: str = ""
    function: str | None = None
    version: str | None = None
    deadline: str | None = None
    lane: int | None = None
    quote: Quote | None = None
    duplicate_of: str | None = None
    refused: Refusal | None = None
    overruled_by: str | None = None
    overrules: list[str] = []
    plan: list[ChoiceView] = []
    parts: list[PartView] = []


class EventExplanation(Struct, frozen=True, kw_only=True):
    """What would become of one event, route by route, those that fire first."""

    event: EventView
    routes: list[RouteExplanation]


class Explanation(Struct, frozen=True, kw_only=True):
    """What would come of sending this: nothing was started. ``refused`` says why none of it would be accepted now."""

    refused: Refusal | None
    events: list[EventExplanation]


class RunPage(Struct, frozen=True, kw_only=True):
    """A page of runs, newest first; ``next`` is the cursor of the next page, None at the end.

    ``behind`` says that the newest changes may be missing: the read model had not taken them in.
    """

    runs: list[RunView]
    next: str | None
    behind: bool = False


class AttemptError(Struct, frozen=True, kw_only=True):
    """How one attempt of an invocation failed, when, and on which worker."""

    attempt: int
    at: str
    worker: str
    error: ErrorInfo


class DeadView(Struct, frozen=True, kw_only=True):
    """An invocation that was given up on. ``errors`` tells each failed attempt; ``replayed_as`` the run of its replay.

    ``attempts`` counts attempts that were lost with their worker too, which left no error behind.
    """

    invocation_id: str
    run_id: str
    route: str
    function: str
    version: str
    attempts: int
    at: str
    error: ErrorInfo
    errors: list[AttemptError]
    replayed_as: str | None


class DeadPage(Struct, frozen=True, kw_only=True):
    """A page of dead invocations, newest first; ``next`` and ``behind`` are as in a page of runs."""

    dead: list[DeadView]
    next: str | None
    behind: bool = False


class Replaying(RunRef, frozen=True, kw_only=True):
    """The promise given for a replay: the new run, what it replays, and from where.

    ``invocation``: the dead invocation runs again, with what it was given. ``start``: the whole run does, because the
    dead one was a branch whose siblings are needed for what follows.
    """

    replay_of: ReplayView
    from_: Literal["invocation", "start"] = msgspec.field(name="from")


class Audit(Struct, frozen=True, kw_only=True):
    """What the auditor found at the instant ``at``: every accepted run has ended, or is on its way.

    ``accepted`` and ``ended`` count the runs of which the log has the beginning, ``running`` those that have not ended
    and wait for a worker or are with one; ``difference`` is accepted - ended - running and has to be 0. It is made of
    runs that are ``lost`` (work was acknowledged and has no outcome), ``stuck`` (all work has outcomes and the run no
    end) or ``missed`` (ended in the log, open in the read model); the lists name the first ones.
    """

    at: str
    accepted: int
    ended: int
    running: int
    difference: int
    lost: int = 0
    stuck: int = 0
    missed: int = 0
    lost_runs: list[str] = []
    stuck_runs: list[str] = []
    missed_runs: list[str] = []


class Recorded(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An invocation that has ended, as the log has it; ``stored_at`` is when its outcome was on disk.

    ``due`` is when it should have ended for the answer to be there by the ``deadline`` of its run; ``size`` is the
    class of the size of its payload. ``children`` counts what it started in its run. ``fills`` names the joins that
    waited for it, innermost first, by the invocations that they start. ``answered``: it gave the answer of its run with
    ``ctx.answer``; ``run_state`` is how the run ended, if it ended with this invocation.
    """

    run_id: str
    invocation_id: str
    function: str
    version: str
    tenant: str
    route: str
    state: InvocationState
    accepted_at: str
    queued_at: str
    started_at: str
    ended_at: str
    stored_at: str
    worker: str
    attempts: int = 1
    parent_id: str | None = None
    deadline: str | None = None
    due: str | None = None
    on_late: str = "continue"
    size: int = 0
    children: int = 0
    fills: list[str] = []
    answered: bool = False
    run_state: RunState | None = None


class HistoryPage(Struct, frozen=True, kw_only=True):
    """A page of what has ended, in the order of the log; ``next`` is the cursor of the next page, None at the end.

    ``kept_since`` is the instant of the oldest message that the log still holds, None if it holds none.
    """

    invocations: list[Recorded]
    next: str | None
    kept_since: str | None


class SiteView(Struct, frozen=True, kw_only=True):
    """A facility or cloud that runs jobs, as ``GET /v1/sites/{name}`` shows it.

    ``detail`` says why it is not up, ``since`` since when it is as it is. ``gpus`` and ``nodes`` count the ``total``
    and the ``free`` ones, and nodes the ``unusable`` ones; ``queue`` the ``jobs`` that wait and those ``running``, with
    how long such jobs waited (``wait_p50_s``, ``wait_p90_s``). What cannot be told is not there: of a site that is down
    or unknown nobody can say what is free. One that jobs name and for which no agent ever spoke has no ``kind``.
    """

    name: str
    kind: str
    status: SiteStatus
    gpus: dict[str, int] = msgspec.field(default_factory=dict)
    queue: dict[str, int | float | None] = msgspec.field(default_factory=dict)
    last_seen_at: str | None = None
    nodes: dict[str, int] = {}
    detail: str = ""
    since: str | None = None


class StreamEvent(Struct, frozen=True, kw_only=True):
    """One server-sent event: ``kind`` is run, invocation, job, progress, log, site or steer; resume at ``seq``."""

    seq: int
    kind: str
    data: dict[str, Any]


class Problem(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error over HTTP as RFC 9457 writes it; ``hint`` is the cure.

    ``quote`` comes with the refusal of an event whose answer is not expected in time.
    """

    type: str
    title: str
    status: int
    detail: str
    hint: str = ""
    instance: str | UnsetType = UNSET
    quote: Quote | UnsetType = UNSET
