"""What is expected of work that has not begun, from what was learned of such work: read without I/O, at any moment.

The rows are learned by the ledger from the log and kept in a table that every process has a copy of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

from functions.qos import due_of
from headrace.wire import Expected, ForecastRow

Measure = Literal["stage", "run", "answer", "rest", "wait"]
MEASURES: dict[Measure, str] = {
    "stage": "bringing data in, as a part of an attempt: of those that did so for more than some milliseconds",
    "run": "one attempt of an invocation that went well: how long it keeps a slot",
    "answer": "from the start of an invocation to the answer of its run",
    "rest": "from the end of an invocation to the answer of its run",
    "wait": "from acceptance to the start of the first invocation, where hardly anything else waited",
}
JOBS = "=jobs"  # the key of the row of batch jobs, by shape and site; the sign keeps it apart from every function
OWN_MIN = 3  # so many durations of its own, and work is no longer forecast from wider kinds


@lru_cache(maxsize=8192)
def kind_names(measure: Measure, version: str, site: str, size: int) -> tuple[str, str, str]:
    """Return the names of the kinds that work belongs to, from its own to the widest: the function itself."""
    return f"{measure}|{version}|{site}|{size}", f"{measure}|{version}|{site}|", f"{measure}|||"


class Outlook:
    """Looks up what is expected, by function; ``row`` returns what was learned of one."""

    def __init__(self, row: Callable[[str], ForecastRow | None]) -> None:
        self._row = row

    def due(self, deadline: float | None, function: str, version: str, size: int, now: float) -> float | None:
        """Return the instant by which an invocation should have ended, so that the answer is there in time.

        That is the deadline of its run less the time from its end to the answer; None without a deadline.

        Args:
            deadline: of its run.
            function: the key of its function's row, as in ``of``.
            version: the function's version.
            size: the size class of its payload.
            now: when it can start.
        """
        return None if deadline is None else due_of(deadline, self.of("rest", function, version, size=size), now)

    def of(self, measure: Measure, function: str, version: str, *, size: int = 0, site: str = "") -> Expected | None:
        """Return what is expected of work of this kind, else of its kin; None without any history.

        Args:
            measure: which duration.
            function: the key of the function's row (``streams.tables.row_key``).
            version: its version; another version tells something as long as this one has little history.
            size: the size class of its input (``functions.forecast.size_class``).
            site: where it runs; empty for this platform's own workers.
        """
        row = self._row(function)
        if row is None:
            return None
        first: Expected | None = None
        for name in kind_names(measure, version, site, size):
            found = row.kinds.get(name)
            if found is not None:
                if found.observations >= OWN_MIN:
                    return found
                first = first or found
        return first


NOTHING_KNOWN = Outlook(lambda function: None)
