"""How many outcomes a run comes to, learned from sums."""

from __future__ import annotations

from functions.sizes import Sizes


def test_one_route_is_known_after_one_rest() -> None:
    sizes = Sizes()
    sizes.accept("chain", 10)
    assert sizes.expected(unknown=2.0) == 20.0
    sizes.rest(ended=40)
    sizes.accept("chain", 3)
    assert sizes.expected(unknown=2.0) == 12.0


def test_a_run_beside_a_large_map_is_not_taken_for_a_large_one() -> None:
    sizes = Sizes()
    sizes.accept("plain", 100)
    sizes.rest(ended=100)
    sizes.accept("plain", 50)
    sizes.accept("map")
    sizes.rest(ended=10_052)
    sizes.accept("plain", 10)
    assert sizes.expected(unknown=2.0) == 10.0
    sizes.accept("map")
    assert sizes.expected(unknown=2.0) == 12.0


def test_no_run_is_smaller_than_one_outcome() -> None:
    sizes = Sizes()
    sizes.accept("r", 5)
    sizes.rest(ended=0)
    sizes.accept("r")
    assert sizes.expected(unknown=9.0) == 1.0
