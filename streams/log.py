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
from typing import NamedTuple

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from headrace.errors import HeadraceError, TooLarge, Unavailable
from streams.link import Link
from streams.live import Live
from streams.replies import (
    NO_HINTS,
    STREAM_FULL,
    WRONG_LAST_SEQUENCE,
    Info,
    Refused,
    from_leader,
    sequence_in,
    stored_in,
)
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
STALE_TRIES_MAX = 50
STALE_S = 0.05
HINT_KEEP_S = 600


class Record(NamedTuple):
    """A message to append, and its guard: ``absent`` names a subject (``*`` allowed) that must not hold a message yet.

    With ``expected`` the guarded subject must hold that sequence as its last one instead. A ``hint`` is worth something
    for minutes only (``HINT_KEEP_S``): how far something is, said again and again, would fill the log otherwise.
    """

    subject: str
    body: bytes
    absent: str | None = None
    expected: int = 0
    hint: bool = False


class AlreadyThere(HeadraceError):
    """A subject that had to be empty holds a message already; nothing of the unit was appended."""

    title = "Already recorded"


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


class Log:
    """Appends to the stream and reads from it; one per process, shared by all its tasks."""

    def __init__(self, link: Link, *, linger_s: float = 0.0, replicated: bool = False) -> None:
        """Use a link.

        Args:
            link: the connection.
            linger_s: after a crowded group, how long to wait for the next one to gather. Each message gets cheaper for
                the server and for us, and waits longer: for those whose callers do not wait one by one.
            replicated: whether the log has copies on several servers. Then any of them may answer a read, also one
                that was paused and does not know yet what it missed, so reads are asked of or measured by the leader.
        """
        self._link = link
        self._linger_s = linger_s
        self.replicated = replicated
        self._queue: deque[_Unit] = deque()
        self._committer: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._tokens = itertools.count(1)
        self._batches = itertools.count(1)
        self._answers: dict[str, asyncio.Future[Msg | None]] = {}  # None: the connection was lost
        self._streams: dict[str, asyncio.Queue[Msg]] = {}
        self._prefix = ""
        self._sub: Subscription | None = None
        self._forget: Callable[[], None] | None = None
        # Set when an append got no answer: nothing more is sent until the log is heard again.
        self._silent = False
        # Unset by a log that an older release has set up, which keeps hints as long as all else.
        self._hints = True
        self.last_seq = 0

    @property
    def link(self) -> Link:
        """The connection that this log uses."""
        return self._link

    async def start(self) -> None:
        """Begin to take answers; call once before anything else."""
        self._prefix = self._link.nc.new_inbox() + "."
        self._sub = await self._link.nc.subscribe(self._prefix + "*", cb=self._answer)
        self._forget = self._link.on_loss(self._lose_answers)
        self._committer = asyncio.create_task(self._commit_for_ever(), name="log-committer")

    async def close(self) -> None:
        """Stop; appends still waiting end with ``Unavailable``."""
        if self._forget is not None:
            self._forget()
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
        if len(self._queue) in (1, CROWD):  # nobody waited before, or these are enough for one more group in flight
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
                    if self._silent:
                        await self._until_heard()
                        continue
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

    async def _until_heard(self) -> None:
        """Return once the log takes messages again: its leader answers a question that is asked again and again.

        A cluster that lost its leader is silent for seconds. To send into that, and wait long for each answer, would
        be to hear late that it is over.
        """
        asked: set[asyncio.Task[int]] = set()
        try:
            while self._silent and self._queue:
                asked.add(asyncio.create_task(self.end_seq()))
                done, asked = await asyncio.wait(asked, timeout=PROBE_S, return_when=asyncio.FIRST_COMPLETED)
                if None in [task.exception() for task in done]:
                    self._silent = False
                elif done:
                    await asyncio.sleep(PROBE_S)
                self._give_up(asyncio.get_running_loop().time())
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    def _give_up(self, now: float) -> None:
        """Tell those whose time is over that the log does not answer."""
        for unit in list(self._queue):
            if now >= unit.give_up_at:
                self._queue.remove(unit)
                if not unit.done.done():
                    unit.done.set_exception(
                        Unavailable("the log does not answer", hint="Send it again with the same id; it runs once.")
                    )

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
            except Refused:
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
        except Refused as refused:
            if unit.done.done():
                return
            if refused.code == NO_HINTS:
                if self._hints:
                    _log.warning("the log keeps hints as long as all else; mend it once by `headrace setup`, as admin")
                self._hints = False
                await self._commit_alone(unit)
            elif refused.code == STREAM_FULL:
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
        self._silent = True
        for unit in reversed(units):
            unit.doubtful = True
            if not unit.done.done():
                self._queue.appendleft(unit)
        self._give_up(asyncio.get_running_loop().time())
        self._wake.set()

    async def _send(self, record: Record) -> int:
        return sequence_in(await self._request(record.subject, record.body, self._headers(record) or None))

    async def _send_batch(self, records: list[Record]) -> int:
        batch = f"{self._prefix[-8:-1]}-{next(self._batches)}"
        final = len(records)
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            for number, record in enumerate(records, 1):
                headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number), **self._headers(record)}
                if number < final:
                    await self._publish(record.subject, record.body, "", headers)
            headers["Nats-Batch-Commit"] = "1"
            return sequence_in(await self._request(record.subject, record.body, headers))

    def _headers(self, record: Record) -> dict[str, str]:
        headers = {}
        if record.hint and self._hints:
            headers["Nats-TTL"] = f"{HINT_KEEP_S}s"
        if record.absent is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(record.expected)
            if record.absent != record.subject:
                headers["Nats-Expected-Last-Subject-Sequence-Subject"] = record.absent
        return headers

    # ------------------------------------------------------------ requests and answers

    async def _request(self, subject: str, body: bytes, headers: dict[str, str] | None = None) -> Msg:
        """Publish with a reply inbox and wait for the one answer.

        Raises:
            TimeoutError: no answer came, or nobody listens on the subject at the moment.
        """
        token = str(next(self._tokens))
        future: asyncio.Future[Msg | None] = asyncio.get_running_loop().create_future()
        self._answers[token] = future
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._publish(subject, body, self._prefix + token, headers)
                message = await future
        finally:
            self._answers.pop(token, None)
        if message is None:
            raise TimeoutError
        if message.headers is not None and message.headers.get("Status") == "503":
            await asyncio.sleep(0.1)  # the server is up but its JetStream is not yet
            raise TimeoutError
        return message

    async def _publish(self, subject: str, body: bytes, reply: str, headers: dict[str, str] | None) -> None:
        if not self._link.connected:
            await self._link.until_connected()  # not into the client's buffer: what waits there goes out late and twice
        try:
            await self._link.nc.publish(subject, body, reply=reply, headers=headers)
        except OSError as error:
            raise TimeoutError from error
        except Exception as error:  # nats-py: closed, draining, or its outbound buffer is full during a reconnect
            await asyncio.sleep(0.1)
            raise TimeoutError from error

    def _lose_answers(self) -> None:
        """Stop waiting for answers that would have come over a connection which is gone; who asked asks again."""
        for future in self._answers.values():
            if not future.done():
                future.set_result(None)

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
        if self._link.site:  # any server may answer, and be behind: whatever a site appends is guarded
            return stored_in(await self._request(f"{self._link.api}.DIRECT.GET.{STREAM}.{subject}", b""))
        body = msgspec.json.encode({"last_by_subj": subject})
        if self.replicated:
            return from_leader(await self._request(f"{self._link.api}.STREAM.MSG.GET.{STREAM}", body))
        return stored_in(await self._request(f"{self._link.api}.DIRECT.GET.{STREAM}", body))

    async def last_of_each(self, subjects: list[str]) -> list[Stored]:
        """Return the newest message of every subject that matches, in the order of the log.

        The user of a site may ask only subject by subject, and gets the newest message of each pattern.

        Raises:
            TooLarge: more than 1,000 subjects match.
            Unavailable: the log does not answer.
        """
        if self._link.site:
            newest = await asyncio.gather(*(self.last(subject) for subject in subjects))
            return sorted((stored for stored in newest if stored is not None), key=lambda stored: stored.seq)
        if not self.replicated:
            return (await self._last_of_each(subjects))[0]
        known = await self.end_seq()
        for _ in range(STALE_TRIES_MAX):
            found, up_to = await self._last_of_each(subjects)
            if up_to >= known or (not found and not any([await self.last(subject) for subject in subjects])):
                return found
            await asyncio.sleep(STALE_S)
        raise _no_answer()

    async def _last_of_each(self, subjects: list[str]) -> tuple[list[Stored], int]:
        """Read as above from whichever server answers; also the sequence that this server has reached, if it says."""
        token = str(next(self._tokens))
        queue = self._streams[token] = asyncio.Queue()
        found: list[Stored] = []
        up_to = 0
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S * 2):
                body = msgspec.json.encode({"multi_last": subjects, "batch": READ_MANY_MAX + 1})
                await self._publish(f"{self._link.api}.DIRECT.GET.{STREAM}", body, self._prefix + token, None)
                while True:
                    message = await queue.get()
                    status = (message.headers or {}).get("Status")
                    if status == "413" or len(found) > READ_MANY_MAX:
                        raise TooLarge(f"more than {READ_MANY_MAX} messages match", hint="Read them page by page.")
                    if status == "503":
                        raise _no_answer()
                    if status is not None:
                        up_to = int((message.headers or {}).get("Nats-UpTo-Sequence", 0))
                        break
                    stored = stored_in(message)
                    if stored is not None:
                        found.append(stored)
        except TimeoutError as error:
            raise _no_answer() from error
        finally:
            self._streams.pop(token, None)
        found.sort(key=lambda s: s.seq)
        return found, up_to

    async def count(self, subject: str) -> int:
        """Return how many messages there are on a subject (``*`` allowed), as the server that answers knows it.

        Raises:
            Unavailable: the log does not answer.
        """
        body = msgspec.json.encode({"seq": 1, "next_by_subj": subject, "batch": 1})
        try:
            first = await self._request(f"{self._link.api}.DIRECT.GET.{STREAM}", body)
        except TimeoutError as error:
            raise _no_answer() from error
        return 0 if stored_in(first) is None else 1 + int((first.headers or {}).get("Nats-Num-Pending", 0))

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
            stored = stored_in(await self._request(f"{self._link.api}.DIRECT.GET.{STREAM}", b'{"seq":%d}' % seq))
            if stored is None and self.replicated:
                stored = from_leader(
                    await self._request(f"{self._link.api}.STREAM.MSG.GET.{STREAM}", b'{"seq":%d}' % seq)
                )
        except TimeoutError as error:
            raise _no_answer() from error
        if stored is None:
            raise Unavailable(f"the log holds message {seq} no longer", hint="Raise log_keep_s.")
        return stored

    async def end_seq(self) -> int:
        """Return the sequence of the newest message, 0 for an empty log.

        Raises:
            Unavailable: the log does not answer, or has no leader at the moment.
        """
        return (await self._info()).state.last_seq

    async def begins_at(self) -> float | None:
        """Return the instant of the oldest message that is still there, None for an empty log.

        Raises:
            Unavailable: the log does not answer, or has no leader at the moment.
        """
        state = (await self._info()).state
        return state.first_ts.timestamp() if state.messages and state.first_ts is not None else None

    async def size(self) -> tuple[int, int]:
        """Return the bytes that the log takes, and those at which it refuses (0: no limit).

        Raises:
            Unavailable: the log does not answer, or has no leader at the moment.
        """
        info = await self._info()
        return info.state.bytes, max(0, info.config.max_bytes)

    async def _info(self) -> Info:
        try:
            message = await self._request(f"{self._link.api}.STREAM.INFO.{STREAM}", b"")
        except TimeoutError as error:
            raise _no_answer() from error
        info = msgspec.json.decode(message.data, type=Info)
        if info.error is not None:
            raise Unavailable(f"the log says: {info.error.description}", hint="Try again in a moment.")
        return info

    def live(self, *subjects: str, wanted: Callable[[str, bytes], bool] | None = None) -> Live:
        """Return a subscription to what is stored on these subjects from now on; each is a subject that is used once.

        ``wanted`` chooses by subject and body. It may miss what a reconnect hides: for a complete reading there is
        ``follow``.
        """
        return Live(self.link, self.last, subjects, wanted)


def covers(pattern: str, subject: str) -> bool:
    """Say whether a subject is among those that a pattern with ``*`` names."""
    wanted, tokens = pattern.split("."), subject.split(".")
    return len(wanted) == len(tokens) and all(w in ("*", t) for w, t in zip(wanted, tokens, strict=True))


def _no_answer() -> Unavailable:
    return Unavailable("the log does not answer", hint="Try again in a moment; `headrace doctor` looks for the cause.")
