"""A Slurm cluster of this machine: munge, one controller and several node daemons, and the faults they can have."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from infra.embedded import free_port
from infra.process import NotStarted
from infra.programs import NoServer
from infra.slurm import pbs, sbatch
from infra.slurm.daemons import Daemon, processes_marked, until
from infra.slurm.layout import JOB_MINUTES_MAX, LOOPBACK, Layout, Shape

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
PLACES = ("/usr/sbin", "/sbin", "/usr/local/sbin")  # not on an ordinary user's path
MUNGE_KEY_BYTES = 1024
READY_S = 20.0
COMMAND_S = 20.0
PORT_TRIES = 3
MARK = "HEADRACE_SLURM_NODE"  # tells the processes of one node's jobs from all others


class Cluster:
    """One cluster in one folder. Runs as root or as any user; that user is Slurm's own, and its administrator."""

    def __init__(self, folder: Path, shape: Shape | None = None) -> None:
        """Describe the cluster; nothing is started yet. Without a shape, that of the one already in the folder."""
        self.layout = Layout(folder)
        if shape is None:
            found = self.layout.shape
            shape = msgspec.json.decode(found.read_bytes(), type=Shape) if found.exists() else Shape()
        self.shape = shape
        self.munged = self._daemon(
            "munged",
            "--foreground",
            f"--socket={self.layout.munge_socket}",
            f"--key-file={self.layout.munge_key}",
            f"--pid-file={folder.absolute()}/run/munged.pid",
            f"--log-file={folder.absolute()}/log/munged.log",
            f"--seed-file={folder.absolute()}/run/munged.seed",
            "--force",  # the folder may lie below one that others may write to, such as /tmp
        )
        self.controller = self._daemon("slurmctld", "-D", "-f", str(self.layout.conf))
        self.nodes = {
            name: self._daemon("slurmd", "-D", "-f", str(self.layout.conf), "-N", name, node=name)
            for name in shape.names
        }
        self._tied = False

    # ------------------------------------------------------------ as a whole

    @property
    def env(self) -> dict[str, str]:
        """What a client needs in its environment, beside its own: this cluster's configuration and ``sbatch``."""
        return {
            "SLURM_CONF": str(self.layout.conf),
            "PATH": f"{self.layout.bin}:{os.environ.get('PATH', os.defpath)}",
        }

    def start(self, *, tied: bool = False) -> None:
        """Start all daemons and return once every node is idle.

        Args:
            tied: let the kernel end them when this process is gone.

        Raises:
            NoServer: Slurm or munge is not installed.
            NotStarted: a daemon ended, or the nodes did not get ready; the message holds its last lines.
        """
        if names := missing():
            raise NoServer(f"not installed: {', '.join(names)}", hint="apt-get install slurm-wlm munge")
        self._tied = tied
        for attempt in range(1, PORT_TRIES + 1):
            self._write()
            self.munged.start(tied=tied)
            if not until(self.layout.munge_socket.is_socket, READY_S):
                raise self._not_started(self.munged)
            for daemon in (self.controller, *self.nodes.values()):
                daemon.start(tied=tied)
            if until(self._all_idle, READY_S):
                return
            error = self._not_started(self.controller)
            self.stop()
            if attempt == PORT_TRIES or "Address already in use" not in str(error):
                raise error

    def stop(self) -> None:
        """End the jobs, then every daemon that runs from this folder. Safe to repeat."""
        if self.controller.pid is not None:
            self.run("scancel", f"--user={os.getuid()}", check=False)
        for name, daemon in self.nodes.items():
            daemon.stop()
            _kill(self._processes(name))
        self.controller.stop()
        self.munged.stop()
        self.layout.munge_socket.unlink(missing_ok=True)

    def running(self) -> dict[str, int | None]:
        """Return each daemon's process by name; None where it does not run."""
        return {daemon.name: daemon.pid for daemon in (self.munged, self.controller, *self.nodes.values())}

    # ------------------------------------------------------------ asking

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands against this cluster and return what it printed.

        Raises:
            subprocess.CalledProcessError: it failed; not if ``check`` is False.
            subprocess.TimeoutExpired: it did not end in time.
        """
        return subprocess.run(
            command,
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            check=check,
            timeout=COMMAND_S,
        ).stdout

    def node_states(self) -> dict[str, str]:
        """Return the state of each node in Slurm's words, such as ``idle`` or ``down*``."""
        lines = self.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %T", check=False).splitlines()
        return dict(line.split(maxsplit=1) for line in lines)

    def jobs(self) -> dict[str, str]:
        """Return the name of every job that Slurm's own records have, running, waiting or ended, by its id.

        Ended ones come from the record of completed jobs, which is never purged.
        """
        found = dict(
            line.split(maxsplit=1) for line in self.run("squeue", "-h", "-r", "-t", "all", "-o", "%A %j").splitlines()
        )
        if self.layout.ended.exists():
            for line in self.layout.ended.read_text().splitlines():
                fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
                found[fields["JobId"]] = fields["Name"]
        return found

    # ------------------------------------------------------------ faults

    def fail_sbatch(self, mode: sbatch.Fault, count: int = 1) -> None:
        """Let the next submissions fail; see ``infra.slurm.sbatch``."""
        sbatch.choose(self.layout.sbatch_fault, mode, count)

    def restart_controller(self) -> None:
        """Stop the controller and start it again from the state it saved; jobs run on meanwhile."""
        self.stop_controller()
        self.start_controller()

    def stop_controller(self) -> None:
        """Stop the controller: every command fails, and jobs run on."""
        self.controller.stop()

    def start_controller(self) -> None:
        """Start the controller again from the state it saved, and return once it answers.

        Raises:
            NotStarted: it does not answer in time.
        """
        self.controller.start(tied=self._tied)
        if not until(lambda: "is UP" in self.run("scontrol", "ping", check=False), READY_S):
            raise self._not_started(self.controller)

    def hang_controller(self) -> None:
        """Let the controller hang: commands time out, and what they asked for may still be done later."""
        self.controller.send(signal.SIGSTOP)

    def wake_controller(self) -> None:
        """Let a hung controller go on."""
        self.controller.send(signal.SIGCONT)

    def mend(self) -> None:
        """Take all faults and jobs away and return once every node is idle.

        Raises:
            NotStarted: they do not get so in time.
        """
        self.layout.sbatch_fault.unlink(missing_ok=True)
        self.wake_controller()
        if self.controller.pid is None:
            self.start_controller()
        for name, daemon in self.nodes.items():
            if daemon.pid is None:
                self.start_node(name)
        for partition in ("gpu", "debug"):
            self.set_partition("UP", partition)
        self.run("scancel", f"--user={os.getuid()}", check=False)
        for name, state in self.node_states().items():
            if not state.startswith(("idle", "mixed", "allocated", "completing")):
                self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
        if not until(self._all_idle, READY_S):
            raise self._not_started(self.controller)

    def drain(self, node: str) -> None:
        """Let a node take no new jobs."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=maintenance")

    def end_soon(self, jobs: Sequence[str]) -> None:
        """Let running jobs come to the end of their time now; Slurm ends them when it next looks, within half a minute.

        A limit is a minute at least, and a test that waits for one waits for longer than for all others together.
        """
        for job in jobs:
            self.run("scontrol", "update", f"JobId={job}", "EndTime=now+1")

    def resume(self, node: str) -> None:
        """Let a drained or downed node take jobs again."""
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def down(self, node: str) -> None:
        """Let the controller take a node for dead at once; its jobs end with NODE_FAIL or wait anew."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def kill_node(self, node: str) -> None:
        """Let a node die as in a power cut: its daemon and all that its jobs had running are gone at once.

        The controller takes note after its own time: ``NODE_SILENT_S`` and up to half a minute for a node with a job.
        """
        marked: set[int] = set()
        while more := self._processes(node) - marked:
            _kill(more, signal.SIGSTOP)  # so that none of them sees another one die and tells of it, or begins another
            marked |= more
        _kill(marked)
        self.nodes[node].kill()

    def start_node(self, node: str) -> None:
        """Switch a node on again."""
        self.nodes[node].start(tied=self._tied)

    def set_partition(self, state: str, name: str = "gpu") -> None:
        """Set a partition UP, DOWN (jobs wait), DRAIN or INACTIVE (jobs are refused)."""
        self.run("scontrol", "update", f"PartitionName={name}", f"State={state}")

    def fill(self) -> list[str]:
        """Take every node for an hour, and return the ids of the jobs that do: what comes now waits."""
        return [
            self.run(
                "sbatch",
                "--parsable",
                f"--nodelist={node}",
                "--exclusive",
                f"--time={JOB_MINUTES_MAX}",
                "--job-name=filler",
                "--output=/dev/null",
                f"--wrap=sleep {JOB_MINUTES_MAX * 60}",
            ).strip()
            for node in self.shape.names
        ]

    def cancel(self, jobs: Sequence[str]) -> None:
        """Cancel jobs by id."""
        self.run("scancel", *jobs)

    # ------------------------------------------------------------ inside

    def _daemon(self, program: str, *arguments: str, node: str | None = None) -> Daemon:
        folder = self.layout.folder
        env = {"PATH": os.environ.get("PATH", os.defpath), "SLURM_CONF": str(self.layout.conf), "LANG": "C.UTF-8"}
        if node is not None:
            env[MARK] = self._mark(node)
        name = program if node is None else f"{program}-{node}"
        return Daemon(name, [_program(program) or program, *arguments], env, folder / "run", folder / "log")

    def _processes(self, node: str) -> set[int]:
        """Return what runs on a node: its daemon's processes, and those of jobs, also where Slurm has lost them.

        A program whose script is killed as it begins has no parent, by which Slurm knows processes here.
        """
        ours = {"SLURM_CONF": self.env["SLURM_CONF"], "SLURMD_NODENAME": node}
        return processes_marked({MARK: self._mark(node)}, ours)

    def _mark(self, node: str) -> str:
        return f"{self.layout.folder}:{node}"

    def _write(self) -> None:
        layout, shape = self.layout, self.shape
        for folder in layout.folders(shape):
            folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        layout.shape.write_bytes(msgspec.json.encode(shape))
        if not layout.munge_key.exists():
            layout.munge_key.touch(mode=0o600)
            layout.munge_key.write_bytes(secrets.token_bytes(MUNGE_KEY_BYTES))
            layout.munge_key.chmod(0o400)
        for number in range(shape.gpus):
            device = layout.folder / "dev" / f"nvidia{number}"
            if not device.is_symlink():
                device.symlink_to("/dev/null")
        node_ports = [free_port() for _ in shape.names]
        layout.conf.write_text(layout.slurm_conf(shape, free_port(), node_ports))
        (layout.conf.parent / "gres.conf").write_text(layout.gres_conf(shape))
        sbatch.install(_program("sbatch") or "sbatch", layout.bin / "sbatch", layout.sbatch_fault)
        if (qsub := _program(pbs.PROGRAM)) is not None:
            sbatch.install(str(pbs.install(qsub, layout.bin)), layout.bin / pbs.PROGRAM, layout.sbatch_fault)
            (layout.conf.parent / "plugstack.conf").write_text(f"optional {pbs.PLUGIN}\n")

    def _all_idle(self) -> bool:
        if self.controller.pid is None:
            return True  # told as an error by the next look
        states = self.node_states()
        return len(states) == self.shape.nodes and set(states.values()) == {"idle"}

    def _not_started(self, daemon: Daemon) -> NotStarted:
        logs = self.layout.folder / "log"
        return NotStarted(
            f"{daemon.name} on {LOOPBACK} is not ready; its last lines:\n{daemon.tail()}", hint=f"See {logs}."
        )


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(PLACES))


def missing() -> list[str]:
    """Return the programs of Slurm that are not installed here."""
    return [name for name in PROGRAMS if _program(name) is None]


def _kill(pids: set[int], number: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
