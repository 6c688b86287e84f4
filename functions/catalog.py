"""Registering functions: what is checked, and what a version is. Code is looked at as bytes, never opened."""

from __future__ import annotations

from collections.abc import Mapping

from functions.outlook import MEASURES, kind_names
from headrace.clock import format_instant, parse_duration
from headrace.errors import BadRequest, NotFound, TooLarge
from headrace.model import Code, DurationView, EventFilter, FunctionOptions, FunctionView, Route
from headrace.names import check_name, content_version
from headrace.revision import check_newest_wins, check_revision
from headrace.sdk import RETRIES_MAX, check_variants
from headrace.wire import ForecastRow, FunctionRecord, encode

CODE_BYTES_MAX = 4 * 1024 * 1024
DOC_CHARS_MAX = 20_000
TIMEOUT_S_MAX = 86400.0


def check_options(options: FunctionOptions) -> None:
    """Check what ``@function`` would have checked, for those who register over HTTP.

    Raises:
        BadRequest: an option cannot be what it was given as.
    """
    if parse_duration(options.timeout, "timeout") > TIMEOUT_S_MAX:
        raise BadRequest(f"timeout: {options.timeout} is more than a day", hint="Submit a job for work of days.")
    if not 0 <= options.retries <= RETRIES_MAX:
        raise BadRequest(f"retries: {options.retries} is not possible", hint=f"Use 0 to {RETRIES_MAX}.")


def check_ladder(name: str, options: FunctionOptions, others: Mapping[str, FunctionRecord]) -> None:
    """Check the variants of a function against what is registered: a ladder has rungs, and no ladder leans on another.

    Args:
        name: the function.
        options: its options.
        others: what is registered, by name.

    Raises:
        BadRequest: a variant cannot be one of this function.
        NotFound: a variant is not registered.
    """
    check_variants(name, options.variants)
    for each in options.variants:
        found = others.get(each)
        if found is None:
            raise NotFound(
                f"{name} names {each} as a variant, which is not registered",
                hint=f"Register {each} first; `headrace deploy` does so if it is in the same file.",
            )
        if found.options.variants:
            raise BadRequest(
                f"{name} names {each} as a variant, which has variants itself",
                hint=f"List all of them at {name}, the best one first.",
            )
    over = next((other.name for other in others.values() if name in other.options.variants), None)
    if options.variants and over is not None:
        raise BadRequest(
            f"{name} is a variant of {over}, so it cannot have variants itself",
            hint=f"List all of them at {over}, the best one first.",
        )


def version_of(code: Code, options: FunctionOptions) -> tuple[str, bytes]:
    """Return the version that follows from code and options, and the encoded code to keep.

    Raises:
        TooLarge: the code is larger than 4 MiB.
        BadRequest: there is nothing to run in it.
    """
    if (code.kind == "source" and not code.files) or (code.kind == "pickle" and not code.blob):
        raise BadRequest(f"the code of {code.name} is empty", hint="Register it with `headrace deploy FILE.py`.")
    content = encode(code)
    if len(content) > CODE_BYTES_MAX:
        raise TooLarge(
            f"the code of {code.name} has {len(content):,} bytes, the limit is {CODE_BYTES_MAX:,}",
            hint="Keep data out of the source: upload it and pass its URI.",
        )
    return content_version(content + encode(options)), content


def register(
    *, name: str, version: str, options: FunctionOptions, code_blob: str, doc: str, now: float, tenant: str
) -> FunctionRecord:
    """Return the record of a registered function.

    Raises:
        BadName: the name does not follow the rule for names.
        BadRequest: an option is not possible.
    """
    check_name(name, "function name")
    check_options(options)
    return FunctionRecord(
        name=name,
        version=version,
        options=options,
        code_blob=code_blob,
        registered_at=now,
        doc=doc[:DOC_CHARS_MAX],
        tenant=tenant,
    )


def view(record: FunctionRecord, source: str = "", learned: ForecastRow | None = None) -> FunctionView:
    """Return a function as the outside sees it; ``learned`` is what is expected of it."""
    return FunctionView(
        name=record.name,
        version=record.version,
        options=record.options,
        registered_at=format_instant(record.registered_at),
        doc=record.doc,
        source=source,
        expected={} if learned is None else _expected(record.version, learned),
    )


def _expected(version: str, learned: ForecastRow) -> dict[str, DurationView]:
    """Return what is expected whatever the size: of this version, else of the function."""
    found: dict[str, DurationView] = {}
    for measure in MEASURES:
        _, of_version, of_function = kind_names(measure, version, "", 0)
        known = learned.kinds.get(of_version) or learned.kinds.get(of_function)
        if known is not None:
            found[measure] = DurationView(
                p50_s=known.p50_s, p90_s=known.p90_s, p99_s=known.p99_s, observations=known.observations
            )
    return found


def check_route(name: str, route: Route, known: FunctionRecord | None, *, ladders: bool = True) -> None:
    """Check a route before it is kept; ``ladders`` says whether any function has variants.

    Raises:
        BadName: its name or its function's name does not follow the rule.
        BadRequest: its deadline is not a duration, its filter is empty, its revision says nothing that can be used, or
            it has both a revision and newest_wins; or it degrades and there are no variants.
        NotFound: its function is not registered.
    """
    check_name(name, "route name")
    check_name(route.function, "function name")
    if route.deadline is not None:
        parse_duration(route.deadline, "deadline")
    if route.filter is not None and route.filter == EventFilter():
        raise BadRequest(
            f"the filter of the route {name} is empty",
            hint='Give "type", "source" or "subject"; leave the filter out for a route reached by its name only.',
        )
    if route.max_in_flight is not None and route.max_in_flight < 1:
        raise BadRequest(f"max_in_flight: {route.max_in_flight} is not possible", hint="Use 1 or more.")
    if route.revision is not None:
        check_revision(route.revision)
    check_newest_wins(route)
    if route.on_late == "degrade" and not ladders:
        raise BadRequest(
            f'on_late "degrade": neither {route.function} nor any other function has variants',
            hint="Give the function that answers cheaper ones: @function(variants=[reduced, surrogate]).",
        )
    if known is None:
        raise NotFound(
            f"the route {name} leads to the function {route.function}, which is not registered",
            hint="Register the function first: `headrace deploy FILE.py`.",
        )
