"""Is every accepted run on its way, or has it ended? What the log says of one run, judged without a look anywhere else.

Work that was acknowledged and has no outcome is lost: nobody will ever run it. A batch job is acknowledged once its
submission stands in the log behind it, and is on its way until its agent tells of its end. A run of which all work is
acknowledged and has outcomes, and which has no end, is stuck: nobody will ever end it. Acknowledged is what lies at or
below the place up to which a consumer has everything back; it must be asked for before the log is read, because
outcomes and submissions are recorded first and acknowledged then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec
from msgspec import Struct

from headrace.wire import Outcome, decode
from streams.stored import Stored
from streams.topology import (
    JobsOf,
    LaneOf,
    done_subject,
    end_subject,
    job_subject,
    kind_of,
    submit_subject,
    work_subject,
)

# Who reads work: the workers a lane of a tenant, or the agent of a site a tenant's jobs there.
Place = LaneOf | JobsOf
Verdict = Literal["on_its_way", "lost", "stuck", "ended"]


class RunFacts(Struct, kw_only=True):
    """What the log holds of a run: its work as (invocation, who reads it, sequence), whose outcome is there, and its
    end. ``submitted`` has the last sequence at which each job was submitted, by job and site.
    """

    work: list[tuple[str, Place, int]] = []
    submitted: dict[tuple[str, str], int] = {}
    done: set[str] = set()
    ended: bool = False


def subjects(run: str) -> list[str]:
    """Return the subjects that tell whether a run is on its way; a cancel of any kind ends it."""
    return [
        work_subject("*", "*", run, "*"),
        job_subject("*", "*", run, "*"),
        submit_subject(run, "*", "*", "*"),
        done_subject(run, "*"),
        end_subject(run),
        f"hr.cancel.{run}.*",
    ]


def read(found: Iterable[Stored]) -> RunFacts:
    """Return the facts of a run from the messages on its subjects."""
    facts = RunFacts()
    for stored in found:
        tokens = stored.subject.split(".")
        match kind_of(stored.subject):
            case "work":
                facts.work.append((tokens[5], LaneOf(int(tokens[2]), tokens[3]), stored.seq))
            case "job":
                facts.work.append((tokens[5], JobsOf(tokens[2], tokens[3]), stored.seq))
            case "submit":
                facts.submitted[tokens[3], tokens[5]] = stored.seq
            case "done":
                facts.done.add(tokens[3])
                facts.ended = facts.ended or _ends(stored)
            case _:
                facts.ended = True
    return facts


def examine(facts: RunFacts, floors: Mapping[Place, int]) -> Verdict:
    """Return how a run stands that the read model takes for open.

    Args:
        facts: what the log holds of it, read after the floors.
        floors: for each tenant each lane, and each site, the sequence up to which all its work there is acknowledged.
            What nobody reads has none: its work waits for one who is not there, any more or yet.
    """
    if facts.ended:
        return "ended"
    newest = {(identity, place): seq for identity, place, seq in sorted(facts.work, key=lambda each: each[2])}
    at_a_site = {
        identity
        for (identity, place), seq in newest.items()
        if isinstance(place, JobsOf) and facts.submitted.get((identity, place.site), 0) > seq
    }
    open_work = {
        identity
        for (identity, place), seq in newest.items()
        if seq > floors.get(place, 0) or (identity in at_a_site and identity not in facts.done)
    }
    if any(identity not in facts.done and identity not in open_work for identity, _, _ in facts.work):
        return "lost"
    # A run of which the log holds nothing is lost as well: it was kept for too short a time.
    if not facts.work:
        return "lost"
    return "on_its_way" if open_work else "stuck"


def confirmed(before: Mapping[str, Verdict], now: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """Return the verdicts that two rounds in a row have come to, without those that nobody has to mind.

    One round alone may have read a replica that lags, or a read model that does.
    """
    return {run: verdict for run, verdict in now.items() if verdict != "on_its_way" and before.get(run) == verdict}


def _ends(stored: Stored) -> bool:
    try:
        return decode(stored.body, Outcome).end is not None
    except msgspec.MsgspecError:
        return False  # of a release to come, or damaged: somebody has to look at it
