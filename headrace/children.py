"""What a worker and its zygote say to each other, and what each child may take. Encoded as in ``headrace.wire``."""

from __future__ import annotations

from msgspec import Struct


class ChildLimits(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one child process may take, and how long it is kept.

    ``memory_bytes_max`` is address space on top of what the child is born with. ``growth_bytes_max`` is how much its
    resident memory may grow between invocations before it is replaced; what the first invocation of a version brings
    in counts as its due. ``result_bytes_max`` holds for result, answer and effects together.

    For one invocation: ``tasks_max`` is processes and threads at a time, the child's own included; ``cpu_max_s`` is
    CPU seconds of all of them together; ``scratch_bytes_max`` and ``scratch_files_max`` bound what is in the child's
    folder, and the first also each single file written anywhere; ``fan_out_max`` is the members of one map.

    ``user_tasks_max`` is a ceiling for all processes and threads of the worker's user, where there are no control
    groups to hold each child to its own.
    """

    memory_bytes_max: int | None = None
    growth_bytes_max: int = 256 * 1024 * 1024
    invocations_max: int = 10_000
    versions_max: int = 32
    result_bytes_max: int = 16 * 1024 * 1024
    output_bytes_max: int = 1024 * 1024
    output_lines_max: int = 10_000
    tasks_max: int = 512
    cpu_max_s: float = 86400.0
    scratch_bytes_max: int = 16 * 1024**3
    scratch_files_max: int = 100_000
    fan_out_max: int = 10_000
    user_tasks_max: int | None = None


class Fork(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="fork"):
    """To the zygote: make a child. Its descriptors come along: line to the worker, stdout, stderr, last words.

    ``group`` is the folder of the control group that holds it; empty where there is none.
    """

    child: int
    scratch: str
    limits: ChildLimits
    group: str = ""


class Kill(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="kill"):
    """To the zygote: end a child and its process group, or (``tell``) only have it write down where it is."""

    child: int
    tell: bool = False


class Ready(Struct, frozen=True, kw_only=True, tag="ready"):
    """From the zygote: everything is imported; children can be made."""

    pid: int


class Born(Struct, frozen=True, kw_only=True, tag="born"):
    """From the zygote: a child was made, under this process id."""

    child: int
    pid: int


class Died(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="died"):
    """From the zygote: a child is gone; ``status`` is its wait status, None where it could not be made."""

    child: int
    status: int | None
    error: str = ""


ToZygote = Fork | Kill
FromZygote = Ready | Born | Died
