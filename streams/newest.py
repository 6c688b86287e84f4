"""Where only the newest event counts: which run is the newest of its kind, and what becomes of those that still wait.

The run of such an event says so in the log (``Newest``), in the same unit in which it is accepted and after its work,
so that a power cut that tears the two apart leaves a run that nobody drops, and never a drop without the run. Whoever
is about to start one reads what stands there last: if a later run does, this one ends as superseded without a start.
What has begun goes on, and so does all that follows from it.

Which of two is the newer one is told by their places in the log, and by no clock.
"""

from __future__ import annotations

from typing import Protocol

from headrace.wire import Cancel, Invocation, Mark, Newest, decode, encode
from streams.log import AlreadyThere, Record
from streams.stored import Stored
from streams.threads import PLAIN
from streams.topology import cancel_subject, newest_subject

WHO = "newest"


class NewestLog(Protocol):
    """What is asked of the log."""

    async def append(self, unit: list[Record]) -> list[int]:
        """Append all records or none; raises ``AlreadyThere``."""

    async def last(self, subject: str) -> Stored | None:
        """Return the newest message on a subject."""


def claim(first: Invocation) -> list[Record]:
    """Return the record that makes the run of a first invocation the newest of its kind; none where each counts."""
    if not first.newest:
        return []
    return [Record(newest_subject(first.newest), encode(Newest(run_id=first.run_id, at=first.accepted_at)))]


async def newest_run(log: NewestLog, key: str) -> str | None:
    """Return the run of the newest event of this key, None if there is none yet.

    Raises:
        Unavailable: the log does not answer.
    """
    stored = await log.last(newest_subject(key))
    return None if stored is None else decode(stored.body, Newest).run_id


async def outdated(log: NewestLog, work: Invocation, seq: int, lease: Record, now: float) -> bool:
    """End a run that has not begun if a newer one took its place, and say whether one did.

    Args:
        log: where both stand.
        work: the first invocation of the run.
        seq: its place in the log.
        lease: takes the invocation over, guarded by what is known of it: where it was begun elsewhere meanwhile, the
            run is not ended.
        now: epoch seconds.

    Raises:
        Unavailable: the log does not answer.
    """
    if not work.newest:
        return False
    stored = await log.last(newest_subject(work.newest))
    if stored is None or stored.seq <= seq:  # without its own claim in the log, a power cut tore its unit apart
        return False
    by = decode(stored.body, Newest).run_id
    if by == work.run_id:
        return False
    mark = Mark(kind="superseded", run_id=by, rank=(PLAIN, float(stored.seq), 0.0, ""))
    subject = cancel_subject(work.run_id, WHO)
    try:
        await log.append([lease, Record(subject, encode(Cancel(run_id=work.run_id, at=now, by=mark)), subject)])
    except AlreadyThere:  # begun elsewhere; or another worker was told the same at this moment
        return await log.last(subject) is not None
    return True
