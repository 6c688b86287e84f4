"""The batch systems that run jobs, all behind one Protocol.

Rooms: ``base`` (the Protocol, its words and errors), ``records`` (what a job's own folder tells of it, and the scripts
that write it), ``executors`` (PSI/J's executors by name, without its polling), ``batch`` (any that has a queue),
``slurm`` and ``portable`` (what one has to know of a batch system beyond PSI/J), ``local`` (this machine).

Imports ``headrace``, and is imported by the agent.
"""

from __future__ import annotations

from headrace.errors import BadRequest
from workers.sites.base import BatchSystem, SiteConfig

KINDS = ("slurm", "pbs", "pbs_classic", "lsf", "local")


def open_site(config: SiteConfig) -> BatchSystem:
    """Return the batch system that a configuration names; nothing is asked of it yet.

    Raises:
        BadRequest: there is no such kind.
    """
    if config.kind == "local":
        from workers.sites.local import Local

        return Local(config)
    if config.kind == "slurm":
        from workers.sites.slurm import Slurm

        return Slurm(config)
    if config.kind in KINDS:
        from workers.sites.portable import Portable

        return Portable(config)
    raise BadRequest(f"site {config.name}: kind {config.kind!r} is not known", hint=f"One of {', '.join(KINDS)}.")
