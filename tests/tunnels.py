"""A proxy as sites have it: it leads outside by ``CONNECT`` alone, resolves names itself, notes what it was asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

MESSAGE_BYTES_MAX = 64 * 1024


@dataclass
class Proxy:
    """What it knows and how it answers; change it at any time."""

    names: dict[str, tuple[str, int]] = field(default_factory=dict)  # host:port as asked, and where that leads
    answer: str = ""  # given instead of a tunnel
    cut_after: int | None = None  # bytes brought back by each of the next `cuts` tunnels
    cuts: int = 0
    asked: list[str] = field(default_factory=list)
    seen: bytearray = field(default_factory=bytearray)  # what went through to the servers
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
            self.asked.append(head.partition("\r\n")[0])
            method, there, _ = self.asked[-1].split(" ")
            if self.answer or method != "CONNECT" or there not in self.names:
                writer.write(f"HTTP/1.1 {self.answer or '403 Forbidden'}\r\nContent-Length: 0\r\n\r\n".encode())
                return
            reading, writing = await asyncio.open_connection(*self.names[there])
            async with closing(writing):
                writer.write(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 a-site\r\n\r\n")
                limit = self.cut_after if self.cuts > 0 else None
                self.cuts -= limit is not None
                await join((reader, writing), (reading, writer), limit, self.see)

    def see(self, chunk: bytes) -> bytes:
        self.seen += chunk
        return chunk


async def join(
    there: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    back: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    limit: int | None = None,
    change: Callable[[bytes], bytes] = bytes,
) -> None:
    """Pass on what comes, changed on its way there, until one side has ended or ``limit`` bytes have come back."""

    async def pass_on(
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        most: int | None = None,
        change: Callable[[bytes], bytes] = bytes,
    ) -> None:
        passed = 0
        while (most is None or passed < most) and (chunk := await reader.read(MESSAGE_BYTES_MAX)):
            passed += len(chunk)
            writer.write(change(chunk))
            await writer.drain()

    ways = [asyncio.create_task(pass_on(*there, change=change)), asyncio.create_task(pass_on(*back, limit))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


@asynccontextmanager
async def closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Close it at the end, whatever happened: callers hang up as they like."""
    try:
        yield
    except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
        pass
    finally:
        writer.close()
        with suppress(OSError, asyncio.CancelledError):
            await writer.wait_closed()


@contextmanager
def proxying(proxy: Proxy) -> Iterator[Proxy]:
    """Run it in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def close(server: asyncio.Server) -> None:
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(proxy.serve, "127.0.0.1", 0), loop).result()
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(close(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
