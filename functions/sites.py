"""How a site is: from what its agent saw last and how long ago that was, without I/O.

The agent writes a row; whoever reads it judges it by its age, for an agent that is silent can write nothing. Incidents
are the times in which a site was not up. The agent keeps them in its row, and what a silence adds to them follows from
the row and the time, in the same words for everybody who looks. A site that jobs name and for which no agent has ever
spoken has a row as well, so that its jobs are in somebody's hands (``workers.adoption``) and everybody can see it.
"""

from __future__ import annotations

from typing import NamedTuple

from msgspec import structs

from functions.forecast import WINDOW, History, forecast, size_class
from headrace.joblog import Incident, SiteRecord, Waited
from headrace.jobs import JobSpec
from headrace.model import SiteStatus
from headrace.names import incident_id
from headrace.wire import Expected

SILENT_S = 20.0  # without a word from the agent for so long, nobody knows how the site is
GONE_S = 60.0  # and after so long it is taken for down
SILENT = "its agent says nothing"
ENDED = "its allocation has ended"
UNHEARD = "jobs name it, and no agent has ever spoken for it"
WORK_FOLDER = "its work folder"  # so begins the detail of a site that has trouble with that
WAITS_MAX = 256  # kept in a site's row
WAITS_MIN = 3  # so many waits of its own shape, and a job is no longer expected to wait as all others do
INCIDENTS_MAX = 32
_WORST: tuple[SiteStatus, ...] = ("up", "degraded", "unknown", "down")


def awaited(name: str, now: float) -> SiteRecord:
    """Return the row of a site that a job names and that nobody knows."""
    return SiteRecord(name=name, kind="", at=now, since=now, status="unknown", detail=UNHEARD)


def is_awaited(record: SiteRecord) -> bool:
    """Say whether no agent has ever spoken for a site."""
    return not record.kind


class Trouble(NamedTuple):
    """What keeps a site from being up, beside what its batch system says of its nodes."""

    status: SiteStatus
    why: str


def status(record: SiteRecord, now: float) -> tuple[SiteStatus, str]:
    """Return how a site is at an instant, and why it is not up.

    Args:
        record: its row; ``record.at`` is when its agent was heard last.
        now: by the clock of ``record.at``.
    """
    if is_awaited(record):
        return record.status, record.detail
    silent_s = now - record.at
    if record.ends_at is not None and now >= record.ends_at:
        return "down", ENDED
    if silent_s >= GONE_S:
        return "down", SILENT
    if silent_s >= SILENT_S:
        return "unknown", SILENT
    return record.status, record.detail


def is_told(record: SiteRecord, now: float) -> bool:
    """Say whether what a row counts (free nodes and GPUs, jobs) still holds: nobody has counted since it is silent."""
    return status(record, now)[0] in ("up", "degraded")


def why_waits(name: str, record: SiteRecord | None, now: float) -> str:
    """Return why a job waits that was sent to a site and is not submitted there; empty where the site takes jobs."""
    if record is None or is_awaited(record):
        return f"it waits for site {name}, which is not known"
    word, why = status(record, now)
    if word != "up":
        return f"it waits for site {name}, which is {word}{f': {why}' if why else ''}"
    return "" if record.accepts else f"it waits for site {name}, which takes no more jobs"


def incidents(record: SiteRecord, now: float) -> list[Incident]:
    """Return the times in which a site was not up, oldest first; the last one may go on."""
    found = list(record.incidents)
    word, why = status(record, now)
    if word == "up" or (word, why) == (record.status, record.detail):
        return found
    # It was the agent that fell silent: what it has not seen is told for it.
    began_at = record.at + SILENT_S
    if record.ends_at is not None and now >= record.ends_at:
        began_at = min(began_at, record.ends_at)
    return _went_on(found, record.name, word, why, began_at)


def seen(fresh: SiteRecord, before: SiteRecord | None, trouble: Trouble | None = None) -> SiteRecord:
    """Return the row of a site after a look at it, with the history of the row before.

    Args:
        fresh: what was seen at ``fresh.at``; its status, history and ``since`` are filled in here.
        before: the row before it, None for the first.
        trouble: what its agent has met with, None if there was nothing.
    """
    if before is not None and is_awaited(before):
        before = None  # it is the first word of an agent
    word, why = _judged(fresh, trouble)
    history = [] if before is None else incidents(before, fresh.at)
    history = _ended(history, fresh.at) if word == "up" else _went_on(history, fresh.name, word, why, fresh.at)
    stayed = before is not None and before.status == word and status(before, fresh.at)[0] == word
    return structs.replace(
        fresh,
        status=word,
        detail=why,
        since=before.since if before is not None and stayed else fresh.at,
        incidents=history[-INCIDENTS_MAX:],
        waits=[] if before is None else before.waits,
        wait=None if before is None else before.wait,
    )


def waited(record: SiteRecord, shape: str, wait_s: float, now: float) -> SiteRecord:
    """Return the row of a site after a job of some shape left its queue, having waited for so many seconds."""
    waits = [*record.waits, Waited(shape, max(0.0, wait_s), now)][-WAITS_MAX:]
    return structs.replace(record, waits=waits, wait=_expected(waits))


def wait_of(record: SiteRecord, shape: str) -> Expected | None:
    """Return how long a job of some shape is expected to wait: as others of its shape did, else as all did."""
    own = [wait for wait in record.waits if wait.shape == shape]
    return _expected(own) if len(own) >= WAITS_MIN else record.wait


def shape_of(spec: JobSpec) -> str:
    """Return what jobs have in common that wait about equally long: queue, and sizes of nodes, GPUs and walltime."""
    needs = spec.resources
    limit = size_class(spec.attributes.duration_s or 0.0)
    return f"{spec.attributes.queue_name or ''}|{size_class(needs.nodes)}|{size_class(needs.gpus)}|{limit}"


def _judged(fresh: SiteRecord, trouble: Trouble | None) -> tuple[SiteStatus, str]:
    unusable, total = fresh.nodes_unusable, fresh.nodes_total
    if trouble is not None and trouble.status != "degraded":
        return trouble
    if not fresh.queue_open:
        return "down", "its queue takes no jobs"
    if total and unusable >= total:
        return "down", f"none of its {total} nodes can be used"
    if trouble is not None:
        return trouble
    if unusable:
        return "degraded", f"{unusable} of its {total} nodes cannot be used"
    if not fresh.accepts:
        return "degraded", "it takes no more jobs"
    return "up", ""


def _ended(history: list[Incident], at: float) -> list[Incident]:
    if history and history[-1].ended_at is None:
        return [*history[:-1], structs.replace(history[-1], ended_at=at)]
    return history


def _went_on(history: list[Incident], site: str, word: SiteStatus, why: str, at: float) -> list[Incident]:
    """Return the incidents with the one that goes on at an instant: it is as bad as the worst of it was."""
    last = history[-1] if history else None
    if last is None or last.ended_at is not None:
        return [*history, Incident(id=incident_id(site, at), status=word, began_at=at, why=why)]
    if _WORST.index(word) < _WORST.index(last.status):
        return history
    return [*history[:-1], structs.replace(last, status=word, why=why)]


def _expected(waits: list[Waited]) -> Expected | None:
    history = History()
    for wait in waits[-WINDOW:]:
        history.learn(wait.wait_s, wait.at)
    found = forecast(history)
    return None if found is None else Expected(found.p50_s, found.p90_s, found.p99_s, found.observations)
