"""Where bytes are kept and fetched from, wired from the settings: a folder or a bucket, and the rules of staging.

boto3 is imported only in a process whose settings name an S3 server or a bucket, and of gateway and workers only what
the process is made of.
"""

from __future__ import annotations

import configparser
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from headrace.errors import BadRequest
from infra.credentials import BadSecretFile, read_private
from infra.settings import BadSetting, Settings, env_name
from streams.blobs import FolderBlobs

if TYPE_CHECKING:
    from gateway.direct import Direct
    from streams.s3 import Bucket, S3Blobs, Store
    from workers.egress import Egress
    from workers.staging import Stager

SCHEME = "s3://"
# What boto3 reads of the environment and functions shall not have.
SECRET_NAMES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
)


class Stores:
    """What one process has of them; made once, at its start.

    Raises:
        BadSetting: a setting of a bucket cannot be used.
        BadSecretFile: the file with the keys cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.store: Store | None = None
        self._bucket: Bucket | None = None
        self.blobs: FolderBlobs | S3Blobs
        if settings.blobs_url or settings.s3_url or settings.s3_credentials_file or settings.stage_buckets:
            self.store = _store(settings)
        if settings.blobs_url and self.store is not None:
            from streams.s3 import Bucket, S3Blobs

            if not settings.blobs_url.startswith(SCHEME):
                raise BadSetting(
                    f"{env_name('blobs_url')} is no bucket", hint="Write s3://BUCKET or s3://BUCKET/PREFIX."
                )
            name, _, prefix = settings.blobs_url.removeprefix(SCHEME).partition("/")
            self._bucket = Bucket(self.store, name, prefix)
            self.blobs = S3Blobs(self._bucket, settings.blobs_path() / "incoming")
        else:
            self.blobs = FolderBlobs(settings.blobs_path())

    @property
    def named(self) -> bool:
        """Whether somebody said where bytes are kept; else it is a folder beside everything else."""
        return bool(self._settings.blobs_url or self._settings.blobs_dir)

    @property
    def place(self) -> str:
        """Where bytes are kept, in words."""
        settings = self._settings
        if settings.blobs_url:
            return f"bucket {settings.blobs_url} at {settings.s3_url or 'AWS'}"
        return f"folder {settings.blobs_path().absolute()} on {socket.gethostname()}"

    def direct(self) -> Direct | None:
        """Return where callers send uploads to past the gateway; None where they come through it."""
        from gateway.direct import Direct

        return None if self._bucket is None else Direct(self._bucket)

    def stager(self) -> Stager:
        """Return what brings content to this machine."""
        from workers.cache import Cache
        from workers.guard import Guard
        from workers.staging import Stager

        settings = self._settings
        egress = _egress(settings, "stage")
        return Stager(
            self.blobs,
            cache=Cache(
                settings.cache_path().absolute(),
                bytes_max=settings.cache_bytes_max,
                disk_bytes_min=settings.disk_bytes_min,
            ),
            guard=Guard(
                hosts=_list(settings.stage_hosts),
                folders=map(Path, _list(settings.stage_folders)),
                buckets=_list(settings.stage_buckets),
                bytes_max=settings.stage_bytes_max,
                proxied=egress.proxy is not None,
            ),
            objects=None if self.store is None else self.store.link,
            egress=egress,
            to_store=_egress(settings, "s3"),
        )

    def environment(self) -> Mapping[str, str] | None:
        """Return the environment of functions, without the keys of the platform if it has any; None: all of ours."""
        if self.store is None:
            return None
        return {name: text for name, text in os.environ.items() if name not in SECRET_NAMES}


def _egress(settings: Settings, of: Literal["stage", "s3"]) -> Egress:
    """Return the way out to where inputs are fetched from, or to the S3 server.

    Raises:
        BadSetting: its proxy or its certificates cannot be used.
    """
    from workers.egress import Egress, proxy_of, trusting

    proxy_url: str = getattr(settings, f"{of}_proxy_url")
    ca_file: Path | None = getattr(settings, f"{of}_ca_file")
    try:
        proxy = proxy_of(proxy_url) if proxy_url else None
    except BadRequest as error:
        raise BadSetting(f"{env_name(f'{of}_proxy_url')}: {error}", hint=error.hint) from error
    try:
        tls = trusting(ca_file, public=of == "stage") if ca_file else None
    except OSError as error:
        raise BadSetting(
            f"{env_name(f'{of}_ca_file')}: {ca_file} holds no certificates that can be read: {error.strerror}",
            hint="Name a file of certificates in PEM form.",
        ) from error
    return Egress(proxy=proxy, tls=tls)


def _store(settings: Settings) -> Store:
    from streams.s3 import Access, Store

    _egress(settings, "s3")  # refused now, and not at the first call
    if settings.s3_proxy_url and settings.s3_url.startswith("http:"):
        raise BadSetting(
            f"{env_name('s3_proxy_url')} leads to servers that are spoken to by https",
            hint=f"Leave it out, or give {env_name('s3_url')} as https://...",
        )
    keys = _keys(settings.s3_credentials_file) if settings.s3_credentials_file else {}
    return Store(
        Access(
            endpoint_url=settings.s3_url,
            public_url=settings.s3_public_url,
            region=settings.s3_region,
            access_key=keys.get("aws_access_key_id", ""),
            secret_key=keys.get("aws_secret_access_key", ""),
            session_token=keys.get("aws_session_token", ""),
            proxy_url=settings.s3_proxy_url,
            ca_file=str(settings.s3_ca_file or ""),
        )
    )


def _keys(path: Path) -> Mapping[str, str]:
    setting = env_name("s3_credentials_file")
    text = read_private(path, setting)
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(text)
        keys = dict(parser["default"])
    except (configparser.Error, KeyError):
        keys = {}
    if not keys.get("aws_access_key_id") or not keys.get("aws_secret_access_key"):
        raise BadSecretFile(
            f"{setting}: {path} holds no keys",
            hint="It needs a section [default] with aws_access_key_id and aws_secret_access_key.",
        )
    return keys


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
