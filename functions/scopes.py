"""Branches that end together: counting the slots of a scope, and what starts when the last one is full.

The count lives in the log, not in a process. Whoever committed an outcome that fills a slot appends a tally to the
scope's subject, guarded by the sequence of the tally before it, so that tallies form a chain and none overlooks
another. The tally that fills the last slot carries the next step in its own unit. A slot is counted once however often
it is reported, which makes every step safe to repeat after a crash.
"""

from __future__ import annotations

from msgspec import Struct, structs

from functions import trail
from functions.forecast import size_class
from functions.outlook import NOTHING_KNOWN, Outlook
from functions.qos import lane
from headrace.failures import together
from headrace.model import ErrorInfo
from headrace.names import invocation_id
from headrace.wire import GATHER, Gather, Invocation, Outcome, Payload, RunEnd, Slot, Tally, decode, encode
from streams.log import Record
from streams.stored import Stored
from streams.tables import row_key
from streams.topology import end_subject, tally_subject, work_subject


class Fill(Struct, frozen=True, kw_only=True):
    """A slot was filled by an outcome, which stands at ``seq`` in the log and was stored at ``at``."""

    slot: Slot
    outcome: Outcome
    seq: int
    at: float
    failed: bool
    error: ErrorInfo | None = None


class Scope(Struct, kw_only=True):
    """What the tallies of one scope say so far; ``last_seq`` is the sequence of the newest."""

    size: int
    filled: dict[int, int] = {}
    failed: set[int] = set()
    error: ErrorInfo | None = None
    last_seq: int = 0

    def take(self, tally: Tally, seq: int) -> None:
        """Add one tally of the log."""
        for index, outcome_seq in tally.filled:
            self.filled.setdefault(index, outcome_seq)
        self.failed.update(tally.failed)
        if self.error is None:
            self.error = tally.error
        self.last_seq = max(self.last_seq, seq)

    @property
    def full(self) -> bool:
        """Whether every slot is filled."""
        return len(self.filled) >= self.size


def read(size: int, tallies: list[Stored]) -> Scope:
    """Return the scope that these tallies of the log describe."""
    scope = Scope(size=size)
    for stored in tallies:
        scope.take(decode(stored.body, Tally), stored.seq)
    return scope


def tally(
    scope: Scope, fills: list[Fill], now: float, outlook: Outlook = NOTHING_KNOWN
) -> tuple[Tally, list[Record]] | None:
    """Return the tally that counts these fills and the unit to append, or None if all were counted before.

    When it fills the scope and nothing failed, ``then`` starts in the same unit. The tally stands last, for the reason
    that an outcome does.
    """
    fresh = {f.slot.index: f for f in fills if f.slot.index not in scope.filled}
    if not fresh:
        return None
    some = next(iter(fresh.values()))
    failed = [i for i, f in fresh.items() if f.failed]
    error = scope.error or next((f.error for f in fresh.values() if f.failed), None)
    made = Tally(
        run_id=some.outcome.run_id,
        scope=some.slot.scope,
        filled=[(i, f.seq) for i, f in fresh.items()],
        failed=failed,
        error=error,
        after=scope.last_seq,
    )
    subject = tally_subject(made.run_id, made.scope)
    records = [Record(subject, encode(made), subject, scope.last_seq)]
    if len(scope.filled) + len(fresh) >= scope.size and not scope.failed and not failed and some.slot.then is not None:
        outcomes = {**scope.filled, **{i: f.seq for i, f in fresh.items()}}
        latest = max(fresh.values(), key=lambda f: f.seq)
        records.insert(0, _then(latest, [outcomes[i] for i in range(scope.size)], now, outlook))
    return made, records


def _then(latest: Fill, outcomes: list[int], now: float, outlook: Outlook) -> Record:
    slot, by = latest.slot, latest.outcome
    body = encode(Gather(scope=slot.scope, outcomes=outcomes))
    identity = invocation_id(slot.scope, "then")
    due = outlook.due(by.deadline, row_key(by.tenant, slot.then or ""), slot.then_version, size_class(len(body)), now)
    joined = Invocation(
        run_id=by.run_id,
        invocation_id=identity,
        function=slot.then or "",
        version=slot.then_version,
        route=by.route,
        tenant=by.tenant,
        payload=Payload(type=GATHER, body=body, size=len(body)),
        accepted_at=by.accepted_at,
        sent_at=by.ended_at,
        deadline=by.deadline,
        parent_id=slot.opened_by or by.invocation_id,
        slot=slot.parent,
        spent=by.spent,
        depth=slot.depth + 1,
        breadth=slot.breadth,
        on_late=slot.on_late,
        due=due,
        trail=trail.of(by),
    )
    return Record(work_subject(lane(due, now), by.tenant, by.run_id, identity), encode(joined))


def upward(scope: Scope, last: Fill) -> Fill | Record | None:
    """Return what a full scope leads to: a slot around it that is now full, the end of the run, or nothing further.

    Nothing further means that ``then`` runs in the slot around the scope and will fill it.
    """
    slot = last.slot
    if not scope.full or (slot.then is not None and not scope.failed):
        return None
    failed = bool(scope.failed)
    made = last.outcome
    error = together(scope.error, len(scope.failed), slot, made.function, made.invocation_id) if failed else None
    if slot.parent is not None:
        return structs.replace(last, slot=slot.parent, failed=failed, error=error)
    late = error is not None and error.kind == "deadline"
    ended = RunEnd(
        run_id=last.outcome.run_id,
        state="succeeded" if not failed else "canceled" if late else "failed",
        answer_id=None if failed else last.outcome.invocation_id,
        error=error,
        spent=last.outcome.spent,
        ended_at=last.outcome.ended_at,
        trail=[] if failed else trail.of(last.outcome),
    )
    subject = end_subject(ended.run_id)
    return Record(subject, encode(ended), subject)
