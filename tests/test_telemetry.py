"""Log lines: one JSON object each, whatever stands in them, and never a secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from infra import telemetry

HOSTILE = "a\r\nb\x1b]8;;http://evil\x07\x9b31m\u202e\u2028end"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


def _written(level: str = "info", **options: Any) -> io.StringIO:
    out = io.StringIO()
    telemetry.configure(level=level, role="gateway", stream=out, **options)
    return out


@pytest.mark.parametrize("library", [False, True])
def test_a_line_is_one_json_object_whatever_stands_in_it(library: bool) -> None:
    out = _written()
    if library:
        logging.getLogger("some.library").warning("%s", HOSTILE)
    else:
        structlog.get_logger().warning(HOSTILE, name=HOSTILE)
    (line,) = out.getvalue().splitlines()
    assert line.isascii()
    assert line.isprintable()
    said = json.loads(line)
    assert said["event"] == HOSTILE
    assert (said["level"], said["role"]) == ("warning", "gateway")
    assert said["at"].endswith("Z")


def test_an_exception_is_in_the_line_of_its_event() -> None:
    out = _written()
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("some.library").exception("it failed")
        structlog.get_logger().exception("it failed")
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(lines) == 2
    assert all("ValueError: broken" in line["exception"] for line in lines)


def test_what_is_named_like_a_secret_is_not_written() -> None:
    out = _written()
    structlog.get_logger().info("hello", password="s3cret", bearer_token="s3cret", Authorization="s3cret")
    assert "s3cret" not in out.getvalue()


def test_lines_below_the_level_are_not_written() -> None:
    out = _written("warning")
    structlog.get_logger().info("quiet")
    logging.getLogger("some.library").info("quiet")
    assert out.getvalue() == ""


def test_lines_for_a_person_cannot_steer_the_terminal() -> None:
    out = _written(terminal=True)
    structlog.get_logger().warning("process ended", process="worker", how=HOSTILE)
    (line,) = out.getvalue().splitlines()
    assert line.isprintable()
    assert "warning: process ended process=worker how=a\\r\\nb\\x1b" in line
