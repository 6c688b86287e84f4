"""A conversation with a log's server, as our code has it, and the answers: the same of the real and of the simulated.

Times, names of batches and of inboxes are left out; sequences, codes, counts and orders stay.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

from nats.aio.msg import Msg

from streams.topology import STREAM

SECOND_NS = 1_000_000_000
QUIET_S = 0.15
ACK_WAIT_S = 0.5
EXPECT = "Nats-Expected-Last-Subject-Sequence"
EXPECT_ON = "Nats-Expected-Last-Subject-Sequence-Subject"

Said = list[Any]


class Talk:
    """A client that asks, and writes down the answers."""

    def __init__(self, nc: Any) -> None:
        self.nc = nc
        self.said: Said = []
        self.first = 0
        self._numbers = itertools.count(1)
        self._heard: asyncio.Queue[Msg] = asyncio.Queue()
        self._answers: asyncio.Queue[Msg] = asyncio.Queue()
        self.inbox = ""

    async def start(self) -> None:
        """Listen, and learn where the log begins."""
        self.inbox = self.nc.new_inbox()
        await self.nc.subscribe(self.inbox + ".*", cb=self._hear)
        await self.nc.subscribe(self.inbox + ".answer.*", cb=self._answer)
        self.first = json.loads((await self.ask(f"$JS.API.STREAM.INFO.{STREAM}")).data)["state"]["last_seq"]

    async def _hear(self, message: Msg) -> None:
        self._heard.put_nowait(message)

    async def _answer(self, message: Msg) -> None:
        self._answers.put_nowait(message)

    async def ask(self, subject: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Msg:
        """Return the one answer to a request."""
        await self.nc.publish(subject, body, reply=f"{self.inbox}.answer.{next(self._numbers)}", headers=headers)
        async with asyncio.timeout(3):
            return await self._answers.get()

    def reply(self) -> str:
        """Return an inbox that was not used before."""
        return f"{self.inbox}.{next(self._numbers)}"

    async def until_quiet(self, quiet_s: float = QUIET_S) -> list[Msg]:
        """Return what comes until nothing does for a while."""
        found: list[Msg] = []
        while True:
            try:
                async with asyncio.timeout(quiet_s):
                    found.append(await self._heard.get())
            except TimeoutError:
                return found

    def note(self, what: str, *answers: Any) -> None:
        """Write down what was answered."""
        self.said.append((what, *answers))

    def ack(self, message: Msg) -> Any:
        """Return what an acknowledgement says, sequences counted from the beginning of this conversation."""
        found = json.loads(message.data)
        if "error" in found:
            return found["error"]["err_code"]
        return (found["seq"] - self.first, found.get("count", 1))

    async def put(self, what: str, subject: str, expect: int | None = None, on: str = "", body: bytes = b"x") -> None:
        """Publish one message with its guard."""
        self.note(what, self.ack(await self.ask(subject, body, self.guard(expect, on))))

    def guard(self, expect: int | None, on: str) -> dict[str, str]:
        """Return the headers of a guard; what it expects counts from the beginning of this conversation."""
        headers = {}
        if expect is not None:
            headers[EXPECT] = str(expect + self.first if expect else 0)
        if on:
            headers[EXPECT_ON] = on
        return headers

    async def batch(self, what: str, *messages: tuple[str, int | None, str], numbers: list[int] | None = None) -> None:
        """Publish an atomic batch; with ``numbers`` instead of 1, 2, 3."""
        name = f"b{next(self._numbers)}"
        places = numbers or list(range(1, len(messages) + 1))
        for place, (subject, expect, on) in zip(places[:-1], messages[:-1], strict=True):
            headers = {"Nats-Batch-Id": name, "Nats-Batch-Sequence": str(place), **self.guard(expect, on)}
            await self.nc.publish(subject, b"y", headers=headers)
        subject, expect, on = messages[-1]
        headers = {"Nats-Batch-Id": name, "Nats-Batch-Sequence": str(places[-1]), **self.guard(expect, on)}
        self.note(what, self.ack(await self.ask(subject, b"z", {**headers, "Nats-Batch-Commit": "1"})))

    def stored(self, message: Msg) -> Any:
        """Return a message read from the log, or the status that came instead."""
        headers = message.headers or {}
        if "Nats-Sequence" in headers:
            return (int(headers["Nats-Sequence"]) - self.first, headers["Nats-Subject"], message.data)
        return (headers.get("Status"), "Nats-UpTo-Sequence" in headers)

    def arrived(self, message: Msg) -> Any:
        """Return a delivery (stream sequence, times delivered, consumer sequence, subject), or the status instead."""
        headers = message.headers or {}
        if "Status" in headers:
            told = None if headers["Status"] == "503" else headers.get("Description")
            return (headers["Status"], told, headers.get("Nats-Pending-Messages"))
        parts = message.reply.split(".")
        base = 4 if len(parts) == 9 else 6
        return (
            int(parts[base + 1]) - self.first,
            int(parts[base]),
            int(parts[base + 2]),
            message.subject,
        )

    async def consumer(self, name: str, action: str = "", **config: Any) -> None:
        """Create a consumer; with the action ``create`` only one that is not there."""
        request = {"stream_name": STREAM, "config": {"name": name, **config}, "action": action}
        found = json.loads(
            (await self.ask(f"$JS.API.CONSUMER.CREATE.{STREAM}.{name}", json.dumps(request).encode())).data
        )
        self.note(f"create {name}", found.get("name") == name, found.get("error", {}).get("err_code"))

    async def knows(self, name: str) -> bool:
        """Say whether a consumer's name is among those of all."""
        found = json.loads((await self.ask(f"$JS.API.CONSUMER.NAMES.{STREAM}", b'{"offset":0}')).data)
        return name in found["consumers"]

    async def state(self, name: str) -> Any:
        """Return how much a consumer has not delivered, how much is not acknowledged, and up to where all is."""
        found = json.loads((await self.ask(f"$JS.API.CONSUMER.INFO.{STREAM}.{name}")).data)
        if "error" in found:
            return found["error"]["err_code"]
        return found["num_pending"], found["num_ack_pending"], max(0, found["ack_floor"]["stream_seq"] - self.first)

    async def pull(self, name: str, number: int, expires_s: float = 5.0, beat_s: float = 0.0) -> str:
        """Ask a consumer for messages, and return the inbox of the request."""
        request: dict[str, Any] = {"batch": number, "expires": int(expires_s * SECOND_NS)}
        if beat_s:
            request["idle_heartbeat"] = int(beat_s * SECOND_NS)
        reply = self.reply()
        await self.nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{name}", json.dumps(request).encode(), reply=reply)
        return reply


