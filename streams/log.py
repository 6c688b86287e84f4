"""The log: append with group commit, and read back.

One fsync per message is what a synced log costs (2,000 to 5,000 messages a second); an atomic batch pays it once.
So while one group of appends is in flight, the next one gathers, and each group travels as one atomic batch; a crowd
does not wait for the group before it. A lone append goes at once as a single message. A group that is refused because
of one of its members is sent again member by member, so that each caller gets the answer to its own.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import NamedTuple

import msgspec
from msgspec import Struct
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from headrace.errors import HeadraceError, TooLarge, Unavailable
from streams.link import Link
from streams.live import Live
from streams.stored import Stored
from streams.topology import STREAM

_log = logging.getLogger(__name__)

# A batch has a fixed price of about ten single messages (facts in infra/decisions/0003).
BATCH_MESSAGES_MIN = 8
BATCH_MESSAGES_MAX = 500
BATCH_BYTES_MAX = 4 * 1024 * 1024
UNIT_MESSAGES_MAX = 900
WAITING_UNITS_MAX = 20_000
ANSWER_TIMEOUT_S = 2.0
PROBE_S = 0.2
READ_MANY_MAX = 1000
CROWD = 16
GROUPS_IN_FLIGHT = 2

WRONG_LAST_SEQUENCE = 10071
STREAM_FULL = 10077
UNAVAILABLE = 503


class Record(NamedTuple):
    """A message to append, and its guard: ``absent`` names a subject (``*`` allowed) that must not hold a message yet.

    With ``expected`` the guarded subject must hold that sequence as its last one instead.
    """

    subject: str
    body: bytes
    absent: str | None = None
    expected: int = 0


class AlreadyThere(HeadraceError):
    """A subject that had to be empty holds a message already; nothing of the unit was appended."""

    title = "Already recorded"


class _Refused(Exception):
    """The server said no; ``code`` is its JetStream error code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class _Unit:
    __slots__ = ("done", "doubtful", "give_up_at", "places", "records", "size")

    def __init__(self, records: list[Record], done: asyncio.Future[list[int]], give_up_at: float) -> None:
        self.records = records
        self.done = done
        self.give_up_at = give_up_at
        self.size = sum(len(r.body) for r in records)
        # The guarded places that the unit itself fills.
        self.places = {r.absent for r in records if r.absent is not None and covers(r.absent, r.subject)}
        # Set once an attempt ended without an answer: the unit may be in the log, and a refusal may be our own echo.
        self.doubtful = False


