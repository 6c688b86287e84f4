"""Headrace in the user's own process: a trigger in, the right answer out, before its deadline.

What declares and runs functions is imported at once. What talks to a platform (``Client``, ``Executor``) is imported
when it is first asked for, so that a file of functions loads quickly wherever it runs.

Rooms, by what they are for:

- words: ``errors``, ``names``, ``clock``, ``model``, ``jobs`` and ``wire`` (types), ``media`` (content types),
  ``filters``, ``events``;
- declaring and running: ``sdk`` (``@function``, ``@on``), ``revision`` (what a route says of revisions), ``context``
  (``ctx``), ``binding`` with ``data`` and ``coroutines`` (payload to arguments), ``failures`` (what is told of an
  exception);
- the platform from Python: ``client`` and ``handle`` (coroutines), ``sync`` (the plain form), ``executor`` and
  ``futures``, over ``address``, ``transport``, ``sse``, ``following``, ``uploading``, ``answers`` and ``loopthread``;
- code by value: ``packing`` and ``siblings`` on this side, ``loading`` on the other;
- a worker's child: ``zygote``, ``birth``, ``runner``, ``channel``, ``capture``;
- without a server: ``testing`` over ``virtual`` and ``trace``;
- the terminal: ``cli``, ``terminal``, ``render``.

Imports none of our other folders, because users keep files of the same names.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from headrace import errors
from headrace.context import Context
from headrace.errors import HeadraceError
from headrace.jobs import JobAttributes, JobEnd, JobSpec, JobTime, Resources
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
    "JobAttributes",
    "JobEnd",
    "JobSpec",
    "JobTime",
    "Resources",
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
