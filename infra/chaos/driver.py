"""Posts triggers as an instrument would, and logs what came back: ``python -P -m infra.chaos.driver drive PLAN``.

Open loop: a trigger is sent when it is due, whatever became of those before. One whose fate is unknown is sent again
with the same id. With ``read`` instead of ``drive`` it reads all runs as the platform tells them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvloop

from headrace.clock import parse_instant
from headrace.model import Problem, RunPage, RunRef
from infra.chaos.lines import (
    Answered,
    DriverLine,
    Finished,
    LineLog,
    Listing,
    Load,
    Read,
    ReadBack,
    Reply,
    Shown,
    read_lines,
    read_plan,
)

RETRY_FIRST_S = 0.2
RETRY_MAX_S = 3.0
PAGE = 1000
SETTLE_STEP_S = 0.5
OPEN_STATES = ("accepted", "running")
FINAL_STATES = ("succeeded", "failed", "canceled")
CONNECTIONS_MAX = 2000

_problem = msgspec.json.Decoder(Problem).decode
_reference = msgspec.json.Decoder(RunRef).decode
_page = msgspec.json.Decoder(RunPage).decode


class _State(msgspec.Struct):
    state: str


_state = msgspec.json.Decoder(_State).decode


def fate(status: int, slug: str) -> Answered:
    """Say what a reply promises. 503 ``unavailable`` may come from a log that took the trigger and fell silent."""
    if status in (200, 202):
        return "accepted"
    if status == 0 or status >= 500:
        return "refused" if slug == "busy" else "unknown"
    return "refused"


class Driver:
    """One load on one platform."""

    def __init__(self, load: Load, log: LineLog, session: aiohttp.ClientSession) -> None:
        self._load = load
        self._log = log
        self._session = session
        self._headers = {"Authorization": f"Bearer {Path(load.token_file).read_text().strip()}"}
        self._rng = random.Random(load.seed)  # noqa: S311 - a seeded load, no secret
        self._began = 0.0
        self._accepted: list[str] = []

    async def run(self) -> None:
        """Send everything, and return when the fate of all is known or given up on."""
        load = self._load
        routes, weights = list(load.mix), list(load.mix.values())
        self._began = time.monotonic()
        beside = [
            asyncio.create_task(self._beside(load.reads_per_s, self._read)),
            asyncio.create_task(self._beside(load.lists_per_s, self._list)),
        ]
        async with asyncio.TaskGroup() as group:
            for number in range(load.total):
                due_s = number / load.rate_per_s
                wait_s = due_s - self._now()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                (route,) = self._rng.choices(routes, weights)
                group.create_task(self._until_known(f"{load.name}-{number}", route, due_s))
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        self._log.write(Finished(at=time.time(), total=load.total))

    def _now(self) -> float:
        return time.monotonic() - self._began

    async def _until_known(self, identity: str, route: str, due_s: float) -> None:
        body = msgspec.json.encode({"ledger": self._load.ledger, "token": identity, **self._load.extra.get(route, {})})
        give_up_s = due_s + self._load.patience_s
        retry_s = RETRY_FIRST_S
        attempt = 0
        while True:
            attempt += 1
            reply = await self._post(identity, route, body, attempt, due_s)
            self._log.write(reply)
            if reply.answered == "accepted":
                self._accepted.append(reply.run)
                return
            if self._now() > give_up_s or (reply.answered == "refused" and (self._load.once or reply.status < 429)):
                return
            wait_s = retry_s if reply.retry_after_s is None else min(reply.retry_after_s, RETRY_MAX_S)
            await asyncio.sleep(wait_s * (0.5 + 0.5 * self._rng.random()))
            retry_s = min(RETRY_MAX_S, 2 * retry_s)

    async def _post(self, identity: str, route: str, body: bytes, attempt: int, due_s: float) -> Reply:
        load = self._load
        headers = {**self._headers, "Content-Type": "application/json", "Idempotency-Key": identity}
        headers["Headrace-Deadline"] = load.deadline
        sent_s = self._now()
        status, raw, retry_after = 0, b"", None
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with self._session.post(
                f"{load.url}/v1/triggers/{route}",
                data=body,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=load.timeout_s),
            ) as response:
                said = response.headers.get("Retry-After")
                raw = await response.read()
                status, retry_after = response.status, None if said is None else float(said)
        slug, run, duplicate, deadline = "", "", False, None
        with contextlib.suppress(msgspec.MsgspecError):
            if status == 202:
                made = _reference(raw)
                run, duplicate = made.run_id, made.duplicate
                deadline = None if made.deadline is None else parse_instant(made.deadline, "deadline")
            elif status >= 400:
                slug = _problem(raw).type.rpartition(":")[2]
        return Reply(
            id=identity,
            route=route,
            attempt=attempt,
            at=time.time(),
            due_s=due_s,
            sent_s=sent_s,
            took_s=self._now() - sent_s,
            status=status,
            answered=fate(status, slug) if run or status != 202 else "unknown",
            run=run,
            duplicate=duplicate,
            slug=slug,
            retry_after_s=retry_after,
            deadline=deadline,
        )

    async def _beside(self, per_s: float, act: Any) -> None:
        """Do something again and again, open loop, while the load goes on."""
        if per_s <= 0:
            return
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(1.0 / per_s)
                group.create_task(act())

    async def _read(self) -> None:
        if not self._accepted:
            return
        run = self._accepted[self._rng.randrange(len(self._accepted))]
        at, sent_s = time.time(), self._now()
        status, raw = await _get(self._session, f"{self._load.url}/v1/runs/{run}", self._headers, self._load.timeout_s)
        state = _state(raw).state if status == 200 else ""
        self._log.write(Read(run=run, at=at, sent_s=sent_s, took_s=self._now() - sent_s, status=status, state=state))

    async def _list(self) -> None:
        at, sent_s = time.time(), self._now()
        status, _ = await _get(self._session, f"{self._load.url}/v1/runs?limit=10", self._headers, self._load.timeout_s)
        self._log.write(Listing(at=at, sent_s=sent_s, took_s=self._now() - sent_s, status=status))


async def _get(
    session: aiohttp.ClientSession, url: str, headers: dict[str, str], timeout_s: float
) -> tuple[int, bytes]:
    """Return status and body of one GET; status 0 where no whole answer came."""
    try:
        async with session.get(url, headers=headers, timeout=aiohttp.ClientTimeout(total=timeout_s)) as response:
            return response.status, await response.read()
    except (aiohttp.ClientError, OSError, TimeoutError):
        return 0, b""


async def read_back(plan: ReadBack, log: LineLog, session: aiohttp.ClientSession) -> None:
    """Read the list of all runs once all that were accepted have ended there, or when patience is over."""
    headers = {"Authorization": f"Bearer {Path(plan.token_file).read_text().strip()}"}
    promised = {
        line.run
        for path in plan.accepted
        for line in read_lines(path, DriverLine)
        if isinstance(line, Reply) and line.run
    }
    give_up_at = time.monotonic() + plan.patience_s
    known = -1
    while True:
        shown = await _all_runs(plan.url, session, headers)
        ended = {run for run, view in shown.items() if view.state in FINAL_STATES}
        settled = len(ended) == len(shown) == known and promised <= ended
        if settled or time.monotonic() > give_up_at:
            break
        known = len(shown)
        await asyncio.sleep(SETTLE_STEP_S)
    for view in shown.values():
        log.write(view)
    log.write(Finished(at=time.time(), total=len(promised), settled=settled))


async def _all_runs(url: str, session: aiohttp.ClientSession, headers: dict[str, str]) -> dict[str, Shown]:
    found: dict[str, Shown] = {}
    cursor = ""
    while True:
        at = time.time()
        more = f"&cursor={cursor}" if cursor else ""
        status, raw = await _get(session, f"{url}/v1/runs?limit={PAGE}{more}", headers, 10.0)
        if status != 200:
            return found
        page = _page(raw)
        for run in page.runs:
            found[run.run_id] = Shown(run=run.run_id, at=at, state=run.state, deadline_met=run.deadline_met)
        if page.next is None:
            return found
        cursor = page.next


async def _main(what: str, path: str) -> None:
    connector = aiohttp.TCPConnector(limit=CONNECTIONS_MAX)
    async with aiohttp.ClientSession(connector=connector) as session:
        if what == "read":
            plan = read_plan(path, ReadBack)
            await read_back(plan, LineLog(plan.log), session)
        else:
            load = read_plan(path, Load)
            await Driver(load, LineLog(load.log), session).run()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main(sys.argv[1], sys.argv[2]))
