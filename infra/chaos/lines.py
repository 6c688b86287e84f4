"""What the processes of a trial hand to each other: plans as one JSON document, logs as one JSON line per event.

Instants called ``at`` are epoch seconds, as the log of the platform writes them; durations are seconds by a monotonic
clock. What is not known stays unknown: a reply that did not come is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

T = TypeVar("T")

# What a reply says about a trigger. ``refused`` promises that nothing was accepted; ``unknown`` promises nothing.
Answered = Literal["accepted", "refused", "unknown"]


class Load(Struct, frozen=True, kw_only=True):
    """What a driver posts: ``total`` triggers, open loop at ``rate_per_s``, each repeated until its fate is known.

    ``mix`` gives each route its share, ``extra`` its further fields of the payload. A trigger that is refused or whose
    reply does not come is sent again with the same id until ``patience_s`` seconds have passed since it was due;
    with ``once`` a refusal stands. ``reads_per_s`` reads of runs accepted before go on beside it.
    """

    url: str
    token_file: str
    log: str
    ledger: str
    name: str
    seed: int
    total: int
    rate_per_s: float
    mix: dict[str, float]
    extra: dict[str, dict[str, Any]] = {}
    deadline: str = "30s"
    patience_s: float = 60.0
    timeout_s: float = 10.0
    once: bool = False
    reads_per_s: float = 0.0
    lists_per_s: float = 0.0


class ReadBack(Struct, frozen=True, kw_only=True):
    """What a driver reads once the load is over: the list of all runs, when all have ended or patience ends.

    ``accepted`` are the logs of the drivers whose runs have to be in it.
    """

    url: str
    token_file: str
    log: str
    accepted: list[str]
    patience_s: float = 60.0


class Reply(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="reply"):
    """One POST of a trigger, and what came back: nothing has status 0. ``due_s`` counts from the start of the load."""

    id: str
    route: str
    attempt: int
    at: float
    due_s: float
    sent_s: float
    took_s: float
    status: int
    answered: Answered
    run: str = ""
    duplicate: bool = False
    slug: str = ""
    retry_after_s: float | None = None
    deadline: float | None = None


class Read(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="read"):
    """One GET of a run during the load."""

    run: str
    at: float
    sent_s: float
    took_s: float
    status: int
    state: str = ""


class Listing(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="listing"):
    """One GET of the list of runs during the load: what the read model says, or that it is away."""

    at: float
    sent_s: float
    took_s: float
    status: int


class Shown(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="shown"):
    """A run as the list of the read model shows it after the load."""

    run: str
    at: float
    state: str
    deadline_met: bool | None = None


class Finished(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="finished"):
    """The driver is through: how many triggers it had to send, and whether the list of runs came to rest."""

    at: float
    total: int = 0
    settled: bool = True


DriverLine = Reply | Read | Listing | Shown | Finished


class Step(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One fault: after a time, do this to that process, for so long where it is a pause.

    ``kill`` is SIGKILL, ``pause`` SIGSTOP and, after ``hold_s``, SIGCONT. ``who`` is gateway, worker, ledger,
    nats-server, redis-server, zygote or supervisor.
    """

    after_s: float
    act: Literal["kill", "pause"]
    who: str
    hold_s: float = 0.0


class Plan(Struct, frozen=True, kw_only=True):
    """What the nemesis does: the steps in their order, and then ``kills`` random ones, ``gap_s`` apart on average.

    ``weights`` says how often each process is hit. Everything random comes from ``seed``.
    """

    pid_file: str
    log: str
    seed: int
    steps: list[Step] = []
    kills: int = 0
    gap_s: float = 1.0
    weights: dict[str, float] = {}