class _Error(Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(Struct):
    seq: int = 0
    count: int = 0
    error: _Error | None = None


_read_ack = msgspec.json.Decoder(_Ack).decode


class Log:
    """Appends to the stream and reads from it; one per process, shared by all its tasks."""

    def __init__(self, link: Link, *, linger_s: float = 0.0) -> None:
        """Use a link.

        Args:
            link: the connection.
            linger_s: after a crowded group, how long to wait for the next one to gather. Each message gets cheaper for
                the server and for us, and waits longer: for those whose callers do not wait one by one.
        """
        self._link = link
        self._linger_s = linger_s
        self._queue: deque[_Unit] = deque()
        self._committer: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._tokens = itertools.count(1)
        self._batches = itertools.count(1)
        self._answers: dict[str, asyncio.Future[Msg]] = {}
        self._streams: dict[str, asyncio.Queue[Msg]] = {}
        self._prefix = ""
        self._sub: Subscription | None = None
        self.last_seq = 0

    @property
    def link(self) -> Link:
        """The connection that this log uses."""
        return self._link

    async def start(self) -> None:
        """Begin to take answers; call once before anything else."""
        self._prefix = self._link.nc.new_inbox() + "."
        self._sub = await self._link.nc.subscribe(self._prefix + "*", cb=self._answer)
        self._committer = asyncio.create_task(self._commit_for_ever(), name="log-committer")

    async def close(self) -> None:
        """Stop; appends still waiting end with ``Unavailable``."""
        if self._committer is not None:
            self._committer.cancel()
            await asyncio.gather(self._committer, return_exceptions=True)
        for unit in self._queue:
            if not unit.done.done():
                unit.done.set_exception(Unavailable("the process is stopping", hint="Send it again."))
        self._queue.clear()

    # ------------------------------------------------------------ append

    async def append(self, unit: list[Record], *, timeout_s: float = 10.0) -> list[int]:
        """Append all records of the unit or none, synced to disk, and return their sequences.

        A record may be in the log although the call fails with ``Unavailable``: repeat it with the same ids, and a
        ``absent`` guard keeps it single.

        Raises:
            AlreadyThere: a subject named by ``absent`` holds a message; nothing was appended.
            TooLarge: the unit has more than 900 records.
            Unavailable: the log did not answer in time, is full, or too much is waiting.
        """
        if not 0 < len(unit) <= UNIT_MESSAGES_MAX:
            raise TooLarge(f"{len(unit)} records in one unit", hint=f"Append 1 to {UNIT_MESSAGES_MAX} at once.")
        if len(self._queue) >= WAITING_UNITS_MAX:
            raise Unavailable("too many appends are waiting for the log", hint="Try again in a moment.")
        loop = asyncio.get_running_loop()
        waiting = _Unit(unit, loop.create_future(), loop.time() + timeout_s)
        self._queue.append(waiting)
        self._wake.set()
        return await waiting.done

    async def _commit_for_ever(self) -> None:
        """Send group after group. A second one goes while the first is in flight only if it is a crowd by itself."""
        flying: set[asyncio.Task[None]] = set()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                await asyncio.sleep(0)  # whoever is about to append in this turn of the loop joins the group
                while self._queue:
                    if len(flying) >= (GROUPS_IN_FLIGHT if len(self._queue) >= CROWD else 1):
                        waker = asyncio.ensure_future(self._wake.wait())
                        await asyncio.wait({*flying, waker}, return_when=asyncio.FIRST_COMPLETED)
                        waker.cancel()
                        self._wake.clear()
                        continue
                    group = self._take_group()
                    task = asyncio.create_task(self._commit_group(group))
                    flying.add(task)
                    task.add_done_callback(flying.discard)
                    if len(group) >= CROWD and self._linger_s:
                        await asyncio.wait({task})
                        await asyncio.sleep(self._linger_s)
        finally:
            for task in flying:
                task.cancel()
            await asyncio.gather(*flying, return_exceptions=True)

    async def _commit_group(self, group: list[_Unit]) -> None:
        try:
            await self._commit(group)
        except asyncio.CancelledError:
            self._queue.extendleft(reversed(group))
            raise
        except Exception as error:
            _log.exception("a group of %d units could not be appended", len(group))
            for unit in group:
                if not unit.done.done():
                    unit.done.set_exception(Unavailable(f"the log failed: {error}", hint="Send it again."))

    def _take_group(self) -> list[_Unit]:
        """Take the units that wait, up to the limits of one batch; the first always fits.

        The server checks the guards of a batch against what was there before it: a guard with ``*`` does not see what
        another unit of the same batch puts in its place. So two units that want one place never share a batch.
        """
        group: list[_Unit] = []
        places: set[str] = set()
        messages = size = 0
        while self._queue:
            unit = self._queue[0]
            messages += len(unit.records)
            size += unit.size
            if group and (
                messages > BATCH_MESSAGES_MAX or size > BATCH_BYTES_MAX or not places.isdisjoint(unit.places)
            ):
                break
            places |= unit.places
            group.append(self._queue.popleft())
        return group

    async def _commit(self, group: list[_Unit]) -> None:
        group = [u for u in group if not u.done.done()]  # callers that were cancelled in the meantime
        doubtful = [u for u in group if u.doubtful]
        fresh = [u for u in group if not u.doubtful]
        messages = sum(len(u.records) for u in fresh)
        if len(fresh) > 1 and messages >= BATCH_MESSAGES_MIN:
            try:
                self._settle(fresh, await self._send_batch([r for u in fresh for r in u.records]))
                fresh = []
            except _Refused:
                pass  # one of them is to blame: each alone finds out which
            except TimeoutError:
                self._again(fresh)
                fresh = []
        # Units of one record may travel side by side; larger ones are batches of their own, one after the other.
        alone = [u for u in (*fresh, *doubtful) if len(u.records) == 1]
        for start in range(0, len(alone), 64):
            await asyncio.gather(*(self._commit_alone(u) for u in alone[start : start + 64]))
        for unit in (*fresh, *doubtful):
            if len(unit.records) > 1:
                await self._commit_alone(unit)

    async def _commit_alone(self, unit: _Unit) -> None:
        try:
            if len(unit.records) == 1:
                last = await self._send(unit.records[0])
            else:
                last = await self._send_batch(unit.records)
            self._settle([unit], last)
        except TimeoutError:
            self._again([unit])
        except _Refused as refused:
            if unit.done.done():
                return
            if refused.code == STREAM_FULL:
                unit.done.set_exception(
                    Unavailable("the log is full", hint="Raise log_bytes_max or lower log_keep_s.", retry_after_s=30)
                )
            elif refused.code == WRONG_LAST_SEQUENCE:
                try:
                    own = await self._own_echo(unit) if unit.doubtful else None
                except TimeoutError:
                    self._again([unit])
                    return
                if own is not None:
                    self._settle([unit], own)
                else:
                    unit.done.set_exception(AlreadyThere("this was recorded before"))
            else:
                unit.done.set_exception(Unavailable(f"the log refused: {refused}", hint="Send it again."))

    async def _own_echo(self, unit: _Unit) -> int | None:
        """Return the last sequence of the unit if what stands in its guarded place is this very unit."""
        guarded = [(i, r) for i, r in enumerate(unit.records) if r.absent is not None and covers(r.absent, r.subject)]
        for index, record in guarded:
            found = await self._last(record.absent or record.subject)
            if found is None or found.body != record.body:
                return None
            last = found.seq + len(unit.records) - 1 - index
        return last if guarded else None

    def _settle(self, units: list[_Unit], last: int) -> None:
        """Give each unit its sequences, counted back from the last one of the batch."""
        self.last_seq = max(self.last_seq, last)
        seq = last - sum(len(u.records) for u in units)
        for unit in units:
            n = len(unit.records)
            if not unit.done.done():
                unit.done.set_result(list(range(seq + 1, seq + 1 + n)))
            seq += n

    def _again(self, units: list[_Unit]) -> None:
        """Queue units whose fate is unknown once more, in front, until their time is up."""
        now = asyncio.get_running_loop().time()
        for unit in reversed(units):
            unit.doubtful = True
            if unit.done.done():
                continue
            if now >= unit.give_up_at:
                unit.done.set_exception(
                    Unavailable("the log does not answer", hint="Send it again with the same id; it runs once.")
                )
            else:
                self._queue.appendleft(unit)
        self._wake.set()

    async def _send(self, record: Record) -> int:
        headers = _guard(record)
        ack = _read_ack((await self._request(record.subject, record.body, headers)).data)
        if ack.error is not None:
            raise _Refused(ack.error.err_code, ack.error.description)
        return ack.seq

    async def _send_batch(self, records: list[Record]) -> int:
        batch = f"{self._prefix[-8:-1]}-{next(self._batches)}"
        nc = self._link.nc
        final = len(records)
        for number, record in enumerate(records, 1):
            headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
            guard = _guard(record)
            if guard is not None:
                headers.update(guard)
            if number < final:
                await nc.publish(record.subject, record.body, headers=headers)
            else:
                headers["Nats-Batch-Commit"] = "1"
                ack = _read_ack((await self._request(record.subject, record.body, headers)).data)
        if ack.error is not None:
            raise _Refused(ack.error.err_code, ack.error.description)
        return ack.seq

    # ------------------------------------------------------------ requests and answers

    async def _request(self, subject: str, body: bytes, headers: dict[str, str] | None = None) -> Msg:
        """Publish with a reply inbox and wait for the one answer.

        Raises:
            TimeoutError: no answer came, or nobody listens on the subject at the moment.
        """
        token = str(next(self._tokens))
        future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._answers[token] = future
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._publish(subject, body, self._prefix + token, headers)
                message = await future
        finally:
            self._answers.pop(token, None)
        if message.headers is not None and message.headers.get("Status") == "503":
            await asyncio.sleep(0.1)  # the server is up but its JetStream is not yet
            raise TimeoutError
        return message

    async def _publish(self, subject: str, body: bytes, reply: str, headers: dict[str, str] | None) -> None:
        try:
            await self._link.nc.publish(subject, body, reply=reply, headers=headers)
        except OSError as error:
            raise TimeoutError from error
        except Exception as error:  # nats-py: closed, draining, or its outbound buffer is full during a reconnect
            await asyncio.sleep(0.1)
            raise TimeoutError from error

    async def _answer(self, message: Msg) -> None:
        token = message.subject[len(self._prefix) :]
        future = self._answers.pop(token, None)
        if future is not None:
            if not future.done():
                future.set_result(message)
        else:
            queue = self._streams.get(token)
            if queue is not None:
                queue.put_nowait(message)

    # ------------------------------------------------------------ read

    async def last(self, subject: str) -> Stored | None:
        """Return the newest message on a subject (``*`` allowed), or None.

        Raises:
            Unavailable: the log does not answer.
        """
        try:
            return await self._last(subject)
        except TimeoutError as error:
            raise _no_answer() from error

    async def _last(self, subject: str) -> Stored | None:
        body = msgspec.json.encode({"last_by_subj": subject})
        return _stored(await self._request(f"$JS.API.DIRECT.GET.{STREAM}", body))

    async def last_of_each(self, subjects: list[str]) -> list[Stored]:
        """Return the newest message of every subject that matches, in the order of the log.

        Raises:
            TooLarge: more than 1,000 subjects match.
            Unavailable: the log does not answer.
        """
        token = str(next(self._tokens))
        queue = self._streams[token] = asyncio.Queue()
        found: list[Stored] = []
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S * 2):
                body = msgspec.json.encode({"multi_last": subjects, "batch": READ_MANY_MAX + 1})
                await self._publish(f"$JS.API.DIRECT.GET.{STREAM}", body, self._prefix + token, None)
                while True:
                    message = await queue.get()
                    status = (message.headers or {}).get("Status")
                    if status == "413" or len(found) > READ_MANY_MAX:
                        raise TooLarge(f"more than {READ_MANY_MAX} messages match", hint="Read them page by page.")
                    if status == "503":
                        raise _no_answer()
                    if status is not None:
                        break
                    stored = _stored(message)
                    if stored is not None:
                        found.append(stored)
        except TimeoutError as error:
            raise _no_answer() from error
        finally:
            self._streams.pop(token, None)
        found.sort(key=lambda s: s.seq)
        return found

    async def at(self, seqs: Iterable[int]) -> list[Stored]:
        """Return the messages at these sequences, in the order given.

        Raises:
            Unavailable: the log does not answer, or holds one of them no longer.
        """
        wanted = list(seqs)
        found: list[Stored] = []
        for start in range(0, len(wanted), 128):
            found += await asyncio.gather(*(self._at(seq) for seq in wanted[start : start + 128]))
        return found

    async def _at(self, seq: int) -> Stored:
        try:
            stored = _stored(await self._request(f"$JS.API.DIRECT.GET.{STREAM}", b'{"seq":%d}' % seq))
        except TimeoutError as error:
            raise _no_answer() from error
        if stored is None:
            raise Unavailable(f"the log holds message {seq} no longer", hint="Raise log_keep_s.")
        return stored

    async def end_seq(self) -> int:
        """Return the sequence of the newest message, 0 for an empty log."""
        try:
            message = await self._request(f"$JS.API.STREAM.INFO.{STREAM}", b"")
        except TimeoutError as error:
            raise _no_answer() from error
        return msgspec.json.decode(message.data, type=_Info).state.last_seq

    def live(self, *subjects: str, wanted: Callable[[str, bytes], bool] | None = None) -> Live:
        """Return a subscription to what is stored on these subjects from now on; each is a subject that is used once.

        ``wanted`` chooses by subject and body. It may miss what a reconnect hides: for a complete reading there is
        ``follow``.
        """
        return Live(self.link, self.last, subjects, wanted)