async def converse(nc: Any) -> Said:
    """Have the whole conversation and return what was answered."""
    talk = Talk(nc)
    await talk.start()
    await _guards(talk)
    await _batches(talk)
    await _reading(talk)
    await _pulling(talk)
    await _naks(talk)
    await _requests(talk)
    await _followers(talk)
    await _listeners(talk)
    return talk.said


async def _guards(talk: Talk) -> None:
    await talk.put("plain", "hr.note.r1.i1.1")
    await talk.put("first outcome", "hr.done.r1.i1", 0)
    await talk.put("second outcome", "hr.done.r1.i1", 0)
    await talk.put("after the first", "hr.done.r1.i1", 2)
    await talk.put("after the first again", "hr.done.r1.i1", 2)
    await talk.put("after what never was", "hr.done.r1.i1", 99)
    await talk.put("any lane", "hr.work.3.t.r1.i1", 0, "hr.work.*.t.r1.i1")
    await talk.put("another lane", "hr.work.4.t.r1.i1", 0, "hr.work.*.t.r1.i1")
    await talk.put("a lease", "hr.lease.r1.i2", 0, "hr.*.r1.i2")
    await talk.put("a late outcome", "hr.done.r1.i2", 0, "hr.*.r1.i2")
    await talk.put("an outcome of the lease", "hr.done.r1.i2", 5, "hr.*.r1.i2")
    await talk.put("a lease after the outcome", "hr.lease.r1.i2", 5, "hr.*.r1.i2")
    await talk.put("on another subject", "hr.try.r1.i3.1", 0, "hr.*.r1.i3")
    await talk.put("a sequence of the past", "hr.try.r1.i2.1", 3, "hr.*.r1.i2")
    await talk.put("a sequence between", "hr.try.r1.i2.1", 1, "hr.*.r1.i9")


async def _end(talk: Talk) -> int:
    found = json.loads((await talk.ask(f"$JS.API.STREAM.INFO.{STREAM}")).data)
    return int(found["state"]["last_seq"]) - talk.first


