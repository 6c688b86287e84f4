"""``python -P -m infra.slurm start|stop|status --folder DIR``: a small Slurm to try things on."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from headrace.errors import HeadraceError
from infra.slurm.cluster import Cluster
from infra.slurm.layout import Shape

FOLDER = Path("build/slurm")


def _start(cluster: Cluster) -> int:
    if cluster.controller.pid is not None:
        print(f"It runs already in {cluster.layout.folder}.")
    else:
        cluster.start()
        shape = cluster.shape
        print(f"{shape.nodes} nodes with {shape.gpus} GPUs each are idle. To use them from a shell:")
    for name, value in cluster.env.items():
        print(f"  export {name}={shlex.quote(value)}")
    return 0


def _stop(cluster: Cluster) -> int:
    cluster.stop()
    print(f"Nothing runs from {cluster.layout.folder} any more.")
    return 0


def _status(cluster: Cluster) -> int:
    running = cluster.running()
    for name, pid in running.items():
        print(f"{name:<12} {pid or 'does not run'}")
    if cluster.controller.pid is not None:
        print(
            cluster.run("sinfo", "-N", "-O", "NodeList:8,StateLong:12,Gres:16,GresUsed:28,Reason:32", check=False),
            end="",
        )
        print(cluster.run("squeue", "-t", "all", check=False), end="")
    return 0 if all(running.values()) else 1


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command; the exit code is 0, or 1 if it failed or something does not run."""
    parser = argparse.ArgumentParser(prog="python -P -m infra.slurm", description=__doc__)
    parser.add_argument("command", choices=["start", "stop", "status"])
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="holds everything of the cluster (default %(default)s)"
    )
    parser.add_argument("--nodes", type=int, default=Shape().nodes, help="for start (default %(default)s)")
    parser.add_argument("--gpus", type=int, default=Shape().gpus, help="per node, for start (default %(default)s)")
    chosen = parser.parse_args(arguments)
    starts = chosen.command == "start"
    try:
        cluster = Cluster(chosen.folder, Shape(nodes=chosen.nodes, gpus=chosen.gpus) if starts else None)
        return {"start": _start, "stop": _stop, "status": _status}[chosen.command](cluster)
    except HeadraceError as error:
        print(f"{error}\n{error.hint}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
