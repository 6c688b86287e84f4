"""Ordered reading: every message after a sequence, in order, for ever, whatever happens to the connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import msgspec
import nats.errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError

from streams.log import Log
from streams.poll import Arrival, Poll, heartbeat_s
from streams.stored import Stored
from streams.topology import STREAM

IDLE_S = 5.0
INACTIVE_S = 60.0
# The user of a site has few names for its consumers: those of an agent that was killed must be free again soon.
SITE_INACTIVE_S = 10.0
RETRY_S = 0.5
CREATE_TIMEOUT_S = 5.0


async def follow(
    log: Log,
    subjects: list[str],
    *,
    after: int = -1,
    since: float | None = None,
    window: int = 512,
    idle_s: float = IDLE_S,
) -> AsyncGenerator[list[Stored], None]:
    """Yield every message on these subjects after sequence ``after``, in order and without a gap, in small batches.

    With ``after=-1`` it begins with what is stored from now on, or at the instant ``since`` (epoch seconds), if that is
    given. The reader sets the pace: at most ``window`` messages
    wait here, the rest stay in the log. An empty batch comes when nothing happened for ``idle_s`` seconds. Break off
    with ``aclose()`` (or ``contextlib.aclosing``), which removes the consumer.
    """
    position = await log.end_seq() if after < 0 and since is None else max(0, after)
    reader = _Reader(log, subjects, window)
    while True:
        async with log.link.reader() as name:
            try:
                try:
                    await reader.open(name, position, since)
                except (nats.errors.Error, OSError, TimeoutError):
                    # The server is away, or the name is taken. The place in the log is ours, so nothing is missed.
                    await asyncio.sleep(RETRY_S)
                    continue
                while (batch := await reader.batch(idle_s)) is not None:
                    if batch:
                        position, since = batch[-1].seq, None
                    yield batch
            finally:
                await reader.close()


class _Reader:
    """One short-lived consumer. When its deliveries show a gap, or it is gone, ``batch`` says None."""

    def __init__(self, log: Log, subjects: list[str], window: int) -> None:
        self._log = log
        self._subjects = subjects
        self._window = window
        self._waiting: list[Stored] = []
        self._wake = asyncio.Event()
        self._broken = False
        self._place = 0
        self._poll: Poll | None = None
        self._name = ""

    async def open(self, name: str, position: int, since: float | None) -> None:
        self._waiting, self._broken, self._place = [], False, 0
        self._wake.clear()
        self._name = name
        where: dict[str, Any] = (
            {"filter_subject": self._subjects[0]} if len(self._subjects) == 1 else {"filter_subjects": self._subjects}
        )
        if since is None:
            where |= {"deliver_policy": DeliverPolicy.BY_START_SEQUENCE, "opt_start_seq": position + 1}
        else:
            where |= {
                "deliver_policy": DeliverPolicy.BY_START_TIME,
                "opt_start_time": datetime.fromtimestamp(since, UTC),
            }
        config = ConsumerConfig(
            name=self._name,
            # No two openings are alike: a consumer that somebody left under this name is refused, else it would be
            # taken for ours with all that it has delivered.
            description=uuid4().hex,
            ack_policy=AckPolicy.NONE,
            inactive_threshold=SITE_INACTIVE_S if self._log.link.site else INACTIVE_S,
            mem_storage=True,
            num_replicas=1,
            max_waiting=8,
            **where,
        )
        await self._create(config)
        every_s = heartbeat_s(1, replicated=self._log.replicated)
        self._poll = Poll(self._log.link, self._name, self._take, self._lose, every_s)
        await self._poll.start()
        await self._poll.want(self._window)

    async def _create(self, config: ConsumerConfig) -> None:
        """Make a consumer that is not there: the client's own way would also take, or change, one that is."""
        link = self._log.link
        filtered = f".{config.filter_subject}" if config.filter_subject else ""
        request = {"stream_name": STREAM, "config": config.as_dict(), "action": "create"}
        answer = await link.nc.request(
            f"{link.api}.CONSUMER.CREATE.{STREAM}.{config.name}{filtered}",
            msgspec.json.encode(request),
            timeout=CREATE_TIMEOUT_S,
        )
        refused = msgspec.json.decode(answer.data).get("error")
        if refused is not None:
            raise APIError.from_error(refused)

    def _take(self, arrived: Arrival) -> None:
        if self._broken:
            return
        if arrived.place != self._place + 1:
            self._lose()  # a delivery was lost on the way: start again after the last good one
            return
        self._place = arrived.place
        self._waiting.append(Stored(arrived.seq, arrived.subject, arrived.body, arrived.at))
        self._wake.set()

    def _lose(self) -> None:
        self._broken = True
        self._wake.set()

    async def batch(self, idle_s: float) -> list[Stored] | None:
        """Return what has arrived, [] if nothing did for a while, None if the consumer has to be made anew."""
        if not self._waiting and not self._broken:
            try:
                async with asyncio.timeout(idle_s):
                    await self._wake.wait()
            except TimeoutError:
                return []
        self._wake.clear()
        found, self._waiting = self._waiting, []
        if found:
            if self._poll is not None and self._poll.outstanding <= self._window // 2:
                await self._poll.want(self._window)
            return found
        return None if self._broken else []

    async def close(self) -> None:
        poll, self._poll = self._poll, None
        if poll is not None:
            await poll.close()
            with contextlib.suppress(Exception):  # the server removes it by itself after a minute of silence
                await self._log.link.jetstream(timeout_s=1).delete_consumer(STREAM, self._name)
