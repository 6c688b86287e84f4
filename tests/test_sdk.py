"""What users import, and what their decorators declare."""

from __future__ import annotations

import subprocess
import sys

import pytest

import headrace
from headrace import Event, Route, function, on
from headrace.errors import BadName, BadRequest
from headrace.filters import takes
from headrace.model import EventFilter, FunctionOptions
from headrace.sdk import declaration, function_name

PUBLIC = [
    "AsyncClient",
    "AsyncRun",
    "Client",
    "Context",
    "Event",
    "Executor",
    "HeadraceError",
    "JobAttributes",
    "JobEnd",
    "JobSpec",
    "JobTime",
    "Resources",
    "Route",
    "Run",
    "errors",
    "function",
    "on",
]


def test_the_public_names_are_these_and_all_are_there() -> None:
    assert headrace.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(headrace, name) is not None
        assert name in dir(headrace)
    assert headrace.__version__


def test_a_name_that_is_not_public_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="no attribute 'JobArray'"):
        _ = headrace.JobArray
    assert not hasattr(headrace, "anything")


def test_declaring_functions_loads_nothing_that_talks_to_a_platform_or_opens_pickles() -> None:
    script = """if True:
        import sys
        from headrace import Context, Event, function, on
        heavy = {"aiohttp", "cloudpickle", "rich", "cyclopts", "asyncio", "numpy"} & set(sys.modules)
        assert not heavy, heavy
        assert not {"functions", "workers", "streams", "gateway", "infra"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# ---------------------------------------------------------------- declarations


def test_a_declared_function_is_still_the_function() -> None:
    @function(timeout="5s", retries=2)
    def double(x: int) -> int:
        return 2 * x

    assert double(4) == 8
    declared = declaration(double)
    assert declared is not None
    assert declared.name == "double"
    assert declared.options == FunctionOptions(timeout="5s", retries=2)
    assert function_name(double) == "double"


def test_a_route_is_named_after_its_function_and_leads_to_it() -> None:
    @on(type="org.example.stop", source="prefix:/beam", deadline="60s", on_late="cancel", max_in_flight=3)
    @function
    def stopped(event: Event) -> None:
        pass

    declared = declaration(stopped)
    assert declared is not None
    rule = EventFilter(type="org.example.stop", source="prefix:/beam")
    assert declared.routes == {
        "stopped": Route(function="stopped", filter=rule, deadline="60s", on_late="cancel", max_in_flight=3)
    }


def test_a_name_given_above_or_below_a_route_is_the_name_of_both() -> None:
    @function(name="renamed")
    @on(deadline="5s")
    def above(x: int) -> None:
        pass

    @on(deadline="5s")
    @function(name="renamed")
    def below(x: int) -> None:
        pass

    for fn in (above, below):
        declared = declaration(fn)
        assert declared is not None
        assert declared.name == "renamed"
        assert {name: route.function for name, route in declared.routes.items()} == {"renamed": "renamed"}


def test_a_function_may_have_several_routes_under_names_of_their_own() -> None:
    @on(type="a", name="first")
    @on(type="b", name="second")
    def both(x: int) -> None:
        pass

    declared = declaration(both)
    assert declared is not None
    assert sorted(declared.routes) == ["first", "second"]
    with pytest.raises(BadRequest, match="declared twice"):
        on(name="first")(both)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"timeout": "soon"}, "'soon' is not a duration"),
        ({"timeout": "0s"}, "is not a duration"),
        ({"timeout": "9999h"}, "'9999h' is longer than 366 days"),
        ({"retries": -1}, "retries: -1"),
        ({"retries": True}, "retries: True"),
        ({"name": "not a name"}, "is not a valid function name"),
    ],
)
def test_an_impossible_option_is_refused_where_it_is_written(options: dict[str, object], says: str) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        function(**options)(lambda x: x)  # type: ignore[call-overload] # wrong on purpose
    assert caught.value.hint


def test_a_route_without_parentheses_says_how_to_write_it() -> None:
    with pytest.raises(BadRequest, match="no parentheses") as caught:
        on(lambda x: x)
    assert "@on()" in caught.value.hint


def test_a_lambda_needs_a_name() -> None:
    with pytest.raises(BadName):
        function_name(lambda x: x)
    named = function(name="named")(lambda x: x)
    assert function_name(named) == "named"


@pytest.mark.parametrize(
    ("rule", "taken"),
    [
        (EventFilter(type="org.example.stop"), True),
        (EventFilter(type="org.example"), False),
        (EventFilter(type="prefix:org.example"), True),
        (EventFilter(type="prefix:org.example", source="/other"), False),
        (EventFilter(subject="anything"), False),
        (EventFilter(subject="prefix:"), False),
        (EventFilter(), True),
    ],
)
def test_a_filter_takes_what_is_equal_or_begins_with_its_prefix(rule: EventFilter, taken: bool) -> None:
    event = Event(id="1", source="/beamline", type="org.example.stop")
    assert takes(rule, event) is taken


def test_a_route_declares_who_is_let_in_and_that_only_the_newest_counts() -> None:
    @on(type="org.test.frame", admission="strict", newest_wins=True)
    def steer(frame: int) -> None: ...

    made = declaration(steer)
    assert made is not None
    route = made.routes["steer"]
    assert (route.admission, route.newest_wins) == ("strict", True)
    plain = Route(function="f")
    assert (plain.admission, plain.newest_wins) == ("always", False)
