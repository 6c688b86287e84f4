"""How bytes of a content type become a Python value of an annotated type.

JSON is decoded into the type. Text becomes ``str`` where that is asked for. Everything else stays bytes.
"""

from __future__ import annotations

import collections.abc
import sys
from collections.abc import Callable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec

from headrace.media import charset, essence, is_json, is_text
from headrace.model import Event
from headrace.wire import ITEMS, PICKLE

Read = Callable[[str, bytes], Any]

_BYTES = (bytes, bytearray, memoryview)
_LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_items = msgspec.msgpack.Decoder(list[tuple[str, bytes]])
_any = msgspec.json.Decoder()


class Mismatch(ValueError):
    """The data is not of the type; the text names the field."""

    def __init__(self, message: str, hint: str = "Send data that fits, or change the annotation.") -> None:
        super().__init__(message)
        self.hint = hint


class Unusable(Exception):
    """Nothing that arrives as bytes can ever become a value of this type."""


def accepted() -> str:
    """Return the types that may be asked for, for hints."""
    return "dict, list, str, int, float, bytes, a dataclass, a TypedDict or a msgspec.Struct"


def is_event(hint: Any) -> bool:
    """Return whether the annotation asks for the whole event."""
    members = set(_members(hint)) - {NoneType}
    return members == {Event}


def data_of(content_type: str, body: bytes) -> Any:
    """Return the data of an event: decoded JSON, text or bytes, as the content type says.

    Raises:
        Mismatch: the body is not what its content type says.
    """
    if is_text(content_type) and not is_json(content_type):
        return _text(content_type, body)
    return _plain(content_type, body)


def reader(hint: Any) -> Read:
    """Return what turns a content type and a body into a value of the annotated type; made once per function.

    Raises:
        Unusable: there is no decoding into this type. Some such types are noticed only when data arrives.
    """
    members = _members(hint)
    if Any in members or object in members:
        return _untyped
    raw = next((kind for kind in members if kind in _BYTES), None)
    if raw is not None and not set(members) - {raw, NoneType}:
        return _raw_reader(raw, optional=NoneType in members)
    return _typed_reader(hint, raw, text=str in members)


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the one type, without what ``Annotated`` says of it."""
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return tuple(member for each in get_args(hint) for member in _members(each))
    return (NoneType if hint is None else hint,)


# ---------------------------------------------------------------- without a type


def _untyped(content_type: str, body: bytes) -> Any:
    if content_type == ITEMS:
        pairs = _items.decode(body)
        if all(kind == "application/json" for kind, _ in pairs):
            return _json(_any, b"[" + b",".join(item for _, item in pairs) + b"]")
        return [_plain(kind, item) for kind, item in pairs]
    return _plain(content_type, body)


def _plain(content_type: str, body: bytes) -> Any:
    if is_json(content_type):
        return _json(_any, body)
    if content_type == PICKLE:
        return _unpickled(body)
    return body


def _unpickled(body: bytes) -> Any:
    import cloudpickle  # here, so that whoever imports this module for its types holds no unpickler

    return cloudpickle.loads(body)


def _text(content_type: str, body: bytes) -> str:
    try:
        return body.decode(charset(content_type))
    except (LookupError, UnicodeDecodeError) as error:
        raise Mismatch(
            f"it is said to be {content_type}, but it is not: {error}", "Name the right charset in the content type."
        ) from error


def _json(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body or b"null")
    except msgspec.ValidationError as error:
        raise Mismatch(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Mismatch(f"it is not JSON: {error}", "Send valid JSON, or name its content type.") from error
    except RecursionError as error:
        raise Mismatch("it is nested too deeply") from error


# ---------------------------------------------------------------- with a type


def _raw_reader(kind: Any, *, optional: bool) -> Read:
    """Whoever asks for bytes gets the body as it came, JSON or not."""

    def read(content_type: str, body: bytes) -> Any:
        if content_type == ITEMS:
            raise Mismatch(f"expected `{kind.__name__}`, got the results of a map", "Annotate the parameter as list.")
        if optional and is_json(content_type) and body in (b"", b"null"):
            return None
        return body if kind is bytes else kind(body)

    return read


def _typed_reader(hint: Any, raw: Any, *, text: bool) -> Read:
    decoder = _decoder(hint)
    items = _items_reader(hint, decoder)

    def read(content_type: str, body: bytes) -> Any:
        if is_json(content_type):
            return _json(decoder, body)
        if content_type == ITEMS:
            return items(body)
        if text and is_text(content_type):
            return _text(content_type, body)
        if raw is not None:
            return raw(body)
        if content_type == PICKLE:
            return _unpickled(body)
        raise Mismatch(
            f"expected {_shown(hint)}, got data of the content type {essence(content_type) or '(none)'}",
            "Send it as application/json, or annotate the parameter bytes." if not text else "Send it as text/plain.",
        )

    return read


def _items_reader(hint: Any, decoder: msgspec.json.Decoder[Any]) -> Callable[[bytes], Any]:
    """Read the results of a map. All are JSON as a rule, and one pass names the member that is wrong."""
    element = next(_elements(hint), None)
    each: Read | None = None
    in_one = element is not None and not any(kind in _BYTES for kind in _members(element))

    def read(body: bytes) -> Any:
        nonlocal each
        if element is None:
            raise Mismatch(
                f"expected {_shown(hint)}, got the list of the results of a map", "Annotate the parameter as list."
            )
        pairs = _items.decode(body)
        if in_one and all(kind == "application/json" for kind, _ in pairs):
            return _json(decoder, b"[" + b",".join(item for _, item in pairs) + b"]")
        each = each or reader(element)
        values = []
        for index, (kind, item) in enumerate(pairs):
            try:
                values.append(each(kind, item))
            except Mismatch as error:
                raise Mismatch(f"{error} - in member {index}", error.hint) from error
        made = next((kind for kind in (tuple, set, frozenset) if kind in _containers(hint)), list)
        return made(values)

    return read


def _containers(hint: Any) -> list[Any]:
    return [get_origin(member) or member for member in _members(hint)]


def _elements(hint: Any) -> Iterator[Any]:
    """Yield the type of the members of a list."""
    for member, container in zip(_members(hint), _containers(hint), strict=True):
        if container in _LISTS:
            arguments = get_args(member)
            yield arguments[0] if arguments else Any


def _decoder(hint: Any) -> msgspec.json.Decoder[Any]:
    try:
        return msgspec.json.Decoder(hint, dec_hook=_from_json)
    except (TypeError, ValueError, NameError, AttributeError, RecursionError) as error:
        raise Unusable(f"{_shown(hint)}: {error}") from error


def _from_json(kind: Any, value: Any) -> Any:
    """Make an array, which scientists ask for most; for other classes nobody has said how they are written in JSON."""
    if getattr(kind, "__module__", "") == "numpy" and getattr(kind, "__name__", "") == "ndarray" and not get_args(kind):
        return sys.modules["numpy"].asarray(value)
    raise Unusable(f"{_shown(kind)} cannot be made from JSON")


def _shown(hint: Any) -> str:
    return f"`{hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace('typing.', '')}`"
