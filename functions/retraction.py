"""An event that takes others back is itself a run: what it says, and to whom."""

from __future__ import annotations

import msgspec

from functions.effects import succeed
from functions.outcomes import Attempted, World
from headrace.wire import Emit, Invocation, Outcome, Payload
from streams.log import Record
from streams.threads import RETRACTS

RUNS_TOLD_MAX = 100
RETRACTED_TYPE = "org.headrace.retracted"


def retract(invocation: Invocation, tried: Attempted, over: list[str], world: World) -> tuple[Outcome, list[Record]]:
    """Return the outcome of an event that took others back, and the unit to append: an event tells everybody.

    Args:
        invocation: the first of the retraction's run.
        tried: when and where.
        over: the runs of what was taken back, as far as they are known. They are told in the event and not in the
            answer, which is the same whenever the retraction came.
        world: what is registered, and the time.
    """
    keys = [place.key for place in invocation.places if place.rank[0] == RETRACTS]
    event = invocation.event
    told = {
        "retracted": keys,
        "route": invocation.route,
        "by": {
            "run_id": invocation.run_id,
            "id": "" if event is None else event.id,
            "source": "" if event is None else event.source,
            "type": "" if event is None else event.type,
        },
        "runs": over[:RUNS_TOLD_MAX],
        "runs_total": len(over),
    }
    return succeed(
        invocation,
        tried,
        result=_json({"retracted": keys}),
        answer=None,
        effects=[Emit(type=RETRACTED_TYPE, subject=keys[0] if len(keys) == 1 else None, payload=_json(told))],
        kept={},
        world=world,
    )


def _json(value: object) -> Payload:
    body = msgspec.json.encode(value)
    return Payload(body=body, size=len(body))
