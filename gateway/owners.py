"""Whose run a fact of the log belongs to. Only the subjects of work and of jobs name the tenant."""

from __future__ import annotations

from collections import OrderedDict

import msgspec
from msgspec import Struct

from functions.admission import guard_subject
from gateway.needs import Log
from headrace.wire import decode
from streams.stored import Stored
from streams.topology import kind_of, run_of

REMEMBERED_MAX = 100_000


class _Owned(Struct):
    """The one field of an outcome that is of interest here; all others are passed over."""

    tenant: str = ""


class Owners:
    """Remembers whose runs are whose, for all who follow the log in this process."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._known: OrderedDict[str, str] = OrderedDict()

    async def of(self, stored: Stored) -> str:
        """Return the tenant of the run that a fact is of; "" where the log does not tell (any more).

        Raises:
            Unavailable: the log does not answer.
        """
        kind = kind_of(stored.subject)
        if kind in ("work", "job"):
            tokens = stored.subject.split(".")
            return self._remember(tokens[4], tokens[3])
        run = run_of(stored.subject)
        known = self._known.get(run)
        if known is not None:
            return known
        tenant = _said(stored) if kind == "done" else ""
        if not tenant:
            first = await self._log.last(guard_subject("*", run))
            if first is None:
                return ""
            tenant = first.subject.split(".")[3]
        return self._remember(run, tenant)

    def _remember(self, run: str, tenant: str) -> str:
        self._known[run] = tenant
        if len(self._known) > REMEMBERED_MAX:
            self._known.popitem(last=False)
        return tenant


def _said(outcome: Stored) -> str:
    try:
        return decode(outcome.body, _Owned).tenant
    except msgspec.MsgspecError:
        return ""
