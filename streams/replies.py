"""What the log's server answers, read: acknowledgements and refusals, messages, the state of the stream."""

from __future__ import annotations

from datetime import datetime

import msgspec
from msgspec import Struct
from nats.aio.msg import Msg

from streams.stored import Stored

WRONG_LAST_SEQUENCE = 10071
STREAM_FULL = 10077
NO_HINTS = 10166  # the stream lets no message leave before the others
NO_LEADER = 10008
NOT_FOUND = 10037


class Refused(Exception):
    """The server said no; ``code`` is its JetStream error code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class _Error(Struct):
    err_code: int = 0
    description: str = ""


class _Ack(Struct):
    seq: int = 0
    count: int = 0
    error: _Error | None = None


_read_ack = msgspec.json.Decoder(_Ack).decode


class _State(Struct, frozen=True):
    last_seq: int = 0
    bytes: int = 0
    messages: int = 0
    first_ts: datetime | None = None


class _Config(Struct, frozen=True):
    max_bytes: int = -1


class Info(Struct, frozen=True):
    """The stream: what it holds, its limit, or why it cannot say."""

    state: _State = _State()
    config: _Config = _Config()
    error: _Error | None = None


class _Message(Struct, frozen=True):
    """A message as the leader gives it out; msgspec reads its body from base64."""

    subject: str
    seq: int
    time: str
    data: bytes = b""


class _Found(Struct, frozen=True):
    message: _Message | None = None
    error: _Error | None = None


def from_leader(answer: Msg) -> Stored | None:
    """Read a message that the leader was asked for, or None where there is none.

    Raises:
        TimeoutError: there is no leader at the moment.
    """
    found = msgspec.json.decode(answer.data, type=_Found)
    if found.message is None:
        if found.error is not None and found.error.err_code != NOT_FOUND:
            raise TimeoutError
        return None
    message = found.message
    return Stored(message.seq, message.subject, message.data, _instant(message.time))


def sequence_in(answer: Msg) -> int:
    """Return the sequence that an acknowledgement names.

    Raises:
        TimeoutError: there is no leader at the moment.
        Refused: the server said no.
    """
    ack = _read_ack(answer.data)
    if ack.error is None:
        return ack.seq
    if ack.error.err_code == NO_LEADER:
        raise TimeoutError
    raise Refused(ack.error.err_code, ack.error.description)


def stored_in(message: Msg) -> Stored | None:
    """Read a message that the server sends from the stream (direct get, republish), or None for an empty answer."""
    headers = message.headers
    if headers is None or "Nats-Sequence" not in headers:
        return None
    return Stored(
        int(headers["Nats-Sequence"]),
        headers["Nats-Subject"],
        message.data,
        _instant(headers.get("Nats-Time-Stamp", "")),
    )


def _instant(text: str) -> float:
    """Read the server's RFC 3339 stamp, whose nanoseconds Python takes in part only."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0
