"""An authority for certificates, and servers that show them: real TLS on loopback, with nothing installed anywhere."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority:
    """Signs certificates; ``ca_file`` is what those trust that believe it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ca_file = folder / "ca.pem"
        self._openssl(
            *("req", "-x509", *_KEY, "-days", "2", "-subj", "/CN=an authority of tests"),
            *("-keyout", "ca.key", "-out", "ca.pem", "-addext", "keyUsage=critical,keyCertSign"),
        )

    def server(self, *names: str, days: int = 1, own_word: bool = False) -> ssl.SSLContext:
        """Return what a server of these names shows.

        Args:
            names: as in a certificate: DNS:data.example, IP:127.0.0.1.
            days: how long it is good; -1 for one that was good until yesterday.
            own_word: signed by nobody but itself.
        """
        signed_by = ("-signkey", "server.key") if own_word else ("-CA", "ca.pem", "-CAkey", "ca.key")
        wanted = f"subjectAltName={','.join(names)}"
        self._openssl(
            "req", *_KEY, "-subj", "/CN=a server", "-addext", wanted, "-keyout", "server.key", "-out", "server.csr"
        )
        self._openssl(
            *("x509", "-req", "-in", "server.csr", "-copy_extensions", "copy", "-days", str(days)),
            *(*signed_by, "-out", "server.pem"),
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._folder / "server.pem", self._folder / "server.key")
        return context

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._folder, check=True, capture_output=True, timeout=30)
