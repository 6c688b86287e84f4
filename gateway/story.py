"""From facts of the log to what is told of them: pure, but for what a ``Teller`` has to look up.

``run`` and ``invocation`` events carry those fields of ``GET /v1/runs/{id}`` that the fact tells; fields that are not
there stay as they were. ``progress`` carries ``fraction`` and ``note``, ``log`` carries ``level`` and ``text``.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import structs

from gateway.runs import RunBook
from headrace.clock import format_instant, maybe_instant
from headrace.errors import NotFound, Unavailable
from headrace.failures import size_text
from headrace.joblog import JOB, Held, Report, Submitted
from headrace.model import FINAL
from headrace.wire import Attempt, Cancel, Invocation, Moved, Note, Outcome, RunEnd, Started, decode
from streams.record import RunRecord, moves_of
from streams.stored import Stored
from streams.topology import kind_of

REMEMBERED_MAX = 10_000

Data = dict[str, Any]
Told = list[tuple[str, Data]]


def events_of(stored: Stored) -> Told:
    """Return the events (name, data) that a message of the log makes; none for what is of no interest outside.

    One that cannot be read makes none: a stream that broke off at it would break off there for ever.
    """
    try:
        return _read(stored)
    except msgspec.MsgspecError:
        return []


def _read(stored: Stored) -> Told:
    match kind_of(stored.subject):
        case "work":
            return _queued(decode(stored.body, Invocation), stored)
        case "job":
            return _job_waits(decode(stored.body, Invocation), stored)
        case "submit":
            return _submitted(decode(stored.body, Submitted))
        case "held":
            return _held(decode(stored.body, Held))
        case "start":
            return _started(decode(stored.body, Started))
        case "try":
            return _tried(decode(stored.body, Attempt))
        case "done":
            return _ended(decode(stored.body, Outcome), stored)
        case "end":
            end = decode(stored.body, RunEnd)
            return [("run", {"run_id": end.run_id, "state": end.state, "ended_at": format_instant(stored.at)})]
        case "cancel":
            return _canceled(decode(stored.body, Cancel), stored)
        case "note":
            return _noted(decode(stored.body, Note))
        case "report":
            return _reported(decode(stored.body, Report))
        case _:
            return []


def _queued(work: Invocation, stored: Stored) -> Told:
    told: Told = []
    if work.parent_id is None:
        event = work.event
        told.append(
            (
                "run",
                {
                    "run_id": work.run_id,
                    "route": work.route,
                    "function": work.function,
                    "state": "accepted",
                    "event": None if event is None else {"id": event.id, "source": event.source, "type": event.type},
                    "accepted_at": format_instant(work.accepted_at),
                    "deadline": maybe_instant(work.deadline),
                    "quote": work.quote,
                },
            )
        )
    told.append(
        (
            "invocation",
            {
                "run_id": work.run_id,
                "invocation_id": work.invocation_id,
                "parent_id": work.parent_id,
                "function": work.function,
                "version": work.version,
                "state": "queued",
                "queued_at": format_instant(stored.at),
            },
        )
    )
    return told


def _job_waits(work: Invocation, stored: Stored) -> Told:
    site = stored.subject.split(".")[2]
    told: Told = [("job", {**_job_head(work), "site": site, "state": "new", "native_id": None})]
    for move in moves_of(work)[-1:]:
        head = {"run_id": work.run_id, "invocation_id": work.invocation_id, "at": format_instant(move.at)}
        told.append(("log", {**head, "level": "info", "text": f"moved from {move.site} to {site}: {move.why}"}))
    return told


def _submitted(fact: Submitted) -> Told:
    data = {
        "run_id": fact.run_id,
        "job_id": fact.invocation_id,
        "site": fact.site,
        "native_id": fact.native_id,
        "state": "queued",
        "submitted_at": format_instant(fact.at),
    }
    return [("job", data)]


def _held(fact: Held) -> Told:
    head = {"run_id": fact.run_id, "invocation_id": fact.invocation_id, "at": format_instant(fact.at)}
    job = {"run_id": fact.run_id, "job_id": fact.invocation_id, "site": fact.site, "state": "new", "why": fact.why}
    return [("job", job), ("log", {**head, "level": "info", "text": f"it is not submitted yet: {fact.why}"})]


def _job_head(fact: Invocation | Started | Attempt | Outcome) -> Data:
    return {"run_id": fact.run_id, "job_id": fact.invocation_id, "parent_id": fact.parent_id}


def _job_ended(done: Outcome) -> Told:
    if done.job is None:
        return [("job", {**_job_head(done), "state": "failed", "error": done.error})]
    job = done.job
    data = {
        **_job_head(done),
        "site": job.site,
        "native_id": job.native_id,
        "state": job.state,
        "submitted_at": maybe_instant(job.submitted_at),
        "started_at": maybe_instant(job.started_at),
        "ended_at": maybe_instant(job.ended_at),
        "exit_code": job.exit_code,
        "reason": job.reason,
        "error": done.error,
    }
    return [("job", data)]


def _started(start: Started) -> Told:
    if start.function == JOB:
        return [("job", {**_job_head(start), "state": "active", "started_at": format_instant(start.started_at)})]
    return [
        ("run", {"run_id": start.run_id, "state": "running"}),
        (
            "invocation",
            {
                "run_id": start.run_id,
                "invocation_id": start.invocation_id,
                "parent_id": start.parent_id,
                "function": start.function,
                "version": start.version,
                "state": "running",
                "attempts": start.attempt,
                "started_at": format_instant(start.started_at),
                "worker": start.worker,
            },
        ),
    ]


def _tried(attempt: Attempt) -> Told:
    if attempt.function == JOB:
        error = attempt.error
        return [
            ("job", {**_job_head(attempt), "state": "new", "native_id": None, "reason": error.kind, "error": error})
        ]
    return [
        (
            "invocation",
            {
                "run_id": attempt.run_id,
                "invocation_id": attempt.invocation_id,
                "parent_id": attempt.parent_id,
                "function": attempt.function,
                "version": attempt.version,
                "state": "queued",
                "attempts": attempt.attempt,
                "started_at": format_instant(attempt.started_at),
                "worker": attempt.worker,
                "error": attempt.error,
                "retry_at": format_instant(attempt.retry_at),
            },
        )
    ]


def _invocation_ended(done: Outcome) -> tuple[str, Data]:
    return (
        "invocation",
        {
            "run_id": done.run_id,
            "invocation_id": done.invocation_id,
            "parent_id": done.parent_id,
            "function": done.function,
            "version": done.version,
            "state": done.state,
            "attempts": done.attempts,
            "started_at": format_instant(done.started_at),
            "ended_at": format_instant(done.ended_at),
            "worker": done.worker,
            "error": done.error,
        },
    )


def _ended(done: Outcome, stored: Stored) -> Told:
    told: Told = [_invocation_ended(done)] if done.function != JOB else _job_ended(done)
    run: Data = {"run_id": done.run_id, "route": done.route, "state": "running"}
    answered = done.answer is not None
    if done.end is not None:
        run |= {"state": done.end.state, "ended_at": format_instant(stored.at), "time_ledger": done.end.spent}
        if done.end.error is not None:
            run["error"] = done.end.error
        answered = answered or done.end.state == "succeeded"
    if answered:
        run["answered_at"] = format_instant(stored.at)
        run["time_to_solution_s"] = max(0.0, stored.at - done.accepted_at)
    if done.deadline is not None and (answered or done.end is not None):
        run["deadline_met"] = answered and stored.at <= done.deadline
    if done.fidelity is not None and answered:
        run["fidelity"] = done.fidelity
    if done.end is not None or answered or done.parent_id is None:
        told.append(("run", run))
    return told


def _canceled(cancel: Cancel, stored: Stored) -> Told:
    if cancel.by is not None:
        return [("run", {"run_id": cancel.run_id, f"{cancel.by.kind}_by": cancel.by.run_id})]
    error = {"kind": "canceled", "message": cancel.reason or "the run was canceled"}
    run = {"run_id": cancel.run_id, "state": "canceled", "ended_at": format_instant(stored.at), "error": error}
    return [("run", run)]


def _noted(note: Note) -> Told:
    head = {"run_id": note.run_id, "invocation_id": note.invocation_id, "at": format_instant(note.at)}
    told: Told = [("log", {**head, "level": level, "text": text}) for level, text in note.lines]
    if note.fraction is not None:
        told.append(("progress", {**head, "fraction": note.fraction, "note": note.text}))
    if note.moved is not None:
        told.append(("progress", {**head, **_staged(note.moved)}))
    return told


def _reported(report: Report) -> Told:
    """Tell how far a job says it is, and that it was heard; what has become of it, its agent tells."""
    at = format_instant(report.at)
    job = {"run_id": report.run_id, "job_id": report.invocation_id, "site": report.site, "heard_at": at}
    head = {"run_id": report.run_id, "invocation_id": report.invocation_id, "at": at}
    told: Told = [("job", job)]
    if report.fraction is not None:
        told.append(("progress", {**head, "fraction": report.fraction, "note": report.text}))
    elif report.text:
        told.append(("log", {**head, "level": "info", "text": report.text}))
    return told


def _staged(moved: Moved) -> Data:
    done, total = moved.bytes_done, moved.bytes_total
    return {
        "fraction": done / total if total else 1.0,
        "note": f"staged {size_text(done)} of {size_text(total)}",
        "uri": moved.uri,
        "bytes_done": done,
        "bytes_total": total,
    }


def run_event(record: RunRecord) -> tuple[str, Data]:
    """Return a ``run`` event that tells all that is known of a run."""
    answered = record.answered_at
    return (
        "run",
        {
            "run_id": record.run_id,
            "route": record.route,
            "function": record.function,
            "state": record.state,
            "accepted_at": format_instant(record.accepted_at),
            "deadline": maybe_instant(record.deadline),
            "deadline_met": record.deadline_met,
            "answered_at": maybe_instant(answered),
            "ended_at": maybe_instant(record.ended_at),
            "time_to_solution_s": None if answered is None else max(0.0, answered - record.accepted_at),
            "time_ledger": record.spent,
            "error": record.error,
            "superseded_by": record.superseded_by,
            "retracted_by": record.retracted_by,
            "fidelity": record.fidelity,
            "answers": len(record.answers),
        },
    )


def as_of(record: RunRecord, at: float) -> RunRecord:
    """Return an answered run as it was at an instant before its end."""
    answers = [each for each in record.answers if each.at <= at]
    fidelity = answers[-1].fidelity if answers else record.fidelity
    return structs.replace(record, state="running", ended_at=None, error=None, answers=answers, fidelity=fidelity)


def text_of(seq: int, told: Told) -> bytes:
    """Return events as they go over the wire, the id on the last of them."""
    parts: list[bytes] = []
    for number, (name, data) in enumerate(told, 1):
        head = b"id: %d\n" % seq if number == len(told) else b""
        parts.append(b"%sevent: %s\ndata: %s\n\n" % (head, name.encode(), msgspec.json.encode(data)))
    return b"".join(parts)


class Teller:
    """Tells one client what happens. What single facts do not say of a run, it looks up or remembers."""

    def __init__(self, book: RunBook) -> None:
        self._book = book
        self._answered: dict[str, None] = {}
        self._canceled: dict[str, None] = {}

    async def tell(self, stored: Stored) -> Told:
        """Return the events of a fact."""
        told = events_of(stored)
        kind = kind_of(stored.subject)
        if kind == "end" or (kind == "cancel" and told and "state" not in told[0][1]):
            # The end of a run with branches knows neither its deadline nor when it was answered; that a run was
            # superseded or retracted does not tell whether it had ended before.
            return await self._looked_up(told, stored)
        if kind == "done" and any(name == "run" and _may_mislead(data) for name, data in told):
            return await self._looked_up(told, stored)  # a cheaper variant may have answered before
        if kind in ("done", "cancel"):
            return [(name, data) for name, data in told if name != "run" or self._mend(data, kind)]
        return told

    async def _looked_up(self, told: Told, stored: Stored) -> Told:
        """Return the events of a fact with all that is known of its run in place of what the fact says of it."""
        try:
            record = await self._book.record(told[0][1]["run_id"], seq=stored.seq)
        except (NotFound, Unavailable):
            return told
        if record.state == "canceled":
            _remember(self._canceled, record.run_id)
        others = [each for each in told if each[0] != "run"]
        if kind_of(stored.subject) != "done" or record.seq == stored.seq:
            return [*others, run_event(record)]
        # What is known is newer than the fact: where the run had ended before, this did not change it; else it ends
        # later, and what it had then is told then.
        return others if record.seq < stored.seq else [*others, run_event(as_of(record, stored.at))]

    def _mend(self, run: Data, kind: str) -> bool:
        """Take out what an earlier fact made untrue, and say whether the event is to be told at all."""
        run_id = run["run_id"]
        if run_id in self._canceled:
            return False  # what comes after the end of a run does not change it
        if run_id in self._answered:
            for name in ("answered_at", "time_to_solution_s", "deadline_met"):
                run.pop(name, None)
        elif "answered_at" in run and run["state"] == "running":
            _remember(self._answered, run_id)
        if run["state"] in FINAL:
            self._answered.pop(run_id, None)
        if kind == "cancel":
            _remember(self._canceled, run_id)
        return True


def _may_mislead(run: Data) -> bool:
    """Return whether an outcome does not tell how its run stands: of several answers, the best is the answer."""
    return "fidelity" in run or run["state"] == "failed"


def _remember(kept: dict[str, None], run_id: str) -> None:
    kept[run_id] = None
    if len(kept) > REMEMBERED_MAX:
        del kept[next(iter(kept))]
