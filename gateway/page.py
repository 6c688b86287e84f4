"""The live page: a handful of files, read once, served with headers that let them load nothing from elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

FOLDER = Path(__file__).parent / "page"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".woff2": "font/woff2",
}


class PageFile(NamedTuple):
    """A file of the page as it is served."""

    content: bytes
    content_type: str
    tag: str


def load(folder: Path = FOLDER) -> dict[str, PageFile]:
    """Read the files of the page, by name. Only what lies in the folder itself is served, so no path can lead out."""
    found: dict[str, PageFile] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in TYPES:
            content = path.read_bytes()
            found[path.name] = PageFile(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:16]}"')
    return found


class Page:
    """Serves the files; a browser asks each time whether its copy is still right, and mostly gets a 304."""

    def __init__(self, files: dict[str, PageFile]) -> None:
        self._files = files

    async def index(self, request: web.Request) -> web.Response:
        """Answer ``GET /``."""
        return self._serve(request, "index.html")

    async def file(self, request: web.Request) -> web.Response:
        """Answer ``GET /page/{file}``."""
        return self._serve(request, request.match_info["file"])

    def _serve(self, request: web.Request, name: str) -> web.Response:
        found = self._files.get(name)
        if found is None:
            raise web.HTTPNotFound
        headers = {
            "Content-Security-Policy": CSP,
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-cache",
            "ETag": found.tag,
        }
        if found.tag in request.headers.get("If-None-Match", ""):
            return web.Response(status=304, headers=headers)
        return web.Response(body=found.content, content_type=found.content_type, charset="utf-8", headers=headers)
