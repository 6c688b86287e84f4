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
takes none; nothing was learned of how long steps take, so ``ctx.budget_left()`` is all of ``ctx.time_left()``. A
``timeout`` is not enforced, and what ``ctx.emit`` publishes is collected, not delivered. A batch job does not run: it
ends as the bench is told (``Bench(..., jobs=...)``), and ``trace.jobs`` lists those that were submitted.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

from headrace.binding import Binding
from headrace.clock import parse_deadline
from headrace.context import to_payload
from headrace.errors import BadRequest, NotFound
from headrace.filters import takes
from headrace.jobs import JobEnd, JobSpec
from headrace.media import is_json
from headrace.model import Event, Route
from headrace.names import run_id
from headrace.sdk import declaration, function_name
from headrace.trace import Job, Step, Trace
from headrace.virtual import BEGIN, VirtualRun
from headrace.wire import NOTHING, EventMeta, Payload

__all__ = ["Bench", "Job", "Step", "Trace", "fire"]

_TENANT = "test"


class Bench:
    """A set of functions to fire events through. Takes functions, and modules for all functions they declare.

    Args:
        functions: what may be called; declared with ``@function`` or ``@on``, or plain.
        files: local files by the URI under which ``ctx.stage`` finds them.
        jobs: how batch jobs end, by their specification: a ``JobEnd`` (what it leaves open is filled in), an exit code,
            or None for one that has completed. Without it all complete, with exit code 0.
    """

    def __init__(
        self,
        *functions: Callable[..., Any] | ModuleType,
        files: Mapping[str, str | Path] | None = None,
        jobs: Callable[[JobSpec], JobEnd | int | None] | None = None,
    ) -> None:
        self._functions: dict[str, Binding] = {}
        self._jobs = jobs
        self._triggers = 0
        self._files = {uri: Path(path) for uri, path in (files or {}).items()}
        self._folder: Path | None = None
        for each in functions:
            for fn in _declared_in(each) if isinstance(each, ModuleType) else [each]:
                self._functions[function_name(fn)] = Binding(fn, function_name(fn))

    def fire(
        self, function: str | Callable[..., Any], data: Any = None, *, deadline: str | None = None, rung: int = 0
    ) -> Trace:
        """Start a run of a function with this data, or with an ``Event``, and return what came of it.

        Args:
            function: one of the bench.
            data: the payload, encoded as on the platform; or an event, whole.
            deadline: by when the answer is due; else as its route says.
            rung: which variant runs of functions that have some: 0 the full function, 1 the first of its variants. The
                full one does not follow here.

        Raises:
            NotFound: the bench does not hold the function.
        """
        name = function_name(function)
        route = next((r for _, r in self._routes() if r.function == name), Route(function=name))
        event = data if isinstance(data, Event) else self._triggered(name, data)
        return self._fire(name, event, name, route, deadline, rung)

    def publish(self, event: Event) -> list[Trace]:
        """Start a run on every declared route that takes the event, by name, and return what came of each."""
        found = [(name, route) for name, route in self._routes() if route.filter and takes(route.filter, event)]
        return [self._fire(route.function, event, name, route, None, 0) for name, route in sorted(found)]

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
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._files[uri] = self._folder / uri.removeprefix("blob:")
        self._files[uri].write_bytes(body)
        return uri

    def job(self, spec: JobSpec) -> JobEnd:
        """Return how a batch job ends here."""
        end = None if self._jobs is None else self._jobs(spec)
        if isinstance(end, JobEnd):
            return end
        code = end or 0
        return JobEnd(
            state="failed" if code else "completed", reason="exit_code" if code else "", exit_code=code, native_id="1"
        )

    def _routes(self) -> Iterable[tuple[str, Route]]:
        for binding in self._functions.values():
            declared = declaration(binding.function)
            yield from (declared.routes if declared else {}).items()

    def _fire(self, name: str, event: Event, route_name: str, route: Route, deadline: str | None, rung: int) -> Trace:
        due = deadline or event.extensions.get("deadline") or route.deadline
        trace = Trace(
            run_id=run_id(_TENANT, event.source, event.id, route_name),
            function=name,
            event=event,
            deadline=None if due is None else parse_deadline(due, BEGIN),
        )
        self.binding(name)
        meta = EventMeta(
            id=event.id,
            source=event.source,
            type=event.type,
            subject=event.subject,
            time=event.time,
            dataschema=event.dataschema,
            extensions=event.extensions,
        )
        VirtualRun(self, trace, cancel_late=route.on_late == "cancel", rung=rung).run(name, meta, _payload_of(event))
        return trace

    def _triggered(self, name: str, data: Any) -> Event:
        """Return the event that a trigger by the route's name makes."""
        self._triggers += 1
        return Event(
            id=f"trigger-{self._triggers}", source=f"/v1/triggers/{name}", type="org.headrace.trigger", data=data
        )


def fire(function: Callable[..., Any], data: Any = None, *, deadline: str | None = None, rung: int = 0) -> Trace:
    """Start a run of a function whose follow-ups are declared in its own module; see ``Bench.fire``."""
    module = sys.modules.get(function.__module__)
    return Bench(*([module] if module else []), function).fire(function, data, deadline=deadline, rung=rung)


def _declared_in(module: ModuleType) -> list[Callable[..., Any]]:
    """Return the declared functions that a module names."""
    return [value for value in vars(module).values() if callable(value) and declaration(value) is not None]


def _payload_of(event: Event) -> Payload:
    """Return the data of an event as the gateway would pass it on."""
    kind, data = event.datacontenttype, event.data
    if data is None:
        return NOTHING
    if isinstance(data, str) and kind is not None and not is_json(kind):
        return Payload(type=kind, body=data.encode())
    payload = to_payload(data)
    return payload if kind is None or is_json(payload.type) else Payload(type=kind, body=payload.body)
