"""The functions of the trials. Each notes that it ran in a file outside the system, and then does its part.

A line is ``run,invocation,attempt,token``, appended with one write and synced before the body returns: what stands
there has happened, whatever becomes of the process. Deployed by value like the functions of any user.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from headrace import Context, function, on

EMITTED_TYPE = "org.headrace.chaos.emitted"
PARTS = 4
RETRIES = 5


def note(task: dict[str, Any], ctx: Context) -> str:
    """Append one line to the ledger of effects, and return the token that stands in it."""
    token = str(task["token"])
    handle = os.open(task["ledger"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, f"{ctx.run_id},{ctx.invocation_id},{ctx.attempt},{token}\n".encode())
        os.fsync(handle)
    finally:
        os.close(handle)
    return token


@on(deadline="30s")
@function(retries=RETRIES)
def instant(task: dict[str, Any], ctx: Context) -> str:
    """Take no time."""
    return note(task, ctx)


@on(deadline="30s")
@function(retries=RETRIES)
def slow(task: dict[str, Any], ctx: Context) -> str:
    """Take a second, or as long as the task says."""
    token = note(task, ctx)
    time.sleep(float(task.get("takes_s", 1.0)))
    return token


@on(deadline="30s")
@function(retries=RETRIES)
def chained(task: dict[str, Any], ctx: Context) -> str:
    """Call a follow-up, which calls another, and emit an event that starts a run of its own."""
    ctx.call(link, task)
    return note(task, ctx)


@function(retries=RETRIES)
def link(task: dict[str, Any], ctx: Context) -> str:
    """Be in the middle of a chain."""
    ctx.call(last, task)
    ctx.emit(EMITTED_TYPE, task)
    return note(task, ctx)


@function(retries=RETRIES)
def last(task: dict[str, Any], ctx: Context) -> str:
    """End a chain."""
    return note(task, ctx)


@on(type=EMITTED_TYPE, deadline="30s")
@function(retries=RETRIES)
def emitted(task: dict[str, Any], ctx: Context) -> str:
    """Run because another function emitted an event."""
    return note(task, ctx)


@on(deadline="30s")
@function(retries=RETRIES)
def fanned(task: dict[str, Any], ctx: Context) -> None:
    """Fan out and join."""
    note(task, ctx)
    ctx.map(part, [task] * PARTS, then=whole)


@function(retries=RETRIES)
def part(task: dict[str, Any], ctx: Context) -> dict[str, Any]:
    """Be one member of a map."""
    note(task, ctx)
    return task


@function(retries=RETRIES)
def whole(tasks: list[dict[str, Any]], ctx: Context) -> str:
    """Join the members of a map."""
    tokens = {note(task, ctx) for task in tasks[:1]} | {str(task["token"]) for task in tasks}
    if len(tasks) != PARTS or len(tokens) != 1:
        raise ValueError(f"{len(tasks)} members with the tokens {sorted(tokens)} met here")
    return tokens.pop()


@on(deadline="30s")
@function(retries=2)
def poison(task: dict[str, Any], ctx: Context) -> str:
    """Kill the process it runs in, every time."""
    token = note(task, ctx)
    os.kill(os.getpid(), signal.SIGKILL)
    return token
