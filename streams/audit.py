"""Is every accepted run on its way, or has it ended? What the log says of one run, judged without a look anywhere else.

Work that was acknowledged and has no outcome is lost: nobody will ever run it. A run of which all work is acknowledged
and has outcomes, and which has no end, is stuck: nobody will ever end it. Acknowledged is what lies at or below the
place up to which a lane's consumer has everything back; it must be asked for before the log is read, because
outcomes are recorded first and acknowledged then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec
from msgspec import Struct

from headrace.wire import Outcome, decode
from streams.stored import Stored
from streams.topology import LaneOf, done_subject, end_subject, kind_of, work_subject

Verdict = Literal["on_its_way", "lost", "stuck", "ended"]


class RunFacts(Struct, kw_only=True):
    """What the log holds of a run: its work as (invocation, lane and tenant, sequence), whose outcome is there, and
    its end.
    """

    work: list[tuple[str, LaneOf, int]] = []
    done: set[str] = set()
    ended: bool = False


def subjects(run: str) -> list[str]:
    """Return the subjects that tell whether a run is on its way; a cancel of any kind ends it."""
    return [work_subject("*", "*", run, "*"), done_subject(run, "*"), end_subject(run), f"hr.cancel.{run}.*"]


def read(found: Iterable[Stored]) -> RunFacts:
    """Return the facts of a run from the messages on its subjects."""
    facts = RunFacts()
    for stored in found:
        tokens = stored.subject.split(".")
        match kind_of(stored.subject):
            case "work":
                facts.work.append((tokens[5], LaneOf(int(tokens[2]), tokens[3]), stored.seq))
            case "done":
                facts.done.add(tokens[3])
                facts.ended = facts.ended or _ends(stored)
            case _:
                facts.ended = True
    return facts


def examine(facts: RunFacts, floors: Mapping[LaneOf, int]) -> Verdict:
    """Return how a run stands that the read model takes for open.

    Args:
        facts: what the log holds of it, read after the floors.
        floors: for each lane of each tenant the sequence up to which all its work is acknowledged. A lane that nobody
            reads has none: its work waits for one who is not there any more.
    """
    if facts.ended:
        return "ended"
    returned = [(identity, seq <= floors.get(lane, 0)) for identity, lane, seq in facts.work]
    if any(is_back and identity not in facts.done for identity, is_back in returned):
        return "lost"
    # A run of which the log holds nothing is lost as well: it was kept for too short a time.
    if not returned:
        return "lost"
    return "stuck" if all(is_back for _, is_back in returned) else "on_its_way"


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
