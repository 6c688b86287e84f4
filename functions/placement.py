"""Which site a job goes to: from what the sites' agents wrote and what the job asks for. Pure.

A site that can never run the job is rejected, with the reason. Of those that take it now, that one is chosen where the
job is expected to have ended first. Where none does (an agent is silent, a batch system is down) but one may later, the
job goes to that one and waits there, in the log. A pilot is chosen only by what fits into it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from functions.outlook import JOBS, NOTHING_KNOWN, Outlook
from functions.pilot import fits
from functions.sites import is_awaited, shape_of, status, wait_of
from headrace.errors import UserError
from headrace.joblog import SiteRecord
from headrace.jobs import JobSpec

WAIT_UNKNOWN_S = 60.0  # of a queue in which jobs stand, and of which no waits are known yet
REJECTED_TOLD_MAX = 10


class Placement(NamedTuple):
    """The site of a job, None where there is none, and why it is not one of the others, by name.

    ``later`` says that none takes the job now, and one of them may at another time: ``site`` is where it waits.
    """

    site: str | None
    rejected: dict[str, str]
    later: bool = False


class _Later(NamedTuple):
    """A site that may run the job at another time, best first: known, there, with time for it, and heard last."""

    unknown: bool
    over: bool
    too_short: bool
    silent_s: float
    name: str


class _Offer(NamedTuple):
    """A site that can run the job, best first: in time, free now, how long until its end, who else waits, its name."""

    late: bool
    busy: bool
    expected_s: float
    waiting: int
    name: str


def place(
    spec: JobSpec,
    sites: Iterable[SiteRecord],
    now: float,
    deadline: float | None = None,
    outlook: Outlook = NOTHING_KNOWN,
    leaves: Mapping[str, str] | None = None,
) -> Placement:
    """Return where a job is to run.

    Args:
        spec: what it asks for; the sites that it names are the only ones.
        sites: all that are known.
        now: the present instant.
        deadline: of its run. A site where the job is late is taken only where it is late everywhere.
        outlook: how long jobs of its shape run, by site.
        leaves: the sites that it is taken away from, with the reason: they are rejected, and not waited for.
    """
    left = leaves or {}
    known = {site.name: site for site in sites if not is_awaited(site)}
    offers: list[_Offer] = []
    rejected: dict[str, str] = {}
    later: list[_Later] = []
    for name in spec.sites or sorted(known):
        site = known.get(name)
        if name in left:
            rejected[name] = left[name]
        elif site is None:
            later.append(_Later(True, False, False, 0.0, name))
            rejected[name] = "it is not known"
        elif (why := never(spec, site)) is not None:
            rejected[name] = why
        elif (why := _too_short(spec, site, now, outlook)) is not None:
            if not spec.sites:  # the next allocation may be a longer one, whatever its name
                later.append(_later(site, now, too_short=True))
            rejected[name] = why
        elif (why := not_now(site, now)) is not None:
            later.append(_later(site, now))
            rejected[name] = why
        else:
            offers.append(_offer(spec, site, now, deadline, outlook))
    if not offers:
        waits_at = min(later).name if later else None
        rejected.pop(waits_at or "", None)
        return Placement(waits_at, rejected, later=waits_at is not None)
    best = min(offers)
    for offer in offers:
        if offer != best:
            rejected[offer.name] = "the job would be late there" if offer.late else f"{best.name} is expected sooner"
    return Placement(best.name, rejected)


def never(spec: JobSpec, site: SiteRecord) -> str | None:
    """Return why a site can never run a job, or None if it can."""
    needs = spec.resources
    if site.nodes_total is not None and needs.nodes > site.nodes_total:
        return f"it has {site.nodes_total} nodes, and the job takes {needs.nodes}"
    if site.gpus_total is not None and needs.gpus > site.gpus_total:
        return f"it has {site.gpus_total} GPUs, and the job takes {needs.gpus}"
    if spec.container is not None and not site.containers:
        return "it has no program for containers"
    duration_s = spec.attributes.duration_s
    if duration_s is not None and site.duration_max_s is not None and duration_s > site.duration_max_s:
        return f"its jobs run at most {site.duration_max_s:,.0f} s, and this one asks for {duration_s:,.0f} s"
    return None


def _too_short(spec: JobSpec, site: SiteRecord, now: float, outlook: Outlook) -> str | None:
    """Return why what is left of an allocation is too little for a job that would start now, or None if it is not."""
    limit_s = spec.attributes.duration_s or site.duration_s
    if site.ends_at is None or now >= site.ends_at or limit_s is None:
        return None
    runs = outlook.of("run", JOBS, shape_of(spec), site=site.name)
    if fits(now, site.ends_at, None if runs is None else (runs.p50_s, runs.p90_s), limit_s):
        return None
    return f"it ends in {site.ends_at - now:,.0f} s, and the job may take longer"


def not_now(site: SiteRecord, now: float) -> str | None:
    """Return why a site takes no jobs now, or None if it does."""
    word, why = status(site, now)
    if word in ("down", "unknown"):
        return f"it is {word}: {why}" if why else f"it is {word}"
    return None if site.accepts else "it takes no more jobs"


def _later(site: SiteRecord, now: float, *, too_short: bool = False) -> _Later:
    ends = site.ends_at is not None and (now >= site.ends_at or not site.accepts)
    return _Later(False, ends, too_short, now - site.at, site.name)


def _offer(spec: JobSpec, site: SiteRecord, now: float, deadline: float | None, outlook: Outlook) -> _Offer:
    shape = shape_of(spec)
    runs = outlook.of("run", JOBS, shape, site=site.name)
    waits = wait_of(site, shape)
    free = _is_free(spec, site)
    wait_s = 0.0 if free else WAIT_UNKNOWN_S if waits is None else waits.p50_s
    late_wait_s = 0.0 if free or waits is None else waits.p90_s
    ends_by = min((each for each in (deadline, site.ends_at) if each is not None), default=math.inf)
    return _Offer(
        late=now + late_wait_s + (0.0 if runs is None else runs.p90_s) > ends_by,
        busy=not free,
        expected_s=wait_s + (0.0 if runs is None else runs.p50_s),
        waiting=site.jobs_waiting,
        name=site.name,
    )


def _is_free(spec: JobSpec, site: SiteRecord) -> bool:
    """Say whether a job would start at once, as far as that can be told."""
    needs = spec.resources
    nodes = site.nodes_free is None or site.nodes_free >= needs.nodes
    gpus = site.gpus_free is None or site.gpus_free >= needs.gpus
    return nodes and gpus and site.jobs_waiting == 0


def refused(spec: JobSpec, placement: Placement) -> UserError:
    """Return the error of a job that no site can ever run: which sites there are, and why not.

    The function that asks for it is tried again, as often as it may be, where there is no site at all yet.
    """
    rejected = placement.rejected
    if not rejected:
        return UserError(
            "submit: there is no site to run a job at",
            hint="Start an agent (headrace agent --site NAME), or name the site that the job is to wait for.",
            transient=True,
        )
    told = "; ".join(f"{name}: {why}" for name, why in list(rejected.items())[:REJECTED_TOLD_MAX])
    more = f"; and {len(rejected) - REJECTED_TOLD_MAX} more" if len(rejected) > REJECTED_TOLD_MAX else ""
    return UserError(
        f"submit: no site can run {spec.executable}: {told}{more}",
        hint="Look at `headrace sites`, and change what the job asks for.",
        transient=False,
    )
