"""Why jobs wait at their agent: told to those who look at their runs, once a job could not be submitted twice."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from headrace.errors import HeadraceError
from headrace.joblog import Held
from headrace.wire import encode
from streams.log import Log, Record
from streams.topology import held_subject
from workers.jobhand import Waiting

_log = logging.getLogger(__name__)

TOLD_KEPT_MAX = 10_000
WHY_MAX = 500


class WhyWaits:
    """Tells of the jobs of one site why they wait."""

    def __init__(
        self,
        log: Log,
        site: str,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        clock: Callable[[], float],
    ) -> None:
        """Describe it; ``spawn`` runs something beside, ``clock`` tells epoch seconds."""
        self._log = log
        self._site = site
        self._spawn = spawn
        self._clock = clock
        self._told: OrderedDict[int, str] = OrderedDict()  # by the sequence of the job's message

    def tell(self, waiting: Waiting, why: str) -> None:
        """Tell why a job is about to be handed back; not at its first try, nor what was told before."""
        why = why[:WHY_MAX]
        if not waiting.tries or self._told.get(waiting.seq) == why:
            return
        self._told[waiting.seq] = why
        while len(self._told) > TOLD_KEPT_MAX:
            self._told.popitem(last=False)
        self._spawn(self._append(waiting.invocation.run_id, waiting.invocation.invocation_id, why))

    async def _append(self, run: str, identity: str, why: str) -> None:
        held = Held(run_id=run, invocation_id=identity, site=self._site, at=self._clock(), why=why)
        try:
            await self._log.append([Record(held_subject(run, identity, self._site), encode(held))])
        except HeadraceError as error:
            _log.warning("why job %s waits is not told: %s", identity, error)
