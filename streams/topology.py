"""Where everything lives in the log: subjects, lanes and limits, and the one function that creates them.

    hr.work.<lane>.<tenant>.<run>.<invocation>   Invocation: work that waits; the first of a run is its acceptance
    hr.job.<site>.<tenant>.<run>.<job>           Invocation: a batch job, which is work for the agent of one site
    hr.done.<run>.<invocation>                   Outcome: one per invocation, for ever
    hr.end.<run>                                 RunEnd: of runs with branches, where no single outcome ends them
    hr.tally.<run>.<scope>                       Tally: branches of a scope that were filled
    hr.lease.<run>.<invocation>                  Lease: who took over an invocation that was delivered before
    hr.start.<run>.<invocation>.<attempt>        Started: an attempt that takes longer than a moment
    hr.try.<run>.<invocation>.<attempt>          Attempt: failed, to be tried again
    hr.note.<run>.<invocation>.<attempt>         Note: log lines and progress
    hr.submit.<run>.<job>.<attempt>.<site>       Submitted: the batch system of the site has the job
    hr.held.<run>.<job>.<site>                   Held: why a job is not submitted yet
    hr.report.<run>.<job>.<site>                 Report: what the job's wrapper says of its start, progress and end
    hr.cancel.<run>.<who>                        Cancel: by a user, or by the run of a later event of the same thread
    hr.thread.<thread>.<run>                     Member: the event of a run belongs to a thread of revisions
    hr.newest.<key>                              Newest: the last accepted run of those of which only one counts
    hr.replay.<run>                              Replay: a failed run was given another go by a new one

All of it stays for as long as the log is kept, except for notes and reports that only say how far something is,
and for why a job waits (``Record.hint``): they leave after minutes, as each is worth nothing once there is a newer one.

Lane and tenant stand in the subject of work: one consumer for each pair of them reads it without looking at the rest,
so that a worker can take of every tenant, however much another one has waiting. A job is an invocation whose body runs
at a site; a consumer for each tenant at each site hands its jobs to the site's agent, for the same reason.

Leases and the outcome of an invocation are one family, ``hr.*.<run>.<invocation>``: who appends to it says which
message of it was the last one known to him, so of all attempts only the holder of the newest lease can commit.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec
import nats.errors
from msgspec import Struct
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    ConsumerInfo,
    DeliverPolicy,
    DiscardPolicy,
    KeyValueConfig,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.client import JetStreamContext
from nats.js.errors import NoKeysError, NotFoundError, ServiceUnavailableError
from nats.js.kv import KeyValue

from headrace.errors import Unavailable
from streams.link import Link

STREAM = "HEADRACE"
LANES = 12
DEFAULT_TENANT = "default"  # always there; every other one is a row of the table of tenants
INLINE_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = 16 * 1024 * 1024
ACK_WAIT_S = 6.0
ACK_PENDING_MAX = 100_000
ANSWER_S = 2.0
BUCKETS = ("functions", "versions", "routes", "tenants", "forecasts", "sites")


class Limits(Struct, frozen=True, kw_only=True):
    """How much the log holds and for how long. When ``bytes_max`` is reached it refuses, it does not forget."""

    keep_s: float = 7 * 86400.0
    bytes_max: int = 8 * 1024**3
    table_bytes_max: int = 64 * 1024**2


def work_subject(lane: int | str, tenant: str, run: str, invocation: str) -> str:
    """Return the subject of a waiting invocation; ``"*"`` as lane means any."""
    return f"hr.work.{lane}.{tenant}.{run}.{invocation}"


def job_subject(site: str, tenant: str, run: str, job: str) -> str:
    """Return the subject of a job that is for a site; ``"*"`` as site means any."""
    return f"hr.job.{site}.{tenant}.{run}.{job}"


def submit_subject(run: str, job: str, attempt: int | str, site: str) -> str:
    """Return the subject that says the batch system of a site has a job."""
    return f"hr.submit.{run}.{job}.{attempt}.{site}"


def held_subject(run: str, job: str, site: str) -> str:
    """Return the subject that says why a job waits at its site to be submitted."""
    return f"hr.held.{run}.{job}.{site}"


def report_subject(run: str, job: str, site: str) -> str:
    """Return the subject of what the wrapper of a job says."""
    return f"hr.report.{run}.{job}.{site}"


def done_subject(run: str, invocation: str) -> str:
    """Return the subject that takes exactly one outcome."""
    return f"hr.done.{run}.{invocation}"


def end_subject(run: str) -> str:
    """Return the subject that takes the end of a run with branches."""
    return f"hr.end.{run}"


def tally_subject(run: str, scope: str) -> str:
    """Return the subject of the tallies of one scope."""
    return f"hr.tally.{run}.{scope}"


def lease_subject(run: str, invocation: str) -> str:
    """Return the subject on which an invocation that was delivered before is taken over."""
    return f"hr.lease.{run}.{invocation}"


def fence_subject(run: str, invocation: str) -> str:
    """Return the family of an invocation's leases and its outcome, which guards both."""
    return f"hr.*.{run}.{invocation}"


