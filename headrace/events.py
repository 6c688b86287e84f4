"""Events as they are written in JSON: the structured form of CloudEvents 1.0."""

from __future__ import annotations

import uuid
from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from headrace.context import to_payload
from headrace.errors import BadRequest
from headrace.model import Event
from headrace.wire import JSON

STRUCTURED = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"

_ATTRIBUTES = ("specversion", "id", "source", "type", "subject", "time", "datacontenttype", "dataschema")


def new_id() -> str:
    """Return an id for an event that has none; whoever repeats the event has to keep it."""
    return uuid.uuid4().hex


def to_json(event: Event | Mapping[str, Any]) -> bytes:
    """Return an event in the JSON form of CloudEvents. A mapping is taken to be in that form already.

    Raises:
        BadRequest: the data has no form in JSON, or an extension has the name of an attribute.
    """
    if not isinstance(event, Event):
        return to_payload(dict(event)).body
    members: dict[str, Any] = {name: getattr(event, name) for name in _ATTRIBUTES if getattr(event, name) is not None}
    for name, value in event.extensions.items():
        if name in (*_ATTRIBUTES, "data", "data_base64"):
            raise BadRequest(
                f"the extension {name} has the name of an attribute", hint=f"Set it as Event({name}=...) instead."
            )
        members[name] = value
    if isinstance(event.data, bytes | bytearray | memoryview):
        members["data_base64"] = b64encode(event.data).decode()
    elif event.data is not None:
        members["data"] = event.data
        if not isinstance(event.data, str):
            members.setdefault("datacontenttype", JSON)
    return to_payload(members).body
