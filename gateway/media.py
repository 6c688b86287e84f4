"""What a body claims to be, and whether it is that, as far as can be told without opening it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

import msgspec

from functions.admission import body_digest
from gateway.problems import Unreadable
from headrace.errors import BadRequest
from headrace.wire import BYTES, JSON, NOTHING, Payload
from streams.topology import INLINE_BYTES_MAX

MEDIA_CHARS_MAX = 256
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - the `token` of RFC 9110, nothing secret
_MEDIA = re.compile(rf"({_TOKEN}/{_TOKEN})[ \t]*(?:;[ \t]*[\x20-\x7e\x80-\uffff]*)?")
_CHARSET = re.compile(rf""";\s*charset\s*=\s*"?({_TOKEN})"?""", re.IGNORECASE)

_any = msgspec.json.Decoder()
_raw = msgspec.json.Decoder(msgspec.Raw)


class Media(NamedTuple):
    """A content type: ``essence`` in lower case without parameters, and the value to hand on with a body."""

    essence: str
    charset: str
    full: str
    is_json: bool
    is_xml: bool


@lru_cache(maxsize=512)
def parse_media(text: str, what: str = "Content-Type") -> Media:
    """Return the parts of a content type.

    JSON of any charset name for UTF-8 is handed on as plain ``application/json``, so that all spellings are equal.

    Raises:
        BadRequest: the text is not ``type/subtype`` with optional parameters.
        Unreadable: it is JSON in another charset than UTF-8.
    """
    text = text.strip()
    match = _MEDIA.fullmatch(text) if len(text) <= MEDIA_CHARS_MAX else None
    if match is None:
        raise BadRequest(
            f"{what}: {ascii(text)[:80]} is not a content type", hint="Write type/subtype, such as application/json."
        )
    essence = match[1].lower()
    found = _CHARSET.search(text)
    charset = found[1].lower() if found else ""
    is_json = essence in ("application/json", "text/json") or essence.endswith("+json")
    if is_json and charset not in ("", "utf-8", "utf8", "us-ascii"):
        raise Unreadable(f"{what}: JSON in the charset {charset} is not read here", hint="Send JSON as UTF-8.")
    full = essence if is_json else essence + text[len(match[1]) :]
    if essence == "text/json":
        full = JSON
    return Media(
        essence, charset, full, is_json, essence in ("application/xml", "text/xml") or essence.endswith("+xml")
    )


def check_json(body: bytes | msgspec.Raw, what: str = "the body") -> None:
    """Return if the bytes are JSON (RFC 8259, UTF-8).

    Up to 64 KiB, numbers are checked to be in the range of 64-bit types too; above, syntax and encoding only, because
    building the values would hold up everybody else. Of members with the same name the last one counts.

    Raises:
        BadRequest: they are not, or are nested too deeply.
    """
    try:
        view = memoryview(body)
        if len(view) <= INLINE_BYTES_MAX:
            _any.decode(view)
        else:
            _raw.decode(view)
            str(view, "utf-8")
    except (msgspec.MsgspecError, ValueError) as error:
        raise BadRequest(
            f"{what} is not JSON: {error}", hint="Check the JSON, or send another Content-Type for what it is."
        ) from error
    except RecursionError as error:
        raise BadRequest(f"{what} is not acceptable JSON: it is nested too deeply") from error


def read_payload(content_type: str | None, body: bytes) -> Payload:
    """Return a body as a payload, checked against its content type. No type and no body is no data at all.

    Raises:
        BadRequest: the content type is malformed, or says JSON where the body is none, or the body is XML that
            declares entities, which nobody should open.
    """
    if content_type is None or not content_type.strip():
        return Payload(type=BYTES, body=body, size=len(body)) if body else NOTHING
    media = parse_media(content_type)
    if not body and media.essence == BYTES:
        return NOTHING  # what some clients say of every request that has no body
    if media.is_json:
        check_json(body)
    elif media.is_xml and b"<!ENTITY" in body:
        raise BadRequest(
            "the body is XML that declares entities", hint="Send the document without a document type declaration."
        )
    return Payload(type=media.full, body=body, size=len(body))


def digest_of(payload: Payload, reference: str = "") -> str:
    """Return what tells two bodies apart: a hash over content type, body, and the reference to data kept elsewhere."""
    return body_digest(f"{payload.type}\n{reference}" if reference else payload.type, payload.body)
