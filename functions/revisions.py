"""Whether an event replaces an earlier one, or takes it back: read at the door, from where its route says it stands.

What cannot be read is refused there, with the path and the route in the message. A notice of a preset that names no
thing to revise, as some GCN notices do, starts an ordinary run. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from functions.voevent import Notice, read_notice
from headrace.clock import parse_instant
from headrace.errors import BadRequest, TooLarge
from headrace.media import is_json
from headrace.model import Revision
from headrace.names import thread_id
from headrace.wire import EventMeta, Payload, Place, Rank, RouteRecord
from streams.threads import PLAIN, REPLACES, RETRACTS

KEY_CHARS_MAX = 256
PLACES_MAX = 32

_LVK = Revision(key="data.superevent_id", kind="data.alert_type", retraction=["RETRACTION"], order="data.time_created")

_read_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_read_any = msgspec.json.Decoder().decode


class Standing(NamedTuple):
    """The places of an event in the threads of its route, and whether it only takes back what stands there."""

    places: list[Place]
    retraction: bool


ORDINARY = Standing([], False)


def standing(route: RouteRecord, event: EventMeta, payload: Payload) -> Standing:
    """Return where an event stands among the revisions of a route.

    Args:
        route: says where the key, the kind and the order are.
        event: its attributes.
        payload: its data, inline.

    Raises:
        BadRequest: something that the route needs is not there or not possible; the message names it and the route.
    """
    revision = route.route.revision
    if revision is None:
        return ORDINARY
    source = _Source(route.name, event, payload)
    if revision.preset == "voevent":
        found = _voevent(source, event, payload)
    elif revision.preset == "gcn":
        found = _gcn(source)
    else:
        found = _paths(source, _LVK if revision.preset == "lvk" else revision)
    if len(found) > PLACES_MAX:
        raise TooLarge(
            f"the event {ascii(event.id)[:80]} names {len(found)} things to revise on the route {route.name}, "
            f"the limit is {PLACES_MAX}"
        )
    places = [
        Place(thread=thread_id(route.tenant, route.name, event.source, key), key=key, rank=rank) for key, rank in found
    ]
    return Standing(places, any(place.rank[0] == RETRACTS for place in places))


class _Source:
    """Looks things up in one event, and says what is wrong with them."""

    def __init__(self, route: str, event: EventMeta, payload: Payload) -> None:
        self.route = route
        self.event = event
        self._payload = payload
        self._objects: dict[str, dict[str, msgspec.Raw]] = {}

    def text(self, path: str) -> str | None:
        """Return a text, or a whole number as text; None where there is nothing."""
        value = self._at(path)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is None:
            return None
        if not isinstance(value, str) or value == "" or len(value) > KEY_CHARS_MAX:
            raise self.bad(path, f"is no text of 1 to {KEY_CHARS_MAX} characters")
        return value

    def texts(self, path: str) -> list[str]:
        """Return a text, or each text of a list, once."""
        value = self._at(path)
        if value is None:
            return []
        found = value if isinstance(value, list) else [value]
        if not found or not all(isinstance(each, str) and 0 < len(each) <= KEY_CHARS_MAX for each in found):
            raise self.bad(path, f"is neither a text of 1 to {KEY_CHARS_MAX} characters nor a list of them")
        return list(dict.fromkeys(found))

    def order(self, path: str) -> float | None:
        """Return a number, or an instant as seconds; one without a time zone is meant as UTC."""
        value = self._at(path)
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                pass
        elif isinstance(value, str):
            try:
                return utc(value)
            except BadRequest:
                pass
        raise self.bad(path, "is neither a number nor an RFC 3339 instant")

    def instant(self) -> float:
        """Return the event's own time in epoch seconds, 0 where it has none."""
        return 0.0 if self.event.time is None else parse_instant(self.event.time)

    def bad(self, path: str, what: str) -> BadRequest:
        return BadRequest(
            f"{path} of the event {ascii(self.event.id)[:80]} {what}, and the route {self.route} tells revisions by it",
            hint="Mend the event, or the revision of the route (GET /v1/routes/" + self.route + ").",
        )

    def _at(self, path: str) -> Any:
        name, *steps = path.split(".")
        if name != "data":
            known = {"id", "source", "type", "subject", "time"}
            return getattr(self.event, name) if name in known else self.event.extensions.get(name)
        if not is_json(self._payload.type):
            raise self.bad(path, f"is not to be found in data of the type {ascii(self._payload.type)[:80]}")
        raw: bytes | msgspec.Raw = self._payload.body
        for depth, step in enumerate(steps):
            where = ".".join(steps[:depth])
            if where not in self._objects:
                try:
                    self._objects[where] = _read_object(raw)
                except msgspec.MsgspecError:
                    return None  # not an object: there is nothing of that name in it
            found = self._objects[where].get(step)
            if found is None:
                return None
            raw = found
        return _read_any(raw)


