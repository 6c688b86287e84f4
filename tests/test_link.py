"""A connection to the log's servers over TLS, as beyond a trusted network."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.errors import Unavailable
from infra.embedded import free_port
from infra.programs import nats_program
from streams import link as links
from streams.link import open_link
from tests.authority import Authority


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Authority, str]]:
    """A nats-server that speaks TLS alone, and the authority that speaks for it."""
    authority, port = Authority(tmp_path), free_port()
    authority.server("DNS:localhost")
    tls = {"cert_file": str(tmp_path / "server.pem"), "key_file": str(tmp_path / "server.key")}
    config = tmp_path / "nats.json"
    config.write_text(json.dumps({"listen": f"127.0.0.1:{port}", "tls": tls}))
    with subprocess.Popen([str(nats_program()), "-c", str(config)], stderr=subprocess.DEVNULL) as process:
        try:
            yield authority, f"tls://localhost:{port}"
        finally:
            process.terminate()


async def test_a_server_is_believed_by_its_name_and_authority(
    server: tuple[Authority, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, url = server
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
    link = await open_link(url)
    try:
        heard = await link.nc.subscribe("here")
        await link.nc.publish("here", b"x" * 100_000, headers={"a": "b"})
        message = await heard.next_msg(timeout=5)
        assert (len(message.data), message.headers) == (100_000, {"a": "b"})
    finally:
        await link.close()


async def test_a_server_that_nobody_speaks_for_is_not(
    server: tuple[Authority, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setattr(links, "OPEN_TIMEOUT_S", 2.0)
    with pytest.raises(Unavailable, match="certificate"):
        await open_link(server[1])


async def test_a_server_that_is_not_there_is_not_told_of_at_each_try(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(links, "OPEN_TIMEOUT_S", 1.0)
    with pytest.raises(Unavailable, match="Connect call failed"):
        await open_link(f"nats://127.0.0.1:{free_port()}")
    assert len([line for line in caplog.messages if "Connect call failed" in line]) == 1
