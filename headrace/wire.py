"""What travels: between a worker and its children, and what the log holds.

One frozen struct per message, encoded as MessagePack by ``encode`` and read back by ``decode``. New fields get defaults
and unknown ones are skipped, so that processes of two releases can share a log.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from headrace.model import (
    Code,
    ErrorInfo,
    Fidelity,
    FunctionOptions,
    InvocationState,
    JobState,
    Quote,
    Route,
    RunState,
    TimeLedger,
)

JSON = "application/json"
BYTES = "application/octet-stream"
PICKLE = "application/vnd.headrace.pickle"
ITEMS = "application/vnd.headrace.items+msgpack"
GATHER = "application/vnd.headrace.gather+msgpack"
SPREAD = "application/vnd.headrace.spread+msgpack"
SPREADER = "headrace.spread"  # a function of the platform: the dot keeps it apart from every name of a user
RETRACTER = "headrace.retract"

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode

T = TypeVar("T")
_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {}


def decode(raw: bytes | memoryview, kind: type[T]) -> T:
    """Read one message of the given type; its decoder is built once."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    value: T = decoder.decode(raw)
    return value


class Payload(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A body with its content type: inline, or in the blob store under its SHA-256 (a claim check)."""

    type: str = JSON
    body: bytes = b""
    blob: str | None = None
    size: int = 0


NOTHING = Payload(body=b"null", size=4)


# ---------------------------------------------------------------- effects: what an invocation asks of the platform


class Call(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="call"):
    """Start one follow-up, ``delay_s`` seconds after this outcome."""

    function: str
    payload: Payload
    delay_s: float = 0.0


class Map(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="map"):
    """Start one invocation per payload and, when all have ended well, ``then`` with their results in order."""

    function: str
    payloads: list[Payload]
    then: str | None = None


class Emit(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="emit"):
    """Publish an event of this type: every route that takes it starts a run of its own."""

    type: str
    payload: Payload
    subject: str | None = None


class Submit(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="submit"):
    """Run a batch job at a site; when it has ended, start ``then`` or, where it failed, ``on_failure``.

    ``spec`` is an encoded ``JobSpec`` (JSON).
    """

    spec: Payload
    then: str | None = None
    on_failure: str | None = None


class SubmitMany(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="submit_many"):
    """Run many batch jobs and, when all have ended well, ``then`` with their ends in order.

    ``on_failure`` starts for each job that fails, and what it returns stands in its place.
    """

    specs: list[Payload]
    then: str | None = None
    on_failure: str | None = None


Effect = Call | Map | Emit | Submit | SubmitMany


# ---------------------------------------------------------------- the log


class EventMeta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The attributes of an event, without its data."""

    id: str
    source: str
    type: str
    subject: str | None = None
    time: str | None = None
    dataschema: str | None = None
    extensions: dict[str, Any] = msgspec.field(default_factory=dict)


class Slot(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The place an invocation fills in a scope, which is ``size`` branches that end together.

    A follow-up takes over the slot of its parent, so a slot is full when the whole chain in it has ended. When all
    slots of a scope are full, ``then`` starts in the slot around the scope; without ``then`` that slot is full too.
    An invocation without a slot fills its whole run: when it ends without a follow-up, the run ends.
    ``depth``, ``breadth`` and ``on_late`` are those of the invocation that opened the scope, and of its ``then``.
    """

    scope: str
    index: int
    size: int
    then: str | None = None
    then_version: str = ""
    parent: Slot | None = None
    opened_by: str = ""
    on_late: str = "continue"
    depth: int = 0
    breadth: int = 1


class Replayed(Struct, frozen=True, kw_only=True):
    """What a run gives another go: an invocation that was given up on, and the run that failed with it."""

    run_id: str
    invocation_id: str


# Where an event stands in a thread: its level (0 plain, 1 replaces, 2 retracts), its order, its instant, its id.
Rank = tuple[int, float, float, str]


class Place(Struct, frozen=True, kw_only=True):
    """A thread that the event of a run belongs to, by id and by the key that its sender knows, and its rank in it."""

    thread: str
    key: str
    rank: Rank


class Step(Struct, frozen=True, array_like=True):
    """An invocation that ended well on the way to a later one: ``size`` is the class of its payload's size.

    The instants are epoch seconds, by the clock of the worker it ran on.
    """

    function: str
    version: str
    size: int
    started_at: float
    ended_at: float


class Rung(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The place of an invocation on a ladder of variants, of which there are ``of``; level 0 is the full function.

    ``asked`` is the invocation that was asked for, ``full`` and ``full_version`` its function. Another one on the same
    ladder is a ``rescue``, which answers in its place while it runs and does nothing else; or ``full``, which follows
    when a cheaper one has answered or failed.
    """

    asked: str
    full: str
    full_version: str
    level: int
    of: int
    role: Literal["asked", "rescue", "full"] = "asked"


class Invocation(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Work: one call of one function, waiting in a lane. The first of a run is also the record of its acceptance.

    ``depth`` is how many led to it; ``breadth`` how many of its kind there are if all branched as those did.
    ``deadline`` is when the answer of the run has to be there, ``due`` when this invocation should have ended for that
    (None: as ``deadline``). ``trail`` holds the steps that led to it, oldest first. ``newest`` is the key of those of
    which only the newest is worth starting; empty where each is.
    """

    run_id: str
    invocation_id: str
    function: str
    version: str
    route: str
    tenant: str
    payload: Payload
    accepted_at: float
    sent_at: float
    deadline: float | None = None
    parent_id: str | None = None
    event: EventMeta | None = None
    digest: str = ""
    quote: Quote | None = None
    slot: Slot | None = None
    spent: TimeLedger = TimeLedger()
    depth: int = 0
    breadth: int = 1
    not_before: float = 0.0
    on_late: str = "continue"
    replays: Replayed | None = None
    places: list[Place] = []
    due: float | None = None
    trail: list[Step] = []
    newest: str = ""
    rung: Rung | None = None


class Spread(Struct, frozen=True, kw_only=True):
    """The payload of a platform invocation that starts the members ``first`` to ``last`` (exclusive) of a large map."""

    function: str
    version: str
    payloads: Payload
    slot: Slot
    first: int
    last: int


class Gather(Struct, frozen=True, kw_only=True):
    """The payload of a ``then``: the results of the scope's slots, to be read from the log in order.

    ``outcomes`` holds, slot by slot, the sequence of the outcome that filled it.
    """

    scope: str
    outcomes: list[int]


class RunEnd(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a run ended. ``answer_id`` is the invocation whose result is the answer where none was given explicitly.

    ``trail`` holds the steps to the end where this stands alone; where an outcome ends the run, that tells them.
    """

    run_id: str
    state: RunState
    answer_id: str | None = None
    error: ErrorInfo | None = None
    spent: TimeLedger = TimeLedger()
    ended_at: float = 0.0
    trail: list[Step] = []


class Move(Struct, frozen=True, kw_only=True):
    """A batch job was taken away from ``site`` at ``at`` (epoch seconds), where it had not begun, or was lost."""

    at: float
    site: str
    why: str


class JobDone(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a batch job ended; instants in epoch seconds, None where it did not come so far. ``moves``: oldest first."""

    site: str
    state: JobState
    native_id: str | None = None
    reason: str = ""
    exit_code: int | None = None
    submitted_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    moves: list[Move] = []


class Outcome(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an invocation ended, once and for all. ``end`` is set if its run ends with it.

    ``size`` is the class of its payload's size. ``trail`` holds the steps that led to it where it may be the last of
    them: where it gives the answer, ends its run or fills a slot. ``fidelity`` is set where its function has variants.
    Of its ``children`` so many are ``jobs``; ``job`` is set where it was one itself. ``stage_in_s`` is how long its
    attempt brought data in, in seconds, where that was worth telling.
    """

    run_id: str
    invocation_id: str
    function: str
    version: str
    route: str
    tenant: str
    state: InvocationState
    attempts: int
    queued_at: float
    started_at: float
    ended_at: float
    worker: str
    accepted_at: float
    deadline: float | None = None
    parent_id: str | None = None
    result: Payload | None = None
    answer: Payload | None = None
    error: ErrorInfo | None = None
    children: int = 0
    slot: Slot | None = None
    spent: TimeLedger = TimeLedger()
    end: RunEnd | None = None
    size: int = 0
    trail: list[Step] = []
    due: float | None = None
    on_late: str = "continue"
    fidelity: Fidelity | None = None
    jobs: int = 0
    job: JobDone | None = None
    stage_in_s: float = 0.0


class Tally(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Slots of a scope that were filled since the tally before it: (index, outcome sequence), and those that failed.

    ``after`` is the sequence of that tally, 0 for the first. Two workers may count a slot in the same words; what
    each knew of the scope tells their tallies apart, also for who has to find out whether his own was stored.
    """

    run_id: str
    scope: str
    filled: list[tuple[int, int]]
    failed: list[int] = []
    error: ErrorInfo | None = None
    after: int = 0


class Started(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An attempt has been running for a moment. Short ones go straight to their outcome."""

    run_id: str
    invocation_id: str
    function: str
    version: str
    worker: str
    attempt: int
    queued_at: float
    started_at: float
    parent_id: str | None = None


class Lease(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An invocation that was delivered before is in the hands of this worker now, which begins this attempt.

    Whatever an older attempt still tries to commit is refused from here on.
    """

    run_id: str
    invocation_id: str
    attempt: int
    worker: str
    at: float


class Attempt(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An attempt failed and another will follow, not before ``retry_at``."""

    run_id: str
    invocation_id: str
    function: str
    version: str
    worker: str
    attempt: int
    started_at: float
    ended_at: float
    retry_at: float
    error: ErrorInfo
    parent_id: str | None = None
    queued_at: float = 0.0


class Note(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something of a running function: lines of its log (level, text), how far it is (0 to 1), or what was staged."""

    run_id: str
    invocation_id: str
    at: float
    lines: list[tuple[str, str]] = []
    fraction: float | None = None
    text: str = ""
    moved: Moved | None = None


class Member(Struct, frozen=True, kw_only=True):
    """The event of this run belongs to a thread; of all members the one with the highest rank is the current one."""

    run_id: str
    rank: Rank
    at: float


class Newest(Struct, frozen=True, kw_only=True):
    """The run of the event of some source and subject that was accepted last on a route where the newest one wins."""

    run_id: str
    at: float


class Mark(Struct, frozen=True, kw_only=True):
    """Which run overruled another one, with what rank: ``superseded`` by the next in rank, or ``retracted``."""

    kind: Literal["superseded", "retracted"]
    run_id: str
    rank: Rank


class Cancel(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Nobody needs this run any more. It ends here, if it has not ended; whatever comes later is ignored.

    Somebody said so, or a later event of its thread: then ``by`` marks the run, also one that has ended.
    """

    run_id: str
    at: float
    reason: str = ""
    by: Mark | None = None


class Replay(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A run that had failed was given another go by the run ``by``. It stays failed: what is final is final."""

    run_id: str
    invocation_id: str
    by: str
    at: float


# ---------------------------------------------------------------- tables


class FunctionRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A registered function: its options and where its code is (a blob that holds an encoded ``Code``)."""

    name: str
    version: str
    options: FunctionOptions
    code_blob: str
    registered_at: float
    doc: str = ""
    preload: list[str] = []
    tenant: str = "default"


class RouteRecord(Struct, frozen=True, kw_only=True):
    """A registered route."""

    name: str
    tenant: str
    route: Route


class TenantRecord(Struct, frozen=True, kw_only=True):
    """Somebody who shares the platform: ``digests`` are the SHA-256 (hex) of the tokens that speak for him."""

    name: str
    digests: list[str]
    added_at: float


class Expected(Struct, frozen=True, array_like=True):
    """Quantiles of a duration in seconds, and how many durations of its kind were seen so far."""

    p50_s: float
    p90_s: float
    p99_s: float
    observations: int


class ForecastRow(Struct, frozen=True, kw_only=True):
    """What is expected of one function: by ``measure|version|site|size``, with empty parts for wider kinds.

    The measures are in ``functions.outlook``.
    """

    function: str
    kinds: dict[str, Expected]
    at: float


# ---------------------------------------------------------------- a worker and its child


class Invoke(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="invoke"):
    """To the child: run this. ``code`` comes along the first time a child meets the version."""

    run_id: str
    invocation_id: str
    attempt: int
    function: str
    version: str
    type: str
    body: bytes
    deadline: float | None = None
    event: EventMeta | None = None
    code: Code | None = None
    tenant: str = ""
    due: float | None = None


class Granted(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="granted"):
    """To the child: what it asked for, or why not."""

    value: str = ""
    error: str = ""
    hint: str = ""


class Returned(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="returned"):
    """From the child: the body returned, and these are its effects. With ``leave`` the child asks to be replaced."""

    result: Payload
    effects: list[Effect] = []
    answer: Payload | None = None
    started_at: float = 0.0
    ended_at: float = 0.0
    leave: bool = False


class Raised(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="raised"):
    """From the child: the code did not load or the body raised. With ``leave`` the child asks to be replaced."""

    error: ErrorInfo
    transient: bool = True
    started_at: float = 0.0
    ended_at: float = 0.0
    leave: bool = False


class Moved(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far the staging of something is: bytes that are there, and those that there will be."""

    uri: str
    bytes_done: int
    bytes_total: int


class Said(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="said"):
    """From the child: a line of its log, or how far it is; from the worker: how far the staging of something is."""

    level: str = ""
    text: str = ""
    fraction: float | None = None
    moved: Moved | None = None


class Ask(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="ask"):
    """From the child: bring this URI to a local path (``stage``), or keep this (``store``). One ``Granted`` answers."""

    what: str
    uri: str = ""
    path: str = ""
    body: bytes | None = None
    name: str = ""


FromChild = Returned | Raised | Said | Ask
ToChild = Invoke | Granted
