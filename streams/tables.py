"""Small tables of which every process holds a fresh copy: functions and versions, routes, tenants, forecasts, sites.

How long a site is silent, all read by one clock: that of the server, which stored its row.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any, Generic, TypeVar

import nats.errors
from msgspec import structs
from nats.js.errors import KeyWrongLastSequenceError, NotFoundError
from nats.js.kv import KV_DEL, KV_OP, KV_PURGE, KeyValue

from headrace.errors import Unavailable
from headrace.joblog import SiteRecord
from headrace.wire import ForecastRow, FunctionRecord, RouteRecord, TenantRecord, decode, encode
from streams.link import Link
from streams.topology import DEFAULT_TENANT

_log = logging.getLogger(__name__)

T = TypeVar("T")


def row_key(tenant: str, name: str) -> str:
    """Return the key of something that a tenant registered under a name: what is his is no other's of the same name.

    Names hold no dot, so no key of one tenant is that of another. Those of the default tenant are the names alone, as
    they were before there were others.
    """
    return name if tenant == DEFAULT_TENANT else f"{tenant}.{name}"


class Table(Generic[T]):
    """A key-value bucket with a copy in memory that follows it. Keys are checked names (joined by a dot)."""

    def __init__(self, link: Link, bucket: str, kind: type[T]) -> None:
        self._link = link
        self._bucket = bucket
        self._kind = kind
        self._rows: dict[str, T] = {}
        self._revisions: dict[str, int] = {}  # of the rows that came from the server
        self._store: KeyValue | None = None
        self._watching: asyncio.Task[None] | None = None
        self._filled = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    async def open(self) -> None:
        """Fill the copy and keep it fresh from now on."""
        self._store = await self._link.jetstream().key_value(self._bucket)
        self._watching = asyncio.create_task(self._watch(), name=f"table-{self._bucket}")
        await self._filled.wait()

    async def close(self) -> None:
        """Stop following."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    def get(self, name: str) -> T | None:
        """Return the row from the copy in memory."""
        return self._rows.get(name)

    def items(self) -> dict[str, T]:
        """Return the copy in memory; do not change it."""
        return self._rows

    def listen(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call ``changed`` after each change of the copy, until what is returned is called."""
        self._listeners.append(changed)
        return lambda: self._listeners.remove(changed)

    def _tell(self) -> None:
        for changed in list(self._listeners):
            changed()

    async def fetch(self, name: str) -> T | None:
        """Return the row as the server has it, for when the copy may be a moment behind.

        Raises:
            Unavailable: the server does not answer.
        """
        self._bound()
        try:
            # Not by the bucket's own `get`, which does not tell when the row was stored.
            found = await self._link.jetstream().get_msg(
                f"KV_{self._bucket}", subject=f"$KV.{self._bucket}.{name}", direct=True
            )
        except NotFoundError:
            return None
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise self._away() from error
        if (found.headers or {}).get(KV_OP) in (KV_DEL, KV_PURGE):
            return None
        row = self._read(found.data, found.time)
        if (found.seq or 0) >= self._revisions.get(name, 0):
            self._rows[name], self._revisions[name] = row, found.seq or 0
        self._tell()
        return row

    async def create(self, name: str, row: T) -> bool:
        """Write a row unless there is one of this name, and say whether there was none.

        Raises:
            Unavailable: the server does not answer.
        """
        try:
            revision = await self._bound().create(name, encode(row))
        except KeyWrongLastSequenceError:
            return False
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise self._away() from error
        self._wrote(name, row, revision)
        return True

    def _wrote(self, name: str, row: T, revision: int) -> None:
        """Have a row that we wrote in our copy at once, unless the server was quicker to tell of it, or of a newer."""
        if revision > self._revisions.get(name, 0):
            self._rows[name] = row
        self._tell()

    async def put(self, name: str, row: T) -> None:
        """Write a row; it is on disk and in this process's copy when this returns."""
        try:
            revision = await self._bound().put(name, encode(row))
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise self._away() from error
        self._wrote(name, row, revision)

    async def delete(self, name: str) -> bool:
        """Remove a row and say whether there was one."""
        if await self.fetch(name) is None:
            return False
        try:
            await self._bound().delete(name)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise self._away() from error
        self._gone(name)
        return True

    def _gone(self, name: str) -> None:
        self._rows.pop(name, None)
        self._revisions.pop(name, None)
        self._tell()

    def _read(self, body: bytes | None, stored: datetime | None) -> T:
        """Return the row that stands in a message, which was stored at an instant of the server."""
        return decode(body or b"", self._kind)

    def _bound(self) -> KeyValue:
        if self._store is None:
            raise Unavailable(f"the table {self._bucket} is not open", hint="Call open() first.")
        return self._store

    def _away(self) -> Unavailable:
        return Unavailable(f"the table {self._bucket} does not answer", hint="Try again in a moment.")

    async def _watch(self) -> None:
        """Follow the bucket; a watch that breaks is begun again from the current state of all keys."""
        while True:
            try:
                watcher = await self._bound().watchall()
                seen: set[str] = set()
                told = False
                try:
                    async for entry in watcher:
                        if entry is None:  # all that was there has been told (the client may say so more than once)
                            if not told:
                                for gone in self._rows.keys() - seen:
                                    self._gone(gone)
                            told = True
                            self._filled.set()
                            self._tell()
                        elif entry.operation in ("DEL", "PURGE"):
                            self._gone(entry.key)
                        else:
                            seen.add(entry.key)
                            self._rows[entry.key] = self._read(entry.value, entry.created)
                            self._revisions[entry.key] = entry.revision
                            if told:
                                self._tell()
                finally:
                    with contextlib.suppress(Exception):
                        await watcher.stop()  # type: ignore[no-untyped-call] # nats-py leaves it untyped
            except asyncio.CancelledError:
                raise
            except Exception as error:
                _log.warning("watching the table %s: %s; beginning again", self._bucket, error)
            await asyncio.sleep(0.5)


class SiteTable(Table[SiteRecord]):
    """How the sites are. ``at`` of each row is when the server stored it, for agents' clocks are not all right."""

    def __init__(self, link: Link) -> None:
        super().__init__(link, "sites", SiteRecord)

    def _read(self, body: bytes | None, stored: datetime | None) -> SiteRecord:
        row = super()._read(body, stored)
        return row if stored is None else structs.replace(row, at=stored.timestamp())


class Tables:
    """The tables of a platform."""

    def __init__(self, link: Link) -> None:
        self.functions = Table(link, "functions", FunctionRecord)
        self.versions = Table(link, "versions", FunctionRecord)
        self.routes = Table(link, "routes", RouteRecord)
        self.tenants = Table(link, "tenants", TenantRecord)
        self.forecasts = Table(link, "forecasts", ForecastRow)
        self.sites = SiteTable(link)

    async def open(self) -> None:
        """Fill the copies of all of them, and keep them fresh from now on."""
        await asyncio.gather(*(table.open() for table in self._all()))

    async def close(self) -> None:
        """Stop following all of them."""
        await asyncio.gather(*(table.close() for table in self._all()))

    def _all(self) -> tuple[Table[Any], ...]:
        return (self.functions, self.versions, self.routes, self.tenants, self.forecasts, self.sites)

    def function(self, tenant: str, name: str) -> FunctionRecord | None:
        """Return the current version of a tenant's function."""
        return self.functions.get(row_key(tenant, name))

    async def version(self, tenant: str, name: str, version: str) -> FunctionRecord | None:
        """Return one version of a tenant's function, current or not."""
        key = f"{row_key(tenant, name)}.{version}"
        return self.versions.get(key) or await self.versions.fetch(key)


async def open_tables(link: Link) -> Tables:
    """Open all tables and return them once their copies are filled."""
    tables = Tables(link)
    await tables.open()
    return tables
