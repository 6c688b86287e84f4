"""What every event comes through on its way in, in one piece: the door and its dry run are given the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gateway.acceptance import Acceptance
from gateway.admitting import Admitting
from gateway.backlog import Backlog
from gateway.gate import Gate
from gateway.limits import GatewayLimits
from gateway.needs import Behind


class Entrance(NamedTuple):
    """Who lets events in; ``clock`` tells epoch seconds."""

    behind: Behind
    admitting: Admitting
    acceptance: Acceptance
    backlog: Backlog
    gate: Gate
    limits: GatewayLimits
    clock: Callable[[], float]
