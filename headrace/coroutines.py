"""Running ``async def`` functions one after another, each as ``asyncio.run`` would, on one loop that stays.

The loop stays so that a client which a module opened in its first invocation still works in the second.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from contextvars import copy_context
from typing import Any

_runner: asyncio.Runner | None = None


def settle(value: Any) -> Any:
    """Return ``value``, or what it comes to if it is awaitable. Tasks that it leaves behind are canceled."""
    if not hasattr(type(value), "__await__"):
        return value
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(value)
    return _run_beside(value)


def _run(value: Awaitable[Any]) -> Any:
    global _runner
    if _runner is None:
        _runner = asyncio.Runner()
    loop = _runner.get_loop()
    try:
        return _runner.run(_wait_for(value), context=copy_context())
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))


def _run_beside(value: Awaitable[Any]) -> Any:
    """Run it in a thread of its own: in this one a loop is running already, as in a test that is a coroutine itself."""
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append((asyncio.run(_wait_for(value)), None))
        except BaseException as error:  # passed on to the thread that waits
            ended.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = ended[0]
    if error is not None:
        raise error
    return result


async def _wait_for(value: Awaitable[Any]) -> Any:
    return await value
