"""Where the platform is and how to be let in: as given, else from the environment, else from ``./.headrace``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from headrace.errors import BadRequest, PlatformUnreachable, Unauthorized

URL_VARIABLE = "HEADRACE_URL"
TOKEN_VARIABLE = "HEADRACE_TOKEN"  # noqa: S105 - the name of a variable, not a token
FOLDER = Path(".headrace")


@dataclass(frozen=True)
class Address:
    """The URL of a gateway, without a slash at its end, and the bearer token, which its repr does not show."""

    url: str
    token: str = field(repr=False)


def find(url: str | None = None, token: str | None = None) -> Address:
    """Return the address to use. The token in ``./.headrace`` goes to the URL in ``./.headrace`` and nowhere else.

    Args:
        url: the gateway's URL; else ``HEADRACE_URL``, else what ``headrace up`` wrote to ``./.headrace/url``.
        token: the bearer token; else ``HEADRACE_TOKEN``, else the one in ``./.headrace/token``.

    Raises:
        PlatformUnreachable: no URL is given anywhere.
        Unauthorized: no token is given for this URL.
        BadRequest: the URL or the token cannot be one.
    """
    near = _read(FOLDER / "url")
    chosen = url or os.environ.get(URL_VARIABLE) or near
    if not chosen:
        raise PlatformUnreachable(
            "no platform is known here",
            hint=f"Start one in this folder with `headrace up`, or set {URL_VARIABLE} and {TOKEN_VARIABLE}.",
        )
    chosen = _checked_url(chosen)
    secret = token or os.environ.get(TOKEN_VARIABLE)
    if not secret and near and _checked_url(near) == chosen:
        secret = _read(FOLDER / "token")
    if not secret:
        raise Unauthorized(
            f"there is no token for {chosen}",
            hint=f"Set {TOKEN_VARIABLE}; the embedded platform keeps its token in {FOLDER}/token.",
        )
    secret = secret.strip()
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise BadRequest("the token holds characters that no token has", hint=f"Check {TOKEN_VARIABLE}.")
    return Address(chosen, secret)


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise PlatformUnreachable(
            f"{path} cannot be read: {error}", hint="Run as the user who started `headrace up`."
        ) from error


def _checked_url(text: str) -> str:
    try:
        parts = urlsplit(text.strip())
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise BadRequest(
            f"{ascii(text)[:80]} is not the URL of a platform", hint="Use a URL such as http://127.0.0.1:8080."
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise BadRequest(
            f"the URL of {parts.hostname} holds more than an address",
            hint=f"Write scheme, host and port only; the token belongs in {TOKEN_VARIABLE}.",
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
