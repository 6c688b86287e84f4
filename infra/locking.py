"""One platform per data folder: a lock that the kernel gives back when the last process that holds it is gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from headrace.errors import HeadraceError
from infra.credentials import private_folder

PATIENCE_S = 5.0
STEP_S = 0.05


class InUse(HeadraceError):
    """Another platform runs on this data folder."""

    title = "The data folder is in use"


def lock(data: Path) -> int:
    """Take the data folder for this process and those that inherit the descriptor that is returned.

    The log's server inherits it, so a platform that was killed holds its folder until that server, too, is gone.

    Raises:
        InUse: another platform runs here; the message names its process.
    """
    private_folder(data)
    path = private_folder(data / "run") / "lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(handle)
            if _runs(holder) or time.monotonic() > give_up_at:
                os.close(handle)
                raise InUse(
                    f"{data} is in use by another platform (process {holder})",
                    hint="Stop that one (Ctrl-C, or kill it), or choose another folder with --data.",
                ) from None
            time.sleep(STEP_S)  # its supervisor is gone and its servers are on their way out
        else:
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
            return handle


def _holder(handle: int) -> int:
    with contextlib.suppress(ValueError):
        return int(os.pread(handle, 32, 0))
    return 0


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid > 0
