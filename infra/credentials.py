"""Secrets: made here, kept in files that only their owner reads, never shown."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

from headrace.errors import HeadraceError

SECRET_BYTES_MAX = 4096


class BadSecretFile(HeadraceError):
    """A file that should hold a secret is missing, empty, or can be read by others."""

    title = "A secret cannot be read"


def new_secret() -> str:
    """Return 256 random bits as URL-safe text."""
    return secrets.token_urlsafe(32)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read; readers see the old content or the new, never a part.

    The file is private from its first byte on: it is written aside with mode 0600 and then renamed.
    """
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def private_folder(path: Path) -> Path:
    """Make a folder, and those above it, that only its owner can enter; one that exists keeps its mode."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    return path


def read_secret(path: Path, setting: str) -> str:
    """Return the secret in a file that holds one line, without the newline at its end; raises as ``read_private``."""
    text = read_private(path, setting)
    if any(ord(c) < 32 for c in text):
        raise _unusable(path, setting)
    return text


def read_private(path: Path, setting: str) -> str:
    """Return the text of a file with secrets, without white space around it.

    Args:
        path: the file; it must belong to this user (or root) and be closed to group and others.
        setting: the setting that named the file, for the error.

    Raises:
        BadSecretFile: it is not there, is empty or too large, or others could read or change it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for a writer
    except OSError as error:
        raise BadSecretFile(
            f"{setting}: {path} cannot be read: {error.strerror}",
            hint="Create it with mode 0600, or name another file.",
        ) from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise BadSecretFile(f"{setting}: {path} is not a file", hint="Name the file that holds the secret.")
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & 0o077:
            raise BadSecretFile(
                f"{setting}: {path} is open to others (mode {stat.S_IMODE(found.st_mode):04o}, owner {found.st_uid})",
                hint=f"chmod 600 {path}",
            )
        text = os.read(handle, SECRET_BYTES_MAX).decode("utf-8", "replace").strip()
    finally:
        os.close(handle)
    if not text or len(text) >= SECRET_BYTES_MAX or "\ufffd" in text:
        raise _unusable(path, setting)
    return text


def _unusable(path: Path, setting: str) -> BadSecretFile:
    return BadSecretFile(
        f"{setting}: {path} holds no usable secret", hint="It should hold one line of text with the secret."
    )


def kept_secret(path: Path, setting: str) -> str:
    """Return the secret in the file; the first call makes it."""
    if not path.exists():
        write_private(path, new_secret() + "\n")
    return read_secret(path, setting)
