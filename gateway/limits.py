"""Every limit of the front door in one place; units last."""

from __future__ import annotations

from msgspec import Struct

from streams.topology import BODY_BYTES_MAX

MIB = 1024 * 1024
GIB = 1024 * MIB


class GatewayLimits(Struct, frozen=True, kw_only=True):
    """How much one gateway takes on. What passes a limit is refused with the limit in the message.

    ``in_flight_max`` and ``in_flight_bytes_max`` bound requests whose body is being read or appended; ``waiting_max``
    those that wait for an answer (``Prefer: wait``); ``streams_max`` clients of server-sent events.
    ``backlog_max`` is how much work may wait for a worker before nothing more is accepted; one of several tenants may
    have as much waiting as there is room left.
    ``disk_bytes_min`` is the free space below which nothing new is accepted, before the log stalls; ``log_share_max``
    the share of the log's size limit from which on nothing new is accepted, so that what was accepted can still end.
    """

    body_bytes_max: int = BODY_BYTES_MAX
    body_seconds_max: float = 30.0
    batch_events_max: int = 500
    in_flight_max: int = 1024
    backlog_max: int = 100_000
    in_flight_bytes_max: int = 256 * MIB
    wait_seconds_max: float = 60.0
    waiting_max: int = 1024
    streams_max: int = 256
    stream_send_seconds_max: float = 20.0
    upload_bytes_max: int = 8 * GIB
    upload_part_bytes: int = 64 * MIB
    upload_keep_seconds: float = 3600.0
    uploads_open_max: int = 256
    disk_bytes_min: int = 256 * MIB
    log_share_max: float = 0.9
