"""An HTTP server of one file that can cut, flip, lie and refuse, and counts what it was asked."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Faulty:
    """What the server holds and how it misbehaves; change it at any time."""

    body: bytes = b""
    etag: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    ranged: bool = True
    cut_after: int | None = None  # bytes sent of each of the next `cuts` answers
    cuts: int = 0
    flip_at: int | None = None  # the byte at this place is another, for the next `flips` answers that hold it
    flips: int = 0
    status: int = 0  # answered instead, for the next `refusals`
    refusals: int = 0
    redirect: str = ""
    size_told: int | None = None
    gate: threading.Event | None = None  # answers wait for it, the first one of each file excepted
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0
    url: str = ""
    port: int = 0

    def tag(self) -> str:
        return self.etag or f'"{md5(self.body).hexdigest()}"'


@contextmanager
def serving(faulty: Faulty, tls: ssl.SSLContext | None = None) -> Iterator[Faulty]:
    """Run it in a thread of its own; ``tls`` is what it shows of itself."""
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def do_GET(self) -> None:
            with turn:
                faulty.asked.append((self.path, self.headers.get("Range", "")))
                refused = faulty.refusals > 0
                faulty.refusals -= refused
            if refused or faulty.redirect:
                self.send_response(faulty.status if refused else 302)
                if not refused:
                    self.send_header("Location", faulty.redirect)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if self.headers.get("If-Match") not in (None, faulty.tag()):
                self.send_response(412)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start, end, size = 0, len(faulty.body), faulty.size_told or len(faulty.body)
            wanted = re.fullmatch("bytes=([0-9]+)-([0-9]+)", self.headers.get("Range", ""))
            if faulty.ranged and wanted:
                start, end = int(wanted[1]), min(end, int(wanted[2]) + 1)
                if start >= len(faulty.body):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{size}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            else:
                self.send_response(200)
            if start and faulty.gate is not None:
                faulty.gate.wait(30)
            self.send_header("ETag", faulty.tag())
            for name, value in faulty.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            self._send(bytearray(faulty.body[start:end]), start, end)

        def _send(self, body: bytearray, start: int, end: int) -> None:
            with turn:
                if faulty.flips > 0 and faulty.flip_at is not None and start <= faulty.flip_at < end:
                    body[faulty.flip_at - start] ^= 1
                    faulty.flips -= 1
                cut = faulty.cuts > 0 and faulty.cut_after is not None and len(body) > faulty.cut_after
                faulty.cuts -= cut
            if cut:
                body = body[: faulty.cut_after]
                self.close_connection = True
            with turn:
                faulty.sent += len(body)
            try:
                self.wfile.write(body)
            except OSError:
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            return  # callers hang up, as they should

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        # Each connection shakes hands in a thread of its own: one that does not must not keep the others waiting.
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    faulty.port = server.server_address[1]
    faulty.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{faulty.port}/data"
    try:
        yield faulty
    finally:
        if faulty.gate is not None:
            faulty.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
