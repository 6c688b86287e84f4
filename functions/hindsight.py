"""What was recorded, once more under another policy: which deadlines would have been met, which gained, which lost.

The records are those of ``GET /v1/history``. They become pieces of work that come when they came, or so long after what
they follow from as they did, and keep a slot as long as they did; ``functions.simulate`` says when they end then. The
same records under the same policy give the same report, byte for byte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from msgspec import Struct

from functions.forecast import Kind
from functions.order import Work
from functions.policies import policy
from functions.simulate import End, Piece, simulate
from headrace.clock import parse_instant
from headrace.errors import NotFound
from headrace.joblog import JOB
from headrace.model import Recorded

OURS = "headrace"
PLATFORM = "headrace."  # functions of the platform itself, which take no slot
ALL = "all routes"


class Kept(Struct, frozen=True):
    """Deadlines met, and lateness in seconds of the answers there were: p50 and p99; 0 for one in time."""

    met: int
    late_p50_s: float
    late_p99_s: float


class Change(Struct, frozen=True):
    """Deadlines met that were not met before, and deadlines not met that were met before."""

    gained: int
    lost: int


class RouteReport(Struct, frozen=True):
    """The runs of one route: how many, how many with a deadline, and what became of these.

    ``recorded`` is what really happened, ``simulated`` what would have under the policy, ``ours`` what the same
    simulation says of ``headrace``.
    """

    route: str
    runs: int
    with_deadline: int
    recorded: Kept
    simulated: Kept
    ours: Kept
    against_recorded: Change
    against_ours: Change


class Report(Struct, frozen=True):
    """What a policy would have made of the records.

    ``slots_seen`` is how many invocations ran at a time. ``guessed`` counts invocations that were stopped or never
    started: they are taken to last as long as their like, at the least as long as they ran. ``left_out`` counts those
    of which no like is known. Runs that failed, or had not ended, take slots and are not judged: ``not_judged``.
    """

    policy: str
    slots: int
    slots_seen: int
    since: str
    until: str
    invocations: int
    guessed: int
    left_out: int
    not_judged: int
    routes: list[RouteReport]


class _Row(Struct):
    """A record with its instants read."""

    of: Recorded
    queued: float
    started: float
    ended: float
    stored: float
    seconds: float
    place: int = -1


class _Run(Struct):
    """A run: its rows, its deadline, and when it was answered; None if it was not."""

    route: str
    deadline: float | None
    rows: list[_Row]
    answered: float | None
    judged: bool


def _read(records: Iterable[Recorded]) -> list[_Row]:
    """Read the instants; an outcome that was paged twice counts once, and what the platform itself did not at all."""
    rows: dict[str, _Row] = {}
    for one in records:
        if one.function.startswith(PLATFORM) or one.invocation_id in rows:
            continue
        queued, started, ended, stored = (
            parse_instant(text) for text in (one.queued_at, one.started_at, one.ended_at, one.stored_at)
        )
        rows[one.invocation_id] = _Row(one, queued, started, ended, stored, max(0.0, ended - started))
    return list(rows.values())


def _complete(rows: list[_Row]) -> tuple[list[_Row], int, int]:
    """Return the rows that have a duration, how many of these are guessed, and how many have none."""
    like: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.of.state != "canceled":
            like[row.of.function].append(row.seconds)
    usual = {function: sorted(seconds)[len(seconds) // 2] for function, seconds in like.items()}
    guessed = 0
    found: list[_Row] = []
    for row in rows:
        if row.of.state == "canceled":
            if row.of.function not in usual:
                continue
            row.seconds = max(row.seconds, usual[row.of.function])
            guessed += 1
        found.append(row)
    return found, guessed, len(rows) - len(found)


def _askers(records: Iterable[Recorded]) -> dict[str, str]:
    """Return for each batch job what asked for it: what follows the job follows from that, after as long a time."""
    return {one.invocation_id: one.parent_id for one in records if one.function == JOB and one.parent_id is not None}


def _pieces(rows: list[_Row], askers: dict[str, str]) -> list[Piece]:
    """Return the rows as pieces of work, in their order; each learns its place."""
    place_of: dict[str, int] = {}
    parents_of: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        row.place = place
        place_of[row.of.invocation_id] = place
        for joined in row.of.fills:
            parents_of[joined].append(place)
    pieces = []
    for row in rows:
        one = row.of
        parents = parents_of.get(one.invocation_id, [])
        parent = askers.get(one.parent_id or "", one.parent_id)
        if not parents and parent in place_of:
            parents = [place_of[parent]]
        # What it follows from may have ended before the records begin, or be later in them where clocks differ.
        parents = [parent for parent in parents if rows[parent].stored <= row.stored and parent != row.place]
        delay_s = max(0.0, row.queued - max(rows[parent].ended for parent in parents)) if parents else 0.0
        deadline = _instant(one.deadline)
        work = Work(
            id=one.invocation_id,
            tenant=one.tenant,
            arrived=row.queued,
            deadline=_instant(one.due) or deadline,
            if_late=one.on_late,
            late_at=deadline,
            run_at=parse_instant(one.accepted_at),
        )
        kind = Kind(one.function, one.version, "", one.size)
        pieces.append(Piece(work, row.seconds, kind, tuple(parents), delay_s))
    return pieces


def _instant(text: str | None) -> float | None:
    return None if text is None else parse_instant(text)


def _runs(rows: list[_Row], cut: set[str]) -> list[_Run]:
    """Return the runs in the order of their first rows; of those in ``cut`` some work is left out."""
    of: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        of[row.of.run_id].append(row)
    return [_run(mine, run in cut) for run, mine in of.items()]


def _run(rows: list[_Row], cut: bool) -> _Run:
    first = rows[0].of
    began = any(row.of.parent_id is None for row in rows)
    ended = any(row.of.run_state is not None for row in rows)
    whole = began and (ended or len(rows) > sum(row.of.children for row in rows))
    stopped = any(row.of.state == "canceled" for row in rows)
    judged = whole and not cut and all(row.of.state != "dead" for row in rows)
    answered = None if stopped else _answer([(row, row.stored) for row in rows])
    return _Run(first.route, _instant(first.deadline), rows, answered, judged)


def _answer(stored: list[tuple[_Row, float]]) -> float | None:
    """Return when a run is answered: by what gave its answer, else by what ended last."""
    given = [at for row, at in stored if row.of.answered]
    return min(given) if given else max(at for _, at in stored)


def _simulated(run: _Run, ends: Sequence[End]) -> float | None:
    """Return when a run is answered in simulated time, None if it is not."""
    found: list[tuple[_Row, float]] = []
    for row in run.rows:
        end = ends[row.place]
        if end.ending == "done":
            found.append((row, end.at + max(0.0, row.stored - row.ended)))
        elif not any(other.of.answered for other in run.rows):
            return None
    return _answer(found) if found and (len(found) == len(run.rows) or any(r.of.answered for r, _ in found)) else None


def _met(run: _Run, answered: float | None) -> bool:
    return run.deadline is not None and answered is not None and answered <= run.deadline


def _kept(runs: list[_Run], answers: list[float | None]) -> Kept:
    late = sorted(
        max(0.0, answered - run.deadline)
        for run, answered in zip(runs, answers, strict=True)
        if run.deadline is not None and answered is not None
    )
    met = sum(_met(run, answered) for run, answered in zip(runs, answers, strict=True))
    if not late:
        return Kept(met, 0.0, 0.0)
    p50, p99 = (round(late[min(len(late) - 1, len(late) * part // 100)], 6) for part in (50, 99))
    return Kept(met, p50, p99)


def _change(runs: list[_Run], before: list[float | None], now: list[float | None]) -> Change:
    was = [_met(run, answered) for run, answered in zip(runs, before, strict=True)]
    comes = [_met(run, answered) for run, answered in zip(runs, now, strict=True)]
    return Change(
        sum(new and not old for old, new in zip(was, comes, strict=True)),
        sum(old and not new for old, new in zip(was, comes, strict=True)),
    )


def _of_route(route: str, runs: list[_Run], ends: Sequence[End], ours: Sequence[End]) -> RouteReport:
    due = [run for run in runs if run.deadline is not None]
    recorded = [run.answered for run in due]
    simulated = [_simulated(run, ends) for run in due]
    same = [_simulated(run, ours) for run in due]
    return RouteReport(
        route,
        len(runs),
        len(due),
        _kept(due, recorded),
        _kept(due, simulated),
        _kept(due, same),
        _change(due, recorded, simulated),
        _change(due, same, simulated),
    )


def slots_seen(rows: Sequence[tuple[float, float]]) -> int:
    """Return how many of these spans (begin, end) overlap at most; 1 for none."""
    steps = sorted([(end, -1) for _, end in rows] + [(begin, 1) for begin, _ in rows])
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return max(1, most)


def replayed(records: Iterable[Recorded], name: str, slots: int | None = None) -> Report:
    """Return what the policy of this name would have made of what was recorded.

    Args:
        records: what ended, in the order of the log.
        name: one of ``functions.policies.POLICIES``.
        slots: how many invocations run at a time; as many as really did if it is not given.

    Raises:
        BadRequest: there is no policy of this name.
        NotFound: nothing was recorded of which a duration is known.
    """
    policy(name, 1)  # a name that is none is told before anything else
    records = list(records)
    read, askers = _read(records), _askers(records)
    rows, guessed, left_out = _complete(read)
    if not rows:
        raise NotFound(
            "nothing is recorded that could be replayed", hint="Choose an earlier --since, or run something first."
        )
    seen = slots_seen([(row.started, row.ended) for row in rows if row.ended > row.started])
    number = seen if slots is None else slots
    pieces = _pieces(rows, askers)
    ends = simulate(pieces, number, policy(name, number))
    ours = ends if name == OURS else simulate(pieces, number, policy(OURS, number))
    cut = {row.of.run_id for row in read if row.place < 0}
    runs = _runs(rows, cut)
    judged = [run for run in runs if run.judged]
    by_route: dict[str, list[_Run]] = defaultdict(list)
    for run in judged:
        by_route[run.route].append(run)
    reports = [_of_route(route, by_route[route], ends, ours) for route in sorted(by_route)]
    return Report(
        policy=name,
        slots=number,
        slots_seen=seen,
        since=min(row.of.stored_at for row in read),
        until=max(row.of.stored_at for row in read),
        invocations=len(rows),
        guessed=guessed,
        left_out=left_out,
        not_judged=len(runs) - len(judged),
        routes=[*reports, _of_route(ALL, judged, ends, ours)],
    )
