"""What is told of failures: of an exception that a user's code raised, in one line and with the user's own frames, and
of members that end together.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import traceback
from collections.abc import Iterable

from headrace.errors import BadRequest, FunctionError, HeadraceError, LoadError
from headrace.joblog import JOB
from headrace.model import ErrorInfo
from headrace.names import invocation_id
from headrace.wire import Slot

MESSAGE_CHARS_MAX = 2_000
TRACEBACK_CHARS_MAX = 32_000

_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LOOP = os.path.dirname(os.path.abspath(asyncio.__file__)) + os.sep


def error_text(error: BaseException) -> str:
    """Return "ValueError: what it says", even for an exception whose ``__str__`` raises."""
    try:
        said = str(error)
    except Exception:  # the user's own exception class
        said = "(it cannot be shown)"
    return shorten(f"{type(error).__name__}: {said}" if said else type(error).__name__, MESSAGE_CHARS_MAX)


def told(error: BaseException) -> ErrorInfo:
    """Return what the run says of an exception that left a user's code."""
    kind = "load" if isinstance(error, LoadError) else "user"
    message = _with_hint(error) if isinstance(error, HeadraceError) else _message(error)
    seen = error.traceback if isinstance(error, FunctionError) and error.traceback else user_traceback(error)
    return ErrorInfo(
        kind=kind, message=shorten(message, MESSAGE_CHARS_MAX), traceback=shorten(seen, TRACEBACK_CHARS_MAX)
    )


def worth_another_try(error: BaseException) -> bool:
    """Return whether the same call may go well when it is made again; bad input stays bad."""
    if isinstance(error, FunctionError):
        return error.retry
    return not isinstance(error, BadRequest)


def user_traceback(error: BaseException) -> str:
    """Return the traceback as Python prints it, without frames of ours; empty where no frame of the user's is left."""
    try:
        shown = traceback.TracebackException.from_exception(error, compact=True)
        if not _cut(shown):
            return ""
        return "".join(shown.format()).rstrip("\n")
    except Exception:  # formatting calls __str__ and __repr__ of the user's classes
        return ""


def is_ours(filename: str) -> bool:
    """Return whether a frame of this file says nothing to a user: ours, or of the import system."""
    return filename.startswith((_OURS, "<frozen importlib", "<frozen runpy"))


def is_above(filename: str) -> bool:
    """Return whether a frame of this file, above all of the user's, only led there: the event loop, the import."""
    return filename.startswith(_LOOP) or filename == importlib.__file__


def shorten(text: str, chars_max: int) -> str:
    """Return text that can be sent, its middle left out if it is long: what failed stands at the two ends."""
    text = text.encode("utf-8", "backslashreplace").decode()  # names of files may hold bytes that are no text
    if len(text) <= chars_max:
        return text
    half = (chars_max - 40) // 2
    return f"{text[:half]}\n... ({len(text) - 2 * half:,} characters left out) ...\n{text[-half:]}"


def size_text(size_bytes: int) -> str:
    """Return "1.5 MiB"."""
    for unit, factor in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.4g} {unit}"
    return f"{size_bytes} bytes"


def _message(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"called sys.exit({'' if error.code is None else ascii(error.code)})"
    if isinstance(error, BaseExceptionGroup):
        inner = "; ".join(error_text(each) for each in error.exceptions[:5])
        return f"{error_text(error)}: {inner}"
    return error_text(error)


def _with_hint(error: HeadraceError) -> str:
    return f"{error}. {error.hint}" if error.hint else str(error)


def _cut(shown: traceback.TracebackException) -> bool:
    """Cut our frames from a traceback and all that it is chained to; return whether frames of the user's are left."""
    frames = [frame for frame in shown.stack if not is_ours(frame.filename)]
    while frames and is_above(frames[0].filename):
        frames.pop(0)
    shown.stack = traceback.StackSummary.from_list(frames)
    linked: Iterable[traceback.TracebackException | None] = (
        shown.__cause__,
        shown.__context__,
        *(getattr(shown, "exceptions", None) or ()),
    )
    left = [_cut(each) for each in linked if each is not None]
    syntax = shown.exc_type is not None and issubclass(shown.exc_type, SyntaxError)
    return bool(frames) or any(left) or syntax  # a syntax error tells its line without any frame


def together(first: ErrorInfo | None, failed: int, slot: Slot, function: str, identity: str) -> ErrorInfo:
    """Return one error for all that failed in a scope, led by the first.

    Args:
        first: the first error that is known.
        failed: how many failed.
        slot: the slot that was filled last.
        function: the function of the invocation that filled it.
        identity: the id of that invocation.
    """
    first = first or ErrorInfo(kind="user", message="a branch failed")
    if slot.size == 1 or first.kind in ("map", "jobs"):
        return first
    of_jobs = function == JOB and identity == invocation_id(slot.scope, slot.index)
    kind, what = ("jobs", "jobs") if of_jobs else ("map", "branches")
    if first.kind == "deadline":  # nobody needs the answer any more, which is no failure of any of them
        return ErrorInfo(kind=first.kind, message=f"{failed:,} of {slot.size:,} {what}: {first.message}")
    return ErrorInfo(
        kind=kind,
        message=f"{failed:,} of {slot.size:,} {what} failed; the first: {first.kind}: {first.message}",
        traceback=first.traceback,
    )
