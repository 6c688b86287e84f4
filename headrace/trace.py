"""What came of an event that was fired without a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.errors import NotFound, RunCanceled, RunFailed
from headrace.jobs import JobEnd, JobSpec
from headrace.model import ErrorInfo, Event, Fidelity, InvocationState, RunState
from headrace.sdk import function_name
from headrace.wire import Effect


@dataclass
class Step:
    """One invocation: what it got, what it did, and how it ended. ``at_s`` is the virtual time since acceptance.

    ``fidelity`` is set where its function is a variant, or has some.
    """

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
    fidelity: Fidelity | None = None


@dataclass
class Job:
    """One batch job that was submitted, when, and how it ended."""

    job_id: str
    parent_id: str | None
    spec: JobSpec
    end: JobEnd
    at_s: float


@dataclass
class Trace:
    """All that came of one event: its steps in the order they ran, its answer, and what it published and stored.

    ``jobs`` are those that were submitted, in that order.
    """

    run_id: str
    function: str
    event: Event
    deadline: float | None
    state: RunState = "accepted"
    answer: Any = None
    answered: bool = False
    error: ErrorInfo | None = None
    ended_s: float = 0.0
    steps: list[Step] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
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
        if self.answered:
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
