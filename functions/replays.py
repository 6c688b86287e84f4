"""Giving what failed another go: which part of a run is repeated, and the first invocation of the run that does it.

The old run stays as it is. The new one has ids of its own, the functions as they are registered now, and a deadline
that counts from now; its event is the old one's.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from functions.admission import UNKNOWN, Admitted, due_of, guard_subject
from functions.qos import deadline_of, lane
from headrace.joblog import JOB
from headrace.model import Quote
from headrace.names import invocation_id, run_id
from headrace.wire import RETRACTER, SPREADER, FunctionRecord, Invocation, Replay, Replayed, RouteRecord, encode
from streams.log import Record
from streams.threads import membership
from streams.topology import replay_subject, work_subject

From = Literal["invocation", "start"]


class Again(Struct, frozen=True, kw_only=True):
    """What is to be repeated: ``source`` runs again in the event of ``first``, the first invocation of the old run."""

    of: Replayed
    first: Invocation
    source: Invocation
    start: From


def again(first: Invocation, dead: Invocation) -> Again:
    """Return what has to be repeated for an invocation that was given up on.

    One that stood alone in its chain runs again by itself. A branch needs its siblings for what follows, so there the
    whole run starts again; so it does for a batch job, and for what the platform did on behalf of a function.
    """
    alone = dead.slot is None and dead.function not in (SPREADER, RETRACTER, JOB)
    return Again(
        of=Replayed(run_id=dead.run_id, invocation_id=dead.invocation_id),
        first=first,
        source=dead if alone else first,
        start="invocation" if alone else "start",
    )


def function_of(wanted: Again, route: RouteRecord) -> str:
    """Return the name of the function to run: where a run begins, the route says it; else it is the one that died."""
    return route.route.function if wanted.source.parent_id is None else wanted.source.function


def replay(
    wanted: Again,
    *,
    key: str,
    route: RouteRecord,
    function: FunctionRecord,
    now: float,
    quote: Quote = UNKNOWN,
    due: float | None = None,
) -> Admitted:
    """Return the run that gives something another go, with the record that tells the old run of it.

    Its id follows from what is repeated and the key, so a request that comes twice makes one run, and so do those for
    several branches of one run that came with one key. Somebody wants it: it is refused by no strict route, and no
    newer event takes its place.
    """
    first = wanted.first
    origin = wanted.of.invocation_id if wanted.start == "invocation" else wanted.of.run_id
    run = run_id(first.tenant, f"/v1/dead/{origin}", key, route.name)
    deadline = deadline_of(route.route, None, now)
    invocation = Invocation(
        run_id=run,
        invocation_id=invocation_id(run, 0),
        function=function.name,
        version=function.version,
        route=route.name,
        tenant=first.tenant,
        payload=wanted.source.payload,
        accepted_at=now,
        sent_at=now,
        deadline=deadline,
        event=first.event,
        digest=first.digest,
        quote=quote,
        due=due,
        on_late=route.route.on_late,
        places=first.places,
        replays=wanted.of,
    )
    subject = work_subject(lane(due_of(invocation), now), first.tenant, run, invocation.invocation_id)
    accepting = Record(subject, encode(invocation), guard_subject(first.tenant, run))
    # The work comes first: should a power cut tear the unit apart, the dead stay on the list and do not vanish from it.
    return Admitted(records=[accepting, *membership(invocation), told(wanted.of, run, now)], invocation=invocation)


def told(of: Replayed, run: str, now: float) -> Record:
    """Return the record that tells a failed run which new one gave it another go."""
    fact = Replay(run_id=of.run_id, invocation_id=of.invocation_id, by=run, at=now)
    return Record(replay_subject(of.run_id), encode(fact))
