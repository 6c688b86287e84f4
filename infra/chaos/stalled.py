"""F9: a page that stops reading its events, and a worker that stops answering, while others go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

from infra.chaos import measure
from infra.chaos.launch import LOOPBACK, Up
from infra.chaos.lines import Figure, Reply, Result, Step
from infra.chaos.trial import Case, Trial
from infra.rights import GATEWAY, WORKER

PHASE_S = 30.0
RATE_PER_S = 100.0
PAGES = 8
SETTLE_S = 2.0
GROWTH_MIB = 8.0
ALLOWED = 1.10
READ_S = 15.0
SMALL_BUFFER_BYTES = 4096


class Page:
    """One client of server-sent events, by hand: it reads when it is told to, and only then."""

    def __init__(self, up: Up) -> None:
        self._up = up
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.last_id = ""
        self.accepted: set[str] = set()

    async def open(self) -> None:
        """Connect, and go on after the last event that was read, if any was."""
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, (LOOPBACK, self._up.port))
        self._reader, self._writer = await asyncio.open_connection(sock=raw, limit=SMALL_BUFFER_BYTES)
        resume = f"Last-Event-ID: {self.last_id}\r\n" if self.last_id else ""
        self._writer.write(
            f"GET /v1/stream HTTP/1.1\r\nHost: {LOOPBACK}\r\nAuthorization: Bearer {self._up.token}\r\n"
            f"Accept: text/event-stream\r\n{resume}\r\n".encode()
        )
        await self._writer.drain()

    async def lines(self) -> AsyncIterator[str]:
        """Yield lines until the connection ends."""
        if self._reader is None:
            return
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while (line := await self._reader.readline()).endswith(b"\n"):  # else it was cut off in mid-line
                yield line.decode("utf-8", "replace").strip()

    async def read(self, until: set[str], patience_s: float) -> None:
        """Read until the acceptance of all these runs was told, the connection ends, or patience does."""
        kind, held = "", set[str]()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                async for line in self.lines():
                    name, _, value = line.partition(": ")
                    if name == "event":
                        kind = value
                    elif name == "id":
                        self.last_id = value
                        self.accepted |= held
                        held = set()
                    elif name == "data" and kind == "run":
                        told = json.loads(value)
                        if told.get("state") == "accepted":
                            (self.accepted if not self.last_id else held).add(told["run_id"])
                    if until and until <= self.accepted | held:
                        self.accepted |= held
                        return

    def close(self) -> None:
        """Hang up."""
        if self._writer is not None:
            self._writer.transport.abort()


async def run(trial: Trial) -> Result:
    """Three phases of the same load: all read; pages stand still; the worker stands still too."""
    phase_s = max(6.0, PHASE_S * trial.scale)
    async with trial.platform() as up:
        mix = {"instant": 0.9, "chained": 0.1}
        await trial.drive(trial.load(up, total=300, rate_per_s=RATE_PER_S, mix=mix))
        page, idle = Page(up), [Page(up) for _ in range(PAGES)]
        load = trial.load(up, total=round(3 * phase_s * RATE_PER_S), rate_per_s=RATE_PER_S, mix=mix, deadline="120s")
        async with trial.driving(load):
            await asyncio.sleep(phase_s)
            before_mib = measure.resident_mib(up.pids()[GATEWAY])
            for one in [page, *idle]:
                await one.open()
            trial.say(f"{PAGES + 1} pages do not read for {2 * phase_s:g} s, the worker stands still for {phase_s:g} s")
            most_mib = await _watch(up, phase_s - 0.5)
            async with trial.nemesis(up, steps=[Step(after_s=0.5, act="pause", who=WORKER, hold_s=phase_s - 1.0)]):
                most_mib = max(most_mib, await _watch(up, phase_s - 0.5))
        await trial.read_back(up, patience_s=120.0)
        verdict = await trial.check(up)
        replies = [r for r in trial.replies() if r.id.startswith(load.name)]
        missing = await _resume(page, {r.run for r in replies if r.answered == "accepted" and r.sent_s > phase_s + 1.0})
        for one in idle:
            one.close()
    return Result(verdict=verdict, figures=_figures(replies, phase_s, most_mib - before_mib, missing))


async def _watch(up: Up, seconds: float) -> float:
    """Return the most memory that the gateway took, in MiB."""
    most = 0.0
    for _ in range(int(seconds / 0.25)):
        await asyncio.sleep(0.25)
        most = max(most, measure.resident_mib(up.pids().get(GATEWAY, 0)))
    return most


async def _resume(page: Page, wanted: set[str]) -> int:
    """Let a page that stood still read what it was sent, and come back where it left; return how many it missed."""
    await page.read(wanted, READ_S)
    page.close()
    if not wanted <= page.accepted:
        await page.open()
        await page.read(wanted, 2 * READ_S)
        page.close()
    return len(wanted - page.accepted)


def _figures(replies: list[Reply], phase_s: float, grown_mib: float, missing: int) -> list[Figure]:
    calm = measure.door(replies, 0.0, phase_s)
    pages = measure.door(replies, phase_s, 2 * phase_s)
    worker = measure.door(replies, 2 * phase_s, 3 * phase_s)
    return [
        Figure(
            name="memory added to the gateway, most",
            value=f"{grown_mib:.1f} MiB",
            bar=f"< {GROWTH_MIB:g} MiB",
            good=grown_mib < GROWTH_MIB,
        ),
        Figure(
            name="accept p99: all read, pages stand still, worker stands still",
            value=", ".join(f"{d.p99_s * measure.MS:.1f} ms" for d in (calm, pages, worker)),
            bar="+10 %",
            good=max(pages.p99_s, worker.p99_s) <= ALLOWED * calm.p99_s,
        ),
        Figure(name="events missing after the page resumed", value=str(missing), bar="0", good=missing == 0),
    ]


CASE = Case(name="F9", title="a page stops reading, a worker stops answering", run=run)
