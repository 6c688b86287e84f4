"""Content types, as far as data needs them: what is JSON, what is text, and in which alphabet."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=256)
def essence(content_type: str) -> str:
    """Return "text/csv" of "Text/CSV; charset=utf-8"."""
    return content_type.partition(";")[0].strip().lower()


@lru_cache(maxsize=256)
def is_json(content_type: str) -> bool:
    """Return whether data of this type is JSON."""
    kind = essence(content_type)
    return kind == "application/json" or kind == "text/json" or kind.endswith("+json")


def is_text(content_type: str) -> bool:
    """Return whether data of this type is text to be read as it is."""
    return essence(content_type).startswith("text/")


@lru_cache(maxsize=256)
def charset(content_type: str) -> str:
    """Return the alphabet that a content type names; UTF-8 where it names none."""
    for parameter in content_type.split(";")[1:]:
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "charset":
            return value.strip().strip('"').lower() or "utf-8"
    return "utf-8"
