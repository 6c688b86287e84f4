"""Where everything lives in the log: subjects, lanes and limits, and the one function that creates them.

    hr.work.<lane>.<tenant>.<run>.<invocation>   Invocation: work that waits; the first of a run is its acceptance
    hr.done.<run>.<invocation>                   Outcome: one per invocation, for ever
    hr.end.<run>                                 RunEnd: of runs with branches, where no single outcome ends them
    hr.tally.<run>.<scope>                       Tally: branches of a scope that were filled
    hr.lease.<run>.<invocation>                  Lease: who took over an invocation that was delivered before
    hr.start.<run>.<invocation>.<attempt>        Started: an attempt that takes longer than a moment
    hr.try.<run>.<invocation>.<attempt>          Attempt: failed, to be tried again
    hr.note.<run>.<invocation>.<attempt>         Note: log lines and progress
    hr.cancel.<run>.<who>                        Cancel: by a user, or by the run of a later event of the same thread
    hr.thread.<thread>.<run>                     Member: the event of a run belongs to a thread of revisions
    hr.replay.<run>                              Replay: a failed run was given another go by a new one

The lane stands in the subject of work, so that one consumer per lane reads it without looking at the rest.

Leases and the outcome of an invocation are one family, ``hr.*.<run>.<invocation>``: who appends to it says which
message of it was the last one known to him, so of all attempts only the holder of the newest lease can commit.
"""

from __future__ import annotations

from msgspec import Struct
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    KeyValueConfig,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import NotFoundError

from streams.link import Link

STREAM = "HEADRACE"
LANES = 12
INLINE_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = 16 * 1024 * 1024
ACK_WAIT_S = 6.0
ACK_PENDING_MAX = 100_000
BUCKETS = ("functions", "versions", "routes", "tenants", "forecasts")


class Limits(Struct, frozen=True, kw_only=True):
    """How much the log holds and for how long. When ``bytes_max`` is reached it refuses, it does not forget."""

    keep_s: float = 7 * 86400.0
    bytes_max: int = 8 * 1024**3
    table_bytes_max: int = 64 * 1024**2


def work_subject(lane: int | str, tenant: str, run: str, invocation: str) -> str:
    """Return the subject of a waiting invocation; ``"*"`` as lane means any."""
    return f"hr.work.{lane}.{tenant}.{run}.{invocation}"


def done_subject(run: str, invocation: str) -> str:
    """Return the subject that takes exactly one outcome."""
    return f"hr.done.{run}.{invocation}"


def end_subject(run: str) -> str:
    """Return the subject that takes the end of a run with branches."""
    return f"hr.end.{run}"


def tally_subject(run: str, scope: str) -> str:
    """Return the subject of the tallies of one scope."""
    return f"hr.tally.{run}.{scope}"


def lease_subject(run: str, invocation: str) -> str:
    """Return the subject on which an invocation that was delivered before is taken over."""
    return f"hr.lease.{run}.{invocation}"


def fence_subject(run: str, invocation: str) -> str:
    """Return the family of an invocation's leases and its outcome, which guards both."""
    return f"hr.*.{run}.{invocation}"


def start_subject(run: str, invocation: str, attempt: int | str) -> str:
    """Return the subject that says an attempt has started."""
    return f"hr.start.{run}.{invocation}.{attempt}"


def attempt_subject(run: str, invocation: str, attempt: int | str) -> str:
    """Return the subject of a failed attempt that will be followed by another."""
    return f"hr.try.{run}.{invocation}.{attempt}"


def note_subject(run: str, invocation: str, attempt: int | str) -> str:
    """Return the subject of what a running function says."""
    return f"hr.note.{run}.{invocation}.{attempt}"


def cancel_subject(run: str, who: str = "user") -> str:
    """Return the subject that takes one wish to cancel a run: of a user, or of a run that overrules it in a thread."""
    return f"hr.cancel.{run}.{who}"


def thread_subject(thread: str, run: str) -> str:
    """Return the subject that says that the event of a run belongs to a thread."""
    return f"hr.thread.{thread}.{run}"


def replay_subject(run: str) -> str:
    """Return the subject that says which new runs gave a failed one another go."""
    return f"hr.replay.{run}"


def run_subjects(run: str) -> list[str]:
    """Return the subjects that together hold the state of one run, without what its functions said."""
    return [
        work_subject("*", "*", run, "*"),
        done_subject(run, "*"),
        start_subject(run, "*", "*"),
        attempt_subject(run, "*", "*"),
        end_subject(run),
        cancel_subject(run, "*"),
        replay_subject(run),
    ]


def kind_of(subject: str) -> str:
    """Return the second token of a subject: the kind of its facts, such as work, done or cancel."""
    return subject.split(".", 2)[1]


def run_of(subject: str) -> str:
    """Return the run of a subject of any kind but work."""
    return subject.split(".", 3)[2]


def lane_consumer(lane: int) -> str:
    """Return the name of the consumer that all workers share for one lane."""
    return f"work-{lane}"


def _stream(limits: Limits, replicas: int) -> StreamConfig:
    return StreamConfig(
        name=STREAM,
        subjects=["hr.>"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.NEW,
        max_age=limits.keep_s,
        max_bytes=limits.bytes_max,
        num_replicas=replicas,
        allow_atomic=True,
        allow_direct=True,
    )


def _lane(lane: int) -> ConsumerConfig:
    return ConsumerConfig(
        durable_name=lane_consumer(lane),
        filter_subject=f"hr.work.{lane}.>",
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ACK_WAIT_S,
        max_deliver=-1,
        max_ack_pending=ACK_PENDING_MAX,
        max_waiting=4096,
    )


async def ensure(link: Link, limits: Limits, replicas: int = 1) -> None:
    """Create the stream, its lanes and the tables, or bring them to these limits. Safe to repeat."""
    js = link.jetstream()
    wanted = _stream(limits, replicas)
    try:
        await js.stream_info(STREAM)
    except NotFoundError:
        await js.add_stream(wanted)
    else:
        await js.update_stream(wanted)
    for lane in range(LANES):
        await js.add_consumer(STREAM, _lane(lane))
    for bucket in BUCKETS:
        try:
            await js.key_value(bucket)
        except NotFoundError:
            await js.create_key_value(
                KeyValueConfig(
                    bucket=bucket,
                    history=1,
                    max_bytes=limits.table_bytes_max,
                    storage=StorageType.FILE,
                    replicas=replicas,
                    direct=True,
                )
            )