async def _batches(talk: Talk) -> None:
    await talk.batch("batch", ("hr.work.1.t.r2.a", None, ""), ("hr.work.1.t.r2.b", None, ""), ("hr.done.r2.i1", 0, ""))
    await talk.batch("refused by its last", ("hr.work.1.t.r2.c", None, ""), ("hr.done.r2.i1", 0, ""))
    await talk.batch("refused by its first", ("hr.done.r2.i1", 0, ""), ("hr.work.1.t.r2.c", None, ""))
    talk.note("nothing of them is there", await _end(talk))
    await talk.batch(
        "a place that the batch fills itself",
        ("hr.work.1.t.r3.a", 0, "hr.work.*.t.r3.a"),
        ("hr.work.2.t.r3.a", 0, "hr.work.*.t.r3.a"),
    )
    await talk.batch(
        "two guards on one empty place",
        ("hr.note.r4.a.1", 0, "hr.cancel.r4.*"),
        ("hr.note.r4.b.1", 0, "hr.cancel.r4.*"),
    )
    await talk.batch("the same subject guarded twice", ("hr.done.r5.a", 0, ""), ("hr.done.r5.a", 0, ""))
    await talk.batch("guarded, then written again", ("hr.done.r5.b", 0, ""), ("hr.done.r5.b", None, ""))
    await talk.batch("written, then guarded", ("hr.done.r5.c", None, ""), ("hr.done.r5.c", 0, ""))
    await talk.batch("written, then guarded by *", ("hr.done.r5.d", None, ""), ("hr.lease.r5.d", 0, "hr.*.r5.d"))
    await talk.batch(
        "one family guarded by * twice", ("hr.lease.r5.e", 0, "hr.*.r5.e"), ("hr.done.r5.e", 0, "hr.*.r5.e")
    )
    await talk.batch("a batch of one", ("hr.end.r5", 0, ""))
    three = (("hr.note.r6.a.1", None, ""), ("hr.note.r6.b.1", None, ""), ("hr.note.r6.c.1", None, ""))
    await talk.batch("its middle was lost", *three[:2], numbers=[1, 3])
    await talk.batch("its beginning was lost", *three[:2], numbers=[2, 3])
    await talk.batch("all but the end was lost", three[0], numbers=[2])
    talk.note("the end", await _end(talk))


async def _reading(talk: Talk) -> None:
    for subject in ("hr.done.r1.i1", "hr.*.r1.i2", "hr.work.*.*.r1.*", "hr.cancel.nobody.*", "hr.done.>"):
        body = json.dumps({"last_by_subj": subject}).encode()
        talk.note(f"last of {subject}", talk.stored(await talk.ask(f"$JS.API.DIRECT.GET.{STREAM}", body)))
    for seq in (1, 999):
        body = json.dumps({"seq": talk.first + seq}).encode()
        talk.note(f"at {seq}", talk.stored(await talk.ask(f"$JS.API.DIRECT.GET.{STREAM}", body)))
    for subjects in (["hr.work.*.*.r2.*", "hr.done.r2.*"], ["hr.end.r5", "hr.*.r1.i2"], ["hr.end.nobody"]):
        body = json.dumps({"multi_last": subjects, "batch": 1001}).encode()
        await talk.nc.publish(f"$JS.API.DIRECT.GET.{STREAM}", body, reply=talk.reply())
        found = await talk.until_quiet()
        talk.note(f"last of each {subjects}", sorted(talk.stored(m) for m in found[:-1]), talk.stored(found[-1]))


async def _pulling(talk: Talk) -> None:
    nc = talk.nc
    await talk.consumer("c1", filter_subject="hr.work.7.>", ack_policy="explicit", ack_wait=int(ACK_WAIT_S * SECOND_NS))
    for name in "abcde":
        await talk.put(f"work {name}", f"hr.work.7.t.r7.{name}")
    await talk.pull("c1", 2)
    a, b = await talk.until_quiet()
    talk.note("two are asked for", talk.arrived(a), talk.arrived(b))
    talk.note("two are out", (await talk.state("c1"))[:2])
    await nc.publish(a.reply, b"+ACK")
    await nc.publish(b.reply, b"-NAK")
    await asyncio.sleep(QUIET_S)  # the server puts it back in its own time
    await talk.pull("c1", 2)
    b2, c = await talk.until_quiet()
    talk.note("what was given back comes first", talk.arrived(b2), talk.arrived(c))
    await nc.publish(b2.reply, b"+ACK")
    await nc.publish(c.reply, b"+WPI")
    await talk.pull("c1", 2)
    d, e = await talk.until_quiet()
    talk.note("the next two", talk.arrived(d), talk.arrived(e))
    talk.note("two are done", await talk.state("c1"))
    await nc.publish(e.reply, b"+ACK")
    # c and d are left alone until their time is over; c says in the meantime that it is in progress.
    await talk.pull("c1", 2)
    await nc.publish(c.reply, b"+WPI")
    late = await talk.until_quiet(ACK_WAIT_S + 0.2)
    talk.note("both came again", sorted(talk.arrived(m)[:2] for m in late[:2]))
    for message in late:
        await nc.publish(message.reply, b"+ACK")
    talk.note("nothing more", await talk.until_quiet(ACK_WAIT_S + 0.3))
    talk.note("all are done", await talk.state("c1"))