def start_subject(run: str, invocation: str, attempt: int | str) -> str:
    """Return the subject that says an attempt has started."""
    return f"hr.start.{run}.{invocation}.{attempt}"


def attempt_subject(run: str, invocation: str, attempt: int | str) -> str:
    """Return the subject of a failed attempt that will be followed by another."""
    return f"hr.try.{run}.{invocation}.{attempt}"


def note_subject(run: str, invocation: str, attempt: int | str) -> str:
    """Return the subject of what a running function says."""
    return f"hr.note.{run}.{invocation}.{attempt}"


def cancel_subject(run: str, who: str = "user") -> str:
    """Return the subject that takes one wish to cancel a run: of a user, or of a run that overrules it in a thread."""
    return f"hr.cancel.{run}.{who}"


def thread_subject(thread: str, run: str) -> str:
    """Return the subject that says that the event of a run belongs to a thread."""
    return f"hr.thread.{thread}.{run}"


def newest_subject(key: str) -> str:
    """Return the subject whose last message names the newest run of a source and a subject of events."""
    return f"hr.newest.{key}"


def replay_subject(run: str) -> str:
    """Return the subject that says which new runs gave a failed one another go."""
    return f"hr.replay.{run}"


def run_subjects(run: str) -> list[str]:
    """Return the subjects that together hold the state of one run, without what its functions said."""
    return [
        work_subject("*", "*", run, "*"),
        job_subject("*", "*", run, "*"),
        submit_subject(run, "*", "*", "*"),
        held_subject(run, "*", "*"),
        done_subject(run, "*"),
        start_subject(run, "*", "*"),
        attempt_subject(run, "*", "*"),
        end_subject(run),
        cancel_subject(run, "*"),
        replay_subject(run),
    ]


def kind_of(subject: str) -> str:
    """Return the second token of a subject: the kind of its facts, such as work, done or cancel."""
    return subject.split(".", 2)[1]


def run_of(subject: str) -> str:
    """Return the run of a subject of any kind but work and job."""
    return subject.split(".", 3)[2]


class LaneOf(NamedTuple):
    """A lane of one tenant, which has a consumer of its own."""

    lane: int
    tenant: str


def lane_consumer(lane: int, tenant: str) -> str:
    """Return the name of the consumer that all workers share for one lane of one tenant."""
    return f"work-{lane}-{tenant}"


def lane_of(consumer: str) -> LaneOf | None:
    """Return which lane of which tenant a consumer reads; None for any other consumer."""
    kind, _, rest = consumer.partition("-")
    lane, _, tenant = rest.partition("-")
    return LaneOf(int(lane), tenant) if kind == "work" and tenant and lane.isdecimal() else None


class JobsOf(NamedTuple):
    """The jobs of one tenant at one site, which have a consumer of their own."""

    site: str
    tenant: str


def jobs_consumer(site: str, tenant: str) -> str:
    """Return the name of the consumer that hands the jobs of a tenant at a site to its agent."""
    return f"jobs-{tenant}@{site}"


def jobs_of(consumer: str) -> JobsOf | None:
    """Return whose jobs at which site a consumer reads; None for any other consumer."""
    kind, _, rest = consumer.partition("-")
    tenant, _, site = rest.partition("@")
    return JobsOf(site, tenant) if kind == "jobs" and site else None


def _undivided_jobs(site: str) -> str:
    """Return the name of the one consumer of a site's jobs in a log of an older release."""
    return f"jobs-{site}"


