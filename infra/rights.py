"""What each role may say and hear on the log's server: one table, and nothing beyond it.

Streams, lanes and tables are made by ``admin`` alone. A role reads through short-lived consumers and direct gets, and
hears answers on its own inbox only, so one role cannot listen to the answers of another.
"""

from __future__ import annotations

from typing import NamedTuple

from streams.topology import BUCKETS, STREAM

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
        subscribe=("hr.done.>", "hr.end.*", "hr.cancel.>"),
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
            f"$JS.API.CONSUMER.INFO.{STREAM}.*",
            f"$JS.ACK.{STREAM}.>",
            f"$JS.ACK.*.*.{STREAM}.>",
        ),
    ),
    # It makes the consumer of its site itself, as anyone may who reads; it takes no work from lanes.
    AGENT: Rights(
        publish=(
            *_READ_LOG,
            *_read_tables("forecasts", "sites"),
            "hr.work.>",
            "hr.job.>",
            "hr.done.>",
            "hr.end.*",
            "hr.tally.>",
            "hr.lease.>",
            "hr.submit.>",
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
        ACCOUNT: {"jetstream": "enabled", "users": users},
        "SYS": {"users": [{"user": SYSTEM, "password": passwords[SYSTEM]}]},
    }
