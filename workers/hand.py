"""What a worker holds, as its order sees it: deliveries by their work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from functions.busy import Busy
from functions.order import Work
from functions.policies import Waiting, work_of
from streams.intake import Delivery
from workers.durations import Durations


class WorkerHand:
    """The deliveries in the hand of a worker, in the order of ``waiting``."""

    def __init__(self, waiting: Waiting, durations: Durations, busy: Busy, clock: Callable[[], float]) -> None:
        """Begin with nothing.

        Args:
            waiting: the order; it must be empty.
            durations: what is expected of work.
            busy: what runs.
            clock: epoch seconds.
        """
        self.waiting = waiting
        self._durations = durations
        self._busy = busy
        self._clock = clock
        self._deliveries: dict[str, Delivery] = {}
        self._guessed: dict[str, Delivery] = {}  # of whose duration nothing was known when they came
        self._news = 0

    def add(self, delivery: Delivery) -> Delivery | None:
        """Let it wait; return what need not be started as there is a newer one: another, or this one."""
        self._deliveries[delivery.identity] = delivery
        older = self._add(delivery)
        return None if older is None else self._pop(older)

    def _add(self, delivery: Delivery) -> Work | None:
        invocation = delivery.invocation
        expected = self._durations.of(invocation)
        delivery.run = expected.run
        if expected.run is None:
            self._guessed[delivery.identity] = delivery
        work = work_of(
            invocation, identity=delivery.identity, arrived=delivery.at, run=expected.run, path_s=expected.path_s
        )
        return self.waiting.add(work, self._clock())

    def _pop(self, work: Work) -> Delivery:
        self._guessed.pop(work.id, None)
        return self._deliveries.pop(work.id)

    def take(self) -> tuple[Delivery | None, Sequence[Delivery]]:
        """Return what to start on a slot that is free now, and what is not worth starting any more."""
        if self._guessed and self._news != self._durations.news:
            self._estimate_again()
        decision = self.waiting.take(self._clock(), self._busy)
        over = [self._pop(work) for work in decision.give_up] if decision.give_up else ()
        return (None if decision.start is None else self._pop(decision.start)), over

    def drop(self, delivery: Delivery) -> None:
        """Let go of it."""
        work = self.waiting.drop(delivery.identity)
        if work is not None:
            self._pop(work)

    def put_off(self, delivery: Delivery) -> bool:
        """Say whether it waits behind other work because it is not expected to make its deadline."""
        return self.waiting.put_off(delivery.identity)

    def _estimate_again(self) -> None:
        """Take what nothing was known of back in, where something has been learned since."""
        self._news = self._durations.news
        guessed, self._guessed = self._guessed, {}
        for delivery in guessed.values():
            if self._durations.of(delivery.invocation).run is None:
                self._guessed[delivery.identity] = delivery
            elif self.waiting.drop(delivery.identity) is not None:
                self._add(delivery)
