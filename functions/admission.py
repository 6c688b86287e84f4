"""The first invocation of a run: what the gateway appends before it says 202."""

from __future__ import annotations

import hashlib

from msgspec import Struct

from functions.qos import lane
from functions.revisions import ORDINARY, Standing
from headrace.clock import format_instant, maybe_instant
from headrace.model import Links, Quote, RunRef
from headrace.names import invocation_id, run_id
from headrace.wire import RETRACTER, EventMeta, FunctionRecord, Invocation, Payload, RouteRecord, encode
from streams.log import Record
from streams.threads import membership
from streams.topology import work_subject


class Admitted(Struct, frozen=True, kw_only=True):
    """A run about to be accepted: its records, to append as they are, and the invocation in the first of them."""

    records: list[Record]
    invocation: Invocation

    @property
    def record(self) -> Record:
        """The record that accepts the run; the others say which threads it belongs to."""
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
        quote=Quote(),
        on_late="continue" if revises.retraction else route.route.on_late,
        places=revises.places,
    )
    subject = work_subject(lane(deadline, now), tenant, run, first)
    accepting = Record(subject, encode(invocation), work_subject("*", tenant, run, first))
    # First the work: should a power cut tear the two apart, whoever runs it says again which threads it belongs to.
    return Admitted(records=[accepting, *membership(invocation)], invocation=invocation)


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
        quote=first.quote or Quote(),
        links=links(first.run_id),
    )
