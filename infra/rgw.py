"""A real S3 server on loopback: Ceph's RADOS Gateway on a cluster of one disk file, for tests and benchmarks.

It checks signatures, their expiry, and Content-MD5. Nothing of it is for production: one copy of everything, no TLS.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Self

from headrace.errors import HeadraceError
from infra.credentials import write_private
from infra.embedded import LOOPBACK, free_port
from infra.process import tie_to

PROGRAMS = ("ceph-mon", "ceph-mgr", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool", "ceph-authtool")
INSTALL = "apt-get install --no-install-recommends ceph-mon ceph-mgr ceph-osd ceph-common radosgw"
DISK_BYTES = 24 * 1024**3  # sparse: it takes what is written to it
READY_S = 90.0
STEP_S = 0.05
STOP_S = 5.0
TOOL_S = 60.0

_CONF = """
[global]
fsid = {fsid}
mon_host = v2:{host}:{mon}
mon_initial_members = a
public_addr = {host}
cluster_addr = {host}
ms_bind_ipv4 = true
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = {root}/keyring
log_file = {root}/$name.log
run_dir = {root}
admin_socket = {root}/$name.asok
crash_dir = {root}
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_allow_pool_delete = true
mon_data_avail_warn = 1
mon_data_avail_crit = 1
mon_osd_full_ratio = .99
mon_osd_nearfull_ratio = .98
mon_osd_backfillfull_ratio = .98
[mon.a]
mon_data = {root}/mon
[mgr.x]
mgr_data = {root}/mgr
mgr_initial_modules =
[osd]
osd_data = {root}/osd
osd_objectstore = bluestore
bluestore_block_size = {disk}
bluestore_block_create = true
osd_memory_target = 1073741824
osd_class_dir = {classes}
[client.rgw.a]
rgw_data = {root}/rgw
rgw_frontends = beast endpoint={host}:{port}
rgw_gc_obj_min_wait = 5
rgw_gc_processor_period = 5
rgw_dynamic_resharding = false
rgw_enable_usage_log = false
"""


class NoRgw(HeadraceError):
    """The S3 server cannot be started here."""

    title = "The S3 server cannot be started"


def is_installed() -> bool:
    """Say whether all programs that it needs are here."""
    return all(shutil.which(program) for program in PROGRAMS)


class Rgw:
    """One S3 server with one user; ``url``, ``access_key`` and ``secret_key`` are good from ``start`` to ``stop``."""

    def __init__(self, folder: Path) -> None:
        """Describe the server; nothing is started yet.

        Args:
            folder: it makes a folder ``rgw`` there; the path must be short, for there are sockets in it.
        """
        self._root = folder.absolute() / "rgw"
        self._port = 0
        self._running: list[subprocess.Popen[bytes]] = []
        self.access_key = secrets.token_hex(10)
        self.secret_key = secrets.token_hex(20)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{LOOPBACK}:{self._port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Make the cluster and start it; takes about 15 seconds.

        Raises:
            NoRgw: a program is missing, or did not start.
        """
        if not is_installed():
            raise NoRgw(
                "Ceph's RADOS Gateway is not installed",
                hint=INSTALL,
            )
        shutil.rmtree(self._root, ignore_errors=True)  # of one that was killed
        self._root.mkdir(parents=True)
        try:
            self._make()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it and remove what it stored. Safe to repeat."""
        for process in reversed(self._running):
            process.send_signal(signal.SIGKILL)  # nothing in it has to outlive it
        for process in self._running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        self._running.clear()
        shutil.rmtree(self._root, ignore_errors=True)

    def credentials_file(self, path: Path) -> Path:
        """Write the keys where boto3 and Headrace read them, and return the path."""
        lines = f"aws_access_key_id = {self.access_key}\naws_secret_access_key = {self.secret_key}\n"
        write_private(path, f"[default]\n{lines}")
        return path

    def _make(self) -> None:
        root, mon, fsid = self._root, free_port(), str(uuid.uuid4())
        self._port = free_port()
        (root / "ceph.conf").write_text(
            _CONF.format(
                fsid=fsid,
                host=LOOPBACK,
                mon=mon,
                port=self._port,
                root=root,
                disk=DISK_BYTES,
                classes=_classes(),
            )
        )
        for name in ("mon", "mgr", "osd", "rgw"):
            (root / name).mkdir()
        self._tool("ceph-authtool", "--create-keyring", "keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        every = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        for name in ("client.admin", "osd.0", "mgr.x", "client.rgw.a"):
            self._tool("ceph-authtool", "keyring", "--gen-key", "-n", name, *every)
        self._tool("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:{LOOPBACK}:{mon}]", "monmap")
        self._tool("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring")
        self._serve("ceph-mon", "-i", "a")
        disk = str(uuid.uuid4())
        self._until("the cluster's monitor", "ceph", "osd", "new", disk)
        self._serve("ceph-mgr", "-i", "x")
        self._tool("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._serve("ceph-osd", "-i", "0")
        self._serve("radosgw", "-n", "client.rgw.a")
        self._wait_for_port()
        keys = ("--access-key", self.access_key, "--secret-key", self.secret_key)
        self._tool("radosgw-admin", "user", "create", "--uid", "headrace", "--display-name", "headrace", *keys)

    def _serve(self, program: str, *arguments: str) -> None:
        with (self._root / f"{program}.out").open("wb") as output:
            self._running.append(
                subprocess.Popen(
                    [_found(program), "-f", "-c", str(self._root / "ceph.conf"), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self._root,
                    start_new_session=True,
                    preexec_fn=tie_to(os.getpid()),
                )
            )

    def _tool(self, program: str, *arguments: str) -> bytes:
        return self._ran(program, *arguments, check=True).stdout

    def _ran(self, program: str, *arguments: str, check: bool) -> subprocess.CompletedProcess[bytes]:
        conf = () if program in ("ceph-authtool", "monmaptool") else ("-c", str(self._root / "ceph.conf"))
        done = subprocess.run(
            [_found(program), *conf, *arguments], cwd=self._root, capture_output=True, timeout=TOOL_S, check=False
        )
        if check and done.returncode:
            raise NoRgw(f"{program} failed: {done.stderr.decode(errors='replace')[-500:]}", hint="Look into its log.")
        return done

    def _until(self, what: str, program: str, *arguments: str) -> None:
        give_up_at = time.monotonic() + READY_S
        while self._ran(program, *arguments, check=False).returncode:
            if time.monotonic() > give_up_at:
                raise self._failed(what)
            time.sleep(STEP_S)

    def _wait_for_port(self) -> None:
        give_up_at = time.monotonic() + READY_S
        while True:
            with suppress(OSError), socket.create_connection((LOOPBACK, self._port), STEP_S):
                return
            if time.monotonic() > give_up_at or any(p.poll() is not None for p in self._running):
                raise self._failed("radosgw")
            time.sleep(STEP_S)

    def _failed(self, what: str) -> NoRgw:
        tails = {p.name: p.read_bytes()[-300:].decode(errors="replace") for p in self._root.glob("*.out")}
        return NoRgw(f"{what} was not ready within {READY_S:g} s", hint=json.dumps(tails))


def _found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise NoRgw(
            f"{program} is not installed", hint="apt-get install ceph-common radosgw ceph-mon ceph-osd ceph-mgr"
        )
    return path


def _classes() -> Path:
    """Return the folder of Ceph's object classes, which depends on the architecture."""
    return next(iter(Path("/usr/lib").glob("*/rados-classes")), Path("/usr/lib/rados-classes"))
