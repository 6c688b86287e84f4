"""A gateway whose log is written by hand, and a browser that is watched while it shows the live page."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web
from playwright.async_api import ConsoleMessage, Page, Request

from functions.admission import UNKNOWN, admit
from gateway.app import build
from gateway.limits import GatewayLimits
from gateway.server import Runner
from headrace.model import ErrorInfo, FunctionOptions, InvocationState, Quote, Route, RunState, TimeLedger
from headrace.wire import (
    EventMeta,
    FunctionRecord,
    Invocation,
    Note,
    Outcome,
    Payload,
    RouteRecord,
    RunEnd,
    Started,
    encode,
)
from streams.blobs import FolderBlobs
from streams.topology import DEFAULT_TENANT, done_subject, note_subject, start_subject
from tests.doubles import MemoryLog, MemoryReader, MemoryTables

TOKEN = "a-token-for-tests"


class Stage:
    """A real gateway on a free port, and the facts that a worker would put into its log."""

    def __init__(self, folder: Path) -> None:
        self.log = MemoryLog()
        self.reader = MemoryReader(self.log)
        self.tables = MemoryTables()
        self.port = 0
        self._blobs = FolderBlobs(folder / "blobs")
        self._runner: Runner | None = None
        self._numbers = itertools.count()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.port}/"

    async def open(self) -> None:
        """Serve, on the port of the time before if there was one."""
        app = build(
            log=self.log,
            follow=self.log.follow,
            tables=self.tables,
            blobs=self._blobs,
            reader=self.reader,
            token=TOKEN,
            version="1.2.3",
            limits=GatewayLimits(disk_bytes_min=0),
        )
        self._runner = Runner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Stop serving. The log stays."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def accept(
        self, route: str = "fusion", *, age_s: float = 0.0, due_in_s: float | None = 60.0, quote: Quote = UNKNOWN
    ) -> Invocation:
        """Accept a run with this quote, ``age_s`` seconds ago, that is due ``due_in_s`` seconds from now."""
        now = time.time()
        admitted = admit(
            event=EventMeta(id=str(next(self._numbers)), source="/test", type="org.test"),
            payload=Payload(body=b"1", size=1),
            digest="",
            route=RouteRecord(name=route, tenant=DEFAULT_TENANT, route=Route(function="analyse")),
            function=FunctionRecord(
                name="analyse", version="v1", options=FunctionOptions(), code_blob="0" * 64, registered_at=now
            ),
            tenant=DEFAULT_TENANT,
            now=now - age_s,
            deadline=None if due_in_s is None else now + due_in_s,
            quote=quote,
        )
        self.log.put(admitted.record.subject, admitted.record.body)
        return admitted.invocation

    def start(self, work: Invocation) -> None:
        """Have a worker start it."""
        fact = Started(
            run_id=work.run_id,
            invocation_id=work.invocation_id,
            function=work.function,
            version=work.version,
            worker="w",
            attempt=1,
            queued_at=work.sent_at,
            started_at=time.time(),
        )
        self.log.put(start_subject(work.run_id, work.invocation_id, 1), encode(fact))

    def note(self, work: Invocation, text: str, fraction: float) -> None:
        """Have it say how far it is."""
        fact = Note(run_id=work.run_id, invocation_id=work.invocation_id, at=time.time(), fraction=fraction, text=text)
        self.log.put(note_subject(work.run_id, work.invocation_id, 1), encode(fact))

    def end(self, work: Invocation, *, result: bytes = b'{"q95":4.1}', error: ErrorInfo | None = None) -> None:
        """Have it end well with this result, or in this error."""
        now = time.time()
        run_state: RunState = "failed" if error else "succeeded"
        state: InvocationState = "dead" if error else "succeeded"
        spent = TimeLedger(lane_s=0.1 * (now - work.accepted_at), run_s=0.9 * (now - work.accepted_at))
        end = RunEnd(
            run_id=work.run_id,
            state=run_state,
            answer_id=None if error else work.invocation_id,
            error=error,
            spent=spent,
            ended_at=now,
        )
        fact = Outcome(
            run_id=work.run_id,
            invocation_id=work.invocation_id,
            function=work.function,
            version=work.version,
            route=work.route,
            tenant=work.tenant,
            state=state,
            attempts=1,
            queued_at=work.sent_at,
            started_at=work.sent_at,
            ended_at=now,
            worker="w",
            accepted_at=work.accepted_at,
            deadline=work.deadline,
            result=None if error else Payload(body=result, size=len(result)),
            error=error,
            spent=spent,
            end=end,
        )
        self.log.put(done_subject(work.run_id, work.invocation_id), encode(fact))


@dataclass
class Watched:
    """What a page did besides showing something."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._request)

    def _console(self, message: ConsoleMessage) -> None:
        # Chromium tells here of broken rules of the Content-Security-Policy too.
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _request(self, request: Request) -> None:
        self.requests.append(request.url)

    def strangers(self, url: str) -> list[str]:
        """Return the requests that did not go to the origin of ``url``."""
        home = urlsplit(url)[:2]
        return [r for r in self.requests if urlsplit(r)[:2] != home and not r.startswith("data:")]


async def text_of(page: Page, selector: str) -> str:
    """Return what a reader sees of an element, on one line."""
    return " ".join((await page.locator(selector).inner_text()).split())
