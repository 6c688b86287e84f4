"""The few lines of a VOEvent that tell which packet it is and which ones it cites, in any version of the standard.

What a stranger sends as XML is read by expat with everything refused that could make it grow or fetch: document types,
and with them all entities. Sizes are bounded.
"""

from __future__ import annotations

from typing import NamedTuple
from xml.parsers import expat

from headrace.errors import BadRequest, TooLarge

PACKET_BYTES_MAX = 1024 * 1024
IVORN_CHARS_MAX = 256
CITATIONS_MAX = 64
DEPTH_MAX = 64


class Notice(NamedTuple):
    """A packet: its ``ivorn`` and role, when it was made (as text), and what it cites: (ivorn, kind of citation)."""

    ivorn: str
    role: str
    date: str | None
    citations: list[tuple[str, str]]


class _Refused(Exception):
    """The packet is not read further; the text says why."""


def read_notice(body: bytes, route: str) -> Notice:
    """Return what a VOEvent says of itself.

    Args:
        body: the XML.
        route: the name of the route that needs it, for the message.

    Raises:
        BadRequest: it is no VOEvent, or one without its name.
        TooLarge: it is larger than 1 MiB.
    """
    if len(body) > PACKET_BYTES_MAX:
        raise TooLarge(
            f"the VOEvent for the route {route} has {len(body):,} bytes, the limit is {PACKET_BYTES_MAX:,}",
            hint="A VOEvent refers to large data by URL.",
        )
    reading = _Reading()
    try:
        reading.parser.Parse(body, True)
    except (expat.ExpatError, _Refused, LookupError, ValueError) as error:
        raise BadRequest(
            f"the data is no VOEvent: {error}; the route {route} tells revisions by VOEvent citations",
            hint="Send a VOEvent packet, or change the revision of the route.",
        ) from error
    return Notice(reading.ivorn, reading.role, reading.date or None, reading.citations)


class _Reading:
    """What has been read of a packet so far. Element names are taken without their namespace, which varies."""

    def __init__(self) -> None:
        self.parser = expat.ParserCreate(namespace_separator=" ")
        self.parser.buffer_text = True
        self.parser.StartDoctypeDeclHandler = self._doctype
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        self.ivorn = ""
        self.role = ""
        self.date = ""
        self.citations: list[tuple[str, str]] = []
        self._path: list[str] = []
        self._cite = ""
        self._cited = ""

    def _doctype(self, name: str, system: str | None, public: str | None, internal: int) -> None:
        raise _Refused("it has a document type, which is not read here")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition(" ")[2]
        self._path.append(name)
        if len(self._path) > DEPTH_MAX:
            raise _Refused(f"its elements are nested more than {DEPTH_MAX} deep")
        if self._path == ["VOEvent"]:
            self.ivorn = attributes.get("ivorn", "").strip()
            self.role = attributes.get("role", "")
            if not 0 < len(self.ivorn) <= IVORN_CHARS_MAX:
                raise _Refused(f"its attribute ivorn is missing or longer than {IVORN_CHARS_MAX} characters")
        elif len(self._path) == 1:
            raise _Refused(f"its root is {ascii(name)[:80]}")
        elif self._path == ["VOEvent", "Citations", "EventIVORN"]:
            self._cite, self._cited = attributes.get("cite", "").strip().lower(), ""

    def _text(self, text: str) -> None:
        if self._path == ["VOEvent", "Who", "Date"]:
            self.date = (self.date + text.strip())[:IVORN_CHARS_MAX]
        elif self._path == ["VOEvent", "Citations", "EventIVORN"]:
            self._cited += text
            if len(self._cited) > 2 * IVORN_CHARS_MAX:
                raise _Refused(f"it cites a name longer than {IVORN_CHARS_MAX} characters")

    def _end(self, name: str) -> None:
        if self._path.pop() == "EventIVORN" and self._path == ["VOEvent", "Citations"]:
            cited = self._cited.strip()
            if not 0 < len(cited) <= IVORN_CHARS_MAX:
                raise _Refused(f"it cites a name that is empty or longer than {IVORN_CHARS_MAX} characters")
            self.citations.append((cited, self._cite))
            if len(self.citations) > CITATIONS_MAX:
                raise _Refused(f"it cites more than {CITATIONS_MAX} packets")
