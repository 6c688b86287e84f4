"""The batch systems that run jobs, all behind one Protocol.

Rooms: ``base`` (the Protocol, its words and errors), ``blocking`` (what all have in common), ``records`` (what a job's
own folder tells of it, and the scripts that write it), ``executors`` (PSI/J's executors, mended and without its
polling), ``batch`` (any that has a queue), ``arrays`` (any that has job arrays, too), ``slurm``, ``pbs``, ``lsf`` and
``flux`` (what one has to know of each beyond PSI/J), ``local`` (this machine) with ``processes`` and ``machine`` (what
runs on it, and what it has), and ``lazy`` (any of them, opened when it is first needed).

Imports ``headrace``, and is imported by the agent.
"""

from __future__ import annotations

from headrace.errors import BadRequest
from workers.sites.base import BatchSystem, SiteConfig

KINDS = ("slurm", "pbs", "pbs_classic", "lsf", "flux", "local")


def open_site(config: SiteConfig) -> BatchSystem:
    """Return the batch system that a configuration names; nothing is asked of it yet, and no other one is imported.

    Raises:
        BadRequest: there is no such kind.
    """
    match config.kind:
        case "local":
            from workers.sites.local import Local

            return Local(config)
        case "slurm":
            from workers.sites.slurm import Slurm

            return Slurm(config)
        case "pbs":
            from workers.sites.pbs import PBS

            return PBS(config)
        case "pbs_classic":
            from workers.sites.pbs import PBSClassic

            return PBSClassic(config)
        case "lsf":
            from workers.sites.lsf import LSF

            return LSF(config)
        case "flux":
            from workers.sites.flux import Flux

            return Flux(config)
        case _:
            raise BadRequest(
                f"site {config.name}: kind {config.kind!r} is not known", hint=f"One of {', '.join(KINDS)}."
            )
