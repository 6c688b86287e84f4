"""What the gateway asks of the rest, as small protocols. The real things are in ``streams``; tests bring doubles."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from headrace.joblog import SiteRecord
from headrace.model import Audit, RunPage, RunView
from headrace.wire import ForecastRow, FunctionRecord, RouteRecord, TenantRecord
from streams.backlog import Look
from streams.blobs import Blobs
from streams.log import Record
from streams.reader import DeadFound
from streams.record import RunRecord
from streams.stored import Stored

T = TypeVar("T")


class Link(Protocol):
    """The connection to the log's server."""

    @property
    def connected(self) -> bool:
        """Whether it stands at this moment."""


class Log(Protocol):
    """The log, as ``streams.log.Log`` is it: what ``append`` returned is synced to disk."""

    last_seq: int

    @property
    def link(self) -> Link:
        """The connection in use."""

    async def append(self, unit: list[Record], *, timeout_s: float = 10.0) -> list[int]:
        """Append all records or none; raises ``AlreadyThere`` and ``Unavailable``."""

    async def last(self, subject: str) -> Stored | None:
        """Return the newest message on a subject."""

    async def last_of_each(self, subjects: list[str]) -> list[Stored]:
        """Return the newest message of each subject that matches, in the order of the log; at most 1,000."""

    async def at(self, seqs: Iterable[int]) -> list[Stored]:
        """Return the messages at these sequences; ``Unavailable`` if the log holds one of them no longer."""

    async def end_seq(self) -> int:
        """Return the sequence of the newest message."""

    async def begins_at(self) -> float | None:
        """Return the instant of the oldest message, None for an empty log."""

    async def size(self) -> tuple[int, int]:
        """Return the bytes that the log takes, and those at which it refuses (0: no limit)."""

    def live(
        self, *subjects: str, wanted: Callable[[str, bytes], bool] | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Stored]]:
        """Return what is stored on these subjects from now on; it may miss what a reconnect hides."""


class Follow(Protocol):
    """Ordered reading, as ``streams.follow.follow`` does it for one log."""

    def __call__(
        self,
        subjects: list[str],
        *,
        after: int = -1,
        since: float | None = None,
        window: int = 512,
        idle_s: float = 5.0,
    ) -> AsyncGenerator[list[Stored], None]:
        """Yield every message after a sequence or from an instant on, in order, for ever; empty when nothing comes."""


class Table(Protocol[T]):
    """Rows by name, with a copy in memory that is at most a moment old."""

    def get(self, name: str) -> T | None:
        """Return a row from memory."""

    def items(self) -> dict[str, T]:
        """Return all rows in memory."""

    async def fetch(self, name: str) -> T | None:
        """Return a row as the server has it."""

    async def put(self, name: str, row: T) -> None:
        """Write a row to disk."""

    async def delete(self, name: str) -> bool:
        """Remove a row and say whether there was one."""

    def listen(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call ``changed`` after each change of the copy, until what is returned is called."""


class Tables(Protocol):
    """What is registered, who shares the platform, what is expected of functions, and how the sites are."""

    @property
    def functions(self) -> Table[FunctionRecord]:
        """Current versions by name."""

    @property
    def versions(self) -> Table[FunctionRecord]:
        """All versions by ``name.version``."""

    @property
    def routes(self) -> Table[RouteRecord]:
        """Routes by name."""

    @property
    def tenants(self) -> Table[TenantRecord]:
        """Those who share the platform, by name."""

    @property
    def forecasts(self) -> Table[ForecastRow]:
        """What is expected of functions, by name."""

    @property
    def sites(self) -> Table[SiteRecord]:
        """How the sites are, by name."""


class Store(Blobs, Protocol):
    """Bytes by their digest, with a folder on the same disk in which large ones can grow before they are adopted."""

    incoming: Path

    def adopt(self, path: Path, digest: str) -> None:
        """Move a finished and synced file from ``incoming`` into its place. The caller has checked its digest."""


class Lanes(Protocol):
    """The lanes of the log, from outside."""

    async def look(self) -> Look:
        """Return how much waits and how much has ended; ``Unavailable`` while the log does not answer."""


class Reader(Protocol):
    """The read model. It may lag behind the log and may be away (``Unavailable``)."""

    async def position(self) -> int:
        """Return the sequence up to which the log was read."""

    async def run(self, run: str, /) -> RunView | None:
        """Return a run, or None if it is not known here (yet)."""

    async def record(self, run: str, /) -> RunRecord | None:
        """Return a run without its invocations, or None."""

    async def open_runs(self, tenant: str, route: str, /) -> int:
        """Return how many runs of a tenant's route have not ended."""

    async def page(
        self,
        tenant: str,
        /,
        *,
        state: str | None = None,
        route: str | None = None,
        since: float | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> RunPage:
        """Return runs of a tenant, newest first; ``BadRequest`` for a cursor that is none."""

    async def dead(
        self,
        tenant: str,
        /,
        *,
        function: str | None = None,
        route: str | None = None,
        since: float | None = None,
        replayed: bool = False,
        limit: int = 100,
        cursor: str | None = None,
    ) -> DeadFound:
        """Return invocations that were given up on, newest first; ``BadRequest`` for a cursor that is none."""

    async def run_of_dead(self, invocation: str, /) -> str | None:
        """Return the run of an invocation that was given up on, or None if it is not known here."""

    async def audit(self) -> Audit | None:
        """Return what the auditor found last, or None before its first round."""


class Behind(NamedTuple):
    """What is behind the front door."""

    log: Log
    tables: Tables
    blobs: Store
    reader: Reader
