"""What our code uses of a nats-server with JetStream, and what it promises: the log, its consumers, and connections.

It promises no more than the real one: an acknowledgement is forgotten when the server dies, a message comes again, an
answer may be lost after the message was stored. ``test_simulation`` has the same conversation with both.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from streams.topology import STREAM
from tests.simulation.loop import SimLoop
from tests.simulation.messages import Connection, Headers, Kept, Tokens, Wire, fits

EPOCH = 1_800_000_000.0  # when every simulation begins, in epoch seconds
EXPECT = "Nats-Expected-Last-Subject-Sequence"
EXPECT_ON = "Nats-Expected-Last-Subject-Sequence-Subject"
WRONG_LAST = 10071
TAKEN = 10148
GUARD_IN_BATCH = 10164
BATCH_INCOMPLETE = 10176
BATCH_OPEN_S = 5.0
SECOND_NS = 1_000_000_000
NAMES_MAX = 1024
_ACK = "$JS.ACK."
_NEXT = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}."
_CREATE = f"$JS.API.CONSUMER.CREATE.{STREAM}."
_NAMES = f"$JS.API.CONSUMER.NAMES.{STREAM}"
_LOOK = f"$JS.API.CONSUMER.INFO.{STREAM}."
_DELETE = f"$JS.API.CONSUMER.DELETE.{STREAM}."
_GET = f"$JS.API.DIRECT.GET.{STREAM}"
_INFO = f"$JS.API.STREAM.INFO.{STREAM}"

_NOT_FOUND = b'{"error":{"code":404,"err_code":10014,"description":"not found"}}'


class _Request:
    """A pull request that waits."""

    __slots__ = ("beat_s", "left", "opened_at", "reply", "timer")

    def __init__(self, reply: str, left: int, beat_s: float, opened_at: float) -> None:
        self.reply = reply
        self.left = left
        self.beat_s = beat_s
        self.opened_at = opened_at
        self.timer: asyncio.TimerHandle | None = None


@dataclass
class _Progress:
    """What a consumer knows of its deliveries: what a server that dies may forget."""

    after: int = 0
    places: int = 0
    floor: int = 0
    pending: dict[int, int] = field(default_factory=dict)  # stream sequence to place of the first delivery
    again: dict[int, int] = field(default_factory=dict)  # stream sequence to number of deliveries, beyond the first


class _Consumer:
    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.name = name
        self.config = config
        filters = config.get("filter_subjects") or [config.get("filter_subject") or ">"]
        self.filters = [tuple(f.split(".")) for f in filters]
        self.explicit = config.get("ack_policy") == "explicit"
        self.ack_wait_s = config.get("ack_wait", 30 * SECOND_NS) / SECOND_NS
        self.waiting_max = config.get("max_waiting") or 512
        self.inactive_s = config.get("inactive_threshold", 0) / SECOND_NS
        self.progress = _Progress(after=max(0, config.get("opt_start_seq", 1) - 1))
        self.waiting: list[_Request] = []
        self.available: deque[Kept] = deque()
        self.redeliver: deque[int] = deque()
        self.due: dict[int, float] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.asked_at = 0.0


class SimServer:
    """The server. What it is asked arrives at ``handle``; what it says goes out through connections."""

    def __init__(self, loop: SimLoop, rng: random.Random) -> None:
        self.loop = loop
        self._rng = rng
        self.up = True
        self.ready = True
        self.guarding = True
        self.lost_share = 0.0  # of acknowledgements, publishes, requests, and answers to them
        self.log: list[Kept] = []
        self.refusals = 0
        self.on_event: Callable[[str, str, Connection | None], None] = lambda kind, what, by: None
        self._by_subject: dict[str, Kept] = {}
        self._by_token: dict[tuple[int, str], list[str]] = {}
        self._consumers: dict[str, _Consumer] = {}
        self._by_head: dict[Tokens, list[_Consumer]] = {}
        self._exact: dict[str, list[Connection]] = {}
        self._starred: dict[str, list[Connection]] = {}
        self._batches: dict[str, list[Wire]] = {}
        self._beating: set[float] = set()
        self._checkpoint: dict[str, _Progress] = {}

    @property
    def now(self) -> float:
        """Return the time by the server's clock, in epoch seconds."""
        return EPOCH + self.loop.time()

    # ------------------------------------------------------------ connections

    def subscribe(self, connection: Connection, pattern: str) -> None:
        """Let a connection hear a subject, or all with one more token (``.*``)."""
        where, key = self._interest(pattern)
        connections = where.setdefault(key, [])
        if connection not in connections:  # a client that repeats itself is heard once
            connections.append(connection)

    def unsubscribe(self, connection: Connection, pattern: str) -> None:
        """Let it hear that no longer."""
        where, key = self._interest(pattern)
        if connection in where.get(key, ()):
            where[key].remove(connection)

    def forget(self, connection: Connection) -> None:
        """The connection is gone."""
        for where in (self._exact, self._starred):
            for connections in where.values():
                while connection in connections:
                    connections.remove(connection)

    def _interest(self, pattern: str) -> tuple[dict[str, list[Connection]], str]:
        head, _, last = pattern.rpartition(".")
        if "*" in head or last == ">":
            raise ValueError(f"nobody subscribes to {pattern}")
        return (self._starred, head) if last == "*" else (self._exact, pattern)

    def _hearing(self, subject: str) -> list[Connection]:
        return self._starred.get(subject.rpartition(".")[0], []) + self._exact.get(subject, [])

    def _send(self, subject: str, body: bytes = b"", headers: Headers = None, reply: str = "", to: str = "") -> None:
        """Send to all who listen on ``to`` a message whose subject is ``subject``."""
        message = Wire(to or subject, subject, reply, body, headers)
        for connection in self._hearing(message.to):
            connection.send(message)

    def _answer(self, reply: str, body: bytes, headers: Headers = None) -> None:
        if reply and not (self.lost_share and self._rng.random() < self.lost_share):
            self._send(reply, body, headers)

    # ------------------------------------------------------------ what is asked

    def handle(self, by: Connection, subject: str, body: bytes, reply: str, headers: Headers) -> None:
        """Take one message from a client."""
        if not self.up or (self.lost_share and self._rng.random() < self.lost_share):
            return
        if subject.startswith("hr."):
            message = Wire(subject, subject, reply, body, headers)
            for connection in self._hearing(subject):  # before it is stored, and also when it is refused
                connection.send(message)
            if self.ready:
                self._publish(by, message)
                return
        elif self.ready and self._managed(by, subject, body, reply):
            return
        if reply:
            self._send(reply, b"", {"Status": "503"})

    def _managed(self, by: Connection, subject: str, body: bytes, reply: str) -> bool:
        """Do what concerns consumers and reading; False where nobody listens."""
        if subject.startswith(_ACK):
            self._acknowledge(by, subject, body)
        elif subject.startswith(_NEXT):
            consumer = self._consumers.get(subject[len(_NEXT) :])
            if consumer is None:
                return False
            self._pull(consumer, body, reply)
        elif subject == _GET:
            self._get(msgspec.json.decode(body), reply)
        elif subject == _INFO:
            state = {"last_seq": len(self.log), "bytes": 0}
            self._answer(reply, msgspec.json.encode({"config": {"max_bytes": -1}, "state": state}))
        elif subject.startswith(_CREATE):
            self._answer(reply, self._create(**msgspec.json.decode(body)))
        elif subject == _NAMES:
            names = sorted(self._consumers)[msgspec.json.decode(body)["offset"] :][:NAMES_MAX]
            self._answer(reply, msgspec.json.encode({"total": len(self._consumers), "consumers": names}))
        elif subject.startswith(_LOOK):
            self._answer(reply, self._info(subject[len(_LOOK) :]))
        elif subject.startswith(_DELETE):
            told = b'{"success":true}' if self.delete(subject[len(_DELETE) :]) else _NOT_FOUND
            self._answer(reply, told)
        else:
            return False
        return True

    # ------------------------------------------------------------ append

    def _publish(self, by: Connection, message: Wire) -> None:
        headers = message.headers
        if headers and "Nats-Batch-Id" in headers:
            self._stage(by, message, headers)
            return
        code = self._check(message, ())
        if code:
            self._refuse(by, message, code)
        else:
            seq = self._store(by, message)
            self._answer(message.reply, b'{"stream":"%s","seq":%d}' % (STREAM.encode(), seq))

    def _stage(self, by: Connection, message: Wire, headers: dict[str, str]) -> None:
        name, place = headers["Nats-Batch-Id"], int(headers["Nats-Batch-Sequence"])
        staged = self._batches.get(name)
        if staged is None:
            if place != 1:
                self._answer(message.reply, _refusal(BATCH_INCOMPLETE))
                return
            staged = self._batches[name] = []
            self.loop.later(BATCH_OPEN_S, self._batches.pop, name, None)
        elif place != len(staged) + 1:
            del self._batches[name]
            self._answer(message.reply, _refusal(BATCH_INCOMPLETE))
            return
        staged.append(message)
        if "Nats-Batch-Commit" in headers:
            del self._batches[name]
            self._commit(by, staged)

    def _commit(self, by: Connection, staged: list[Wire]) -> None:
        final = staged[-1]
        written: list[str] = []
        for message in staged:
            code = self._check(message, written)
            if code:
                self._refuse(by, final, code)
                return
            written.append(message.subject)
        for message in staged:
            seq = self._store(by, message)
        count = len(staged)
        self._answer(final.reply, b'{"stream":"%s","seq":%d,"batch":"b","count":%d}' % (STREAM.encode(), seq, count))

    def _check(self, message: Wire, written: list[str] | tuple[()]) -> int:
        """Return the code of a refusal, or 0. What the batch itself has written is seen by exact subject only."""
        headers = message.headers
        if not headers or EXPECT not in headers or not self.guarding:
            return 0
        guarded = headers.get(EXPECT_ON) or message.subject
        if guarded in written:
            return GUARD_IN_BATCH
        newest = self.last(guarded)
        return 0 if int(headers[EXPECT]) == (newest.seq if newest is not None else 0) else WRONG_LAST

    def _refuse(self, by: Connection, message: Wire, code: int) -> None:
        self.refusals += 1
        self.on_event("refuse", message.subject, by)
        self._answer(message.reply, _refusal(code))

    def _store(self, by: Connection | None, message: Wire) -> int:
        subject = message.subject
        tokens = tuple(subject.split("."))
        at_ns = int(self.now * 1e9)
        kept = Kept(len(self.log) + 1, subject, message.body, at_ns // 1000 / 1e6, at_ns, tokens)
        self.log.append(kept)
        if subject not in self._by_subject:
            for place in enumerate(tokens):
                self._by_token.setdefault(place, []).append(subject)
        self._by_subject[subject] = kept
        for size in (2, 3, len(tokens)):
            for consumer in self._by_head.get(tokens[:size], ()):
                if any(fits(f, tokens) for f in consumer.filters) and consumer.progress.after < kept.seq:
                    consumer.available.append(kept)
                    if consumer.waiting:
                        self._pump(consumer)
        self.on_event("store", subject, by)
        return kept.seq

    # ------------------------------------------------------------ read

    def matching(self, pattern: str) -> list[Kept]:
        """Return the newest message of each subject that a pattern names."""
        if "*" not in pattern and ">" not in pattern:
            found = self._by_subject.get(pattern)
            return [] if found is None else [found]
        wanted = tuple(pattern.split("."))
        lists = [self._by_token.get((i, t), []) for i, t in enumerate(wanted) if t not in ("*", ">")]
        subjects = min(lists, key=len)
        return [kept for s in subjects if fits(wanted, (kept := self._by_subject[s]).tokens)]

    def last(self, pattern: str) -> Kept | None:
        """Return the newest message that a pattern names."""
        return max(self.matching(pattern), default=None)

    def _get(self, asked: dict[str, Any], reply: str) -> None:
        if "multi_last" in asked:
            found = sorted({kept for pattern in asked["multi_last"] for kept in self.matching(pattern)})
            for kept in found:
                self._answer(reply, kept.body, _stored(kept))
            if found:
                self._answer(reply, b"", {"Status": "204", "Nats-UpTo-Sequence": str(len(self.log))})
            else:
                self._answer(reply, b"", {"Status": "404"})
            return
        if "seq" in asked:
            one = self.log[asked["seq"] - 1] if 0 < asked["seq"] <= len(self.log) else None
        else:
            one = self.last(asked["last_by_subj"])
        if one is None:
            self._answer(reply, b"", {"Status": "404"})
        else:
            self._answer(reply, one.body, _stored(one))

    # ------------------------------------------------------------ consumers

    def _create(self, config: dict[str, Any], action: str = "", **_: Any) -> bytes:
        name = config.get("name") or config["durable_name"]
        if self.add_consumer(name, config).config != config and action == "create":
            return _refusal(TAKEN)
        zero = {"consumer_seq": 0, "stream_seq": 0}
        return msgspec.json.encode(
            {
                "stream_name": STREAM,
                "name": name,
                "config": config,
                "created": "2027-01-15T08:00:00Z",
                "delivered": zero,
                "ack_floor": zero,
            }
        )

    def _info(self, name: str) -> bytes:
        consumer = self._consumers.get(name)
        if consumer is None:
            return _NOT_FOUND
        progress = consumer.progress
        acknowledged = min(progress.pending, default=progress.after + 1) - 1
        numbers = {"num_pending": len(consumer.available), "num_ack_pending": len(progress.pending)}
        floor = {"ack_floor": {"consumer_seq": progress.floor, "stream_seq": acknowledged}}
        made = {"stream_name": STREAM, "name": name, "config": {"name": name}, "created": "2027-01-15T08:00:00Z"}
        return msgspec.json.encode({**made, **numbers, **floor})

    def add_consumer(self, name: str, config: dict[str, Any]) -> _Consumer:
        """Create a consumer and return it; one that exists stays as it is."""
        if name in self._consumers:
            return self._consumers[name]
        consumer = self._consumers[name] = _Consumer(name, config)
        for head in {_head(f) for f in consumer.filters}:
            self._by_head.setdefault(head, []).append(consumer)
        consumer.asked_at = self.loop.time()
        self._fill(consumer)
        if consumer.inactive_s:
            self.loop.later(consumer.inactive_s, self._tidy, consumer)
        return consumer

    def _fill(self, consumer: _Consumer) -> None:
        """Line up what the consumer has not delivered yet."""
        filters, after = consumer.filters, consumer.progress.after
        consumer.available = deque(k for k in self.log[after:] if any(fits(f, k.tokens) for f in filters))

    def delete(self, name: str) -> bool:
        """Remove a consumer, and tell those who wait at it."""
        consumer = self._consumers.pop(name, None)
        if consumer is None:
            return False
        for consumers in self._by_head.values():
            if consumer in consumers:
                consumers.remove(consumer)
        for request in consumer.waiting:
            self._end(request, {"Status": "409", "Description": "Consumer Deleted"})
        consumer.waiting.clear()
        return True

    def _tidy(self, consumer: _Consumer) -> None:
        if self._consumers.get(consumer.name) is not consumer:
            return
        if not consumer.waiting and self.loop.time() - consumer.asked_at >= consumer.inactive_s:
            self.delete(consumer.name)
        else:
            self.loop.later(consumer.inactive_s, self._tidy, consumer)

    def _pull(self, consumer: _Consumer, body: bytes, reply: str) -> None:
        asked = msgspec.json.decode(body)
        now = self.loop.time()
        consumer.asked_at = now
        if len(consumer.waiting) >= consumer.waiting_max:
            self._send(reply, b"", {"Status": "409", "Description": "Exceeded MaxWaiting"})
            return
        request = _Request(reply, asked["batch"], asked.get("idle_heartbeat", 0) / SECOND_NS, now)
        request.timer = self.loop.later(asked["expires"] / SECOND_NS, self._expire, consumer, request)
        consumer.waiting.append(request)
        self._pump(consumer)
        if request.beat_s and request.left and request.beat_s not in self._beating:
            self._beating.add(request.beat_s)
            self.loop.later(request.beat_s, self._beat, request.beat_s)

    def _beat(self, every_s: float) -> None:
        """Tell everybody who waits that we are alive."""
        waits = False
        began = self.loop.time() - every_s
        for consumer in self._consumers.values():
            for request in consumer.waiting:
                if request.beat_s == every_s:
                    waits = True
                    if request.opened_at <= began:
                        self._send(request.reply, b"", {"Status": "100", "Description": "Idle Heartbeat"})
        if waits and self.up:
            self.loop.later(every_s, self._beat, every_s)
        else:
            self._beating.discard(every_s)

    def _expire(self, consumer: _Consumer, request: _Request) -> None:
        if request in consumer.waiting:
            consumer.waiting.remove(request)
            headers = {
                "Status": "408",
                "Description": "Request Timeout",
                "Nats-Pending-Messages": str(request.left),
                "Nats-Pending-Bytes": "0",
            }
            self._end(request, headers)

    def _end(self, request: _Request, headers: dict[str, str]) -> None:
        if request.timer is not None:
            request.timer.cancel()
        self._send(request.reply, b"", headers)

    def _pump(self, consumer: _Consumer) -> None:
        """Deliver as long as somebody asks and there is something."""
        while consumer.waiting:
            index = int(self._rng.random() * len(consumer.waiting))  # which of those who ask is the server's choice
            request = consumer.waiting[index]
            if not self._hearing(request.reply):
                self._drop(consumer, request)
                continue
            seq = self._next_seq(consumer)
            if not seq:
                return
            request.left -= 1
            if not request.left:
                self._drop(consumer, request)
            self._deliver(consumer, self.log[seq - 1], request.reply)

    def _drop(self, consumer: _Consumer, request: _Request) -> None:
        consumer.waiting.remove(request)
        if request.timer is not None:
            request.timer.cancel()

    def _next_seq(self, consumer: _Consumer) -> int:
        progress = consumer.progress
        while consumer.redeliver:
            seq = consumer.redeliver.popleft()
            if seq in progress.pending:
                progress.again[seq] = progress.again.get(seq, 0) + 1
                return seq
        while consumer.available:
            kept = consumer.available.popleft()
            if kept.seq > progress.after:
                progress.after = kept.seq
                return kept.seq
        return 0

    def _deliver(self, consumer: _Consumer, kept: Kept, reply: str) -> None:
        progress = consumer.progress
        progress.places += 1
        delivered = progress.again.get(kept.seq, 0) + 1
        if consumer.explicit:
            progress.pending.setdefault(kept.seq, progress.places)
            self._time(consumer, kept.seq, consumer.ack_wait_s)
        left = len(consumer.available)
        ack = f"{_ACK}{STREAM}.{consumer.name}.{delivered}.{kept.seq}.{progress.places}.{kept.at_ns}.{left}"
        self._send(kept.subject, kept.body, None, ack, to=reply)
        self.on_event("deliver" if delivered == 1 else "redeliver", kept.subject, None)

    # ------------------------------------------------------------ acknowledgements

    def _acknowledge(self, by: Connection, subject: str, body: bytes) -> None:
        parts = subject.split(".")
        consumer = self._consumers.get(parts[3])
        if consumer is None or not consumer.explicit:
            return
        seq, place = int(parts[5]), int(parts[6])
        progress = consumer.progress
        if body in (b"", b"+ACK", b"+TERM"):
            self.on_event("ack", subject, by)
            first = progress.pending.pop(seq, None)
            progress.again.pop(seq, None)
            consumer.due.pop(seq, None)
            if first is not None:
                progress.floor = min(progress.pending.values(), default=progress.places + 1) - 1
        elif seq not in progress.pending:
            return
        elif body == b"+WPI":
            self._time(consumer, seq, consumer.ack_wait_s)
        elif place > progress.floor:  # -NAK
            self.on_event("nak", subject, by)
            delay_ns = msgspec.json.decode(body[5:])["delay"] if len(body) > 4 else 0
            if delay_ns:
                self._time(consumer, seq, delay_ns / SECOND_NS)
            elif seq not in consumer.redeliver:
                consumer.redeliver.append(seq)
                self._pump(consumer)

    def _time(self, consumer: _Consumer, seq: int, wait_s: float) -> None:
        """Have a delivery come again after this time."""
        due = consumer.due[seq] = self.loop.time() + wait_s
        if consumer.timer is None or consumer.timer.cancelled() or consumer.timer.when() > due:
            if consumer.timer is not None:
                consumer.timer.cancel()
            consumer.timer = self.loop.later(wait_s, self._look, consumer)

    def _look(self, consumer: _Consumer) -> None:
        """Line up again what nobody has acknowledged in time."""
        consumer.timer = None
        now = self.loop.time()
        for seq in sorted(s for s, due in consumer.due.items() if due <= now + 1e-9):
            del consumer.due[seq]
            if seq in consumer.progress.pending and seq not in consumer.redeliver:
                consumer.redeliver.append(seq)
        if consumer.due:
            consumer.timer = self.loop.later(max(0.0, min(consumer.due.values()) - now), self._look, consumer)
        self._pump(consumer)

    def undone(self) -> list[str]:
        """Return the subjects of what durable consumers have not delivered, or delivered and not seen acknowledged."""
        return [
            subject
            for consumer in self._consumers.values()
            if consumer.explicit
            for subject in [
                *(k.subject for k in consumer.available if k.seq > consumer.progress.after),
                *(self.log[seq - 1].subject for seq in consumer.progress.pending),
            ]
        ]

    # ------------------------------------------------------------ faults

    def checkpoint(self) -> None:
        """Write to disk how far the durable consumers are: what comes after may be forgotten."""
        self._checkpoint = {c.name: copy.deepcopy(c.progress) for c in self._consumers.values() if c.explicit}

    def die(self) -> None:
        """Be killed: what is in the log stays, what the consumers know goes back to the last checkpoint."""
        self.up = self.ready = False
        self._batches.clear()
        self._exact.clear()
        self._starred.clear()
        for consumer in list(self._consumers.values()):
            for request in consumer.waiting:
                if request.timer is not None:
                    request.timer.cancel()
            consumer.waiting.clear()
            if not consumer.explicit:
                self.delete(consumer.name)
                continue
            known = self._checkpoint.get(consumer.name)
            consumer.progress = copy.deepcopy(known) if known is not None else _Progress()
            consumer.redeliver.clear()
            consumer.due.clear()

    def rise(self, ready_after_s: float) -> None:
        """Be started again; JetStream answers a moment after connections are taken."""
        self.up = True
        self.loop.later(ready_after_s, self._get_ready)

    def _get_ready(self) -> None:
        self.ready = self.up
        for consumer in self._consumers.values():
            self._fill(consumer)
            for seq in consumer.progress.pending:
                self._time(consumer, seq, consumer.ack_wait_s * self._rng.random())


def _head(pattern: Tokens) -> Tokens:
    """Return the tokens before the first wildcard: of a length by which stored messages are looked up."""
    size = next((i for i, token in enumerate(pattern) if token in ("*", ">")), len(pattern))
    return pattern if size == len(pattern) else pattern[: 3 if size >= 3 else 2]


def _refusal(code: int) -> bytes:
    return b'{"error":{"code":400,"err_code":%d,"description":"refused"},"stream":"%s","seq":0}' % (
        code,
        STREAM.encode(),
    )


def _stored(kept: Kept) -> dict[str, str]:
    return {
        "Nats-Stream": STREAM,
        "Nats-Sequence": str(kept.seq),
        "Nats-Subject": kept.subject,
        "Nats-Time-Stamp": f"{datetime.fromtimestamp(kept.at_ns // 10**9, UTC):%Y-%m-%dT%H:%M:%S}"
        f".{kept.at_ns % 10**9:09}Z",
    }
