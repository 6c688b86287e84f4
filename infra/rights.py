"""What each role may say and hear on the log's server: one table, and nothing beyond it.

Streams, lanes and tables are made by ``admin`` alone. A role reads through short-lived consumers and direct gets, and
hears answers on its own inbox only, so one role cannot listen to the answers of another.

The roles are of one account and trust each other. The agent of a site, whose password lies at a facility, is the user
of an account of its own, into which only what it needs is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from streams.link import API, SITE_API, inbox_of, reader_names
from streams.topology import BUCKETS, STREAM, job_subject, jobs_consumer

ACCOUNT = "HEADRACE"
ADMIN = "admin"
GATEWAY = "gateway"
WORKER = "worker"
LEDGER = "ledger"
AGENT = "agent"
SYSTEM = "sys"


class Rights(NamedTuple):
    """Subjects that a role may publish to and subscribe to, its own inbox aside."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...] = ()


def _read_tables(*buckets: str) -> tuple[str, ...]:
    """Return what following these tables takes."""
    return tuple(
        subject
        for table in (f"KV_{bucket}" for bucket in buckets)
        for subject in (
            f"$JS.API.STREAM.INFO.{table}",
            f"$JS.API.DIRECT.GET.{table}",
            f"$JS.API.DIRECT.GET.{table}.>",
            f"$JS.API.CONSUMER.CREATE.{table}",
            f"$JS.API.CONSUMER.CREATE.{table}.>",
            f"$JS.API.CONSUMER.INFO.{table}.*",
            f"$JS.API.CONSUMER.DELETE.{table}.*",
            f"$JS.FC.{table}.>",
        )
    )


# Looking at a stream, reading single messages, and reading in order through a consumer of one's own.
_READ_LOG = (
    "$JS.API.INFO",
    f"$JS.API.STREAM.INFO.{STREAM}",
    f"$JS.API.STREAM.MSG.GET.{STREAM}",
    f"$JS.API.DIRECT.GET.{STREAM}",
    f"$JS.API.DIRECT.GET.{STREAM}.>",
    f"$JS.API.CONSUMER.CREATE.{STREAM}.>",
    f"$JS.API.CONSUMER.DELETE.{STREAM}.*",
    f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.*",
)
_READ_TABLES = _read_tables(*BUCKETS)
_LOOK_AT_LANES = f"$JS.API.CONSUMER.LIST.{STREAM}"
# Who shares the platform is for the admin to say: a gateway only knows their tokens' digests.
_REGISTER = ("$KV.functions.>", "$KV.versions.>", "$KV.routes.>")

RIGHTS: dict[str, Rights] = {
    ADMIN: Rights(publish=(">",), subscribe=(">",)),
    GATEWAY: Rights(
        publish=(
            *_READ_LOG,
            *_READ_TABLES,
            *_REGISTER,
            _LOOK_AT_LANES,
            "hr.work.>",
            "hr.cancel.>",
            "hr.thread.>",
            "hr.newest.*",
            "hr.replay.*",
            "hr.report.>",
        ),
        subscribe=("hr.done.>", "hr.end.*", "hr.cancel.>", "presence.*"),
    ),
    WORKER: Rights(
        publish=(
            *_READ_LOG,
            *_READ_TABLES,
            "hr.work.>",
            "hr.job.>",
            "hr.done.>",
            "hr.end.*",
            "hr.tally.>",
            "hr.lease.>",
            "hr.start.>",
            "hr.try.>",
            "hr.note.>",
            "hr.cancel.>",
            "hr.thread.>",
            "hr.newest.*",
            "presence.*",
            # It forgets sites that have ended, with their consumers.
            "$KV.sites.>",
            f"$JS.API.CONSUMER.NAMES.{STREAM}",
            f"$JS.API.CONSUMER.INFO.{STREAM}.*",
            f"$JS.ACK.{STREAM}.>",
            f"$JS.ACK.*.*.{STREAM}.>",
        ),
    ),
    # Of an agent of the release before this one: it is the same for all sites, and may what the worst of them needs.
    # To be removed with the next release; ``site_subjects`` has what an agent may now.
    AGENT: Rights(
        publish=(
            *_READ_LOG,
            *_read_tables("forecasts", "sites"),
            f"$JS.API.CONSUMER.NAMES.{STREAM}",
            f"$JS.API.CONSUMER.INFO.{STREAM}.*",
            "hr.work.>",
            "hr.job.>",
            "hr.done.>",
            "hr.end.*",
            "hr.tally.>",
            "hr.lease.>",
            "hr.submit.>",
            "hr.held.>",
            "hr.start.>",
            "hr.try.>",
            "hr.note.>",
            f"$JS.ACK.{STREAM}.>",
            f"$JS.ACK.*.*.{STREAM}.>",
            "$KV.sites.>",
        ),
    ),
    LEDGER: Rights(publish=(*_READ_LOG, *_READ_TABLES, _LOOK_AT_LANES, "$KV.forecasts.>")),
}


def inbox(role: str) -> str:
    """Return the prefix of the subjects on which a role hears its answers."""
    return f"_INBOX_{role}"


# ---------------------------------------------------------------- the agents of sites

