"""HTTP to the platform: one request, made again while that can help, and problems turned back into errors."""

from __future__ import annotations

import asyncio
import platform
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import aiohttp
import msgspec

from headrace.address import Address
from headrace.errors import (
    BadName,
    BadRequest,
    Conflict,
    HeadraceError,
    Infeasible,
    NotFound,
    Overloaded,
    PlatformUnreachable,
    RunFailed,
    RunRetracted,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from headrace.model import Problem, Quote

CONNECT_S_MAX = 5.0
ANSWER_S_MAX = 30.0
SILENCE_S_MAX = 60.0  # the platform pings its streams several times in this time
REQUESTS_AT_ONCE_MAX = 128
_URN = "urn:headrace:problem:"

_ERRORS: dict[int, type[HeadraceError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    405: BadRequest,
    409: Conflict,
    410: RunFailed,
    413: TooLarge,
    415: BadRequest,
    422: Conflict,
    429: Overloaded,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}
_SLUGS: dict[str, type[HeadraceError]] = {
    "bad-name": BadName,
    "infeasible": Infeasible,
    "unknown-function": BadRequest,
    "run-retracted": RunRetracted,
}
_BUSY = frozenset({429, 502, 503, 504})
_LOST = (aiohttp.ClientError, TimeoutError, OSError)


class Answer(NamedTuple):
    """What the platform said to one request."""

    status: int
    type: str
    retry_after_s: float
    body: bytes


def delays() -> Iterator[float]:
    """Yield the seconds to wait before each new try: doubling from 20 ms to 2 s, drawn from the upper half."""
    longest = 0.02
    while True:
        yield longest * (0.5 + 0.5 * random.random())  # noqa: S311 - spreads callers out; nothing is kept secret by it
        longest = min(2.0, longest * 2)


@cache
def _user_agent() -> str:
    try:
        version = metadata.version("headrace")
    except metadata.PackageNotFoundError:
        version = "0"
    return f"headrace/{version} python/{platform.python_version()}"


class Transport:
    """Requests to one platform over one pool of connections. Belongs to one event loop."""

    def __init__(self, address: Address, *, patience_s: float) -> None:
        self.address = address
        self.patience_s = patience_s
        self._session: aiohttp.ClientSession | None = None
        self._turns = asyncio.Semaphore(REQUESTS_AT_ONCE_MAX)

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | Callable[[], AsyncIterator[bytes]] | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        wait_s: float = 0.0,
    ) -> Answer:
        """Make a request, and again after lost connections and while the platform is busy, within ``patience_s``.

        Every request of this client can be made twice with the effect of once: what starts a run carries its id.

        Args:
            method: the HTTP method.
            path: a path, or a whole URL of this or another server (then the token stays here).
            body: the bytes to send, or what makes a new stream of them for each try.
            headers: in addition to the usual ones.
            params: the query.
            wait_s: how long the platform may keep the request before it answers.

        Raises:
            PlatformUnreachable: no answer came.
            HeadraceError: the platform refused; the error's class says why.
        """
        began: float | None = None
        for delay in delays():
            try:
                async with self._turns:  # a request that waits for its turn here has not begun to run out of time
                    began = began or time.monotonic()
                    answer = await self._once(method, path, body, headers, params, wait_s)
            except _LOST as error:
                failure: HeadraceError = self._unreachable(error)
                if isinstance(error, aiohttp.ClientSSLError) or not self._is_patient(began, delay):
                    raise failure from error
            else:
                if answer.status < 400 or answer.status not in _BUSY:
                    return answer
                failure = problem(answer)
                if not self._is_patient(began, max(delay, answer.retry_after_s)):
                    raise failure
                await asyncio.sleep(answer.retry_after_s)
            await asyncio.sleep(delay)
        raise AssertionError("delays() never ends")

    def _is_patient(self, began: float | None, delay_s: float) -> bool:
        return began is None or time.monotonic() + delay_s <= began + self.patience_s

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        """Make a request and raise what the platform answers instead of returning it, if it is an error."""
        answer = await self.request(method, path, **options)
        if answer.status >= 400:
            raise problem(answer)
        return answer

    @asynccontextmanager
    async def stream(self, path: str, headers: Mapping[str, str]) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open an endless answer and yield its chunks; one try.

        Raises:
            PlatformUnreachable: the connection could not be made, or was lost.
            HeadraceError: the platform refused.
        """
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S_MAX, sock_read=SILENCE_S_MAX)
        try:
            async with self._open().request(
                "GET", self._url(path), headers=self._headers(path, headers), timeout=limits, allow_redirects=False
            ) as response:
                if response.status != 200:
                    raise problem(await _answer(response))
                yield response.content.iter_any()
        except _LOST as error:
            raise self._unreachable(error) from error

    async def _once(
        self,
        method: str,
        path: str,
        body: bytes | Callable[[], AsyncIterator[bytes]] | None,
        headers: Mapping[str, str] | None,
        params: Mapping[str, str] | None,
        wait_s: float,
    ) -> Answer:
        limits = aiohttp.ClientTimeout(total=ANSWER_S_MAX + wait_s, sock_connect=CONNECT_S_MAX)
        if callable(body):
            limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S_MAX, sock_read=ANSWER_S_MAX + wait_s)
        async with self._open().request(
            method,
            self._url(path),
            data=body() if callable(body) else body,
            headers=self._headers(path, headers),
            params=params,
            timeout=limits,
            allow_redirects=False,  # the token is meant for this address only
        ) as response:
            return await _answer(response)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # requests take turns, and streams stay
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": _user_agent(), "Accept": "application/json, */*;q=0.5"},
            )
        return self._session

    def _url(self, path: str) -> str:
        return self.address.url + path if path.startswith("/") else path

    def _headers(self, path: str, more: Mapping[str, str] | None) -> dict[str, str]:
        ours = path.startswith(("/", self.address.url + "/"))
        return {**({"Authorization": f"Bearer {self.address.token}"} if ours else {}), **(more or {})}

    def _unreachable(self, error: BaseException) -> PlatformUnreachable:
        reason = str(error) or type(error).__name__
        if isinstance(error, TimeoutError):
            reason = "no answer in time"
        return PlatformUnreachable(
            f"no platform answers at {self.address.url}: {reason}",
            hint="Start it with `headrace up`, or set HEADRACE_URL to where it runs.",
        )


async def _answer(response: aiohttp.ClientResponse) -> Answer:
    return Answer(
        response.status,
        response.headers.get("Content-Type", ""),
        _retry_after(response.headers.get("Retry-After")),
        await response.read(),
    )


def _retry_after(text: str | None) -> float:
    """Return the seconds meant by the header ``Retry-After``, which holds seconds or a date; 0 if there is none."""
    if not text:
        return 0.0
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def problem(answer: Answer) -> HeadraceError:
    """Return the error that an answer of 400 and above tells."""
    kind = _ERRORS.get(answer.status, HeadraceError)
    quote: Quote | None = None
    try:
        told = msgspec.json.decode(answer.body, type=Problem)
    except msgspec.MsgspecError:  # a proxy in between, or no Headrace at all
        message, hint = f"the server answered {answer.status}", "Check that this is the URL of a Headrace gateway."
    else:
        kind = _SLUGS.get(told.type.removeprefix(_URN), kind)
        message, hint = told.detail or told.title, told.hint
        quote = told.quote or None
    if issubclass(kind, Infeasible):
        return kind(message, hint=hint, quote=quote)
    if issubclass(kind, Overloaded):
        return kind(message, hint=hint, retry_after_s=answer.retry_after_s or 1.0)
    return kind(message, hint=hint)