def _stream(limits: Limits, replicas: int) -> StreamConfig:
    return StreamConfig(
        name=STREAM,
        subjects=["hr.>"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.NEW,
        max_age=limits.keep_s,
        max_bytes=limits.bytes_max,
        num_replicas=replicas,
        allow_atomic=True,
        allow_direct=True,
        allow_msg_ttl=True,
    )


def lane_config(lane: int, tenant: str, start: int = 1) -> ConsumerConfig:
    """Return what the consumer of one lane of one tenant is to be.

    Args:
        lane: 0 to ``LANES - 1``.
        tenant: whose work it reads.
        start: the sequence at which it begins to read. It is named and not left to the server ("what comes from now
            on"): a consumer whose state was lost begins there again.
    """
    return _reader(lane_consumer(lane, tenant), f"hr.work.{lane}.{tenant}.>", start)


def jobs_config(site: str, tenant: str, start: int = 1) -> ConsumerConfig:
    """Return what the consumer of a tenant's jobs at a site is to be; ``start`` as of a lane."""
    return _reader(jobs_consumer(site, tenant), job_subject(site, tenant, "*", "*"), start)


def _reader(name: str, subject: str, start: int) -> ConsumerConfig:
    return ConsumerConfig(
        name=name,
        durable_name=name,
        filter_subject=subject,
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE if start > 1 else DeliverPolicy.ALL,
        opt_start_seq=start if start > 1 else None,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ACK_WAIT_S,
        max_deliver=-1,
        max_ack_pending=ACK_PENDING_MAX,
        max_waiting=4096,
    )


async def ensure_jobs(link: Link, site: str) -> frozenset[str]:
    """Make the consumers of a site's jobs, one for each tenant, and return the tenants whose jobs it may take. Safe to
    repeat.

    Its agent does so, who may not read the table of tenants: they are those who have lanes. The consumers begin at the
    beginning, for jobs may wait for their site. In a log of an older release one consumer read the jobs of all: they
    begin where everything before was acknowledged to that one, and it is removed. What was acknowledged to it beyond
    comes once more, and its agent finds in the log what was done about it.

    Raises:
        Unavailable: the log does not answer.
    """
    js = link.jetstream()
    try:
        names = await _names(link)
        tenants = _tenants_in(names)
        there = {found.tenant for name in names if (found := jobs_of(name)) and found.site == site}
        undivided = _undivided_jobs(site)
        begin = 1
        if undivided in names:
            begin = _undivided_floor(await js.consumer_info(STREAM, undivided)) + 1
        missing = sorted(tenants - there)
        made = await asyncio.gather(*(_make(link, jobs_config(site, tenant, begin)) for tenant in missing))
        for tenant in there - tenants:
            with _if_allowed(link):
                await _delete(js, jobs_consumer(site, tenant))
        if undivided in names:
            await _delete(js, undivided)
    except (nats.errors.Error, msgspec.MsgspecError, OSError, TimeoutError) as error:
        raise Unavailable("the log does not answer", hint="Is it running, and is it full?") from error
    return tenants - {tenant for tenant, there in zip(missing, made, strict=True) if not there}


async def _make(link: Link, config: ConsumerConfig) -> bool:
    """Make a consumer, and say whether this user may."""
    with _if_allowed(link):
        await link.jetstream().add_consumer(STREAM, config)
        return True
    return False


@contextlib.contextmanager
def _if_allowed(link: Link) -> Iterator[None]:
    """Pass over what the user of a site may not do: nobody answers, while a server that is not ready says so."""
    try:
        yield
    except ServiceUnavailableError as error:
        if not link.site or error.err_code is not None:
            raise


async def lane_tenants(link: Link) -> frozenset[str]:
    """Return who has lanes, which are all tenants.

    Raises:
        Unavailable: the log does not answer.
    """
    try:
        return _tenants_in(await _names(link))
    except (nats.errors.Error, msgspec.MsgspecError, OSError, TimeoutError) as error:
        raise Unavailable("the log does not answer", hint="Is it running?") from error


def _tenants_in(names: Iterable[str]) -> frozenset[str]:
    return frozenset({DEFAULT_TENANT, *(lane.tenant for name in names if (lane := lane_of(name)))})


async def jobs_waiting(link: Link, site: str) -> int | None:
    """Return up to which sequence every job of a site is acknowledged; None where no job of it is not.

    Where an agent has not yet made the consumers of all tenants, nothing is known to be acknowledged: 0.

    Raises:
        Unavailable: the log does not answer.
    """
    js = link.jetstream()
    try:
        names = await _names(link)
        tenants = _tenants_in(names)
        if not names >= {jobs_consumer(site, tenant) for tenant in tenants}:
            return 0
        infos = [await js.consumer_info(STREAM, jobs_consumer(site, tenant)) for tenant in sorted(tenants)]
    except (nats.errors.Error, msgspec.MsgspecError, OSError, TimeoutError) as error:
        raise Unavailable("the log does not answer", hint="Is it running, and is it full?") from error
    busy = [info for info in infos if info.num_pending or info.num_ack_pending]
    return min((0 if info.ack_floor is None else info.ack_floor.stream_seq for info in busy), default=None)


async def remove_site(link: Link, site: str) -> None:
    """Remove the consumers of a site's jobs, and with them the memory of which of those are acknowledged."""
    js = link.jetstream()
    for name in await _names(link):
        found = jobs_of(name)
        if name == _undivided_jobs(site) or (found is not None and found.site == site):
            await _delete(js, name)


async def notes_of(link: Link) -> dict[str, str]:
    """Return what is noted at the log beside its limits; nothing where there is no log yet."""
    try:
        found = (await link.jetstream().stream_info(STREAM)).config.metadata or {}
    except NotFoundError:
        return {}
    return {name: text for name, text in found.items() if not name.startswith("_nats.")}


async def ensure(link: Link, limits: Limits, replicas: int = 1, notes: Mapping[str, str] | None = None) -> None:
    """Create the stream, its lanes and the tables, or bring them to these limits. Safe to repeat.

    ``notes`` are kept at the log beside its limits; those that are there stay where none are given.
    """
    js = link.jetstream()
    wanted = _stream(limits, replicas)
    wanted.metadata = await notes_of(link) | dict(notes or {})
    try:
        await js.stream_info(STREAM)
    except NotFoundError:
        await js.add_stream(wanted)
    else:
        await js.update_stream(wanted)
    for bucket in BUCKETS:
        try:
            await js.key_value(bucket)
        except NotFoundError:
            await js.create_key_value(
                KeyValueConfig(
                    bucket=bucket,
                    history=1,
                    max_bytes=limits.table_bytes_max,
                    storage=StorageType.FILE,
                    replicas=replicas,
                    direct=True,
                )
            )
    there = await consumers(js)
    for tenant in await _tenants(await js.key_value("tenants")):
        await _ensure_lanes(js, tenant, there)
    await _remove_undivided(js, there)


async def add_tenant(link: Link, tenant: str) -> None:
    """Make the lanes of a tenant. Safe to repeat: lanes that exist keep their place.

    They begin at the end of the log: there is no work yet of one who is not in the table, or all of it is over.
    """
    js = link.jetstream()
    end = (await js.stream_info(STREAM)).state.last_seq
    await _ensure_lanes(js, tenant, await consumers(js), start=end + 1)


async def remove_tenant(link: Link, tenant: str) -> None:
    """Remove the lanes of a tenant and its places at all sites, and with them the memory of which work is done."""
    js = link.jetstream()
    for name in await consumers(js):
        found = lane_of(name) or jobs_of(name)
        if found is not None and found.tenant == tenant:
            await _delete(js, name)


async def consumers(js: JetStreamContext) -> dict[str, ConsumerInfo]:
    """Return all consumers of the log by name, page by page."""
    found: dict[str, ConsumerInfo] = {}
    while True:
        page = await js.consumers_info(STREAM, offset=len(found))
        known = len(found)
        found |= {info.name: info for info in page}
        if len(found) == known:
            return found


async def _tenants(table: KeyValue) -> Iterable[str]:
    try:
        return {DEFAULT_TENANT, *await table.keys()}
    except NoKeysError:
        return {DEFAULT_TENANT}


async def _ensure_lanes(js: JetStreamContext, tenant: str, there: dict[str, ConsumerInfo], start: int = 1) -> None:
    """Make the consumers of a tenant, or bring them to these settings; where one begins to read cannot change."""
    wanted = []
    for lane in range(LANES):
        known = there.get(lane_consumer(lane, tenant))
        if known is not None:
            begin = known.config.opt_start_seq or 1
        elif tenant == DEFAULT_TENANT:
            begin = _undivided_floor(there.get(f"work-{lane}")) + 1
        else:
            begin = start
        wanted.append(lane_config(lane, tenant, begin))
    await asyncio.gather(*(js.add_consumer(STREAM, config) for config in wanted))


def _undivided_floor(info: ConsumerInfo | None) -> int:
    """Return up to where a lane was acknowledged when one consumer read it for all: a log of an older release.

    What was acknowledged beyond comes once more, as a first delivery of something stored before the workers came: they
    look for its outcome.
    """
    return 0 if info is None or info.ack_floor is None else info.ack_floor.stream_seq


async def _remove_undivided(js: JetStreamContext, there: dict[str, ConsumerInfo]) -> None:
    for lane in range(LANES):
        if f"work-{lane}" in there:
            await _delete(js, f"work-{lane}")


class _Page(Struct, frozen=True):
    total: int = 0
    consumers: list[str] = []


async def _names(link: Link) -> set[str]:
    """Return the names of all consumers of the log, page by page, which costs less than to ask how each is."""
    found: set[str] = set()
    while True:
        request = b'{"offset":%d}' % len(found)
        answer = await link.nc.request(f"{link.api}.CONSUMER.NAMES.{STREAM}", request, timeout=ANSWER_S)
        page = msgspec.json.decode(answer.data, type=_Page)
        known = len(found)
        found.update(page.consumers or ())
        if len(found) >= page.total or len(found) == known:
            return found


async def _delete(js: JetStreamContext, consumer: str) -> None:
    with contextlib.suppress(NotFoundError):
        await js.delete_consumer(STREAM, consumer)
