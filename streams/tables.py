"""Small tables of which every process holds a fresh copy: functions and versions, routes, tenants, forecasts, sites."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import nats.errors
from nats.js.errors import KeyDeletedError, KeyNotFoundError
from nats.js.kv import KeyValue

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
        try:
            entry = await self._bound().get(name)
        except (KeyNotFoundError, KeyDeletedError):
            return None
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise self._away() from error
        row = decode(entry.value or b"", self._kind)
        self._rows[name] = row
        self._tell()
        return row

    async def put(self, name: str, row: T) -> None:
        """Write a row; it is on disk and in this process's copy when this returns."""
        try:
            await self._bound().put(name, encode(row))
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise self._away() from error
        self._rows[name] = row
        self._tell()

    async def delete(self, name: str) -> bool:
        """Remove a row and say whether there was one."""
        if await self.fetch(name) is None:
            return False
        try:
            await self._bound().delete(name)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise self._away() from error
        self._rows.pop(name, None)
        self._tell()
        return True

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
                                    del self._rows[gone]
                            told = True
                            self._filled.set()
                            self._tell()
                        elif entry.operation in ("DEL", "PURGE"):
                            self._rows.pop(entry.key, None)
                            self._tell()
                        else:
                            seen.add(entry.key)
                            self._rows[entry.key] = decode(entry.value or b"", self._kind)
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


class Tables:
    """The tables of a platform."""

    def __init__(self, link: Link) -> None:
        self.functions = Table(link, "functions", FunctionRecord)
        self.versions = Table(link, "versions", FunctionRecord)
        self.routes = Table(link, "routes", RouteRecord)
        self.tenants = Table(link, "tenants", TenantRecord)
        self.forecasts = Table(link, "forecasts", ForecastRow)
        self.sites = Table(link, "sites", SiteRecord)

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
