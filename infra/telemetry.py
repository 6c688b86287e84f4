"""The servers' own log lines: one JSON object per line on stderr, safe to read with a parser and in a terminal."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
SECRET_KEYS = ("password", "token", "secret", "authorization")
TEXT_CHARS_MAX = 4000


def configure(*, level: str, role: str, terminal: bool = False, stream: TextIO | None = None) -> None:
    """Send the log lines of this process, those of its libraries included, to stderr.

    Args:
        level: the least level that is written: debug, info, warning or error.
        role: what this process is; stands in every line.
        terminal: write short lines for a person instead of JSON.
        stream: where to, if not stderr.
    """
    out = _Sink(stream or sys.stderr)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _hide_secrets,
    ]
    render: Processor = _for_people if terminal else _Json(role)
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", out)),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    logging.basicConfig(level=LEVELS[level], handlers=[handler], force=True)


class _Sink:
    """Where lines go. On a full disk they are dropped: a line that cannot be written must not stop a server."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._out.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._out.flush()


class _Json:
    """Renders a line as JSON in ASCII: line breaks, escape sequences and other controls arrive as text."""

    def __init__(self, role: str) -> None:
        self._role = role

    def __call__(self, logger: object, method: str, event: EventDict) -> str:
        line = {"at": event.pop("timestamp", ""), "level": event.pop("level", method), "role": self._role, **event}
        return json.dumps(line, default=_plain)


def _for_people(logger: object, method: str, event: EventDict) -> str:
    at = str(event.pop("timestamp", ""))[11:19]
    level = event.pop("level", method)
    said = _printable(str(event.pop("event", "")))
    event.pop("logger", None)
    trace = event.pop("exception", "")
    rest = " ".join(f"{key}={_printable(str(value))}" for key, value in event.items())
    lines = [f"{at} {level}: {said} {rest}".rstrip(), *(_printable(line) for line in str(trace).splitlines())]
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Return text that cannot steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _hide_secrets(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Blank values whose name says that they are secret, and cut what is too long: a second line of defence."""
    for key, value in event.items():
        if any(word in key.lower() for word in SECRET_KEYS):
            event[key] = "***"
        elif isinstance(value, str) and len(value) > TEXT_CHARS_MAX and key != "exception":
            event[key] = value[:TEXT_CHARS_MAX] + "..."
    return event


def _plain(value: object) -> str:
    return str(value)
