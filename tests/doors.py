"""Gateways for tests: real HTTP on a free port, with the log and the read model in memory behind it."""

from __future__ import annotations

import json
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec
from aiohttp import web

from gateway.app import build
from gateway.limits import GatewayLimits
from gateway.needs import Lanes
from gateway.server import Runner
from gateway.uploads import Landing
from headrace.model import Problem, RunRef, RunState
from headrace.wire import Invocation, Outcome, Payload, RunEnd, decode, encode
from streams.blobs import FolderBlobs
from streams.topology import done_subject, end_subject
from tests.doubles import MemoryLog, MemoryReader, MemoryTables

TOKEN = "test-token-0123456789"
CODE = {"kind": "source", "name": "f", "module": "user", "files": {"user.py": "def f(x):\n    return x\n"}}


@dataclass
class Front:
    """A gateway on a free port, and a client with its token."""

    url: str
    http: aiohttp.ClientSession
    runner: Runner

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any, aiohttp.ClientResponse]:
        async with self.http.request(method, self.url + path, **options) as answer:
            body = await answer.read()
            said: Any = body
            if "json" in answer.headers.get("Content-Type", ""):
                said = json.loads(body)
            return answer.status, said, answer

    async def problem(self, status: int, method: str, path: str, **options: Any) -> Problem:
        """Ask for what must be refused, and return a well-formed problem."""
        found, said, answer = await self.ask(method, path, **options)
        assert found == status, said
        assert answer.headers["Content-Type"] == "application/problem+json"
        problem = msgspec.convert(said, Problem)
        assert problem.status == status
        assert problem.detail
        assert problem.type.startswith("urn:headrace:problem:")
        assert "Traceback" not in str(said)
        return problem

    async def deploy(self, route: str = "r", **rule: Any) -> None:
        status, said, _ = await self.ask("PUT", "/v1/functions/f", json={"code": CODE})
        assert status in (200, 201), said
        status, said, _ = await self.ask("PUT", f"/v1/routes/{route}", json={"function": "f", **rule})
        assert status in (200, 201), said

    async def trigger(self, route: str = "r", **options: Any) -> RunRef:
        status, said, _ = await self.ask("POST", f"/v1/triggers/{route}", **options)
        assert status == 202, said
        return msgspec.convert(said, RunRef)


@dataclass
class Door(Front):
    """A gateway, and what is behind it in memory."""

    log: MemoryLog
    reader: MemoryReader
    tables: MemoryTables
    blobs: FolderBlobs

    def firsts(self) -> list[Invocation]:
        """Return all accepted first invocations, in order."""
        return [decode(s.body, Invocation) for s in self.log.stored if s.subject.startswith("hr.work.")]

    def finish(self, run_id: str, result: bytes | Payload = b'{"ok":true}', **changes: Any) -> int:
        """Commit the outcome of a run's first invocation, as a worker would."""
        if isinstance(result, bytes):
            result = Payload(body=result, size=len(result))
        first = next(i for i in self.firsts() if i.run_id == run_id)
        now = time.time()
        fields: dict[str, Any] = {
            "run_id": run_id,
            "invocation_id": first.invocation_id,
            "function": first.function,
            "version": first.version,
            "route": first.route,
            "tenant": first.tenant,
            "state": "succeeded",
            "attempts": 1,
            "queued_at": now,
            "started_at": now,
            "ended_at": now,
            "worker": "w",
            "accepted_at": first.accepted_at,
            "deadline": first.deadline,
            "result": result,
            "end": RunEnd(run_id=run_id, state="succeeded", answer_id=first.invocation_id, ended_at=now),
            **changes,
        }
        return self.log.put(done_subject(run_id, first.invocation_id), encode(Outcome(**fields)))

    def finish_run(self, run_id: str, state: RunState) -> int:
        """Record the end of a run with branches, as a worker would."""
        return self.log.put(end_subject(run_id), encode(RunEnd(run_id=run_id, state=state, ended_at=time.time())))


class Doors:
    """Opens gateways and closes them all in the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def open(self, lanes: Lanes | None = None, direct: Landing | None = None, **limits: Any) -> Door:
        """Open a gateway with these limits, before these lanes; nothing is registered yet."""
        log, tables, blobs = MemoryLog(), MemoryTables(), FolderBlobs(self._folder / "blobs")
        reader = MemoryReader(log)
        app = build(
            log=log,
            follow=log.follow,
            tables=tables,
            blobs=blobs,
            reader=reader,
            token=TOKEN,
            version="1.2.3",
            limits=GatewayLimits(**{"disk_bytes_min": 0, **limits}),
            lanes=lanes,
            direct=direct,
        )
        front = await self.serve(app)
        return Door(front.url, front.http, front.runner, log, reader, tables, blobs)

    async def serve(self, app: web.Application) -> Front:
        """Serve an application on a free port."""
        runner = Runner(app)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        http = await self._stack.enter_async_context(
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"})
        )
        host, port = runner.addresses[0][:2]
        return Front(f"http://{host}:{port}", http, runner)
