"""How many outcomes a run comes to, learned from sums."""

from __future__ import annotations

import random

import pytest

from functions.sizes import Sizes


def test_one_route_is_known_after_one_rest() -> None:
    sizes = Sizes()
    sizes.accept("chain", 10)
    assert sizes.expected(unknown=2.0) == 20.0
    sizes.rest(ended=40)
    sizes.accept("chain", 3)
    assert sizes.expected(unknown=2.0) == 12.0


def test_routes_that_run_together_are_told_apart_in_time() -> None:
    true = {"plain": 1, "chain": 4, "map": 102}
    rng, sizes = random.Random(1), Sizes()
    for _ in range(300):
        counts = {route: rng.randrange(1, 30) for route in true}
        for route, runs in counts.items():
            sizes.accept(route, runs)
        sizes.rest(sum(true[route] * runs for route, runs in counts.items()))
    for route, size in true.items():
        sizes.forget()
        sizes.accept(route)
        assert sizes.expected(unknown=0.0) == pytest.approx(size, rel=0.05, abs=0.5)


def test_no_run_is_smaller_than_one_outcome() -> None:
    sizes = Sizes()
    sizes.accept("r", 5)
    sizes.rest(ended=0)
    sizes.accept("r")
    assert sizes.expected(unknown=9.0) == 1.0
