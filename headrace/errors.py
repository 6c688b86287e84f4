"""What can go wrong, and what to do about it.

    HeadraceError
    ├── BadRequest            the caller's input is wrong; nothing was done
    │   ├── BadName           a name does not match the one rule for names
    │   └── TooLarge          a limit on size or number was passed
    ├── NotFound              there is nothing of that name or id
    ├── Conflict              the request contradicts what is already recorded
    ├── Infeasible            refused because the answer is not expected in time (``quote``)
    ├── Unauthorized          the token is missing or wrong
    ├── Overloaded            refused now, welcome later (``retry_after_s``)
    │   └── Unavailable       a part of the platform does not answer
    ├── PlatformUnreachable   no gateway answers at this address
    ├── RunFailed             the run ended without an answer
    │   ├── RunCanceled
    │   └── RunRetracted      the event behind it was taken back, and its answer with it
    └── FunctionError         a user's function failed; ``kind`` says whose fault
        ├── LoadError         its code could not be loaded
        ├── UserError         its body raised, or was given data of the wrong type
        ├── OutOfMemory       it needed more memory than it may take
        ├── OverLimit         it took more processes, CPU time or scratch space than it may
        ├── TimeLimit         it ran longer than its ``timeout``
        └── ChildLost         its process died under it (signal, exit, out of memory)

Each error holds one sentence for the user (``str(error)``), a ``hint`` with the cure, and ``transient``: whether
the same call may succeed when it is simply made again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from headrace.model import Quote


class HeadraceError(Exception):
    """The root of all errors raised by Headrace; ``hint`` tells the reader what to do next."""

    title: ClassVar[str] = "Something went wrong"
    transient: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class BadRequest(HeadraceError):
    """The caller's input is wrong; nothing was done."""

    title = "The request cannot be understood"


class BadName(BadRequest):
    """A name does not match ``[A-Za-z0-9_-]{1,64}``."""

    title = "Not a valid name"


class TooLarge(BadRequest):
    """A limit on size or number was passed; the message names the limit."""

    title = "A limit was passed"


class NotFound(HeadraceError):
    """There is nothing of that name or id."""

    title = "Not found"


class Conflict(HeadraceError):
    """The request contradicts what is already recorded."""

    title = "Conflict with what is already recorded"


class Infeasible(HeadraceError):
    """Refused by a route with strict admission: the answer is not expected before the deadline. Nothing was started."""

    title = "Not expected in time"

    def __init__(self, message: str, *, hint: str = "", quote: Quote | None = None) -> None:
        super().__init__(message, hint=hint)
        self.quote = quote


class Unauthorized(HeadraceError):
    """The token is missing or wrong."""

    title = "Not authorized"


class Overloaded(HeadraceError):
    """Refused now, welcome after ``retry_after_s`` seconds; nothing was half-accepted."""

    title = "Too much at once"
    transient = True

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class Unavailable(Overloaded):
    """A part of the platform does not answer at the moment."""

    title = "A part of the platform does not answer"


class PlatformUnreachable(HeadraceError):
    """No gateway answers at this address."""

    title = "The platform cannot be reached"
    transient = True


class RunFailed(HeadraceError):
    """The run ended without an answer.

    ``kind`` says whose fault it is, ``reason`` what was said of it, such as "ValueError: no peak"; ``traceback`` holds
    the user's frames only.
    """

    title = "The run failed"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        kind: str = "user",
        reason: str = "",
        traceback: str = "",
        run_id: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind
        self.reason = reason
        self.traceback = traceback
        self.run_id = run_id


class RunCanceled(RunFailed):
    """The run was canceled before it had an answer."""

    title = "The run was canceled"


class RunRetracted(RunFailed):
    """The event that started the run was retracted by a later one; if there was an answer, it does not hold."""

    title = "The run was retracted"


class FunctionError(HeadraceError):
    """A user's function failed. ``kind`` travels in records; ``traceback`` holds the user's frames only."""

    title = "The function failed"
    kind: ClassVar[str] = "user"

    def __init__(self, message: str, *, hint: str = "", traceback: str = "", transient: bool | None = None) -> None:
        super().__init__(message, hint=hint)
        self.traceback = traceback
        self.retry = self.transient if transient is None else transient


class LoadError(FunctionError):
    """The function's code could not be loaded."""

    title = "The function's code cannot be loaded"
    kind = "load"


class UserError(FunctionError):
    """The function's body raised, or was given data of the wrong type."""

    kind = "user"
    transient = True


class OutOfMemory(FunctionError):
    """The function needed more memory than it may take."""

    title = "The function ran out of memory"
    kind = "memory"
    transient = True


class OverLimit(FunctionError):
    """The function took more processes, CPU time or scratch space than it may; the message names the limit."""

    title = "The function was stopped at a limit"
    kind = "limit"


class TimeLimit(FunctionError):
    """The function ran longer than its timeout and was stopped."""

    title = "The function was stopped at its time limit"
    kind = "timeout"
    transient = True


class ChildLost(FunctionError):
    """The process that ran the function died: a signal, an exit, out of memory."""

    title = "The function's process died"
    kind = "lost"
    transient = True
