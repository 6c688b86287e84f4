"""Where the parts of a cluster lie, and its configuration as text."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from msgspec import Struct

LOOPBACK = "127.0.0.1"
GPU_TYPE = "a100"
NODE_MEMORY_MIB = 4000

# How fast a test cluster reacts; a facility waits ten times as long. Seconds, but for the limits of a job in minutes.
NODE_SILENT_S = 3
MESSAGE_TIMEOUT_S = 3
KILL_WAIT_S = 2
FINISHED_KEPT_S = 60
JOB_MINUTES_MAX = 120
JOB_MINUTES_DEFAULT = 5
DEBUG_MINUTES_MAX = 5
DEBUG_MINUTES_DEFAULT = 1


class Shape(Struct, frozen=True, kw_only=True):
    """What a cluster has: ``gpus`` and ``cpus`` are per node; none of them needs to be in this machine."""

    nodes: int = 3
    gpus: int = 4
    cpus: int = 4
    finished_kept_s: int = FINISHED_KEPT_S

    @property
    def names(self) -> list[str]:
        """The names of the nodes."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]


class Layout:
    """The folders and files of one cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.conf = self.folder / "etc" / "slurm.conf"
        self.shape = self.folder / "etc" / "shape.json"
        self.munge_key = self.folder / "etc" / "munge.key"
        self.munge_socket = self.folder / "run" / "munge.socket"
        self.ended = self.folder / "log" / "ended.txt"
        self.bin = self.folder / "bin"
        self.sbatch_fault = self.folder / "run" / "sbatch-fault"
        self.work = self.folder / "work"

    def folders(self, shape: Shape) -> list[Path]:
        """Return the folders that have to be there before the first daemon starts."""
        parts = ["etc", "run", "log", "state", "dev", "bin", "work", *(f"spool/{name}" for name in shape.names)]
        return [self.folder, *(self.folder / part for part in parts)]

    def slurm_conf(self, shape: Shape, controller_port: int, node_ports: list[int]) -> str:
        """Return ``slurm.conf``: no control groups, no accounting, a scheduler that looks at once."""
        folder, user = self.folder, pwd.getpwuid(os.getuid()).pw_name
        gres = f" Gres=gpu:{GPU_TYPE}:{shape.gpus}" if shape.gpus else ""
        nodes = [
            f"NodeName={name} NodeHostname=localhost NodeAddr={LOOPBACK} Port={port} CPUs={shape.cpus} "
            f"RealMemory={NODE_MEMORY_MIB}{gres} State=UNKNOWN"
            for name, port in zip(shape.names, node_ports, strict=True)
        ]
        everything = ",".join(shape.names)
        lines = [
            "ClusterName=headrace",
            f"SlurmctldHost=localhost({LOOPBACK})",
            f"SlurmctldPort={controller_port}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={self.munge_socket}",
            "CredType=cred/munge",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool/%n",
            f"SlurmctldPidFile={folder}/run/slurmctld.pid",
            f"SlurmdPidFile={folder}/run/slurmd.%n.pid",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/linux",
            "JobAcctGatherFrequency=task=1",
            "JobAcctGatherParams=OverMemoryKill",  # where control groups cannot, the nodes' daemons watch the memory
            "MpiDefault=none",
            "SwitchType=switch/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU_Memory",
            f"DefMemPerCPU={NODE_MEMORY_MIB // shape.cpus}",
            "SlurmdParameters=config_overrides",  # more CPUs than this machine has
            "GresTypes=gpu",
            "ReturnToService=1",  # 2 would bring a node that a test took down back by itself
            f"SlurmdTimeout={NODE_SILENT_S}",
            f"MessageTimeout={MESSAGE_TIMEOUT_S}",
            f"KillWait={KILL_WAIT_S}",
            f"MinJobAge={shape.finished_kept_s}",
            "EnforcePartLimits=ALL",  # an impossible job is refused and does not wait for ever
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1",
            "JobCompType=jobcomp/filetxt",
            f"JobCompLoc={self.ended}",
            "PriorityType=priority/basic",
            *nodes,
            f"PartitionName=gpu Nodes={everything} Default=YES MaxTime={JOB_MINUTES_MAX} "
            f"DefaultTime={JOB_MINUTES_DEFAULT} State=UP",
            f"PartitionName=debug Nodes={everything} MaxTime={DEBUG_MINUTES_MAX} DefaultTime={DEBUG_MINUTES_DEFAULT} "
            "PriorityTier=10 State=UP",
        ]
        return "\n".join(lines) + "\n"

    def gres_conf(self, shape: Shape) -> str:
        """Return ``gres.conf``: devices that are links to /dev/null, which Slurm counts like real ones."""
        if not shape.gpus:
            return ""
        return f"Name=gpu Type={GPU_TYPE} File={self.folder}/dev/nvidia[0-{shape.gpus - 1}]\n"
