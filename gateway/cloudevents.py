"""CloudEvents 1.0 over HTTP: binary, structured and batch mode; the content type says which.

Read strictly, because a mended event is another event: a made-up id would turn every repeat into a run of its own.
Data is checked for what its content type says and handed on as the bytes that came; nothing is opened.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec

from gateway.media import check_json, parse_media, read_payload
from gateway.media import digest_of as body_digest_of
from gateway.problems import Unreadable
from headrace.clock import parse_deadline, parse_instant
from headrace.errors import BadRequest, TooLarge
from headrace.wire import BYTES, JSON, NOTHING, EventMeta, Payload

STRUCTURED = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"
FAMILY = "application/cloudevents"

ATTRIBUTE_CHARS_MAX = 1024
EXTENSION_CHARS_MAX = 4096
EXTENSIONS_MAX = 64
EXTENSIONS_CHARS_MAX = 32_768
INTEGER_MIN, INTEGER_MAX = -(2**31), 2**31 - 1

_REQUIRED = ("specversion", "id", "source", "type")
_CORE = frozenset({*_REQUIRED, "datacontenttype", "dataschema", "subject", "time"})
_DATA = frozenset({"data", "data_base64"})
_NAME = re.compile("[a-z0-9]+")
_BLANK = re.compile(r"\s")
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)
# What the type String of CloudEvents leaves out: control characters, lone surrogates, noncharacters.
_FORBIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
    + "]"
)

_read_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_read_list = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_read_value = msgspec.json.Decoder(str | bool | int | None).decode
_read_text = msgspec.json.Decoder(str | None).decode

T = TypeVar("T")


class Received(NamedTuple):
    """An event as it came in: its attributes, and its data as bytes with a content type."""

    event: EventMeta
    payload: Payload


def read_events(
    content_type: str | None, headers: Iterable[tuple[str, str]], body: bytes, *, events_max: int
) -> list[Received]:
    """Return the events of a request: one, or as many as a batch holds.

    Raises:
        BadRequest: an attribute is missing or not possible (the message names it), or the data is not what it says.
        Unreadable: the body is in an event format that is not read here.
        TooLarge: a batch holds more than ``events_max`` events.
    """
    media = parse_media(content_type) if content_type else None
    if media is None or not media.essence.startswith(FAMILY):
        return [_binary(content_type, headers, body)]
    if media.essence == STRUCTURED:
        return [_structured(_parse(body, _read_object, "a JSON object"), "")]
    if media.essence == BATCH:
        members = _parse(body, _read_list, "a JSON list of objects")
        if len(members) > events_max:
            raise TooLarge(
                f"the batch holds {len(members):,} events, the limit is {events_max}", hint="Send several batches."
            )
        return [_structured(member, f"event {number}: ") for number, member in enumerate(members)]
    raise Unreadable(
        f"the event format {ascii(media.essence)[:80]} is not read here",
        hint=f"Send {STRUCTURED}, {BATCH}, or binary mode with ce- headers.",
    )


def deadline_of(event: EventMeta, now: float) -> float | None:
    """Return the instant by which the event wants its answer: of ``deadline`` and ``expirytime`` the earlier one.

    Raises:
        BadRequest: one of them is not what it should be.
    """
    extensions = event.extensions
    if not extensions:
        return None
    found: list[float] = []
    deadline, expiry = extensions.get("deadline"), extensions.get("expirytime")
    if deadline is not None:
        found.append(parse_deadline(deadline, now))
    if expiry is not None:
        found.append(parse_instant(expiry, "expirytime"))
    return min(found, default=None)


def digest_of(event: EventMeta, payload: Payload) -> str:
    """Return what tells the bodies of two events apart: their data, and the reference to data kept elsewhere."""
    return body_digest_of(payload, str(event.extensions.get("dataref", "")))


# ---------------------------------------------------------------- binary mode


def _binary(content_type: str | None, headers: Iterable[tuple[str, str]], body: bytes) -> Received:
    attributes: dict[str, Any] = {}
    for header, value in headers:
        if header[:3].lower() != "ce-":
            continue
        name = header[3:].lower()
        if name in attributes:
            raise BadRequest(f"the header ce-{ascii(name)[1:-1]} is there twice", hint="Send each attribute once.")
        attributes[name] = _header_value(name, value)
    if not attributes:
        raise BadRequest(
            "this is not a CloudEvent: there are no ce- headers and no CloudEvents content type",
            hint=f"Send ce-id, ce-source, ce-type and ce-specversion, or a body of {STRUCTURED}; "
            "for a plain body use POST /v1/triggers/ROUTE.",
        )
    if "datacontenttype" in attributes:
        raise BadRequest("the header ce-datacontenttype is not allowed", hint="Send Content-Type instead.")
    return Received(_meta(attributes, ""), read_payload(content_type, body))


def _header_value(name: str, value: str) -> str:
    """Undo what the HTTP binding does to a value (3.1.3.2): quotes first, then percent encoding, once."""
    value = value.strip(" \t")
    if len(value) >= 2 and value[0] == value[-1] == '"':
        value = _QUOTED_PAIR.sub(r"\1", value[1:-1])
    if "%" not in value:
        return value
    try:
        return unquote_to_bytes(value).decode()
    except UnicodeError as error:
        raise BadRequest(
            f"the header ce-{ascii(name)[1:-1]} is not UTF-8 in percent encoding", hint="Encode it as UTF-8."
        ) from error


# ---------------------------------------------------------------- structured and batch mode


def _parse(body: bytes, read: Callable[[bytes], T], what: str) -> T:
    try:
        value = read(body)
        str(body, "utf-8")  # the decoder skips data without looking at its encoding
    except (msgspec.MsgspecError, ValueError) as error:
        raise BadRequest(
            f"the body is not {what}: {error}", hint="Send the JSON event format of CloudEvents 1.0."
        ) from error
    except RecursionError as error:
        raise BadRequest("the body is not acceptable JSON: it is nested too deeply") from error
    return value


def _structured(members: dict[str, msgspec.Raw], where: str) -> Received:
    attributes: dict[str, Any] = {}
    for name, raw in members.items():
        if name in _DATA:
            continue
        try:
            value = _read_text(raw) if name in _CORE else _read_value(raw)
        except (msgspec.MsgspecError, ValueError) as error:
            wanted = "text" if name in _CORE else "text, a whole number, true or false"
            raise BadRequest(f"{where}the attribute {ascii(name)[:80]} is not {wanted}") from error
        if value is not None:
            attributes[name] = value
    content_type = attributes.pop("datacontenttype", None)
    return Received(_meta(attributes, where), _data(members, content_type, where))


def _data(members: dict[str, msgspec.Raw], content_type: str | None, where: str) -> Payload:
    media = None if content_type is None else parse_media(content_type, f"{where}datacontenttype")
    raw, coded = members.get("data"), members.get("data_base64")
    if raw is not None and bytes(raw) == b"null":
        raw = None
    if coded is not None and bytes(coded) == b"null":
        coded = None
    if raw is not None and coded is not None:
        raise BadRequest(f"{where}data and data_base64 exclude each other", hint="Send one of them.")
    if coded is not None:
        body = _unbase64(coded, where)
        if media is not None and media.is_json:
            check_json(body, f"{where}data_base64")
        return Payload(type=BYTES if media is None else media.full, body=body, size=len(body))
    if raw is None:
        return NOTHING
    if media is not None and not media.is_json:
        try:
            body = msgspec.json.decode(raw, type=str).encode()
        except (msgspec.MsgspecError, ValueError) as error:
            raise BadRequest(
                f"{where}data is not text, although datacontenttype is {media.essence}",
                hint="Send JSON data with datacontenttype application/json, bytes in data_base64.",
            ) from error
        return Payload(type=media.full, body=body, size=len(body))
    check_json(raw, f"{where}data")
    body = bytes(raw)
    return Payload(type=JSON if media is None else media.full, body=body, size=len(body))


def _unbase64(raw: msgspec.Raw, where: str) -> bytes:
    try:
        return b64decode(msgspec.json.decode(raw, type=str), validate=True)
    except (msgspec.MsgspecError, ValueError) as error:
        raise BadRequest(f"{where}data_base64 is not base64", hint="Encode the bytes as RFC 4648 says.") from error


# ---------------------------------------------------------------- attributes


def _meta(attributes: dict[str, Any], where: str) -> EventMeta:
    """Check the attributes of one event and return them; those that CloudEvents does not name are extensions."""
    for name in _REQUIRED:
        if not attributes.get(name):
            state = "empty" if name in attributes else "missing"
            raise BadRequest(
                f"{where}the attribute {name} is {state}",
                hint="CloudEvents 1.0 requires id, source, type, specversion.",
            )
    if attributes["specversion"] != "1.0":
        raise BadRequest(
            f"{where}specversion {ascii(attributes['specversion'])[:40]} is not read here",
            hint='Send specversion "1.0".',
        )
    extensions: dict[str, Any] = {}
    for name, value in attributes.items():
        if name in _CORE:
            _check_text(name, value, ATTRIBUTE_CHARS_MAX, where)
            if value == "":
                raise BadRequest(f"{where}the attribute {name} is empty", hint="Leave it out instead.")
        else:
            _check_extension(name, value, where)
            extensions[name] = value
    if len(extensions) > EXTENSIONS_MAX:
        raise TooLarge(f"{where}{len(extensions)} extension attributes, the limit is {EXTENSIONS_MAX}")
    if extensions and sum(len(v) for v in extensions.values() if isinstance(v, str)) > EXTENSIONS_CHARS_MAX:
        raise TooLarge(
            f"{where}the extension attributes hold more than {EXTENSIONS_CHARS_MAX:,} characters",
            hint="Put data into the data of the event.",
        )
    for name in ("source", "dataschema"):
        if _BLANK.search(attributes.get(name, "")):
            raise BadRequest(f"{where}the attribute {name} holds a blank", hint="Write a URI; encode a blank as %20.")
    moment = attributes.get("time")
    if moment is not None:
        parse_instant(moment, f"{where}time")
    return EventMeta(
        id=attributes["id"],
        source=attributes["source"],
        type=attributes["type"],
        subject=attributes.get("subject"),
        time=moment,
        dataschema=attributes.get("dataschema"),
        extensions=extensions,
    )


def _check_extension(name: str, value: object, where: str) -> None:
    if not _NAME.fullmatch(name) or name == "data":
        raise BadRequest(
            f"{where}{ascii(name)[:80]} cannot be the name of an attribute",
            hint="Names of attributes are lower-case letters a to z and digits.",
        )
    if isinstance(value, str):
        _check_text(name, value, EXTENSION_CHARS_MAX, where)
    elif isinstance(value, int) and not INTEGER_MIN <= value <= INTEGER_MAX:
        raise BadRequest(f"{where}the attribute {name} is not in the range of 32 bits", hint="Send it as text.")


def _check_text(name: str, value: str, chars_max: int, where: str) -> None:
    if len(value) > chars_max:
        raise BadRequest(f"{where}the attribute {name} has {len(value):,} characters, the limit is {chars_max}")
    if _FORBIDDEN.search(value):
        raise BadRequest(
            f"{where}the attribute {name} holds a control character", hint="Send text without control characters."
        )
