"""Headrace in the user's own process: a trigger in, the right answer out, before its deadline.

What declares and runs functions is imported at once. What talks to a platform (``Client``, ``Executor``) is imported
when it is first asked for, so that a file of functions loads quickly wherever it runs.

Rooms: ``sdk`` (``@function``, ``@on``), ``context`` (``ctx``), ``model`` and ``wire`` (types), ``errors``; ``client``,
``sync``, ``executor`` (the platform from Python) over ``transport`` and ``sse``; ``packing`` and ``siblings`` (code by
value); ``binding``, ``loading`` and ``runner`` (a worker's child); ``testing``; ``cli`` and ``render``.

Imports none of our other folders, because users keep files of the same names.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from headrace import errors
from headrace.context import Context
from headrace.errors import HeadraceError
from headrace.model import Event, Route
from headrace.sdk import function, on

if TYPE_CHECKING:
    from headrace.client import AsyncClient
    from headrace.executor import Executor
    from headrace.handle import AsyncRun
    from headrace.sync import Client, Run

_LATER = {
    "AsyncClient": "headrace.client",
    "AsyncRun": "headrace.handle",
    "Client": "headrace.sync",
    "Executor": "headrace.executor",
    "Run": "headrace.sync",
}

__all__ = [
    "AsyncClient",
    "AsyncRun",
    "Client",
    "Context",
    "Event",
    "Executor",
    "HeadraceError",
    "Route",
    "Run",
    "errors",
    "function",
    "on",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for by name on first use."""
    if name == "__version__":
        from importlib.metadata import version

        return version("headrace")
    if name not in _LATER:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    found = getattr(import_module(_LATER[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER, "__version__"])
