"""What a running function holds in its hand: its ids, its deadline, and what it may ask for.

Effects (``call``, ``map``, ``submit``, ``emit``, ``answer``) are collected here and committed together with the
outcome, or not at all: a body that raises, or runs twice after a crash, has asked for nothing. What happens at once
(``progress``, ``log``, ``stage``, ``store``) goes through a ``Port``: a pipe to the worker, or memory in
``headrace.testing``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from headrace.errors import BadRequest, TooLarge
from headrace.jobs import JobSpec
from headrace.sdk import function_name
from headrace.wire import BYTES, JSON, Call, Effect, Emit, Map, Payload, Submit, SubmitMany

EFFECTS_MAX = 256
FAN_OUT_MAX = 10_000
EVENT_TYPE_CHARS_MAX = 256


class Port(Protocol):
    """Where the things go that happen at once."""

    def say(self, level: str, text: str) -> None:
        """Pass on a line of the function's log."""

    def progress(self, fraction: float, note: str) -> None:
        """Pass on how far the function is."""

    def stage(self, uri: str) -> Path:
        """Return a local path that holds the bytes of ``uri``."""

    def store(self, content: Path | bytes, name: str) -> str:
        """Keep the bytes and return their URI."""


class _PortHandler(logging.Handler):
    """Sends log records of ``ctx.log`` to the run."""

    def __init__(self, port: Port) -> None:
        super().__init__()
        self._port = port

    def emit(self, record: logging.LogRecord) -> None:
        self._port.say(record.levelname.lower(), self.format(record))


def to_payload(value: object) -> Payload:
    """Encode a value that a function returns or passes on: bytes as they are, everything else as JSON.

    Raises:
        BadRequest: the value is neither bytes nor something JSON can say.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return Payload(type=BYTES, body=bytes(value), size=len(value))
    try:
        body = msgspec.json.encode(value, enc_hook=_plain)
    except (TypeError, ValueError, NotImplementedError, RecursionError, OverflowError, UnicodeEncodeError) as error:
        raise BadRequest(
            f"a value of type {type(value).__name__} cannot be sent as JSON: {error}",
            hint="Use JSON values, dataclasses or bytes; keep arrays with ctx.store(...) and pass on the URI.",
        ) from error
    return Payload(type=JSON, body=body, size=len(body))


def _plain(value: Any) -> Any:
    """Turn NumPy numbers and small arrays into what JSON can say, without importing NumPy."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _spec_payload(spec: JobSpec) -> Payload:
    if not isinstance(spec, JobSpec):
        raise BadRequest(
            f"submit: a {type(spec).__name__} is no job", hint='Give a JobSpec(executable="...", ...) of headrace.'
        )
    body = msgspec.json.encode(spec)
    return Payload(type=JSON, body=body, size=len(body))


def _named(fn: str | Callable[..., Any] | None) -> str | None:
    return None if fn is None else function_name(fn)


