"""What the rungs of a ladder put into the log: pure.

    asked ── runs the full function, or the best variant that fits
      │  while it runs, in time before the deadline:
      ├─ rescue (rung-1, rung-2 ...) ── answers in its place, starts nothing, ends nothing
      │  after a variant has answered:
      └─ full ── without a deadline; what it returns is the better answer, and its end is the run's

None of them ends the run when it fails, because another may answer yet. Who commits last finds the outcomes of the
others in the log, and ends the run; after a crash in between, the work comes again and finds them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from msgspec import Struct, structs

from functions.ladder import Rescue, fidelity_of
from functions.qos import lane
from headrace.errors import UserError
from headrace.model import Fidelity, TimeLedger
from headrace.names import invocation_id
from headrace.wire import Emit, FunctionRecord, Invocation, Outcome, Payload, RunEnd, Rung, encode
from streams.log import Record
from streams.topology import end_subject, work_subject


def placed(invocation: Invocation, record: FunctionRecord) -> Invocation:
    """Return an invocation of a function with variants as the one that is asked for on their ladder."""
    rung = Rung(
        asked=invocation.invocation_id,
        full=record.name,
        full_version=record.version,
        level=0,
        of=1 + len(record.options.variants),
    )
    return structs.replace(invocation, rung=rung)


def taken(invocation: Invocation, level: int, function: str, version: str) -> Invocation:
    """Return the invocation that was asked for as it runs on this rung."""
    assert invocation.rung is not None  # noqa: S101 - who calls has placed it
    rung = structs.replace(invocation.rung, level=level)
    return structs.replace(invocation, function=function, version=version, rung=rung)


def watched(invocation: Invocation) -> bool:
    """Return whether a cheaper rung may have to answer in the place of this one."""
    rung = invocation.rung
    return rung is not None and rung.role != "full" and invocation.slot is None and invocation.deadline is not None


def rescues(invocation: Invocation) -> bool:
    """Return whether this one answers in the place of another one."""
    rung = invocation.rung
    return rung is not None and rung.role == "rescue"


def answers_early(invocation: Invocation) -> bool:
    """Return whether what this one returns is an answer that a better one may follow on."""
    rung = invocation.rung
    return rung is not None and rung.level > 0 and invocation.slot is None


def fidelity(invocation: Invocation) -> Fidelity | None:
    """Return what the outcome of this one is worth; None where its function has no variants."""
    rung = invocation.rung
    return None if rung is None else fidelity_of(rung.level, invocation.function, rung.of)


def rung_id(asked: str, level: int) -> str:
    """Return the id of the rescue of this level."""
    return invocation_id(asked, f"rung-{level}")


def check_only_answers(invocation: Invocation, effects: Sequence[object], answer: Payload | None) -> None:
    """Refuse a rescue that does not answer. What else it asks for is not done: events come from whom it stands in for.

    Raises:
        UserError: it starts follow-ups and gives no answer of its own.
    """
    if answer is None and any(not isinstance(each, Emit) for each in effects):
        raise UserError(
            f"{invocation.function} is a variant that has to answer in time, and leaves the answer to follow-ups",
            hint="Let a variant return its answer itself, or give it with ctx.answer(...).",
            transient=False,
        )


def full_id(asked: str) -> str:
    """Return the id of the full one that follows."""
    return invocation_id(asked, "full")


def of_full(asked: Invocation) -> dict[str, Any]:
    """Return what is particular to the full one that follows on a cheaper rung: nothing presses it any more."""
    rung = asked.rung
    assert rung is not None  # noqa: S101 - who calls has looked
    return {"event": asked.event, "deadline": None, "due": None, "rung": structs.replace(rung, level=0, role="full")}


def put_full(invocation: Invocation, spent: TimeLedger, since: float, now: float) -> Record:
    """Return the record that starts the full one after all cheaper rungs that were tried have failed; see ``put``."""
    rung = invocation.rung
    assert rung is not None  # noqa: S101 - who calls has looked
    return _start(
        invocation,
        now,
        invocation_id=full_id(rung.asked),
        function=rung.full,
        version=rung.full_version,
        not_before=0.0,
        spent=_up_to(spent, since, now),
        **of_full(invocation),
    )


def put(invocation: Invocation, rescue: Rescue, spent: TimeLedger, since: float, now: float) -> Record:
    """Return the record that starts a rescue at its moment, once however often it is appended.

    Args:
        invocation: the one that was asked for, or the rescue before this one.
        rescue: which rung, and when.
        spent: the time ledger up to the instant ``since``.
        since: see above.
        now: the present instant.
    """
    rung = invocation.rung
    assert rung is not None  # noqa: S101 - who calls has looked
    choice = rescue.choice
    # A clock that is behind has the deadline far ahead: no run has longer to go than it had when it was accepted.
    span_s = math.inf if invocation.deadline is None else invocation.deadline - invocation.accepted_at
    at = min(rescue.at, now + span_s)
    return _start(
        invocation,
        now,
        invocation_id=rung_id(rung.asked, choice.level),
        function=choice.function,
        version=choice.version,
        not_before=at if at > now else 0.0,
        due=invocation.deadline,
        spent=_up_to(spent, since, now),
        rung=structs.replace(rung, level=choice.level, role="rescue"),
    )


def _up_to(spent: TimeLedger, since: float, now: float) -> TimeLedger:
    return structs.replace(spent, commit_s=spent.commit_s + max(0.0, now - since))


def _start(invocation: Invocation, now: float, **particular: Any) -> Record:
    made = structs.replace(
        invocation,
        parent_id=invocation.rung.asked if invocation.rung is not None else None,
        sent_at=now,  # by the clock that made not_before: what is waited for is the difference
        digest="",
        quote=None,
        replays=None,
        places=[],
        newest="",
        **particular,
    )
    subject = work_subject(lane(made.deadline, now), made.tenant, made.run_id, made.invocation_id)
    return Record(subject, encode(made), work_subject("*", made.tenant, made.run_id, made.invocation_id))


class Family(Struct, frozen=True, kw_only=True):
    """What the log holds of one ladder: the outcomes that are there, and what was started.

    ``rescues`` are outcomes by level, ``begun`` the levels of all rescues that were started.
    """

    of: int
    asked: Outcome | None = None
    full: Outcome | None = None
    full_begun: bool = False
    rescues: dict[int, Outcome] = {}
    begun: frozenset[int] = frozenset()


FULL: Literal["full"] = "full"


def next_step(family: Family) -> int | Literal["full"] | RunEnd | None:
    """Return what follows from what is there of a ladder: a rung or the full one to begin, the run's end, or nothing.

    Nothing means that another one is under way, or ends the run itself.
    """
    asked, full = family.asked, family.full
    if asked is not None and asked.end is not None:
        return None
    waits = any(level not in family.rescues for level in family.begun) or (family.full_begun and full is None)
    if waits or _goes_well(full) or (asked is not None and asked.state == "succeeded" and not family.full_begun):
        return None
    answered = [each for each in (asked, *family.rescues.values()) if each is not None and each.state == "succeeded"]
    if not answered:
        ran = 0 if asked is None or asked.fidelity is None else asked.fidelity.level
        lower = 1 + max(ran, *family.begun, 0)
        if lower < family.of and (asked is not None or family.begun) and not family.full_begun:
            return lower
        if asked is not None and ran > 0 and not family.full_begun:
            return FULL
    if asked is None:
        return None
    last = full if full is not None else asked
    best = min(answered, key=lambda each: each.fidelity.level if each.fidelity else 0, default=None)
    return RunEnd(
        run_id=asked.run_id,
        state="failed" if best is None else "succeeded",
        answer_id=None if best is None else best.invocation_id,
        error=last.error,
        spent=last.spent,
        ended_at=max(each.ended_at for each in (asked, last, *family.rescues.values())),
    )


def _goes_well(full: Outcome | None) -> bool:
    return full is not None and full.state == "succeeded"


def end_record(end: RunEnd) -> Record:
    """Return the record of the end of a run, once however often it is appended."""
    subject = end_subject(end.run_id)
    return Record(subject, encode(end), subject)