# What the account of the platform lends. It says what may be lent at all; the account of each site has the parts that
# it gets, and all accounts are written by whoever runs the servers. Requests have one answer, but for the last one.
EXPORTS: tuple[dict[str, str], ...] = (
    *(
        {"service": subject}
        for subject in (
            "hr.>",
            "$KV.>",
            "$JS.API.STREAM.INFO.>",
            "$JS.API.DIRECT.GET.>",
            "$JS.API.CONSUMER.NAMES.>",
            "$JS.API.CONSUMER.CREATE.>",
            "$JS.API.CONSUMER.INFO.>",
            "$JS.API.CONSUMER.DELETE.>",
            "$JS.ACK.>",
            "$JS.FC.>",
        )
    ),
    {"service": "$JS.API.CONSUMER.MSG.NEXT.>", "response_type": "stream"},
    {"stream": "_INBOX_site.>"},
)


class SiteUser(NamedTuple):
    """The user of a site. With ``moves`` it may hand jobs on to other sites, as an allocation does that ends."""

    site: str
    password: str
    moves: bool = False


def agent_user(site: str) -> str:
    """Return the user that the agent of a site is."""
    return f"{AGENT}-{site}"


def site_subjects(site: str, tenants: Iterable[str], *, moves: bool = False) -> list[str]:
    """Return what the agent of a site may publish to: appended to the log, asked for, acknowledged.

    Args:
        site: its name.
        tenants: whose jobs it runs.
        moves: as of ``SiteUser``.
    """
    whose = sorted(tenants)
    jobs = [jobs_consumer(site, tenant) for tenant in whose]
    readers = reader_names(site)
    read = ("hr.cancel.*.*", f"hr.report.*.*.{site}", f"hr.submit.*.*.*.{site}", "hr.tally.*.*")
    get = ("hr.*.*.*", "hr.end.*", "hr.try.*.*.*", f"hr.submit.*.*.*.{site}", f"hr.job.{site}.*.*.*")
    tables = ("KV_sites", "KV_forecasts")
    return [
        *(f"hr.job.{'*' if moves else site}.{tenant}.*.*" for tenant in whose),
        *(f"hr.work.*.{tenant}.*.*" for tenant in whose),
        f"hr.submit.*.*.*.{site}",
        f"hr.held.*.*.{site}",
        # A job's run and id tell nobody whose they are: what guards these is that only who holds a lease commits.
        *("hr.lease.*.*", "hr.done.*.*", "hr.end.*", "hr.tally.*.*", "hr.start.*.*.*", "hr.try.*.*.*", "hr.note.*.*.*"),
        f"$KV.sites.{site}",
        *(f"$JS.API.STREAM.INFO.{stream}" for stream in (STREAM, *tables)),
        f"$JS.API.CONSUMER.NAMES.{STREAM}",
        *(f"$JS.API.DIRECT.GET.{STREAM}.{subject}" for subject in get),
        *(f"$JS.API.DIRECT.GET.{table}.>" for table in tables),
        *(f"$JS.API.CONSUMER.CREATE.{table}" for table in tables),  # names are the server's: it cannot take another's
        *(f"$JS.API.CONSUMER.INFO.{table}.*" for table in tables),
        *(f"$JS.FC.{table}.>" for table in tables),
        *(f"$JS.API.CONSUMER.CREATE.{STREAM}.{name}.{subject}" for name in readers for subject in read),
        *(
            f"$JS.API.CONSUMER.CREATE.{STREAM}.{name}.{job_subject(site, tenant, '*', '*')}"
            for name, tenant in zip(jobs, whose, strict=True)
        ),
        *(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{name}" for name in (*jobs, *readers)),
        *(f"$JS.API.CONSUMER.DELETE.{STREAM}.{name}" for name in (*jobs, *readers, f"jobs-{site}")),
        *(f"$JS.API.CONSUMER.INFO.{STREAM}.{name}" for name in (*jobs, f"jobs-{site}")),
        *(f"$JS.ACK.{domain}{STREAM}.{name}.>" for name in jobs for domain in ("", "*.*.")),
    ]


def site_accounts(users: Iterable[SiteUser], tenants: Iterable[str]) -> dict[str, dict[str, list[object]]]:
    """Return the accounts of sites for the server's configuration, by name, each with its one user.

    Rights on subjects alone would not hold: who may have a message read to a subject of his choice, as all may who ask
    JetStream for something, can have it read to one that he may not publish to. An account of its own has no way to
    other subjects than those it imports, for answers neither.
    """
    whose = sorted(tenants)
    return {
        f"SITE-{user.site}": {
            "users": [{"user": agent_user(user.site), "password": user.password}],
            "imports": [
                *(
                    {"service": {"account": ACCOUNT, "subject": subject}, "to": _as_imported(subject)}
                    for subject in site_subjects(user.site, whose, moves=user.moves)
                ),
                {"stream": {"account": ACCOUNT, "subject": f"{inbox_of(user.site)}.>"}},
            ],
        }
        for user in users
    }


def _as_imported(subject: str) -> str:
    return SITE_API + subject.removeprefix(API) if subject.startswith(f"{API}.") else subject


def accounts(passwords: dict[str, str]) -> dict[str, object]:
    """Return the ``accounts`` part of the server's configuration: a user per role, held to its rights.

    Args:
        passwords: one per role, ``sys`` included.
    """
    users = [
        {
            "user": role,
            "password": passwords[role],
            "permissions": {
                "publish": list(rights.publish),
                "subscribe": [*rights.subscribe, f"{inbox(role)}.>"],
            },
        }
        for role, rights in RIGHTS.items()
    ]
    return {
        ACCOUNT: {"jetstream": "enabled", "users": users, "exports": list(EXPORTS)},
        "SYS": {"users": [{"user": SYSTEM, "password": passwords[SYSTEM]}]},
    }