class Context:
    """Handed to a function that names ``ctx``. One per attempt; not shared between threads."""

    def __init__(
        self,
        *,
        run_id: str,
        invocation_id: str,
        attempt: int,
        deadline: float | None,
        port: Port,
        due: float | None = None,
        clock: Callable[[], float] = time.time,
        fan_out_max: int = FAN_OUT_MAX,
    ) -> None:
        self.run_id = run_id
        self.invocation_id = invocation_id
        self.attempt = attempt
        self.deadline = deadline
        self.due = deadline if due is None else due
        self.effects: list[Effect] = []
        self.answered: Payload | None = None
        self.log = logging.Logger(f"headrace.{invocation_id}", logging.DEBUG)
        self.log.addHandler(_PortHandler(port))
        self._port = port
        self._clock = clock
        self._fan_out_max = fan_out_max

    def time_left(self) -> float:
        """Return the seconds until the deadline of the run; infinite without one, negative when it has passed."""
        return math.inf if self.deadline is None else self.deadline - self._clock()

    def budget_left(self) -> float:
        """Return the seconds until this function should be done, so that the answer of the run is there in time.

        That is the time to the deadline less what usually follows this function up to the answer, as far as that is
        known by now; infinite without a deadline, negative when it has passed.
        """
        return math.inf if self.due is None else self.due - self._clock()

    # ------------------------------------------------------------ effects

    def call(self, fn: str | Callable[..., Any], payload: Any = None, *, delay: float | None = None) -> None:
        """Start a follow-up with this payload once this invocation has succeeded, ``delay`` seconds later if given.

        Raises:
            BadRequest: the payload has no form in JSON, or the delay is negative.
            TooLarge: this invocation asks for more than 256 effects.
        """
        delay_s = 0.0 if delay is None else float(delay)
        if not 0.0 <= delay_s <= 7 * 86400:
            raise BadRequest(f"delay: {delay!r} is not possible", hint="Use seconds from 0 to 604800 (7 days).")
        self._add(Call(function=function_name(fn), payload=to_payload(payload), delay_s=delay_s))

    def map(
        self, fn: str | Callable[..., Any], payloads: Iterable[Any], then: str | Callable[..., Any] | None = None
    ) -> None:
        """Start one invocation per payload; when all have succeeded, ``then`` gets the list of results in order.

        With no payloads at all, ``then`` gets an empty list.

        Raises:
            TooLarge: there are more payloads than the platform takes (10,000, unless it is set otherwise).
        """
        encoded: list[Payload] = []
        for item in payloads:
            if len(encoded) == self._fan_out_max:
                raise TooLarge(
                    f"map: more than {self._fan_out_max:,} payloads",
                    hint="Give each member a chunk of the work instead.",
                )
            encoded.append(to_payload(item))
        self._add(
            Map(
                function=function_name(fn),
                payloads=encoded,
                then=_named(then),
            )
        )

    def submit(
        self,
        spec: JobSpec,
        then: str | Callable[..., Any] | None = None,
        on_failure: str | Callable[..., Any] | None = None,
    ) -> None:
        """Run a batch job at a site once this invocation has succeeded.

        When it has completed, ``then`` gets a ``JobEnd``; when it has failed or was canceled, ``on_failure`` gets it.
        Without ``then`` the end of the job is the result; without ``on_failure`` its failure is that of the run. The
        site is one that can run it, of those that it names, where it is expected to end first; a site that it names
        and that is not there now is waited for.

        Raises:
            BadRequest: it is not a ``JobSpec``.
            TooLarge: this invocation asks for more than 256 effects.
        """
        self._add(Submit(spec=_spec_payload(spec), then=_named(then), on_failure=_named(on_failure)))

    def submit_many(
        self,
        specs: Iterable[JobSpec],
        then: str | Callable[..., Any] | None = None,
        on_failure: str | Callable[..., Any] | None = None,
    ) -> None:
        """Run many batch jobs; when all have ended well, ``then`` gets the list of their ends in order.

        A site gets those that are alike as one job array, where it has such. ``on_failure`` gets the end of each job
        that fails, and what it returns stands in the list in its place; without it, one failure is that of the run.
        With no jobs at all, ``then`` gets an empty list.

        Raises:
            BadRequest: one of them is not a ``JobSpec``.
            TooLarge: there are more than the platform takes (10,000, unless it is set otherwise).
        """
        encoded: list[Payload] = []
        for spec in specs:
            if len(encoded) == self._fan_out_max:
                raise TooLarge(
                    f"submit_many: more than {self._fan_out_max:,} jobs", hint="Let each job do more of the work."
                )
            encoded.append(_spec_payload(spec))
        self._add(SubmitMany(specs=encoded, then=_named(then), on_failure=_named(on_failure)))

    def emit(self, type: str, data: Any = None) -> None:  # noqa: A002 - the CloudEvents attribute is called so
        """Publish an event of this type: every route that takes it starts a run of its own."""
        if not isinstance(type, str) or not 0 < len(type) <= EVENT_TYPE_CHARS_MAX:
            raise BadRequest("emit: the event type is empty or too long", hint='Use a type such as "org.example.peak".')
        self._add(Emit(type=type, payload=to_payload(data)))

    def answer(self, value: Any) -> None:
        """Give the answer of the run: what the deadline is about. The first one given in a run stands."""
        if self.answered is None:
            self.answered = to_payload(value)

    def _add(self, effect: Effect) -> None:
        if len(self.effects) == EFFECTS_MAX:
            raise TooLarge(
                f"more than {EFFECTS_MAX} effects in one invocation", hint="Use ctx.map(...) for many alike."
            )
        self.effects.append(effect)

    # ------------------------------------------------------------ at once

    def progress(self, fraction: float, note: str = "") -> None:
        """Tell how far the work is, 0 to 1; shown live and kept in the log."""
        fraction = float(fraction)
        self._port.progress(0.0 if math.isnan(fraction) else min(1.0, max(0.0, fraction)), str(note))

    def stage(self, uri: str) -> Path:
        """Bring the bytes of ``uri`` to a local path, checked against their checksum."""
        return self._port.stage(uri)

    def store(self, content: str | Path | bytes, name: str) -> str:
        """Keep a file or bytes and return a URI that ``stage`` and an event's ``dataref`` take."""
        return self._port.store(content if isinstance(content, bytes) else Path(content), name)