async def _naks(talk: Talk) -> None:
    """What an older delivery may still say about a message that came again."""
    nc = talk.nc
    await talk.consumer("c2", filter_subject="hr.work.8.>", ack_policy="explicit", ack_wait=int(2 * SECOND_NS))
    await talk.put("work", "hr.work.8.t.r8.a")
    await talk.pull("c2", 1)
    (one,) = await talk.until_quiet()
    await nc.publish(one.reply, b'-NAK {"delay":300000000}')
    await talk.pull("c2", 1)
    talk.note("not before the delay", await talk.until_quiet())
    (two,) = await talk.until_quiet(0.5)
    talk.note("after the delay", talk.arrived(two))
    await nc.publish(two.reply, b'-NAK {"delay":60000000000}')
    await talk.pull("c2", 1)
    talk.note("put aside for long", await talk.until_quiet())
    await nc.publish(two.reply, b"-NAK")
    (two,) = await talk.until_quiet()
    talk.note("called back before that", talk.arrived(two))
    await talk.pull("c2", 1)
    await asyncio.sleep(QUIET_S)
    await nc.publish(one.reply, b"-NAK")
    (three,) = await talk.until_quiet()
    talk.note("the first holder gives back what the second has", talk.arrived(three))
    await nc.publish(one.reply, b"+ACK")
    await asyncio.sleep(QUIET_S)
    await nc.publish(three.reply, b"-NAK")
    await talk.pull("c2", 1, expires_s=0.4)
    last = await talk.until_quiet(0.8)
    talk.note("the first holder acknowledges what the third has", [talk.arrived(m) for m in last])


async def _requests(talk: Talk) -> None:
    await talk.consumer("c3", filter_subject="hr.work.9.>", ack_policy="explicit", max_waiting=2)
    talk.note("its name is told", await talk.knows("c3"))
    await talk.pull("c3", 3, expires_s=0.6, beat_s=0.25)
    found = await talk.until_quiet(0.8)
    talk.note("beats, then expired", talk.arrived(found[0]), talk.arrived(found[-1]))
    await talk.put("work", "hr.work.9.t.r9.a")
    await talk.pull("c3", 3, expires_s=0.5)
    found = await talk.until_quiet(0.8)
    talk.note("one of three, then expired", [talk.arrived(m) for m in found])
    await talk.pull("c3", 1)
    await talk.pull("c3", 1)
    talk.note("two may wait", await talk.until_quiet())
    await talk.pull("c3", 1)
    talk.note("a third may not", [talk.arrived(m) for m in await talk.until_quiet()])
    deleted = json.loads((await talk.ask(f"$JS.API.CONSUMER.DELETE.{STREAM}.c3")).data)
    talk.note("deleted", deleted.get("success"))
    talk.note("who waits is told", [talk.arrived(m) for m in await talk.until_quiet()])
    await talk.pull("c3", 1)
    talk.note("nobody is there", [talk.arrived(m) for m in await talk.until_quiet()])
    talk.note("its name is gone", await talk.knows("c3"), await talk.state("c3"))


async def _followers(talk: Talk) -> None:
    config: dict[str, Any] = {
        "ack_policy": "none",
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": talk.first + 2,
        "mem_storage": True,
        "max_waiting": 8,
        "inactive_threshold": 60 * SECOND_NS,
    }
    await talk.consumer("f1", filter_subjects=["hr.done.>", "hr.lease.>"], **config)
    await talk.pull("f1", 4)
    talk.note("from the second on", [talk.arrived(m) for m in await talk.until_quiet()])
    await talk.consumer("f2", filter_subject="hr.cancel.*.*", **config)
    await talk.pull("f2", 4)
    talk.note("nothing yet", await talk.until_quiet())
    await talk.consumer("f3", "create", filter_subject="hr.done.>", description="one", **config)
    await talk.pull("f3", 4)
    talk.note("it is used", [talk.arrived(m) for m in await talk.until_quiet()])
    await talk.consumer("f3", "create", filter_subject="hr.done.>", description="one", **config)  # it is the same
    await talk.consumer("f3", "create", filter_subject="hr.done.>", description="two", **config)  # it is not ours
    await talk.pull("f3", 1)
    talk.note("it stays where it is", [talk.arrived(m) for m in await talk.until_quiet()])
    await talk.put("a cancel", "hr.cancel.r1.user", 0)
    await talk.put("a guard on all cancels", "hr.note.r1.i1.2", 0, "hr.cancel.r1.*")
    talk.note("it comes", [talk.arrived(m) for m in await talk.until_quiet()])


async def _listeners(talk: Talk) -> None:
    heard: list[tuple[str, bytes]] = []

    async def hear(message: Msg) -> None:
        heard.append((message.subject, message.data))

    sub = await talk.nc.subscribe("hr.done.r9.*", cb=hear)
    await talk.put("heard", "hr.done.r9.a", 0)
    await talk.put("refused, and heard", "hr.done.r9.a", 0)
    await talk.until_quiet()
    await sub.unsubscribe()
    await talk.put("not heard", "hr.done.r9.b", 0)
    await talk.until_quiet()
    talk.note("heard", heard)
