"""Ending tasks for good."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

_log = logging.getLogger(__name__)

CANCEL_AGAIN_S = 1.0


async def ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and return once they have ended. Before Python 3.12 a cancel gets lost in ``wait_for`` at times."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        over, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
        for task in over:
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.debug("%s ended: %s", task.get_name(), error)