class _State(Struct, frozen=True):
    last_seq: int = 0


class _Info(Struct, frozen=True):
    state: _State = _State()


def covers(pattern: str, subject: str) -> bool:
    """Say whether a subject is among those that a pattern with ``*`` names."""
    wanted, tokens = pattern.split("."), subject.split(".")
    return len(wanted) == len(tokens) and all(w in ("*", t) for w, t in zip(wanted, tokens, strict=True))


def _guard(record: Record) -> dict[str, str] | None:
    if record.absent is None:
        return None
    guard = {"Nats-Expected-Last-Subject-Sequence": str(record.expected)}
    if record.absent != record.subject:
        guard["Nats-Expected-Last-Subject-Sequence-Subject"] = record.absent
    return guard


def _stored(message: Msg) -> Stored | None:
    """Read a message that the server sends from the stream (direct get, republish), or None for an empty answer."""
    headers = message.headers
    if headers is None or "Nats-Sequence" not in headers:
        return None
    return Stored(
        int(headers["Nats-Sequence"]),
        headers["Nats-Subject"],
        message.data,
        _instant(headers.get("Nats-Time-Stamp", "")),
    )


def _instant(text: str) -> float:
    """Read the server's RFC 3339 stamp, whose nanoseconds Python takes in part only."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def _no_answer() -> Unavailable:
    return Unavailable("the log does not answer", hint="Try again in a moment; `headrace doctor` looks for the cause.")