class Hit(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A fault that was injected; ``pid`` 0 where the process was not there to be hit."""

    at: float
    act: str
    who: str
    pid: int = 0
    hold_s: float = 0.0


class Inquiry(Struct, frozen=True, kw_only=True):
    """What a checker is to look at.

    ``expected`` says for each route which states its runs may end in (``succeeded`` where it is not named);
    ``silent`` are functions that write no line into the ledger of effects. Runs that are still open are waited for as
    long as something happens, and ``patience_s`` seconds more.
    """

    servers_file: str
    password_file: str
    driver_logs: list[str]
    ledger: str
    verdict: str
    expected: dict[str, list[str]] = {}
    silent: list[str] = []
    patience_s: float = 60.0


class Timing(Struct, frozen=True, kw_only=True):
    """How long runs took from their acceptance to their end, in seconds, and how many ended well but late."""

    n: int
    p50_s: float
    p99_s: float
    most_s: float
    late: int


class Verdict(Struct, frozen=True, kw_only=True):
    """What a checker found. The lists name the first of each kind; every count is of runs unless it says otherwise.

    ``lost``: accepted, and not ended, or ended without the effect that it says it had. ``doubled``: two committed
    effects under one key. ``ghost``: an effect that nobody was promised. ``wrong``: a state that was told and that a
    replay of the log does not give. ``late``: ended well, after its deadline. ``bodies_again`` counts invocations of
    which the body ran more than once, which a crash allows; ``stale`` outcomes stand behind a newer lease, and count as
    doubled; ``unexpected`` runs ended in a state they should not.
    ``by_load`` is by the name of the load, ``deaths`` counts what was given up on by ``function: kind of error``,
    ``attempts_most`` and ``ran_most_s`` (from the start of the last attempt to the stored outcome) are by function.
    """

    triggers: int = 0
    accepted: int = 0
    refused: int = 0
    unknown: int = 0
    unknown_ran: int = 0
    runs: int = 0
    invocations: int = 0
    facts: int = 0
    reads: int = 0
    lost: int = 0
    doubled: int = 0
    ghost: int = 0
    wrong: int = 0
    stale: int = 0
    late: int = 0
    unexpected: int = 0
    bodies_again: int = 0
    leases: int = 0
    states: dict[str, int] = {}
    end_p50_s: float = 0.0
    end_p99_s: float = 0.0
    by_load: dict[str, Timing] = {}
    by_route: dict[str, Timing] = {}
    deaths: dict[str, int] = {}
    attempts_most: dict[str, int] = {}
    ran_most_s: dict[str, float] = {}
    note_bytes_most: int = 0
    named: dict[str, list[str]] = {}

    @property
    def good(self) -> bool:
        """Whether the promise was kept."""
        return self.lost == self.doubled == self.ghost == self.wrong == 0


class Figure(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One figure of a report: its name with the unit, its value, the bar where there is one, and whether it holds."""

    name: str
    value: str
    bar: str = ""
    good: bool | None = None


class Result(Struct, frozen=True, kw_only=True):
    """What a case hands back. The verdict is None where nothing was accepted on purpose."""

    figures: list[Figure]
    verdict: Verdict | None = None
    kills: int = 0
    notes: list[str] = []

    @property
    def good(self) -> bool:
        """Whether the promise was kept and every bar held."""
        return (self.verdict is None or self.verdict.good) and all(f.good is not False for f in self.figures)


def read_plan(path: str, kind: type[T]) -> T:
    """Read a plan that another process wrote."""
    return msgspec.json.decode(Path(path).read_bytes(), type=kind)


def write_plan(path: Path, plan: Struct) -> None:
    """Write a plan for another process."""
    path.write_bytes(msgspec.json.encode(plan))


class LineLog:
    """A file of JSON lines, written as they happen."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("ab", buffering=0)  # noqa: SIM115 - open as long as the process is

    def write(self, line: Struct) -> None:
        """Append one line, with one call, so that a killed writer leaves no half of one behind."""
        self._file.write(msgspec.json.encode(line) + b"\n")


def read_lines(path: str, kind: Any) -> Iterator[Any]:
    """Yield the lines of a log, of the given type; none if it was never begun. A last half line is left out."""
    decode = msgspec.json.Decoder(kind).decode
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        return
    for line in raw.split(b"\n")[:-1]:
        yield decode(line)
