"""Firing events through one's own functions, with no server, and looking at what they did.

    from headrace.testing import Bench

    def test_a_run_with_two_frames_is_reported():
        bench = Bench(run_stopped, find_hits, report)            # or Bench(module)
        trace = bench.fire(run_stopped, Event(id="1", source="/beamline", type="run.stop", data={"frames": [1, 2]}))

        assert trace.state == "succeeded"
        assert trace.answer == {"hits": 3}
        assert [step.function for step in trace.steps] == ["run_stopped", "find_hits", "find_hits", "report"]
        assert trace.step("report").payload == [{"hits": 1}, {"hits": 2}]

Functions are called in this process, with a real ``Context`` and with payloads that were encoded and decoded as on the
platform, so that what cannot travel fails here too. The order is always the same. Time is virtual: a delay or a retry
takes none. A ``timeout`` is not enforced, and what ``ctx.emit`` publishes is collected, not delivered.
"""

from __future__ import annotations

import hashlib
import heapq
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

from headrace.binding import Binding
from headrace.clock import parse_deadline
from headrace.context import Context, to_payload
from headrace.errors import BadRequest, NotFound, RunCanceled, RunFailed, UserError
from headrace.events import TRIGGER_TYPE
from headrace.failures import told, worth_another_try
from headrace.filters import takes
from headrace.handle import value_of
from headrace.model import ErrorInfo, Event, FunctionOptions, InvocationState, Route, RunState
from headrace.names import invocation_id, run_id
from headrace.sdk import declaration, function_name
from headrace.wire import ITEMS, JSON, NOTHING, Call, Effect, Emit, EventMeta, Map, Payload, Slot, encode

STEPS_MAX = 100_000
_BEGIN = 1_767_225_600.0  # 2026-01-01: when every virtual run is accepted
_FIRST_RETRY_S = 0.2
_TENANT = "test"


@dataclass
class Step:
    """One invocation: what it got, what it did, and how it ended. ``at_s`` is the virtual time since acceptance."""

    invocation_id: str
    parent_id: str | None
    function: str
    payload: Any
    at_s: float
    state: InvocationState = "queued"
    attempts: int = 0
    result: Any = None
    error: ErrorInfo | None = None
    exception: BaseException | None = None
    effects: list[Effect] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    progress: list[tuple[float, str]] = field(default_factory=list)


@dataclass
class Trace:
    """All that came of one event: its steps in the order they ran, its answer, and what it published and stored."""

    run_id: str
    function: str
    event: Event
    deadline: float | None
    state: RunState = "accepted"
    answer: Any = None
    error: ErrorInfo | None = None
    ended_s: float = 0.0
    steps: list[Step] = field(default_factory=list)
    emitted: list[Event] = field(default_factory=list)
    stored: dict[str, Path] = field(default_factory=dict)

    def step(self, function: str | Callable[..., Any]) -> Step:
        """Return the one step of this function.

        Raises:
            NotFound: it did not run, or ran more than once.
        """
        found = self.steps_of(function)
        if len(found) != 1:
            ran = ", ".join(step.function for step in self.steps)
            raise NotFound(f"{function_name(function)} ran {len(found)} times, not once", hint=f"What ran: {ran}.")
        return found[0]

    def steps_of(self, function: str | Callable[..., Any]) -> list[Step]:
        """Return all steps of this function."""
        return [step for step in self.steps if step.function == function_name(function)]

    @property
    def log(self) -> list[tuple[str, str]]:
        """All lines that were logged with ``ctx.log``, as (level, text)."""
        return [line for step in self.steps for line in step.log]

    def result(self) -> Any:
        """Return the answer.

        Raises:
            RunFailed: there is none; its cause is what the function raised.
        """
        if self.state == "succeeded":
            return self.answer
        error = self.error or ErrorInfo(kind="user", message="it failed")
        kind = RunCanceled if self.state == "canceled" else RunFailed
        cause = next((step.exception for step in self.steps if step.exception is not None), None)
        raise kind(
            f"the run of {self.function} {'was canceled' if self.state == 'canceled' else 'failed'}: {error.message}",
            kind=error.kind,
            reason=error.message,
            traceback=error.traceback,
            run_id=self.run_id,
        ) from cause


