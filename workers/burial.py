"""Messages that nobody could read: what they stand for ends, so that its run ends too."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from functions import outcomes
from headrace.errors import HeadraceError
from streams.log import Log
from streams.poll import Arrival
from workers.commits import Commits, Fenced

_log = logging.getLogger(__name__)


class Burial:
    """Ends work whose message none of its kind could read."""

    def __init__(
        self,
        name: str,
        log: Log,
        commits: Commits,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        clock: Callable[[], float],
    ) -> None:
        """Describe it.

        Args:
            name: who ends it.
            log: where the messages are.
            commits: commits the outcomes.
            spawn: runs something beside.
            clock: the time in epoch seconds.
        """
        self._name = name
        self._log = log
        self._commits = commits
        self._spawn = spawn
        self._clock = clock

    def later(self, arrived: Arrival) -> None:
        """End what a message stands for, beside all else; should that not work, the message comes again."""
        self._spawn(self._bury(arrived))

    async def bury(self, subject: str, at: float) -> None:
        """End what the message of a subject stands for, which was stored at this instant.

        Raises:
            Fenced: somebody else has it.
            HeadraceError: it cannot be ended now.
        """
        await self._end(subject, at, 0)

    async def _end(self, subject: str, at: float, fence: int) -> None:
        await self._commits.commit(*outcomes.unreadable(subject, self._name, at, self._clock(), fence))

    async def _bury(self, arrived: Arrival) -> None:
        try:
            await self.bury(arrived.subject, arrived.at)
        except (HeadraceError, OSError, Fenced) as error:
            _log.warning("message %d is not buried yet: %s", arrived.seq, error)
            return
        with contextlib.suppress(Exception):
            await self._log.link.nc.publish(arrived.reply, b"+ACK")
