"""What a batch job is: the words of PSI/J's JobSpec, with the inputs, outputs and sites that Headrace adds.

A specification is checked when it is made, in the user's own process, so that a job which no site can run is an error
at the line that asks for it and not an hour later at a facility.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

import msgspec
from msgspec import Struct

from headrace.clock import parse_duration
from headrace.errors import BadRequest, TooLarge
from headrace.model import ErrorInfo, JobState
from headrace.names import check_name

SPEC_BYTES_MAX = 256 * 1024
NODES_MAX = 100_000
PROCESSES_MAX = 10_000_000
FILES_MAX = 1000
RETRIES_MAX = 100
LAUNCHERS = ("single", "multiple", "srun", "mpirun", "aprun", "jsrun")
LINES_TOLD_MAX = 20  # of what a job printed last, in the error of its run
RECORDS = ".headrace"  # the folder in a job's own that tells how it went; no input or output may take its name
PRINTED = ("stdout.txt", "stderr.txt")  # where its own words go: an output may be one of them, an input may not

# Why a job ended as it did, or waits. "" where the state says all.
Reason = Literal[
    "",
    "exit_code",
    "signal",
    "walltime",
    "out_of_memory",
    "node_failure",
    "preempted",
    "deadline",
    "launch",
    "canceled",
    "lost",
    "rejected",
    "stage_in",
    "stage_out",
    "site_ended",
]
REASONS: dict[Reason, str] = {
    "": "Nothing more is to be said.",
    "exit_code": "Its program ended with an exit code other than 0.",
    "signal": "Its program was ended by a signal.",
    "walltime": "It ran longer than it may.",
    "out_of_memory": "It took more memory than it may.",
    "node_failure": "A node that it ran on failed.",
    "preempted": "It had to make room for a more urgent job.",
    "deadline": "The batch system saw that it could not end in time.",
    "launch": "Its program could not be started.",
    "canceled": "Somebody canceled it.",
    "lost": "The batch system knows it no longer, and it left no record of an end.",
    "rejected": "The batch system refused it.",
    "stage_in": "Its inputs could not be brought to the site.",
    "stage_out": "Its outputs could not be kept.",
    "site_ended": "Its site has ended, and no other one may run it.",
}

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_ATTRIBUTE = re.compile(r"[a-z][a-z0-9_]*\.[A-Za-z][A-Za-z0-9_-]*")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:\S+")
_PATTERN = re.compile(r"[*?\[\]]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class _Checked(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Fields have the types they say, also where a struct is made by hand; a dict becomes the struct it stands for."""

    hints: ClassVar[dict[str, str]] = {}  # how a field is written whose type alone does not tell

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            try:
                value = msgspec.convert(getattr(self, name), kind)
            except msgspec.ValidationError as error:
                raise BadRequest(f"{type(self).__name__}: {name}: {error}", hint=self.hints.get(name, "")) from error
            msgspec.structs.force_setattr(self, name, value)
        self._check()

    def _check(self) -> None:
        """Raise BadRequest for what has the right type and makes no sense."""


@lru_cache
def _kinds(of: type[Struct]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(of)}


