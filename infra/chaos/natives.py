"""What Slurm's own records hold against what the platform says, without I/O: every job once, every follow-up once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from headrace.jobs import JobEnd
from headrace.model import RunView
from infra.chaos.submitted import EXIT_CODE

PREFIX = "hr-"
NAMED_MAX = 10

# What the follow-up of each route may be told: (state, reason). A node may die under any job.
ENDS: dict[str, frozenset[tuple[str, str]]] = {
    "simulated": frozenset({("completed", "")}),
    "exiting": frozenset({("failed", "exit_code")}),
    "outlasting": frozenset({("failed", "walltime")}),
}
NODE_FAILED = ("failed", "node_failure")


class Found(Struct, kw_only=True):
    """What was counted; ``wrong`` names the first things that are not as they should be.

    ``jobs`` are those of runs that nobody canceled, ``native`` those of them in Slurm's records. ``open`` are jobs that
    Slurm still has although their run has ended; ``reasons`` counts what the follow-ups were told.
    """

    jobs: int = 0
    native: int = 0
    once: int = 0
    never: int = 0
    twice: int = 0
    strangers: int = 0
    programs_twice: int = 0
    followed_once: int = 0
    canceled: int = 0
    open: int = 0
    untrue: int = 0
    reasons: dict[str, int] = {}
    wrong: list[str] = []

    @property
    def good(self) -> bool:
        """Whether every job was there once, ran once, was followed once by the truth, and none is left."""
        faults = (self.never, self.twice, self.strangers, self.programs_twice, self.open, self.untrue)
        return not any(faults) and self.once == self.jobs == self.followed_once


def job_of(name: str, known: Mapping[str, object]) -> str | None:
    """Return the job that a native name is of: ``hr-JOB`` or ``hr-JOB-ATTEMPT``; None if it is of none known."""
    if not name.startswith(PREFIX):
        return None
    bare = name.removeprefix(PREFIX)
    shorter = bare.rpartition("-")[0]
    return bare if bare in known else shorter if shorter in known else None


def count(
    views: Iterable[RunView],
    native: Mapping[str, str],
    still_open: Sequence[str],
    programs: Sequence[str],
    ends: Mapping[str, Sequence[JobEnd]],
) -> Found:
    """Count, from every run that was accepted and has ended.

    Args:
        views: the runs.
        native: the name of every job in Slurm's records by its native id.
        still_open: native ids of jobs that wait or run there.
        programs: the id under which the batch system's job knows itself, once for every time its program began.
        ends: what follow-ups were given, by job.
    """
    found = Found()
    runs = {job.job_id: view for view in views for job in view.jobs}
    canceled = {job for job, view in runs.items() if view.state == "canceled"}
    natives: defaultdict[str, list[str]] = defaultdict(list)
    for native_id, name in native.items():
        job = job_of(name, runs)
        if job is not None:
            natives[job].append(native_id)
        elif name.startswith(PREFIX):
            found.strangers += 1
            found.wrong.append(f"{name} ({native_id}) is of no run")
    open_ids = set(still_open)
    began = Counter(job_of(f"{PREFIX}{program}", runs) or program for program in programs)
    for job, view in runs.items():
        of = natives[job]
        found.native += len(of)
        found.twice += len(of) > 1
        found.open += sum(each in open_ids for each in of)
        found.programs_twice += began[job] > 1
        if len(of) > 1 or began[job] > 1 or open_ids & set(of):
            found.wrong.append(f"{view.run_id} {job}: native {of}, began {began[job]} times, open {open_ids & set(of)}")
        if job in canceled:
            found.canceled += 1
            continue
        found.jobs += 1
        found.never += not of
        found.once += len(of) == 1
        _follow(found, job, view, ends.get(job, ()), began[job])
    for view in views:
        if not view.jobs and view.state != "canceled":
            found.never += 1
            found.wrong.append(f"{view.run_id} has no job")
    return found


def _follow(found: Found, job: str, view: RunView, told: Sequence[JobEnd], began: int) -> None:
    """Count the follow-ups of one job, and see whether what they were told can be true."""
    followers = [each for each in view.invocations if each.parent_id == job]
    if len(followers) == 1 and len(told) == 1:
        found.followed_once += 1
    else:
        found.wrong.append(
            f"{view.run_id} {job}: {len(followers)} follow-ups, of which {len(told)} noted what they got"
        )
    for end in told:
        found.reasons[end.reason or end.state] = found.reasons.get(end.reason or end.state, 0) + 1
        possible = ENDS.get(view.route, frozenset()) | {NODE_FAILED}
        wrong_code = view.route == "exiting" and end.reason == "exit_code" and end.exit_code != EXIT_CODE
        never_ran = end.state == "completed" and began != 1
        if (end.state, end.reason) not in possible or wrong_code or never_ran:
            found.untrue += 1
            told_of = f"{end.state} {end.reason} {end.exit_code}, began {began} times"
            found.wrong.append(f"{view.run_id} {job} of {view.route}: told {told_of}")
