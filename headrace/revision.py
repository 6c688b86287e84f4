"""What a route may say of revisions: checked once, where a route is declared and where it is registered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from headrace.errors import BadRequest
from headrace.model import Revision, Route

PATH_CHARS_MAX = 256
RETRACTIONS_MAX = 32
_ATTRIBUTE = re.compile("[a-z0-9]{1,64}")
_DATA = re.compile(r"data(\.[A-Za-z0-9_$@:-]{1,64}){1,16}")
_EXAMPLE = 'Write an attribute such as "subject", or a place in the data such as "data.superevent_id".'


def revision_of(told: Revision | Mapping[str, Any] | None) -> Revision | None:
    """Return what was told of revisions as a type, checked.

    Raises:
        BadRequest: it is not possible; the message names the field.
    """
    if told is None or isinstance(told, Revision):
        found = told
    else:
        try:
            found = msgspec.convert(dict(told), Revision)
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            raise BadRequest(
                f"revision: {error}", hint=f"Its fields: {', '.join(Revision.__struct_fields__)}."
            ) from error
    if found is not None:
        check_revision(found)
    return found


def check_revision(revision: Revision) -> None:
    """Check that it is a preset or a set of paths that can be followed.

    Raises:
        BadRequest: it is not; the message names the field.
    """
    told = [name for name in ("key", "kind", "retraction", "order") if getattr(revision, name)]
    if revision.preset is not None:
        if told:
            raise BadRequest(
                f"revision: the preset {revision.preset} says itself what {told[0]} is",
                hint="Give a preset alone, or key, kind, retraction and order without one.",
            )
        return
    if revision.key is None:
        raise BadRequest("revision: there is neither a preset nor a key", hint=_EXAMPLE)
    for name in ("key", "kind", "order"):
        path = getattr(revision, name)
        if path is not None and not _is_path(path):
            raise BadRequest(f"revision: {name}: {ascii(path)[:80]} is not a path", hint=_EXAMPLE)
    if bool(revision.kind) != bool(revision.retraction):
        raise BadRequest(
            "revision: kind and retraction belong together",
            hint='Say where the kind stands and which kinds retract, as in "retraction": ["RETRACTION"].',
        )
    if len(revision.retraction) > RETRACTIONS_MAX or "" in revision.retraction:
        raise BadRequest(f"revision: retraction holds an empty text, or more than {RETRACTIONS_MAX}")


def check_newest_wins(route: Route) -> None:
    """Check that a route says in one way only which event takes the place of which.

    Raises:
        BadRequest: it has both ``revision`` and ``newest_wins``.
    """
    if route.newest_wins and route.revision is not None:
        raise BadRequest(
            "newest_wins and revision exclude each other: both say which event takes the place of another",
            hint="Use newest_wins where only the last event counts and its predecessors may be dropped while they "
            "wait, revision where an event corrects or retracts an earlier one, also one that was answered.",
        )


def _is_path(path: str) -> bool:
    if len(path) > PATH_CHARS_MAX:
        return False
    return bool(_DATA.fullmatch(path)) or (path != "data" and bool(_ATTRIBUTE.fullmatch(path)))
