"""How a scientist declares functions and routes: ``@function`` and ``@on``.

Both leave the function as it is, so that it can still be called and tested like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, overload

from msgspec import structs

from headrace.clock import parse_duration
from headrace.errors import BadRequest
from headrace.model import Admission, EventFilter, FunctionOptions, OnLate, Revision, Route
from headrace.names import check_name
from headrace.revision import check_newest_wins, revision_of

F = TypeVar("F", bound=Callable[..., Any])

RETRIES_MAX = 100
VARIANTS_MAX = 8
_MARK = "__headrace__"


@dataclass
class Declaration:
    """What was said of a function: its name and options, and the routes that lead to it by route name."""

    name: str
    options: FunctionOptions | None = None
    routes: dict[str, Route] = field(default_factory=dict)


def _declare(fn: Callable[..., Any]) -> Declaration:
    found = getattr(fn, _MARK, None)
    if isinstance(found, Declaration):
        return found
    made = Declaration(name=fn.__name__)
    try:
        setattr(fn, _MARK, made)
    except AttributeError as error:
        raise BadRequest(f"{fn!r} cannot be declared", hint="Decorate a plain function defined with def.") from error
    return made


def declaration(fn: object) -> Declaration | None:
    """Return what was declared of ``fn``, or None where nothing was."""
    found = getattr(fn, _MARK, None)
    return found if isinstance(found, Declaration) else None


def function_name(fn: str | Callable[..., Any]) -> str:
    """Return the registered name that is meant by a function or its name.

    Raises:
        BadName: the name does not follow the rule for names.
    """
    if isinstance(fn, str):
        return check_name(fn, "function name")
    found = declaration(fn)
    return check_name(found.name if found else getattr(fn, "__name__", repr(fn)), "function name")


@overload
def function(fn: F, /) -> F: ...
@overload
def function(
    *,
    name: str | None = None,
    timeout: str = "60s",
    retries: int = 0,
    variants: Sequence[str | Callable[..., Any]] = (),
) -> Callable[[F], F]: ...


def function(
    fn: F | None = None,
    /,
    *,
    name: str | None = None,
    timeout: str = "60s",
    retries: int = 0,
    variants: Sequence[str | Callable[..., Any]] = (),
) -> F | Callable[[F], F]:
    """Declare a function that Headrace may run.

    Args:
        fn: the function, where the decorator is used without parentheses.
        name: its registered name; the name in the source if not given.
        timeout: the longest one attempt may take, such as "30s"; its process is stopped then.
        retries: how many more attempts follow a failed one.
        variants: functions that answer the same payload more cheaply, the best one first: what a route with
            ``on_late="degrade"`` takes where the time is short.

    Raises:
        BadRequest: an option cannot be what it was given as.
    """
    parse_duration(timeout, "timeout")
    if not isinstance(retries, int) or isinstance(retries, bool) or not 0 <= retries <= RETRIES_MAX:
        raise BadRequest(f"retries: {retries!r} is not possible", hint=f"Use a whole number from 0 to {RETRIES_MAX}.")
    ladder = variant_names(variants)

    def mark(target: F) -> F:
        made = _declare(target)
        if name is not None and name != made.name:
            if made.name in made.routes:  # @on below @function named its route after the function
                made.routes[name] = made.routes.pop(made.name)
            made.name = name
        check_name(made.name, "function name")
        check_variants(made.name, ladder)
        made.options = FunctionOptions(timeout=timeout, retries=retries, variants=ladder)
        made.routes = {k: structs.replace(r, function=made.name) for k, r in made.routes.items()}
        return target

    return mark if fn is None else mark(fn)


def variant_names(variants: Sequence[str | Callable[..., Any]]) -> list[str]:
    """Return the names of variants.

    Raises:
        BadRequest: they are not given as a list.
        BadName: one has a name that does not follow the rule for names.
    """
    if isinstance(variants, str) or not isinstance(variants, Sequence):
        raise BadRequest(f"variants: {variants!r} is no list", hint="Write variants=[reduced, surrogate].")
    return [function_name(each) for each in variants]


def check_variants(name: str, variants: Sequence[str]) -> None:
    """Check the variants of a function by their names alone.

    Raises:
        BadName: one does not follow the rule for names.
        BadRequest: there are too many, one comes twice, or the function is among them.
    """
    for each in variants:
        check_name(each, "variant")
    if len(variants) > VARIANTS_MAX:
        raise BadRequest(f"variants: {name} has {len(variants)}, the limit is {VARIANTS_MAX}", hint="Leave some out.")
    if name in variants or len(set(variants)) != len(variants):
        raise BadRequest(
            f"variants: {', '.join(variants)} are not all different from one another and from {name}",
            hint="Name each cheaper function once, the best one first.",
        )


def on(
    *bare: Callable[..., Any],
    type: str | None = None,  # noqa: A002 - the CloudEvents attribute is called so
    source: str | None = None,
    subject: str | None = None,
    name: str | None = None,
    deadline: str | None = None,
    on_late: OnLate = "continue",
    max_in_flight: int | None = None,
    revision: Revision | Mapping[str, Any] | None = None,
    admission: Admission = "always",
    newest_wins: bool = False,
) -> Callable[[F], F]:
    """Declare a route to the function below: which events start it, and by when its answer must be there.

    Each given attribute must be equal, or begin with what follows ``prefix:``. Without ``type``, ``source`` and
    ``subject`` the route is reached by its name only (``headrace trigger NAME``).

    Args:
        type: the event type to match.
        source: the event source to match.
        subject: the event subject to match.
        name: the route's name; the function's name if not given. Give one when a function has several routes.
        deadline: how long after acceptance the answer is due, such as "60s".
        on_late: what happens to a run that is late: it goes on, or is canceled. With "degrade" the best variant that
            can answer in time does, and what the full function finds later takes the place of that answer.
        max_in_flight: how many runs of this route may be open at once; more are refused with 429.
        revision: how an event tells that it replaces an earlier one or takes it back: ``{"preset": "lvk"}`` (or gcn,
            voevent), or ``{"key": "data.id", "kind": "data.kind", "retraction": ["withdrawn"], "order": "data.n"}``.
        admission: "strict" refuses an event whose answer is not expected by its deadline; without a forecast yet, and
            with "always", every event is taken.
        newest_wins: of events with the same source and subject (or without one) only the newest is worth running: one
            that still waits is dropped when a later one is accepted. What has begun goes on.

    Raises:
        BadRequest: something is not possible, or there are no parentheses, or ``revision`` and ``newest_wins`` are
            both given.
    """
    if bare:
        raise BadRequest("@on has no parentheses", hint='Write @on() or @on(deadline="10s").')
    revises = revision_of(revision)
    if deadline is not None:
        parse_duration(deadline, "deadline")
    if admission not in get_args(Admission):
        raise BadRequest(f"admission: {admission!r} is not possible", hint='Use "always" or "strict".')
    chosen = EventFilter(type=type, source=source, subject=subject) if type or source or subject else None
    rule = Route(
        function="",
        filter=chosen,
        deadline=deadline,
        on_late=on_late,
        max_in_flight=max_in_flight,
        revision=revises,
        admission=admission,
        newest_wins=newest_wins,
    )
    check_newest_wins(rule)

    def mark(target: F) -> F:
        made = _declare(target)
        route_name = check_name(name or made.name, "route name")
        if route_name in made.routes:
            raise BadRequest(
                f"the route {route_name} is declared twice on {made.name}", hint='Give each @on its own name="...".'
            )
        made.routes[route_name] = structs.replace(rule, function=made.name)
        if made.options is None:
            made.options = FunctionOptions()
        return target

    return mark
