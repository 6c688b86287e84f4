"""How many invocations one run may come to: counted in the log, and only where there is a doubt."""

from __future__ import annotations

from collections import Counter
from types import TracebackType

from functions.runaway import check_count, worth_counting
from headrace.wire import Invocation
from streams.log import Log
from streams.topology import work_subject


class Bound:
    """Lets a run start more as long as it stays within ``invocations_max``.

    What this worker is about to append counts as well, so at most one unit of each other worker can come on top.
    """

    def __init__(self, log: Log, invocations_max: int) -> None:
        self._log = log
        self._invocations_max = invocations_max
        self._starting: Counter[str] = Counter()  # by run, what was let through and may not be in the log yet

    def hold(self, invocation: Invocation, starting: int) -> _Held:
        """Return what to be within (``async with``) while the invocation appends so many others of its run.

        To enter it raises UserError when the run would become too large, and Unavailable when the log does not answer.
        """
        return _Held(self, invocation, starting)

    async def reserve(self, invocation: Invocation, starting: int) -> bool:
        """Count what this one starts, and say whether it had to be: if so, ``release`` takes it back.

        Raises:
            UserError: the run would become too large.
            Unavailable: the log does not answer.
        """
        if not worth_counting(invocation, starting, self._invocations_max):
            return False
        run = invocation.run_id
        count = await self._log.count(work_subject("*", "*", run, "*"))
        check_count(count + self._starting[run], starting, self._invocations_max)
        self._starting[run] += starting
        return True

    def release(self, run: str, starting: int) -> None:
        """Forget what is in the log by now, or never will be."""
        self._starting[run] -= starting
        if not self._starting[run]:
            del self._starting[run]


class _Held:
    __slots__ = ("_bound", "_counted", "_invocation", "_starting")

    def __init__(self, bound: Bound, invocation: Invocation, starting: int) -> None:
        self._bound = bound
        self._invocation = invocation
        self._starting = starting
        self._counted = False

    async def __aenter__(self) -> None:
        self._counted = await self._bound.reserve(self._invocation, self._starting)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._counted:
            self._bound.release(self._invocation.run_id, self._starting)
