"""What commands read and print: data in, answers and errors out. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import mimetypes
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from rich.text import Text

from headrace import render
from headrace.answers import value_of
from headrace.errors import (
    BadRequest,
    HeadraceError,
    Infeasible,
    LoadError,
    Overloaded,
    PlatformUnreachable,
    RunFailed,
)
from headrace.media import is_json
from headrace.wire import BYTES, JSON, Payload

GOOD, RUN_FAILED, WRONG_USAGE, UNREACHABLE = 0, 1, 2, 3


def read_input(file: str) -> bytes:
    """Return the bytes of a file, or of standard input for "-".

    Raises:
        BadRequest: it cannot be read.
    """
    if file == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise BadRequest(
            f"{file} cannot be read: {error.strerror}", hint="Name a file, or - for standard input."
        ) from error


def read_data(file: str, content_type: str | None) -> tuple[bytes, str]:
    """Return the data of a trigger and its content type: as said, else by the file's name, else by a look at it."""
    body = read_input(file)
    guess = content_type or mimetypes.guess_type(file)[0]
    if guess is None:
        try:
            json.loads(body)
            guess = JSON
        except ValueError:
            guess = BYTES
    return body, guess


def shown(payload: Payload) -> Any:
    """Return an answer as JSON can show it; bytes as base64."""
    return msgspec.to_builtins(value_of(payload))


def print_answer(payload: Payload) -> None:
    """Print an answer as it is into a file or a pipe, and for reading on a terminal."""
    if not sys.stdout.isatty():
        sys.stdout.flush()
        sys.stdout.buffer.write(payload.body)
        if is_json(payload.type):
            sys.stdout.buffer.write(b"\n")
        sys.stdout.buffer.flush()
        return
    value = value_of(payload)
    if isinstance(value, bytes):
        _line(f"{len(value):,} bytes of {render.one_line(payload.type)}; write them to a file with > FILE")
    elif isinstance(value, str) and not is_json(payload.type):
        _line(render.clean(value))
    else:
        _line(render.clean(json.dumps(value, indent=2, ensure_ascii=False)))


def print_json(value: object) -> None:
    """Print JSON on one line."""
    _line(render.as_json(value))


def print_all(name: str, views: list[Any], table: Callable[[Iterable[Any]], Any], as_json: bool) -> None:
    """Print a list as a table, or as the JSON document that the platform has it in."""
    if as_json:
        print_json({name: views})
    else:
        render.console().print(table(views) if views else Text(f"no {name}"))


def say(what: str, hint: str = "") -> None:
    """Tell the user something beside the output, and what to do about it."""
    out = render.console(sys.stderr)
    out.print(Text(render.clean(what)), soft_wrap=True)
    if hint:
        out.print(Text(f"hint: {render.clean(hint)}"), soft_wrap=True)


def tell(error: HeadraceError) -> int:
    """Print an error: what, which, and what to do about it. Return the exit code it stands for."""
    say(f"error: {error}", error.hint)
    if isinstance(error, RunFailed | LoadError) and error.traceback:
        render.console(sys.stderr).print(Text(render.clean(error.traceback.rstrip())), soft_wrap=True)
    if isinstance(error, PlatformUnreachable | Overloaded):
        return UNREACHABLE
    return RUN_FAILED if isinstance(error, RunFailed | Infeasible) else WRONG_USAGE


def _line(text: str) -> None:
    sys.stdout.write(text + "\n")
