"""What an answer says: from bytes with a content type to a Python value."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.media import charset, is_json, is_text
from headrace.wire import Payload


def value_of(payload: Payload) -> Any:
    """Return what an answer says: JSON decoded, text as text, everything else as bytes. Nothing is ever unpickled."""
    if is_json(payload.type):
        return msgspec.json.decode(payload.body)
    if is_text(payload.type):
        try:
            return payload.body.decode(charset(payload.type))
        except (LookupError, UnicodeDecodeError):
            return payload.body
    return payload.body
