"""Connections: aiohttp's own server, made to answer broken HTTP like everything else and to say nothing of itself."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from gateway import problems

SERVER = "Headrace"
KEEP_ALIVE_S = 75.0
HEADERS_S_MAX = 10.0
SHUTDOWN_S = 10.0


class _Connection(web.RequestHandler):
    """One connection. Half a head of a request does not hold it for long, and what is no HTTP is told as a problem."""

    __slots__ = ("_impatience",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._impatience: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Pass on what arrived. A request of which the headers are not complete has to complete them soon."""
        super().data_received(data)
        if self._waiter is None or self._waiter.done():  # a request is there, or being answered
            self._be_patient()
        elif self._impatience is None:
            self._impatience = asyncio.get_running_loop().call_later(HEADERS_S_MAX, self._give_up)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the connection."""
        self._be_patient()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        self._impatience = None
        if self._waiter is not None:
            self.force_close()

    def _be_patient(self) -> None:
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the answer to a request that is not HTTP, or that failed outside of every handler."""
        if status >= 500:
            self.log_exception("Error handling a request", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("half an answer is sent; an error cannot follow it")
        bad = status < 500
        content = problems.body(
            slug="bad-http" if bad else "internal",
            title="This is not well-formed HTTP" if bad else "Something went wrong",
            status=status,
            detail="the request cannot be parsed" if bad else "the gateway met an error that nobody foresaw",
            hint="Check the request line and the headers." if bad else "Send it again.",
        )
        response = web.Response(
            status=status,
            body=content,
            content_type=problems.MEDIA_TYPE,
            headers={"Server": SERVER, "X-Content-Type-Options": "nosniff"},
        )
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Runs the gateway: no line per request, short patience with slow headers, answers as problems throughout."""

    def __init__(self, app: web.Application, **options: Any) -> None:
        super().__init__(
            app,
            access_log=None,
            **{"keepalive_timeout": KEEP_ALIVE_S, "shutdown_timeout": SHUTDOWN_S, **options},
        )

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(made.request_handler, request_factory=made.request_factory, **self._kwargs)
