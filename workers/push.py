"""What a job needs to report by itself: a secret of its own, a script, and the lines that call it.

A report is a hint that lets the agent look at once instead of in its next round. Where the compute nodes cannot reach a
gateway, or have neither curl nor python3, there are none, and the round finds the end.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shlex
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from headrace.errors import BadRequest
from headrace.jobs import RECORDS

SCRIPT = Path(__file__).parent / "sites" / "push.sh"
SECRET_BYTES = 32
SECRET_FILE = "secret"  # noqa: S105 - a name, not a secret
_HEADER = 'header = "Authorization: Bearer {}"\n'
_WRITTEN = re.compile(_HEADER.format(f"([0-9a-f]{{{2 * SECRET_BYTES}}})"))


class Pushed(NamedTuple):
    """Lines for ``Submission.before`` and ``after``, and the SHA-256 (hex) of the secret; all empty without a push."""

    before: str = ""
    after: str = ""
    digest: str = ""


class Push:
    """Prepares jobs to report to a gateway."""

    def __init__(self, public_url: str) -> None:
        """Name the gateway.

        Args:
            public_url: where compute nodes reach it; empty if they cannot, and then nothing is pushed.

        Raises:
            BadRequest: it is not the address of a gateway.
        """
        parts = urlsplit(public_url)
        good = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.username
        if public_url and not good:
            raise BadRequest(
                "the address at which jobs reach the gateway is not one",
                hint="Set HEADRACE_PUBLIC_URL to an address such as https://headrace.example.org, or to nothing.",
            )
        self._url = public_url.rstrip("/")

    def prepare(self, folder: Path, run_id: str, job_id: str) -> Pushed:
        """Write what a job needs into its own folder, and return what calls it. The same folder keeps its secret."""
        if not self._url:
            return Pushed()
        records = folder / RECORDS
        records.mkdir(parents=True, exist_ok=True)
        secret = _secret(records / SECRET_FILE)
        script = records / SCRIPT.name
        script.write_bytes(SCRIPT.read_bytes())
        where = shlex.quote(str(records))
        call = f"bash {shlex.quote(str(script))}"
        url = shlex.quote(f"{self._url}/v1/jobs/{run_id}/{job_id}/report")
        # In a group of processes of its own, which is ended as one; and with nothing open that others wait to close.
        watch = f'{call} watch {where} {url} "$$" >/dev/null 2>&1 3>&- & echo $! >{where}/push.pid'
        return Pushed(
            before=f"(set -m; {watch})",
            after=f'{call} end {where} {url} "$_PSI_J_EC" >/dev/null 2>&1',
            digest=hashlib.sha256(secret.encode()).hexdigest(),
        )


def _secret(path: Path) -> str:
    """Return the secret in a file, which is made where there is none yet; nobody else can read it."""
    try:
        found = _WRITTEN.fullmatch(path.read_text())
    except FileNotFoundError:
        found = None
    if found is not None:
        return found[1]
    secret = secrets.token_hex(SECRET_BYTES)
    aside = path.with_name(f"{path.name}.new")
    aside.unlink(missing_ok=True)
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(_HEADER.format(secret))
    aside.replace(path)
    return secret
