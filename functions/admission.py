"""The first invocation of a run: what the gateway appends before it says 202, and what it refuses to append."""

from __future__ import annotations

import hashlib

from msgspec import Struct

from functions.qos import lane
from functions.revisions import ORDINARY, Standing
from headrace.clock import format_instant, maybe_instant
from headrace.errors import Infeasible
from headrace.model import Links, Quote, RunRef
from headrace.names import invocation_id, newest_id, run_id
from headrace.wire import RETRACTER, EventMeta, FunctionRecord, Invocation, Payload, RouteRecord, encode
from streams import newest
from streams.log import Record
from streams.threads import membership
from streams.topology import work_subject

UNKNOWN = Quote()


class Admitted(Struct, frozen=True, kw_only=True):
    """A run about to be accepted: its records, to append as they are, and the invocation in the first of them.

    ``strict`` says that it is not to be accepted where its answer is not expected in time.
    """

    records: list[Record]
    invocation: Invocation
    strict: bool = False

    @property
    def record(self) -> Record:
        """The record that accepts the run; the others say which threads it belongs to, and that it is the newest."""
        return self.records[0]

    @property
    def retraction(self) -> bool:
        """Whether it only takes others back. That makes room, so it is not refused for want of any."""
        return self.invocation.function == RETRACTER


def body_digest(content_type: str, body: bytes) -> str:
    """Return what tells two bodies under one event id apart."""
    h = hashlib.sha256(content_type.encode("utf-8", "replace"))
    h.update(b"\0")
    h.update(body)
    return h.hexdigest()[:32]


def due_of(first: Invocation) -> float | None:
    """Return the instant that the lane of an invocation goes by."""
    return first.deadline if first.due is None else first.due


def guard_subject(tenant: str, run: str) -> str:
    """Return the subject, whatever the lane, on which the first invocation of this run stands."""
    return work_subject("*", tenant, run, invocation_id(run, 0))


def admit(
    *,
    event: EventMeta,
    payload: Payload,
    digest: str,
    route: RouteRecord,
    function: FunctionRecord,
    tenant: str,
    now: float,
    deadline: float | None,
    revises: Standing = ORDINARY,
    quote: Quote = UNKNOWN,
    due: float | None = None,
) -> Admitted:
    """Make the record that accepts a run. Its ids follow from the event and the route, so a repeat makes the same ones.

    The guard spans all lanes: a repeat that comes later has less time left and another lane, and is still a repeat.
    The run of an event that only takes others back is done by the platform itself, however late it comes.
    """
    run = run_id(tenant, event.source, event.id, route.name)
    first = invocation_id(run, 0)
    invocation = Invocation(
        run_id=run,
        invocation_id=first,
        function=RETRACTER if revises.retraction else function.name,
        version="" if revises.retraction else function.version,
        route=route.name,
        tenant=tenant,
        payload=payload,
        accepted_at=now,
        sent_at=now,
        deadline=deadline,
        event=event,
        digest=digest,
        quote=quote,
        on_late="continue" if revises.retraction else route.route.on_late,
        places=revises.places,
        due=due,
        newest=newest_id(tenant, route.name, event.source, event.subject) if route.route.newest_wins else "",
    )
    subject = work_subject(lane(due_of(invocation), now), tenant, run, first)
    accepting = Record(subject, encode(invocation), work_subject("*", tenant, run, first))
    # First the work: should a power cut tear the two apart, whoever runs it says again which threads it belongs to.
    return Admitted(
        records=[accepting, *membership(invocation), *newest.claim(invocation)],
        invocation=invocation,
        strict=route.route.admission == "strict" and not revises.retraction,
    )


def is_feasible(admitted: Admitted) -> bool:
    """Return whether a run may be accepted: its route takes it in any case, or its answer may be there in time."""
    quote = admitted.invocation.quote
    return not admitted.strict or quote is None or quote.verdict != "infeasible"


def check_feasible(admitted: Admitted) -> None:
    """Return if a run may be accepted.

    Raises:
        Infeasible: its route is strict, and the answer is not expected in time.
    """
    first = admitted.invocation
    if is_feasible(admitted) or first.quote is None or first.deadline is None:
        return
    quote = first.quote
    left_s = first.deadline - first.accepted_at
    event_id = "" if first.event is None else first.event.id
    expected = "cannot be there in time" if quote.p50_s is None else f"is expected after {quote.p50_s:.3g} s"
    left = f"its deadline is in {left_s:.3g} s" if left_s > 0.0 else "its deadline has passed"
    raise Infeasible(
        f"the answer to the event {ascii(event_id)[:80]} on the route {first.route} {expected}, and {left}",
        hint="Give it a later deadline; `headrace explain` tells where the time goes. The route's admission is strict.",
        quote=quote,
    )


def links(run: str) -> Links:
    """Return where to go from a run."""
    return Links(self=f"/v1/runs/{run}", result=f"/v1/runs/{run}/result", events=f"/v1/runs/{run}/events")


def reference(first: Invocation, *, duplicate: bool) -> RunRef:
    """Return the promise given at the door for the run that this first invocation began."""
    return RunRef(
        run_id=first.run_id,
        route=first.route,
        state="accepted",
        duplicate=duplicate,
        accepted_at=format_instant(first.accepted_at),
        deadline=maybe_instant(first.deadline),
        quote=first.quote or UNKNOWN,
        links=links(first.run_id),
    )