class Bench:
    """A set of functions to fire events through. Takes functions, and modules for all functions they declare.

    Args:
        functions: what may be called; declared with ``@function`` or ``@on``, or plain.
        files: local files by the URI under which ``ctx.stage`` finds them.
    """

    def __init__(
        self, *functions: Callable[..., Any] | ModuleType, files: Mapping[str, str | Path] | None = None
    ) -> None:
        self._functions: dict[str, Binding] = {}
        self._files = {uri: Path(path) for uri, path in (files or {}).items()}
        self._folder = tempfile.TemporaryDirectory(prefix="headrace-bench-", ignore_cleanup_errors=True)
        for each in functions:
            for fn in _declared_in(each) if isinstance(each, ModuleType) else [each]:
                self._functions[function_name(fn)] = Binding(fn, function_name(fn))

    def fire(
        self, function: str | Callable[..., Any], data: Any = None, *, deadline: str | None = None
    ) -> Trace:
        """Start a run of a function with this data, or with an ``Event``, and return what came of it.

        Args:
            function: one of the bench.
            data: the payload, encoded as on the platform; or an event, whole.
            deadline: by when the answer is due; else as its route says.

        Raises:
            NotFound: the bench does not hold the function.
        """
        name = function_name(function)
        route = next((r for _, r in self._routes() if r.function == name), Route(function=name))
        event = data if isinstance(data, Event) else _triggered(name, data)
        return self._fire(name, event, name, route, deadline)

    def publish(self, event: Event) -> list[Trace]:
        """Start a run on every declared route that takes the event, by name, and return what came of each."""
        found = [(name, route) for name, route in self._routes() if route.filter and takes(route.filter, event)]
        return [self._fire(route.function, event, name, route, None) for name, route in sorted(found)]

    def binding(self, name: str, what: str = "") -> Binding:
        """Return a function of the bench.

        Raises:
            NotFound: the bench does not hold it.
        """
        if name not in self._functions:
            known = ", ".join(sorted(self._functions)) or "nothing"
            raise NotFound(f"{what}no function named {name} is on the bench", hint=f"It holds {known}.")
        return self._functions[name]

    def stage(self, uri: str) -> Path:
        """Return the local file of a URI: one that was given to the bench, was stored, or is of a local file."""
        parts = urlsplit(uri)
        path = self._files.get(uri) or (Path(unquote(parts.path)) if parts.scheme == "file" else None)
        if path is None or not path.is_file():
            raise BadRequest(
                f"{uri} is not on the bench", hint='Give the local file, as in Bench(..., files={"' + uri + '": path}).'
            )
        return path

    def store(self, content: Path | bytes) -> str:
        """Keep the bytes for as long as the bench is there, and return their URI."""
        body = content if isinstance(content, bytes) else content.read_bytes()
        uri = f"blob:{hashlib.sha256(body).hexdigest()}"
        self._files[uri] = Path(self._folder.name) / uri.removeprefix("blob:")
        self._files[uri].write_bytes(body)
        return uri

    def _routes(self) -> Iterable[tuple[str, Route]]:
        for binding in self._functions.values():
            declared = declaration(binding.function)
            yield from (declared.routes if declared else {}).items()

    def _fire(self, name: str, event: Event, route_name: str, route: Route, deadline: str | None) -> Trace:
        due = deadline or event.extensions.get("deadline") or route.deadline
        trace = Trace(
            run_id=run_id(_TENANT, event.source, event.id, route_name),
            function=name,
            event=event,
            deadline=None if due is None else parse_deadline(due, _BEGIN),
        )
        _Run(self, trace, cancel_late=route.on_late == "cancel").run(self.binding(name))
        return trace


def fire(function: Callable[..., Any], data: Any = None, *, deadline: str | None = None) -> Trace:
    """Start a run of a function whose follow-ups are declared in the same module; see ``Bench.fire``."""
    module = __import__("sys").modules.get(function.__module__)
    return Bench(*([module] if module else []), function).fire(function, data, deadline=deadline)
