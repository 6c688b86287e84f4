"""Threads of revisions: events of one source about one thing, of which the highest in rank is the current one.

Each event says in the log that it is a member (``Member``), in the same unit in which its run is accepted. Whoever
settles a member reads all of its thread, so of any two members the one that is later in the log sees the other, and
says whose run is overruled (``Cancel`` with a ``Mark``). What is said follows from the ranks alone, and which mark of
a run counts does not depend on when it was said: every order of arrival ends in the same state.

A retraction takes its whole thread back, what came before and what is still to come. Else each member is superseded by
the next one in rank: one more event of a long thread costs two messages, and not one per member.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from headrace.errors import TooLarge, Unavailable
from headrace.wire import Cancel, Invocation, Mark, Member, Rank, decode, encode
from streams.log import READ_MANY_MAX, UNIT_MESSAGES_MAX, AlreadyThere, Record
from streams.stored import Stored
from streams.topology import cancel_subject, thread_subject

PLAIN, REPLACES, RETRACTS = 0, 1, 2  # the levels that begin a rank

_TRIES_MAX = 20


class ThreadLog(Protocol):
    """What settling asks of the log."""

    async def append(self, unit: list[Record]) -> list[int]:
        """Append all records or none; raises ``AlreadyThere``."""

    async def last_of_each(self, subjects: list[str]) -> list[Stored]:
        """Return the newest message of each subject that matches; raises ``TooLarge`` above 1,000."""


class Settled(NamedTuple):
    """What came of settling: whether the run is overruled itself, and the runs that it overrules."""

    overruled: bool
    over: list[str]


NOTHING_TO_SETTLE = Settled(False, [])


def membership(first: Invocation) -> list[Record]:
    """Return the records that make the run of a first invocation a member of its threads."""
    return [
        Record(
            subject := thread_subject(place.thread, first.run_id),
            encode(Member(run_id=first.run_id, rank=place.rank, at=first.accepted_at)),
            subject,
        )
        for place in first.places
    ]


def decide(run: str, rank: Rank, members: Iterable[Member]) -> dict[str, Mark]:
    """Return who is overruled, and by whom, now that this run of this rank is a member: at most all of the thread.

    Members of the same rank are runs of the same event; they leave each other alone.
    """
    others = [m for m in members if m.rank != rank]
    higher = [m for m in others if m.rank > rank]
    lower = [m for m in others if m.rank < rank]
    top = max([rank, *(m.rank for m in higher)])
    mine = Member(run_id=run, rank=rank, at=0.0)
    if _retracts(top) and not _retracts(rank):
        return {run: _mark(rank, _first(m for m in higher if m.rank == top))}
    marks = {run: _mark(rank, _first(higher))} if higher else {}
    alike = [m for m in lower if _retracts(m.rank) == _retracts(rank)]
    below = max((m.rank for m in alike), default=None)
    taken_back = [m for m in lower if not _retracts(m.rank)] if _retracts(rank) and rank == top else []
    for member in [*(m for m in alike if m.rank == below), *taken_back]:
        marks[member.run_id] = _mark(member.rank, mine)
    return marks


def _retracts(rank: Rank) -> bool:
    return rank[0] == RETRACTS


def _first(members: Iterable[Member]) -> Member:
    return min(members, key=lambda m: (m.rank, m.run_id))


def _mark(rank: Rank, by: Member) -> Mark:
    retracted = _retracts(by.rank) and not _retracts(rank)
    return Mark(kind="retracted" if retracted else "superseded", run_id=by.run_id, rank=by.rank)


class _Said(NamedTuple):
    """That a run is overruled, as one thread has it. A pair of runs may meet in several: one VOEvent cites many."""

    subject: str
    run_id: str
    mark: Mark


async def settle(log: ThreadLog, first: Invocation, now: float) -> Settled:
    """Say in the log what follows from the membership of this run in its threads; to repeat it changes nothing.

    Raises:
        TooLarge: a thread has more than 1,000 members.
        Unavailable: the log does not answer.
    """
    own = {record.subject: record for record in membership(first)}
    for _ in range(_TRIES_MAX):
        try:
            found = await _members(log, first)
            # Without itself in it, what was read is older than its acceptance, or a power cut tore that apart.
            missing = [record for subject, record in own.items() if subject not in {s.subject for s in found}]
            if missing:
                await log.append(missing)
                continue
            said = _decide_all(first, found)
            await _say(log, said, now)
        except AlreadyThere:  # another one settles the same at this moment
            continue
        overruled = {one.run_id for one in said}
        return Settled(first.run_id in overruled, sorted(overruled - {first.run_id}))
    raise Unavailable("the log says that a thread is settled and shows it not", hint="Try again.")


async def foresee(log: ThreadLog, first: Invocation) -> dict[str, Mark]:
    """Return which runs would be overruled, and by whom, if this one were accepted now; nothing is said.

    Raises:
        TooLarge: a thread has more than 1,000 members.
        Unavailable: the log does not answer.
    """
    return {one.run_id: one.mark for one in _decide_all(first, await _members(log, first))} if first.places else {}


async def _members(log: ThreadLog, first: Invocation) -> list[Stored]:
    try:
        return await log.last_of_each([thread_subject(place.thread, "*") for place in first.places])
    except TooLarge as error:
        keys = ", ".join(ascii(place.key)[:80] for place in first.places)
        raise TooLarge(
            f"more than {READ_MANY_MAX:,} events on the route {first.route} share the key {keys}",
            hint="Give the route a key that names one thing, such as the id of one alert.",
        ) from error


def _decide_all(first: Invocation, found: list[Stored]) -> list[_Said]:
    said: list[_Said] = []
    for place in first.places:
        prefix = thread_subject(place.thread, "")
        members = [decode(s.body, Member) for s in found if s.subject.startswith(prefix)]
        for run, mark in decide(first.run_id, place.rank, members).items():
            said.append(_Said(cancel_subject(run, f"{mark.run_id}-{place.thread}"), run, mark))
    return said


async def _say(log: ThreadLog, said: list[_Said], now: float) -> None:
    """Append the marks that are not in the log yet."""
    for start in range(0, len(said), UNIT_MESSAGES_MAX):
        some = said[start : start + UNIT_MESSAGES_MAX]
        known = {stored.subject for stored in await log.last_of_each([one.subject for one in some])}
        new = [
            Record(one.subject, encode(Cancel(run_id=one.run_id, at=now, by=one.mark)), one.subject)
            for one in some
            if one.subject not in known
        ]
        if new:
            await log.append(new)