def utc(text: str) -> float:
    """Return the seconds since 1970 of an instant; the notices that leave out the time zone mean UTC.

    Raises:
        BadRequest: it is no instant.
    """
    try:
        return parse_instant(text)
    except BadRequest:
        return parse_instant(text.strip() + "Z")


def _paths(source: _Source, told: Revision) -> list[tuple[str, Rank]]:
    """Follow the paths that a route names."""
    assert told.key is not None  # noqa: S101 - checked when the route was registered
    key = source.text(told.key)
    if key is None:
        raise source.bad(told.key, "is missing")
    kind = None if told.kind is None else source.text(told.kind)
    level = RETRACTS if kind is not None and kind in told.retraction else PLAIN
    order = None if told.order is None else source.order(told.order)
    if level != RETRACTS:  # a retraction counts whatever its order
        if told.order is not None and order is None:
            raise source.bad(told.order, "is missing")
        if told.order is None and source.event.time is None:
            raise source.bad("time", "is missing (or give the revision an order)")
    return [(key, (level, order or 0.0, source.instant(), source.event.id))]


def _gcn(source: _Source) -> list[tuple[str, Rank]]:
    """Read a notice of GCN's core schema: ``id`` names the thing, ``record_number`` counts its notices.

    A ``subsequent`` alert is a new detection of a known source, so it replaces nothing. Tests and injections have
    threads of their own.
    """
    kind = (source.text("data.alert_type") or "").lower()
    ids = source.texts("data.id")
    if kind == "subsequent":
        return []
    if not ids:
        if kind:
            raise source.bad("data.id", "is missing")
        return []
    number, at = source.order("data.record_number"), source.order("data.alert_datetime")
    if kind == "update" and number is None and at is None and source.event.time is None:
        raise source.bad("data.record_number", "is missing, like data.alert_datetime and time,")
    level = RETRACTS if kind == "retraction" else PLAIN
    rank = (level, number or 0.0, source.instant() if at is None else at, source.event.id)
    sender = "/".join(source.text(f"data.{name}") or "" for name in ("mission", "instrument"))
    tense = (source.text("data.alert_tense") or "").lower()
    exercise = f" ({tense})" if tense in ("test", "injection") else ""  # it must not touch what is real
    return [(f"{sender}/{each}{exercise}", rank) for each in ids]


def _voevent(source: _Source, event: EventMeta, payload: Payload) -> list[tuple[str, Rank]]:
    """Read a VOEvent: it stands at its own IVORN, and above what its ``Citations`` supersede or retract."""
    notice: Notice = read_notice(payload.body, source.route)
    at = source.instant() if notice.date is None else _date(source, notice.date)
    found = {notice.ivorn: PLAIN}
    for ivorn, level in _cited(notice):
        if ivorn != notice.ivorn:
            found[ivorn] = max(level, found.get(ivorn, PLAIN))
    exercise = " (test)" if notice.role == "test" else ""  # it must not touch what is real
    return [(ivorn + exercise, (level, 0.0, at, event.id)) for ivorn, level in found.items()]


def _cited(notice: Notice) -> Iterable[tuple[str, int]]:
    levels = {"supersedes": REPLACES, "retraction": RETRACTS}
    return [(ivorn, levels[cite]) for ivorn, cite in notice.citations if cite in levels]


def _date(source: _Source, text: str) -> float:
    try:
        return utc(text)
    except BadRequest as error:
        raise source.bad("Who/Date", f"({ascii(text)[:40]}) is not an instant") from error
