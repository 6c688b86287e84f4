"""Who shares the platform: added, listed, given tokens and removed by whoever may write everything to the log.

A tenant is a row (its name and the digests of its tokens) and a consumer for each lane. The consumers come before the
row and go after it: what is in the table can always be worked on. A token is shown once, when it is made, and is
nowhere else; the row holds its SHA-256.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import msgspec
from msgspec import Struct
from nats.js.errors import KeyDeletedError, KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from headrace.clock import format_instant
from headrace.errors import BadRequest, Conflict, NotFound
from headrace.names import check_name
from headrace.wire import Cancel, FunctionRecord, RouteRecord, TenantRecord, decode, encode
from infra import rights
from infra.credentials import new_secret
from infra.services import link_to, log_on, tables_on
from infra.settings import Settings
from infra.up import Servers
from streams import topology
from streams.follow import follow
from streams.link import Link
from streams.log import AlreadyThere, Log, Record
from streams.tables import Table, Tables
from streams.topology import (
    DEFAULT_TENANT,
    LANES,
    LaneOf,
    cancel_subject,
    done_subject,
    job_subject,
    lane_of,
    run_of,
    work_subject,
)

TOKENS_MAX = 16
HEARD_S = 1.0  # after which every gateway and worker has heard of a change of the table
SCAN_IDLE_S = 1.0
CANCELS_AT_ONCE = 256
REASON = "the tenant was removed"


class TenantView(Struct, frozen=True, kw_only=True):
    """A tenant, how many tokens speak for it, and how much of its work waits for a worker or is with one."""

    name: str
    tokens: int
    added_at: str
    work: int


class Removed(Struct, frozen=True, kw_only=True):
    """What went with a tenant: runs that were canceled, routes and functions."""

    canceled: int
    routes: int
    functions: int


class Admin:
    """Does what is asked for on one platform. The names given to it are checked here."""

    def __init__(self, link: Link, log: Log, tables: Tables, store: KeyValue) -> None:
        self._link = link
        self._log = log
        self._tables = tables
        self._store = store

    async def add(self, name: str) -> str:
        """Make a tenant and return its first token.

        Raises:
            BadName: the name does not follow the rule for names.
            Conflict: there is one of this name.
        """
        _check(name)
        token = new_secret()
        if (await self._row(name))[0] is not None:
            raise _there(name)
        await topology.add_tenant(self._link, name)
        row = TenantRecord(name=name, digests=[digest(token)], added_at=time.time())
        try:
            await self._store.create(name, encode(row))
        except KeyWrongLastSequenceError as error:
            raise _there(name) from error
        return token

    async def new_token(self, name: str, *, revoke: bool) -> str:
        """Make another token of a tenant and return it; with ``revoke`` those before it are good no longer.

        Raises:
            NotFound: there is no such tenant.
            TooLarge, Conflict: it has as many as it may have, or somebody else changed it at this moment.
        """
        _check(name)
        row, revision = await self._row(name)
        if row is None:
            raise _unknown(name)
        token = new_secret()
        digests = [*([] if revoke else row.digests), digest(token)]
        if len(digests) > TOKENS_MAX:
            raise Conflict(
                f"{name} has {TOKENS_MAX} tokens, which is the limit",
                hint=f"`headrace tenant token {name} --revoke` makes one that replaces them all.",
            )
        await self._write(msgspec.structs.replace(row, digests=digests), revision)
        return token

    async def list(self) -> list[TenantView]:
        """Return all tenants by name, the default one first."""
        work = await self._work()
        rows = self._tables.tenants.items()
        default = TenantView(name=DEFAULT_TENANT, tokens=1, added_at="", work=work.get(DEFAULT_TENANT, 0))
        others = [
            TenantView(
                name=name, tokens=len(row.digests), added_at=format_instant(row.added_at), work=work.get(name, 0)
            )
            for name, row in sorted(rows.items())
        ]
        return [default, *others]

    async def remove(self, name: str, *, force: bool) -> Removed:
        """Remove a tenant: its tokens are good no longer, its routes fire no more, and in the end its lanes go.

        What it ran stays in the log, as long as that keeps things. Broken off, it can be asked for again.

        Raises:
            NotFound: there is no such tenant, nor anything left of one.
            Conflict: work of it waits or runs, and ``force`` does not say that it shall be canceled.
        """
        _check(name)
        row, revision = await self._row(name)
        work = (await self._work()).get(name)
        if row is None and work is None:
            raise _unknown(name)
        busy = (work or 0) + len(await self._jobs(name))
        if busy and not force:
            raise Conflict(
                f"{busy:,} invocations and jobs of {name} wait or run",
                hint="Wait until they have ended, or add --force: then their runs are canceled.",
            )
        if row is not None and row.digests:
            await self._write(msgspec.structs.replace(row, digests=[]), revision)
            await asyncio.sleep(HEARD_S)
        routes = await _clear_of(self._tables.routes, name)
        functions = await _clear_of(self._tables.functions, name)
        await _clear_of(self._tables.versions, name)
        await _clear(
            self._tables.forecasts, [key for key in self._tables.forecasts.items() if key.startswith(name + ".")]
        )
        canceled = await self._cancel_open(name)
        if row is not None:
            await self._tables.tenants.delete(name)
            await asyncio.sleep(HEARD_S)
        await topology.remove_tenant(self._link, name)
        return Removed(canceled=canceled, routes=routes, functions=functions)

    async def _work(self) -> dict[str, int]:
        """Return how much work of each tenant that has lanes waits or is with a worker."""
        found: dict[str, int] = {}
        for name, info in (await topology.consumers(self._link.jetstream())).items():
            lane = lane_of(name)
            if lane is not None:
                waiting = (info.num_pending or 0) + (info.num_ack_pending or 0)
                found[lane.tenant] = found.get(lane.tenant, 0) + waiting
        return found

    async def _cancel_open(self, name: str) -> int:
        """Cancel all runs of which work is not acknowledged or a batch job has not ended, and return how many."""
        wanted = {LaneOf(lane, name) for lane in range(LANES)}
        lanes = [i for n, i in (await topology.consumers(self._link.jetstream())).items() if lane_of(n) in wanted]
        open_lanes = [info for info in lanes if info.num_pending or info.num_ack_pending]
        found = {run: None for run, _ in await self._jobs(name)}
        if open_lanes:
            after = min(0 if info.ack_floor is None else info.ack_floor.stream_seq for info in open_lanes)
            found |= {run: None async for run, _ in self._after(work_subject("*", name, "*", "*"), after)}
        runs = sorted(found)
        for start in range(0, len(runs), CANCELS_AT_ONCE):
            await asyncio.gather(*(self._cancel(run) for run in runs[start : start + CANCELS_AT_ONCE]))
        return len(runs)

    async def _jobs(self, name: str) -> set[tuple[str, str]]:
        """Return the batch jobs (run, job) that have not ended, in runs that are not canceled.

        The message of a job is acknowledged once its site has it, so no consumer tells of those.
        """
        asked = {one: None async for one in self._after(job_subject("*", name, "*", "*"), 0)}
        found: set[tuple[str, str]] = set()
        every = tuple(asked)
        for start in range(0, len(every), CANCELS_AT_ONCE):
            some = every[start : start + CANCELS_AT_ONCE]
            ended = await self._log.last_of_each([done_subject(run, job) for run, job in some])
            canceled = await self._log.last_of_each([*{cancel_subject(run, "*") for run, _ in some}])
            over = {tuple(stored.subject.split(".")[2:4]) for stored in ended}
            gone = {run_of(stored.subject) for stored in canceled}
            found |= {(run, job) for run, job in some if (run, job) not in over and run not in gone}
        return found

    async def _after(self, subject: str, after: int) -> AsyncIterator[tuple[str, str]]:
        """Yield run and invocation of all work of a subject behind a place in the log."""
        newest = await self._log.last(subject)
        end = 0 if newest is None else newest.seq
        if end <= after:
            return
        async with aclosing(follow(self._log, [subject], after=after, idle_s=SCAN_IDLE_S)) as batches:
            async for batch in batches:
                for stored in batch:
                    _, _, _, _, run, identity = stored.subject.split(".")
                    yield run, identity
                if batch and batch[-1].seq >= end:
                    return

    async def _cancel(self, run: str) -> None:
        subject = cancel_subject(run)
        wish = Cancel(run_id=run, at=time.time(), reason=REASON)
        with suppress(AlreadyThere):
            await self._log.append([Record(subject, encode(wish), subject)])

    async def _row(self, name: str) -> tuple[TenantRecord | None, int]:
        """Return a row and its revision, as the server has them."""
        try:
            entry = await self._store.get(name)
        except (KeyNotFoundError, KeyDeletedError):
            return None, 0
        return decode(entry.value or b"", TenantRecord), entry.revision or 0

    async def _write(self, row: TenantRecord, revision: int) -> None:
        try:
            await self._store.update(row.name, encode(row), last=revision)
        except KeyWrongLastSequenceError as error:
            raise Conflict(f"{row.name} was changed by somebody else just now", hint="Try again.") from error


@asynccontextmanager
async def administration(settings: Settings) -> AsyncIterator[Admin]:
    """Lend what adds and removes tenants, as the user admin.

    It works on the servers that are configured; where none are, on those of the platform that runs on the data folder.
    """
    settings = of_running_platform(settings)
    async with (
        link_to(settings, rights.ADMIN) as link,
        log_on(link, settings) as log,
        tables_on(link) as tables,
    ):
        yield Admin(link, log, tables, await link.jetstream().key_value("tenants"))


def as_json(tenants: list[TenantView]) -> str:
    """Return the tenants as JSON."""
    return msgspec.json.format(msgspec.json.encode({"tenants": tenants}), indent=2).decode()


def as_text(tenants: list[TenantView]) -> str:
    """Return the tenants for a person, a line each."""
    rows = [("NAME", "TOKENS", "WORK", "ADDED"), *((t.name, str(t.tokens), str(t.work), t.added_at) for t in tenants)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def digest(token: str) -> str:
    """Return what is kept of a token. It has 256 random bits, so its digest needs no salt and no slowness."""
    return hashlib.sha256(token.encode()).hexdigest()


def of_running_platform(settings: Settings) -> Settings:
    """Return the settings with the servers of the platform on the data folder, if one runs and no others are named."""
    data = settings.data_dir.absolute()
    if settings.nats_password_file is not None or settings.nats_user or not (data / "url").exists():
        return settings
    with suppress(OSError, msgspec.MsgspecError):
        servers = msgspec.json.decode((data / "run" / "servers.json").read_bytes(), type=Servers)
        password = data / "run" / f"nats-{rights.ADMIN}.password"
        return msgspec.structs.replace(
            settings, nats_url=servers.nats_url, nats_user=rights.ADMIN, nats_password_file=password
        )
    return settings


async def _clear_of(table: Table[FunctionRecord] | Table[RouteRecord], tenant: str) -> int:
    return await _clear(table, [key for key, row in table.items().items() if row.tenant == tenant])


async def _clear(table: Table[Any], keys: list[str]) -> int:
    for key in keys:
        await table.delete(key)
    return len(keys)


def _check(name: str) -> None:
    check_name(name, "name of a tenant")
    if name == DEFAULT_TENANT:
        raise BadRequest(
            f"{DEFAULT_TENANT} is the platform's own tenant and always there",
            hint="Its token is the one in DIR/token, or in the file that HEADRACE_TOKEN_FILE names.",
        )


def _there(name: str) -> Conflict:
    return Conflict(f"there is a tenant {name} already", hint=f"`headrace tenant token {name}` makes another token.")


def _unknown(name: str) -> NotFound:
    return NotFound(f"there is no tenant {name}", hint="`headrace tenant list` shows them.")
