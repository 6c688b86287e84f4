"""How many outcomes a run of each route comes to: learned from what is only counted for all routes together.

Between two moments at which no work waits, all that was accepted has ended. A stretch in which a single route was used
tells the size of its runs; one in which several were used tells only a sum, and is passed over: to share it out by how
often each occurs would take a run beside one large map for a large one.
"""

from __future__ import annotations

ROUTES_KEPT_MAX = 10_000


class Sizes:
    """Counts what is accepted by route, and learns at moments of rest."""

    def __init__(self) -> None:
        self._sizes: dict[str, float] = {}
        self._accepted: dict[str, int] = {}
        self.accepted = 0

    def accept(self, route: str, runs: int = 1) -> None:
        """Count runs that were accepted."""
        self._accepted[route] = self._accepted.get(route, 0) + runs
        self.accepted += runs

    def rest(self, ended: int) -> None:
        """Learn that all accepted since the last rest has come to its end, with so many outcomes; begin anew."""
        if len(self._accepted) == 1:
            ((route, runs),) = self._accepted.items()
            self._sizes[route] = max(1.0, ended / runs)
        while len(self._sizes) > ROUTES_KEPT_MAX:
            del self._sizes[next(iter(self._sizes))]
        self.forget()

    def forget(self) -> None:
        """Begin anew without learning: the count of outcomes is another one."""
        self._accepted = {}
        self.accepted = 0

    def expected(self, unknown: float) -> float:
        """Return how many outcomes all that was accepted since the last rest comes to.

        Args:
            unknown: the size of runs of routes of which nothing was learned.
        """
        return sum(self._sizes.get(route, unknown) * runs for route, runs in self._accepted.items())
