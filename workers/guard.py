"""What may be fetched, and what names are safe: the one place that decides it, for inputs and outputs alike.

An address is judged after its name was resolved, and the connection goes to the very address that was judged, so a name
that changes its mind leads nowhere; redirects are judged like first addresses. Nothing that is fetched is ever unpacked
or decoded, so there is no archive that could burst: a body with a content encoding is refused.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit

from msgspec import Struct

from headrace.errors import BadRequest, NotFound

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NAME_BYTES_MAX = 255
DEPTH_MAX = 32
URI_CHARS_MAX = 4096
# Also where the address is wrong and a password is not where one belongs.
_USER = re.compile("(^(?:[^:/@]*:)?)/{0,2}[^/]*@|//[^/]*:(?![0-9]+/).*@", re.DOTALL)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
PORTS = {"https": 443, "http": 80}
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}")
_PUBLIC_NAME = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])")
_NO_FILE = {  # what opening it tells of what lies under a name; all else is told of the disk
    errno.ELOOP: "is a link",
    errno.ENOTDIR: "lies behind a link, or something that is no folder",
    errno.EISDIR: "is a folder",
    errno.ENXIO: "is a pipe or a socket",
    errno.EACCES: "may not be opened",
    errno.EPERM: "may not be opened",
}
_FILES_ONLY = "Name plain files, each with a name of its own: no folders, links or pipes."
_INNER = re.compile(r"(?:^|\.)(?:localhost|localdomain|local|internal|intranet|private|corp|home|lan|arpa)$")


class Endpoint(Struct, frozen=True, kw_only=True):
    """A server that may be talked to: the checked ``addresses`` are where to connect, ``host`` is what it is called.

    Without addresses it is the site's proxy that is to be asked for the host.
    """

    scheme: str
    host: str
    port: int
    addresses: tuple[str, ...]

    def is_of(self, url: str) -> bool:
        """Say whether an address that may be fetched leads to this server."""
        parts = urlsplit(url)
        return (parts.scheme, _host(parts), parts.port or PORTS[parts.scheme]) == (self.scheme, self.host, self.port)


class Guard:
    """The rules of one site."""

    def __init__(
        self,
        *,
        hosts: Iterable[str] = (),
        folders: Iterable[Path] = (),
        buckets: Iterable[str] = (),
        bytes_max: int = 64 * 1024**3,
        proxied: bool = False,
    ) -> None:
        """Set the rules.

        Args:
            hosts: names, addresses and networks of one's own that may be fetched from although they are private, by
                plain http too. Link-local addresses, where clouds hand out credentials, never may.
            folders: below these, ``file:`` may read.
            buckets: ``bucket`` or ``bucket/prefix``, from which ``s3:`` may read with the platform's credentials.
            bytes_max: the size of the largest thing that is fetched.
            proxied: only a proxy leads to others than ``hosts``. It resolves names by itself, so what a name means
                there is for the proxy to judge; what it means here, and what it says by itself, is judged all the same.

        Raises:
            BadRequest: a host is neither a name nor an address nor a network.
        """
        self._names: set[str] = set()
        self._networks: list[Network] = []
        for host in hosts:
            try:
                self._networks.append(ipaddress.ip_network(host.strip("[]")))
            except ValueError:
                if not _HOST.fullmatch(host):
                    raise BadRequest(f"{host!a} is no host", hint="Name hosts, addresses, or networks.") from None
                self._names.add(host.lower())
        self._folders = [Path(os.path.realpath(folder)) for folder in folders]
        self._buckets = [tuple(bucket.partition("/")[::2]) for bucket in buckets]
        self.bytes_max = bytes_max
        self._proxied = proxied

    # ------------------------------------------------------------ servers

    def endpoint(self, url: str) -> Endpoint:
        """Return the server behind an address that may be fetched. Blocks while the name is resolved.

        Raises:
            BadRequest: it may not be fetched, or is no address; the message never holds its query.
            NotFound: the name of the server cannot be resolved.
        """
        parts = _split(url)
        host = _host(parts)
        own = host in self._names
        port = parts.port or PORTS[parts.scheme]
        addresses = self._resolved(host, port)
        allowed = [a for a in addresses if self._may(a, own)]
        is_own = own or (bool(allowed) and all(self._is_own(a) for a in allowed))
        by_proxy = self._proxied and not is_own
        # Which of them a proxy would take cannot be known.
        if addresses and (len(allowed) < len(addresses) if by_proxy else not allowed):
            refused = next(a for a in addresses if a not in allowed)
            raise BadRequest(
                f"{host!a} leads to {refused}, which must not be fetched from",
                hint="Public servers only; an operator allows others with HEADRACE_STAGE_HOSTS.",
            )
        if parts.scheme == "http" and not is_own:
            raise BadRequest(
                f"{host!a} cannot be fetched from by plain http",
                hint="Use https; an operator allows http to hosts in HEADRACE_STAGE_HOSTS.",
            )
        found = () if by_proxy else tuple(dict.fromkeys(str(a) for a in allowed))
        return Endpoint(scheme=parts.scheme, host=host, port=port, addresses=found)

    def _resolved(self, host: str, port: int) -> list[Address]:
        """Return where a name leads from here; nowhere, if it is one that only the proxy can know."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            if self._proxied and host not in self._names and _PUBLIC_NAME.fullmatch(host) and not _INNER.search(host):
                return []
            raise NotFound(
                f"there is no server {host!a}",
                hint="Check the name in the URI. Where only a proxy leads outside, an operator names it with "
                "HEADRACE_STAGE_PROXY_URL.",
            ) from error
        return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]

    def _may(self, address: Address, own: bool) -> bool:
        inner = _inner(address)
        if any(a.is_link_local or a.is_multicast or a.is_unspecified for a in (address, inner)):
            return False
        if own or self._is_own(address):
            return True
        return address.is_global and inner.is_global and not (address.is_reserved or inner.is_reserved)

    def _is_own(self, address: Address) -> bool:
        return any(address in network for network in self._networks)

    # ------------------------------------------------------------ files and buckets

    def file(self, uri: str) -> Path:
        """Return the file that a ``file:`` URI names, with all links followed.

        Raises:
            BadRequest: it does not lie below a folder that may be read, or is no regular file.
            NotFound: it is not there.
        """
        try:
            parts = urlsplit(uri)
        except ValueError as error:
            raise BadRequest(f"{shown(uri)} is no file", hint="Write file:///an/absolute/path.") from error
        text = unquote(parts.path)
        if parts.netloc not in ("", "localhost") or not text.startswith("/") or "\0" in text or parts.query:
            raise BadRequest(f"{shown(uri)} is no file", hint="Write file:///an/absolute/path.")
        real = Path(os.path.realpath(text))
        if not any(real.is_relative_to(folder) for folder in self._folders):
            allowed = ", ".join(map(str, self._folders)) or "none"
            raise BadRequest(
                f"{ascii(text)[:200]} is outside the folders that may be read",
                hint=f"Allowed here: {allowed}. An operator sets them with HEADRACE_STAGE_FOLDERS.",
            )
        try:
            kind = real.lstat().st_mode
        except OSError as error:
            raise NotFound(f"{ascii(text)[:200]}: {error.strerror}", hint="Check the path.") from error
        if not stat.S_ISREG(kind):
            raise BadRequest(f"{ascii(text)[:200]} is no regular file", hint="Name a file.")
        return real

    def object(self, uri: str) -> tuple[str, str]:
        """Return the bucket and the key of an ``s3:`` URI.

        Raises:
            BadRequest: it is none, or the bucket may not be read.
        """
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        if not re.fullmatch("[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket) or not key or len(key.encode()) > 1024:
            raise BadRequest(f"{shown(uri)} is no object", hint="Write s3://bucket/key.")
        if not any(
            bucket == b and (not p or key == p or key.startswith(p.rstrip("/") + "/")) for b, p in self._buckets
        ):
            raise BadRequest(
                f"the platform does not read {shown(uri)} for functions",
                hint="An operator allows buckets with HEADRACE_STAGE_BUCKETS (bucket or bucket/prefix).",
            )
        return bucket, key

    def size(self, size: int, what: str) -> None:
        """Refuse what is larger than anything that is fetched here.

        Raises:
            BadRequest: it is.
        """
        if size > self.bytes_max:
            raise BadRequest(
                f"{what} has {size:,} bytes, the limit is {self.bytes_max:,}",
                hint="Stage a part of it; an operator sets the limit with HEADRACE_STAGE_BYTES_MAX.",
            )


def _split(url: str) -> SplitResult:
    """Return the parts of a web address, or refuse it."""
    if len(url) > URI_CHARS_MAX or not url.isascii() or any(c.isspace() or ord(c) < 32 for c in url) or "\\" in url:
        raise BadRequest(f"{shown(url)[:80]} is no address", hint="Write it in ASCII, percent-encoded, without blanks.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadRequest(f"{shown(url)[:80]} is no address", hint="Write https://host/path.") from error
    if parts.scheme not in PORTS:
        raise BadRequest(
            f"addresses of the kind {ascii(parts.scheme)[:20]} cannot be fetched",
            hint="Use https:, s3:, file:, or blob:.",
        )
    if parts.username is not None or parts.password is not None:
        raise BadRequest("an address must not hold a user or a password", hint="Take them out of the URI.")
    if not parts.hostname or port == 0:
        raise BadRequest(f"{shown(url)[:80]} names no server", hint="Write https://host/path.")
    return parts


def _host(parts: SplitResult) -> str:
    return (parts.hostname or "").rstrip(".").lower()


def shown(uri: str) -> str:
    """Return what people may see of a URI: no user, no password, no query, and nothing that ends a line."""
    # A key of S3 may hold what elsewhere begins a query, and nothing that is secret.
    bare = uri if uri.startswith("s3://") else re.split("[?#]", uri, maxsplit=1)[0]
    return quote(_USER.sub(lambda found: f"{found[1] or ''}//", bare), safe="/:%@+,;=~!$&'()*[]", errors="replace")[
        :200
    ]


def _inner(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address stands for, if it does: mapped, 6to4, Teredo, NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in _NAT64 or int(address) >> 32 == 0:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


# ---------------------------------------------------------------- names of inputs and outputs


def check_name(name: str) -> tuple[str, ...]:
    """Return the parts of the name of an input or output: a relative path without tricks.

    Raises:
        BadRequest: it is absolute, leads out of its folder, or holds what no name should.
    """
    parts = tuple(name.split("/"))
    tricky = (
        not name
        or len(parts) > DEPTH_MAX
        or any(
            p in ("", ".", "..") or p.startswith("~") or len(p.encode("utf-8", "replace")) > NAME_BYTES_MAX
            for p in parts
        )
        or any(ord(c) < 32 or ord(c) == 127 or c == "\\" or 0xD800 <= ord(c) <= 0xDFFF for c in name)
    )
    if tricky:
        raise BadRequest(
            f"{ascii(name)[:200]} cannot be the name of a file here",
            hint="Use a relative path without .., such as out/frames.h5.",
        )
    return parts


def open_inside(folder: Path, name: str, flags: int = os.O_RDONLY) -> int:
    """Open a regular file below ``folder`` and return its descriptor; no link on the way is followed.

    Args:
        folder: the folder; links in its own path are followed.
        name: as ``check_name`` allows; with ``os.O_CREAT``, folders on the way are made.
        flags: for ``os.open``.

    Raises:
        BadRequest: the name is tricky, or a link or something that is no file lies under it.
        NotFound: it is not there.
        OSError: the disk cannot be read or written.
    """
    *above, last = check_name(name)
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in above:
            if flags & os.O_CREAT:
                _make_folder(part, at)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
        # Without O_NONBLOCK a pipe that lies there would be waited on for ever.
        handle = os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644, dir_fd=at)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {ascii(name)[:200]}", hint="Check the name.") from error
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise BadRequest(f"{ascii(name)[:200]} {_NO_FILE[error.errno]}", hint=_FILES_ONLY) from error
    finally:
        os.close(at)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise BadRequest(f"{ascii(name)[:200]} {_what_is(found)}", hint=_FILES_ONLY)
    return handle


def _what_is(found: os.stat_result) -> str:
    if stat.S_ISDIR(found.st_mode):
        return "is a folder"
    return "is linked to from elsewhere" if stat.S_ISREG(found.st_mode) else "is a pipe or a device"


def _make_folder(name: str, at: int) -> None:
    try:
        os.mkdir(name, 0o755, dir_fd=at)
    except FileExistsError:
        return
