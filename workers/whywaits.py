"""Why jobs wait at their agent: told to those who look at their runs, once a job could not be submitted twice."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from headrace.errors import HeadraceError
from headrace.joblog import Held
from headrace.wire import encode
from streams.log import HINT_KEEP_S, Log, Record
from streams.topology import held_subject
from workers.jobhand import Waiting

_log = logging.getLogger(__name__)

TOLD_KEPT_MAX = 10_000
WHY_MAX = 500
TELL_S = 60.0  # between two reasons of one kind, which differ in a number or so
TELL_AGAIN_S = HINT_KEEP_S / 2  # what is still so must not leave the log


class _Told(NamedTuple):
    kind: type[HeadraceError]
    why: str
    at: float


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
        self._told: OrderedDict[int, _Told] = OrderedDict()  # by the sequence of the job's message

    def tell(self, waiting: Waiting, error: HeadraceError) -> None:
        """Tell why a job is about to be handed back; not at its first try, nor what was told a moment ago."""
        now = _Told(type(error), str(error)[:WHY_MAX], self._clock())
        before = self._told.get(waiting.seq)
        if not waiting.tries or (before is not None and not _is_news(before, now)):
            return
        self._told[waiting.seq] = now
        while len(self._told) > TOLD_KEPT_MAX:
            self._told.popitem(last=False)
        self._spawn(self._append(waiting.invocation.run_id, waiting.invocation.invocation_id, now))

    async def _append(self, run: str, identity: str, told: _Told) -> None:
        held = Held(run_id=run, invocation_id=identity, site=self._site, at=told.at, why=told.why)
        try:
            await self._log.append([Record(held_subject(run, identity, self._site), encode(held), hint=True)])
        except HeadraceError as error:
            _log.warning("why job %s waits is not told: %s", identity, error)


def _is_news(before: _Told, now: _Told) -> bool:
    if now.kind is not before.kind:
        return True
    return now.at - before.at >= (TELL_AGAIN_S if now.why == before.why else TELL_S)
