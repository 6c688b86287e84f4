"""What a running function asks for at once: bytes brought to a local path, and bytes kept under a URI."""

from __future__ import annotations

from pathlib import Path

from headrace.errors import BadRequest, HeadraceError
from headrace.wire import Ask, Granted
from streams.blobs import Blobs

SCHEME = "blob:"


async def grant(ask: Ask, blobs: Blobs) -> Granted:
    """Answer one request of a child. Its fault is told to it; the worker goes on."""
    try:
        if ask.what == "stage":
            return Granted(value=str(await stage(ask.uri, blobs)))
        if ask.body is not None:
            return Granted(value=SCHEME + await blobs.put(ask.body))
        return Granted(value=SCHEME + await blobs.put_file(Path(ask.path)))
    except HeadraceError as error:
        return Granted(error=str(error), hint=error.hint)
    except OSError as error:
        return Granted(error=f"{ask.path or ask.uri}: {error.strerror or error}", hint="Check the path.")


async def stage(uri: str, blobs: Blobs) -> Path:
    """Return a local file that holds the bytes of ``uri``; what is named by its hash needs no further check.

    Raises:
        BadRequest: the URI is of a kind that cannot be fetched.
        NotFound: there is nothing under it.
    """
    if not uri.startswith(SCHEME):
        raise BadRequest(
            f"{ascii(uri)[:200]} cannot be staged",
            hint='Upload the file (`Client.upload`) and pass the "blob:..." URI that comes back.',
        )
    return await blobs.path(uri[len(SCHEME) :])
