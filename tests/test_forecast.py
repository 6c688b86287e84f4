from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.forecast import (
    FEW,
    WINDOW,
    Forecast,
    Forecasts,
    History,
    Kind,
    forecast,
    left_s,
    mean_s,
    merged,
    size_class,
)

DURATIONS = st.lists(st.floats(min_value=1e-3, max_value=1e5), min_size=1, max_size=300)
KIND = Kind("analyse", "1", "site-a", 12)


def learned(seconds: list[float], *, begin: float = 0.0) -> History:
    history = History()
    for place, one in enumerate(seconds):
        history.learn(one, begin + place)
    return history


def known(history: History) -> Forecast:
    found = forecast(history)
    assert found is not None
    return found


def test_without_history_nothing_is_stated() -> None:
    assert forecast(History()) is None
    assert Forecasts().of(KIND) is None


@given(DURATIONS)
def test_quantiles_are_in_order_and_all_observations_count(seconds: list[float]) -> None:
    found = known(learned(seconds))
    assert 0.0 < found.p50_s <= found.p90_s <= found.p99_s
    assert found.observations == len(seconds)
    assert found.p50_s <= max(found.p50_s, found.mean_s) <= max(found.p90_s, found.p50_s)


@given(DURATIONS)
def test_a_history_that_was_stored_is_the_one_that_the_log_rebuilds(seconds: list[float]) -> None:
    half = len(seconds) // 2
    stored = msgspec.msgpack.decode(msgspec.msgpack.encode(learned(seconds[:half])), type=History)
    for place, one in enumerate(seconds[half:], start=half):
        stored.learn(one, float(place))
    assert stored == learned(seconds)
    assert len(stored.seconds) == min(WINDOW, len(seconds))


@given(DURATIONS, DURATIONS)
def test_merging_does_not_depend_on_who_comes_first(one: list[float], other: list[float]) -> None:
    left, right = learned(one), learned(other, begin=0.5)
    both, same = merged(left, right), merged(right, left)
    assert (both.seconds, both.at, both.observed) == (same.seconds, same.at, same.observed)
    assert both.rank == pytest.approx(same.rank)
    assert both.observed == len(one) + len(other)


def test_ninety_percent_is_what_p90_covers() -> None:
    rng = random.Random(1)
    history = History()
    held = stated = 0
    for place in range(3000):
        seconds = rng.lognormvariate(1.0, 1.0)
        if len(history.seconds) >= FEW:
            stated += 1
            held += seconds <= known(history).p90_s
        history.learn(seconds, float(place))
    assert 0.87 <= held / stated <= 0.93


def test_p90_covers_too_while_durations_grow() -> None:
    rng = random.Random(2)
    history = History()
    held = 0
    for place in range(2000):
        seconds = rng.lognormvariate(place / 400.0, 0.5)
        held += place >= 100 and seconds <= known(history).p90_s
        history.learn(seconds, float(place))
    assert 0.87 <= held / 1900 <= 0.93


def test_yesterdays_storm_fades_after_a_few_durations_of_today() -> None:
    history = learned([1.0] * 200 + [10.0] * WINDOW)
    assert known(history).p50_s == 10.0
    for place in range(15):
        history.learn(1.0, 86_400.0 + place)
    assert known(history).p50_s == 1.0
    assert known(history).p90_s < 10.0


def test_half_of_what_ends_once_a_day_takes_no_longer_than_p50() -> None:
    rng = random.Random(6)
    history, held = learned([1.0] * FEW), 0
    for day in range(1, 501):
        seconds = rng.lognormvariate(0.0, 1.0)
        held += seconds <= known(history).p50_s
        history.learn(seconds, day * 86_400.0)
    assert 0.44 <= held / 500 <= 0.56


def test_work_that_is_stopped_keeps_a_slot_no_longer_than_that_on_average() -> None:
    rng = random.Random(5)
    drawn = [rng.lognormvariate(0.0, 1.0) for _ in range(50_000)]
    p90_s = math.exp(1.2816)
    for limit_s in (0.2, 1.0, 5.0):
        mean = sum(min(one, limit_s) for one in drawn) / len(drawn)
        assert mean_s(1.0, p90_s, limit_s) == pytest.approx(mean, rel=0.02)
    assert mean_s(1.0, p90_s, 1e9) == pytest.approx(mean_s(1.0, p90_s))
    assert (mean_s(2.0, 2.0, 1.5), mean_s(2.0, 3.0, -1.0)) == (1.5, 0.0)


def test_a_single_duration_already_gives_a_forecast_with_room() -> None:
    found = known(learned([4.0]))
    assert found.p50_s == pytest.approx(4.0)
    assert found.p90_s > 5.0


def test_work_hardly_seen_is_forecast_from_its_kin() -> None:
    forecasts = Forecasts()
    for place in range(20):
        forecasts.learn(Kind("analyse", "1", "site-a", 12), 2.0, float(place))
    other_size = forecasts.of(Kind("analyse", "1", "site-a", 20))
    other_version = forecasts.of(Kind("analyse", "2", "site-b", 12))
    assert other_size is not None
    assert other_version is not None
    assert other_size.p50_s == other_version.p50_s == 2.0
    assert forecasts.of(Kind("other")) is None


def test_its_own_history_counts_from_the_third_duration_on() -> None:
    forecasts = Forecasts()
    for place in range(50):
        forecasts.learn(Kind("analyse", size=5), 1.0, float(place))
    large = Kind("analyse", size=9)
    for place in range(3):
        forecasts.learn(large, 60.0, 50.0 + place)
    found = forecasts.of(large)
    assert found is not None
    assert found.p50_s == pytest.approx(60.0)


def test_what_still_runs_is_expected_to_take_longer_the_longer_it_took() -> None:
    assert left_s(2.0, 8.0, 0.0) == mean_s(2.0, 8.0)
    assert left_s(2.0, 8.0, 3.0) == 5.0
    assert left_s(2.0, 8.0, 20.0) == 10.0
    assert all(left_s(2.0, 8.0, elapsed / 10.0) >= 0.0 for elapsed in range(200))


def test_sizes_fall_into_powers_of_two() -> None:
    assert [size_class(count) for count in (0, 1, 2, 3, 4, 1024)] == [0, 1, 2, 2, 3, 11]