class Resources(_Checked, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a job needs, in the words of PSI/J's ResourceSpecV1; what is not given follows from the rest.

    ``process_count`` is ``node_count`` times ``processes_per_node``. ``memory`` is that of the whole job, in bytes.
    """

    hints = {"memory": "In bytes, such as 16 * 2**30."}

    node_count: int | None = None
    process_count: int | None = None
    processes_per_node: int | None = None
    cpu_cores_per_process: int | None = None
    gpu_cores_per_process: int | None = None
    exclusive_node_use: bool = False
    memory: int | None = None

    @property
    def processes(self) -> int:
        """How many processes are started in all."""
        return self.process_count or (self.node_count or 1) * (self.processes_per_node or 1)

    @property
    def nodes(self) -> int:
        """How many nodes the job takes, as PSI/J counts where none are given: all processes on one."""
        return self.node_count or self.processes // (self.processes_per_node or self.processes)

    @property
    def gpus(self) -> int:
        """How many GPUs the job takes in all."""
        return self.processes * (self.gpu_cores_per_process or 0)

    def _check(self) -> None:
        for name, most in (("node_count", NODES_MAX), ("process_count", PROCESSES_MAX)):
            given = getattr(self, name)
            if given is not None and given > most:
                raise TooLarge(f"resources: {name} is {given}; at most {most}")
        for name in ("node_count", "process_count", "processes_per_node", "cpu_cores_per_process", "memory"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise BadRequest(f"resources: {name} is {given}", hint="Leave it out, or ask for at least 1.")
        if self.gpu_cores_per_process is not None and self.gpu_cores_per_process < 0:
            raise BadRequest(f"resources: gpu_cores_per_process is {self.gpu_cores_per_process}", hint="0 means none.")
        nodes, processes, per_node = self.node_count, self.process_count, self.processes_per_node
        if nodes and processes and per_node and nodes * per_node != processes:
            raise BadRequest(
                f"resources: {nodes} nodes with {per_node} processes each are {nodes * per_node} processes, and "
                f"process_count says {processes}",
                hint="Give two of the three; the other one follows.",
            )
        share = per_node or nodes
        if processes and share and processes % share:
            raise BadRequest(
                f"resources: {processes} processes cannot be shared out evenly "
                + (f"over {nodes} nodes" if share == nodes else f"with {per_node} on each node"),
                hint="Choose a process_count that is a multiple of it.",
            )


class JobAttributes(_Checked, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the batch system treats a job. ``duration`` is the most it may run, such as "10m"; None is the site's own.

    ``custom_attributes`` are passed on to one kind of batch system, such as ``{"slurm.qos": "urgent"}``.
    """

    hints = {"duration": 'With its unit, such as "10m".'}

    duration: str | None = None
    queue_name: str | None = None
    account: str | None = None
    reservation_id: str | None = None
    custom_attributes: dict[str, str] = {}

    @property
    def duration_s(self) -> float | None:
        """The most it may run in seconds, None where the site decides."""
        return None if self.duration is None else parse_duration(self.duration, "duration")

    def _check(self) -> None:
        _ = self.duration_s
        for name in ("queue_name", "account", "reservation_id"):
            given = getattr(self, name)
            if given is not None:
                plain(given, f"attributes: {name}")
        for name, value in self.custom_attributes.items():
            if not _ATTRIBUTE.fullmatch(name):
                raise BadRequest(
                    f"attributes: custom attribute {ascii(name)[:80]} names no batch system and option",
                    hint='Write it as "slurm.qos", "pbs.l" or "lsf.app".',
                )
            plain(value, f"attributes: custom attribute {name}")


class JobTime(Struct, frozen=True, kw_only=True):
    """Where the time of a job went, in seconds: in the queue, running, and moving inputs and outputs."""

    queue: float = 0.0
    run: float = 0.0
    stage_in: float = 0.0
    stage_out: float = 0.0


class JobEnd(Struct, frozen=True, kw_only=True):
    """How a job ended: what the function after it is given, and the result of a job that none follows.

    ``state`` is completed, failed or canceled; ``reason`` (``REASONS``) tells failures apart, and ``detail`` has the
    batch system's own words. ``outputs`` maps the names of the specification to URIs, ``missing`` has those that the
    job did not make; ``last_lines`` is the end of what it printed.
    """

    job_id: str = ""
    site: str = ""
    state: JobState = "completed"
    exit_code: int | None = None
    reason: Reason = ""
    detail: str = ""
    outputs: dict[str, str] = {}
    missing: list[str] = []
    time_s: JobTime = JobTime()
    native_id: str | None = None
    attempts: int = 1
    nodes: str = ""
    last_lines: str = ""


def failure(end: JobEnd) -> ErrorInfo:
    """Return the error of a job that failed: which one, where, why, and what it printed last."""
    which = f"the job {end.job_id}" + (f" ({end.native_id})" if end.native_id else "")
    why = REASONS.get(end.reason, "")
    code = f" with exit code {end.exit_code}" if end.reason == "exit_code" and end.exit_code is not None else ""
    parts = [f"{which} at {end.site} {end.state}{code}" + (f": {why}" if why and not code else "")]
    if end.detail:
        parts.append(end.detail)
    if end.last_lines:
        lines = end.last_lines.rstrip("\n").split("\n")[-LINES_TOLD_MAX:]
        parts.append("Its last lines:\n" + "\n".join(lines))
    return ErrorInfo(kind=end.reason or "job", message=". ".join(part.rstrip(". ") for part in parts))


class JobSpec(_Checked, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A batch job: what runs, with what, and where it may run.

    ``directory`` is where it runs, on the site's own disk; None is a fresh folder of its own. ``inputs`` are put there
    under their names before it starts, and ``outputs`` are paths in it that are kept when it has ended. ``sites`` are
    the ones it may go to, all if there are none. ``container`` is an image that the executable is taken from.
    ``launcher`` starts the processes of a job that has several; None is what the site uses. ``retries`` is how often it
    is run again where it failed for a reason that may not come again, such as a node that died.
    """

    hints = {
        "arguments": 'A list of strings, such as ["--steps", "1000"].',
        "environment": 'Variables and their values as strings, such as {"OMP_NUM_THREADS": "8"}.',
        "outputs": 'A list, such as ["energy.json"].',
        "sites": 'A list, such as ["lab"].',
    }

    executable: str
    arguments: list[str] = []
    directory: str | None = None
    environment: dict[str, str] = {}
    resources: Resources = Resources()
    attributes: JobAttributes = JobAttributes()
    inputs: dict[str, str] = {}
    outputs: list[str] = []
    sites: list[str] = []
    container: str | None = None
    launcher: str | None = None
    retries: int = 0

    def _check(self) -> None:
        plain(self.executable, "executable")
        if not 0 <= self.retries <= RETRIES_MAX:
            raise BadRequest(f"retries: {self.retries} is not 0 to {RETRIES_MAX}", hint="0 means that it runs once.")
        for i, argument in enumerate(self.arguments):
            if "\0" in argument:
                raise BadRequest(f"arguments: number {i} holds a NUL character, which no program can be given")
        if self.directory is not None:
            plain(self.directory, "directory")
            if "\\" in self.directory:
                raise BadRequest(
                    f"directory: {ascii(self.directory)[:80]} holds a backslash, which not all batch systems take",
                    hint="Choose a folder without.",
                )
            if not PurePosixPath(self.directory).is_absolute():
                raise BadRequest(
                    f"directory: {self.directory} is not absolute",
                    hint="Give a full path at the site, or none: then the job has a fresh folder of its own.",
                )
        check_variables(self.environment, "environment")
        self._check_files()
        _once(self.sites, "sites")
        for site in self.sites:
            check_name(site, "site")
        if self.container is not None:
            plain(self.container, "container")
            if self.container.startswith("-") or " " in self.container:
                raise BadRequest(f"container: {ascii(self.container)[:80]} is not an image", hint='Such as "md.sif".')
        if self.launcher is not None and self.launcher not in LAUNCHERS:
            raise BadRequest(
                f"launcher: {ascii(self.launcher)[:80]} is not known", hint=f"One of {', '.join(LAUNCHERS)}."
            )
        size = len(msgspec.json.encode(self))
        if size > SPEC_BYTES_MAX:
            raise TooLarge(
                f"the job's specification has {size} bytes; at most {SPEC_BYTES_MAX}",
                hint="Hand over large data as an input, by URI.",
            )

    def _check_files(self) -> None:
        if len(self.inputs) + len(self.outputs) > FILES_MAX:
            raise TooLarge(f"{len(self.inputs)} inputs and {len(self.outputs)} outputs; at most {FILES_MAX} in all")
        _once(self.outputs, "outputs")
        for name in (*self.inputs, *self.outputs):
            _inside(name, "inputs" if name in self.inputs else "outputs")
        for name in self.outputs:
            if _PATTERN.search(name):
                raise BadRequest(
                    f"outputs: {ascii(name)[:80]} is a pattern",
                    hint="Name each file, or let the job pack them into one.",
                )
        for name, uri in self.inputs.items():
            if name in PRINTED:
                raise BadRequest(f"inputs: {name} is where the job's own words go", hint="Choose another name.")
            if not _SCHEME.fullmatch(uri):
                raise BadRequest(
                    f"inputs: {name} is not given by a URI",  # and not repeated: it may hold a password
                    hint='Such as "s3://bucket/key", "https://..." or "blob:...".',
                )


def check_variables(variables: Mapping[str, str], what: str) -> None:
    """Refuse what cannot stand in the environment of a job.

    Raises:
        BadRequest: a name is none of a variable, or belongs to Headrace, or a value cannot be handed over.
    """
    for name, value in variables.items():
        if not _VARIABLE.fullmatch(name):
            raise BadRequest(
                f"{what}: {ascii(name)[:80]} is not the name of a variable",
                hint="Use letters, digits and underscores, and no digit first.",
            )
        if name.startswith("HEADRACE_"):
            raise BadRequest(f"{what}: {name} belongs to Headrace", hint="Choose another name.")
        if "\0" in value:
            raise BadRequest(f"{what}: {name} holds a NUL character")


def plain(text: str, what: str) -> None:
    """Refuse what would end a line of a batch script, or a word that is not there.

    Raises:
        BadRequest: the message says which.
    """
    if not text or _CONTROL.search(text):
        said = "holds a control character" if text else "is empty"
        raise BadRequest(f"{what} {said}")


def _inside(name: str, what: str) -> None:
    """Refuse a path that is not one of a file in the job's own folder."""
    parts = PurePosixPath(name).parts
    if not parts or _CONTROL.search(name) or name.startswith("/") or ".." in parts or parts[0] == RECORDS:
        raise BadRequest(
            f"{what}: {ascii(name)[:80]} is no file in the job's folder",
            hint=f'Give a relative path without ".." that does not begin with {RECORDS}.',
        )


def _once(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BadRequest(f"{what}: {ascii(name)[:80]} is given twice")
        seen.add(name)
