"""How inputs are fetched from outside: over real TLS, straight or by a site's proxy, from servers of every temper."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import BadRequest, HeadraceError, NotFound, Unavailable
from infra.rgw import Rgw
from infra.settings import BadSetting, load
from infra.stores import Stores
from tests.authority import Authority
from tests.faulty import Faulty, serving
from tests.test_guard import resolving
from tests.tunnels import Proxy, closing, join, proxying
from workers import egress, transfer
from workers.cache import Cache, Held
from workers.egress import Egress, proxy_of, trusting
from workers.guard import Guard
from workers.lines import Source
from workers.staging import Stager
from workers.transfer import Checks, Fetched, Transfer

PART = 64 * 1024
BODY = random.Random(11).randbytes(10 * PART + 123)
SHA256 = hashlib.sha256(BODY).hexdigest()
NAME = "data.example"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def server(authority: Authority) -> Iterator[Faulty]:
    with serving(Faulty(body=BODY), authority.server(f"DNS:{NAME}")) as faulty:
        yield faulty


@pytest.fixture
def proxy(server: Faulty) -> Iterator[Proxy]:
    with proxying(Proxy(names={f"{NAME}:443": ("127.0.0.1", server.port)})) as running:
        yield running


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every name leads to this machine."""
    return resolving(monkeypatch, ["127.0.0.1"])


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name can be resolved, as on a compute node that only a proxy leads away from; numbers mean what they say."""
    real = socket.getaddrinfo

    def answer(host: str, *rest: Any, **more: Any) -> Any:
        if any(c.isalpha() for c in host) and ":" not in host and not host.startswith("0x") and host != "localhost":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", answer)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress, "SILENCE_S_MAX", 0.2)
    monkeypatch.setattr(egress, "PACE_S", 0.2)
    monkeypatch.setattr(egress, "PACE_BYTES_MIN", 1000)
    monkeypatch.setattr(transfer, "TRIES_MAX", 2)


class Fetch:
    """Fetches into one file."""

    def __init__(self, folder: Path, way: Egress, guard: Guard | None = None) -> None:
        self.path = folder / "growing"
        self.path.touch()
        self._egress = way
        self._guard = guard or Guard(hosts=[NAME])

    def __call__(self, url: str, *, sha256: str = "", size: int | None = None) -> Fetched:
        return Transfer(
            Source(name="data", address=lambda: url, guard=self._guard, egress=self._egress),
            self.path,
            checks=Checks(sha256=sha256, size=size),
            room=lambda size: None,
            stopped=threading.Event(),
            on_moved=lambda there, size: None,
            part_bytes=PART,
            lines_max=4,
            backoff_s=0.001,
        ).run()


@pytest.fixture
def fetch(tmp_path: Path, authority: Authority, here: list[str]) -> Fetch:
    return Fetch(tmp_path, Egress(tls=trusting(authority.ca_file, public=True)))


@pytest.fixture
def by_proxy(tmp_path: Path, authority: Authority, proxy: Proxy, nowhere: None) -> Fetch:
    way = Egress(proxy=proxy_of(proxy.url), tls=trusting(authority.ca_file, public=True))
    return Fetch(tmp_path, way, Guard(proxied=True))


def url_of(server: Faulty, name: str = NAME) -> str:
    return f"https://{name}:{server.port}/data"


# ---------------------------------------------------------------- TLS


def test_content_arrives_over_tls_from_the_server_of_that_name(fetch: Fetch, server: Faulty, here: list[str]) -> None:
    assert fetch(url_of(server), sha256=SHA256, size=len(BODY)).moved == len(BODY)
    assert fetch.path.read_bytes() == BODY
    assert len(server.asked) == 11
    assert len(here) <= 4  # once for each line, and not for each stretch


def test_what_is_cut_over_tls_is_taken_up_again(fetch: Fetch, server: Faulty) -> None:
    server.cut_after, server.cuts = PART // 3, 5
    assert fetch(url_of(server), sha256=SHA256).moved == len(BODY)
    assert fetch.path.read_bytes() == BODY
    assert server.cuts == 0


def test_a_wrong_size_and_damage_are_told_over_tls_too(fetch: Fetch, server: Faulty) -> None:
    with pytest.raises(BadRequest, match="bytes instead of 5"):
        fetch(url_of(server), size=5)
    server.flip_at, server.flips = 5 * PART, 10_000
    with pytest.raises(BadRequest, match=f"instead of {SHA256}"):
        fetch(url_of(server), sha256=SHA256)


WRONG: dict[str, Callable[[Authority], ssl.SSLContext]] = {
    # The address that is connected to is in this one, and does not count: what counts is the name in the URI.
    "certificate is not valid for 'data.example'": lambda a: a.server("DNS:other.example", "IP:127.0.0.1"),
    "certificate has expired": lambda a: a.server(f"DNS:{NAME}", days=-1),
    "self-signed certificate": lambda a: a.server(f"DNS:{NAME}", own_word=True),
}


@pytest.mark.parametrize("why", [*WRONG])
def test_a_server_that_cannot_prove_its_name_is_refused_at_once(why: str, fetch: Fetch, authority: Authority) -> None:
    with (
        serving(Faulty(body=BODY), WRONG[why](authority)) as server,
        pytest.raises(BadRequest, match=f"data.example is not who it says: .*{why}") as refused,
    ):
        fetch(url_of(server))
    assert server.asked == []
    assert "HEADRACE_STAGE_CA_FILE" in str(refused.value.hint)


def test_an_authority_that_nobody_named_is_not_believed(tmp_path: Path, server: Faulty, here: list[str]) -> None:
    with pytest.raises(BadRequest, match="unable to get local issuer certificate"):
        Fetch(tmp_path, Egress())(url_of(server))
    assert server.asked == []


@pytest.mark.parametrize(
    ("location", "refused"),
    [
        ("http://data.example/data", "redirects away from https"),
        ("https://169.254.169.254/latest", r"169\.254\.169\.254, which must not be fetched from"),
        ("https://10.0.0.1/", r"10\.0\.0\.1, which must not be fetched from"),
        ("https://[10.0.0.1", "redirects to what is no address"),
        ("https://user:secret@data.example/", "must not hold a user or a password"),
        ("file:///etc/passwd", "redirects away from https"),
        ("https://data.example:0/", "names no server"),
        ("", "redirects more than 5 times"),
        ("//\u00e4.example\\@[", "redirects to what is no address|is no address"),
    ],
)
def test_redirects_over_tls_lead_nowhere_else(location: str, refused: str, fetch: Fetch, server: Faulty) -> None:
    server.redirect = location or url_of(server)
    with pytest.raises(BadRequest, match=refused) as told:
        fetch(url_of(server))
    assert "secret" not in str(told.value)


def test_a_redirect_to_another_server_asks_for_its_name(fetch: Fetch, server: Faulty, authority: Authority) -> None:
    with serving(Faulty(redirect=url_of(server)), authority.server(f"DNS:{NAME}")) as first:
        assert fetch(url_of(first)).sha256 == SHA256
    with serving(Faulty(redirect=url_of(server, "127.0.0.1")), authority.server(f"DNS:{NAME}")) as first:
        fetch._guard = Guard(hosts=[NAME, "127.0.0.1"])
        with pytest.raises(BadRequest, match=r"not valid for '127\.0\.0\.1'"):
            fetch(url_of(first))


# ---------------------------------------------------------------- servers that let us wait


@contextmanager
def saying(talk: Callable[[socket.socket, threading.Event], None]) -> Iterator[int]:
    """Run a server that talks like this to whoever connects, and return its port."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.05)

        def accept() -> None:
            while not over.is_set():
                try:
                    line, _ = listening.accept()
                except TimeoutError:
                    continue
                threads.append(threading.Thread(target=one, args=(line,)))
                threads[-1].start()

        def one(line: socket.socket) -> None:
            with line:
                try:
                    talk(line, over)
                except OSError:
                    return

        threads = [threading.Thread(target=accept)]
        threads[0].start()
        try:
            yield listening.getsockname()[1]
        finally:
            over.set()
            for thread in threads:
                thread.join()


def silent(line: socket.socket, over: threading.Event) -> None:
    over.wait(60)


def dripping(head: bytes) -> Callable[[socket.socket, threading.Event], None]:
    def talk(line: socket.socket, over: threading.Event) -> None:
        line.recv(4096)
        line.sendall(head)
        while not over.wait(0.01):
            line.sendall(b"x")

    return talk


TALKS = {
    "silent": silent,
    "a head without an end": dripping(b"HTTP/1.1 200 OK\r\nX: "),
    "a body without an end": dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"),
}


@pytest.mark.parametrize("talk", [*TALKS])
def test_a_server_that_lets_us_wait_is_given_up_on(talk: str, fetch: Fetch, impatient: None) -> None:
    with saying(TALKS[talk]) as port, pytest.raises(Unavailable, match=r"timed out|sends less than"):
        fetch(f"http://{NAME}:{port}/x")


def test_a_server_that_does_not_shake_hands_is_given_up_on(fetch: Fetch, impatient: None) -> None:
    with saying(silent) as port, pytest.raises(Unavailable, match="timed out"):
        fetch(f"https://{NAME}:{port}/x")


async def test_who_is_canceled_does_not_wait_for_a_slow_server(tmp_path: Path, here: list[str]) -> None:
    stager = Stager(None, cache=Cache(tmp_path, bytes_max=10**9), guard=Guard(hosts=[NAME]))  # type: ignore[arg-type]
    began, left = threading.Event(), threading.Event()

    def talk(line: socket.socket, over: threading.Event) -> None:
        began.set()
        try:
            TALKS["a body without an end"](line, over)
        except OSError:  # we hung up
            left.set()
            raise

    with saying(talk) as port:
        task = asyncio.create_task(stager.stage(f"http://{NAME}:{port}/x"))
        while not began.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not left.is_set():
            await asyncio.sleep(0.01)


async def test_servers_that_let_us_wait_do_not_keep_others_from_working(tmp_path: Path, here: list[str]) -> None:
    """More of them than there are threads for the rest of the process."""
    stager = Stager(None, cache=Cache(tmp_path, bytes_max=10**9), guard=Guard(hosts=[NAME]))  # type: ignore[arg-type]
    with saying(silent) as port:
        tasks = [asyncio.create_task(stager.stage(f"http://{NAME}:{port}/{n}")) for n in range(80)]
        await asyncio.sleep(0.1)
        assert await asyncio.to_thread(lambda: 1) == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ---------------------------------------------------------------- by a proxy


def test_a_proxy_is_asked_for_the_name_and_sees_nothing_more(by_proxy: Fetch, proxy: Proxy, server: Faulty) -> None:
    assert by_proxy(f"https://{NAME}/data?signature=secret", sha256=SHA256).moved == len(BODY)
    assert by_proxy.path.read_bytes() == BODY
    assert set(proxy.asked) == {f"CONNECT {NAME}:443 HTTP/1.1"}
    assert len(server.asked) == 11
    assert len(proxy.asked) <= 4
    assert proxy.seen
    assert b"signature" not in proxy.seen


def test_what_is_cut_in_a_tunnel_is_taken_up_again(by_proxy: Fetch, proxy: Proxy) -> None:
    proxy.cut_after, proxy.cuts = 3 * PART, 3
    assert by_proxy(f"https://{NAME}/data", sha256=SHA256).size == len(BODY)
    assert proxy.cuts == 0


def test_behind_a_proxy_a_server_has_to_prove_its_name_too(
    by_proxy: Fetch, proxy: Proxy, authority: Authority, server: Faulty
) -> None:
    proxy.names["other.example:443"] = proxy.names[f"{NAME}:443"]
    with pytest.raises(BadRequest, match=r"other\.example is not who it says"):
        by_proxy("https://other.example/data")
    assert server.asked == []


@pytest.mark.parametrize(
    ("answer", "error", "told"),
    [
        ("403 Forbidden", BadRequest, "does not lead to data.example: it answers 403"),
        ("407 Proxy Authentication Required", BadRequest, "wants a password"),
        ("502 Bad Gateway", Unavailable, "the proxy of this site answers 502 for data.example"),
        ("no HTTP at all", Unavailable, "says nothing that can be understood"),
    ],
)
def test_a_proxy_that_does_not_lead_there_is_told_of(
    answer: str, error: type[HeadraceError], told: str, by_proxy: Fetch, proxy: Proxy
) -> None:
    proxy.answer = answer
    with pytest.raises(error, match=told) as refused:
        by_proxy(f"https://{NAME}/data")
    assert refused.value.hint
    if error is BadRequest:
        assert len(proxy.asked) == 1


def test_a_proxy_that_is_away_is_told_of(by_proxy: Fetch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    by_proxy._egress = Egress(proxy=("127.0.0.1", port))
    with pytest.raises(Unavailable, match=r"the proxy of this site does not answer: .*refused"):
        by_proxy(f"https://{NAME}/data")


def test_a_proxy_that_lets_us_wait_is_given_up_on(by_proxy: Fetch, impatient: None) -> None:
    with saying(TALKS["a head without an end"]) as port:
        by_proxy._egress = Egress(proxy=("127.0.0.1", port))
        with pytest.raises(Unavailable, match="sends less than"):
            by_proxy(f"https://{NAME}/data")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f000001",
        "10.1.2.3",
        "[::1]",
        "[::ffff:169.254.169.254]",
        "169.254.169.254",
        "localhost",
        "a.localhost",
        "metadata.google.internal",
        "printer.local",
        "intranet",
        "1.2.3.4.5",
        "%31%30.0.0.1",
    ],
)
def test_what_says_by_itself_that_it_is_inside_no_proxy_is_asked_for(host: str, nowhere: None) -> None:
    with pytest.raises((BadRequest, NotFound)) as refused:
        Guard(proxied=True).endpoint(f"https://{host}/x")
    assert refused.value.hint


def test_a_name_that_leads_inside_from_here_no_proxy_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if it leads outside as well: which of its addresses a proxy would take cannot be known."""
    public = "93.184.216.34"
    resolving(monkeypatch, ["10.0.0.1"], [public, "10.0.0.1"], [public])
    guard = Guard(proxied=True)
    for _ in range(2):
        with pytest.raises(BadRequest, match=r"leads to 10\.0\.0\.1"):
            guard.endpoint(f"https://{NAME}/x")
    assert guard.endpoint(f"https://{NAME}/x").addresses == ()  # found by the proxy
    with pytest.raises(BadRequest, match="plain http"):
        guard.endpoint(f"http://{NAME}/x")


def test_where_a_redirect_leads_is_judged_before_the_proxy_is_asked(
    by_proxy: Fetch, proxy: Proxy, server: Faulty
) -> None:
    server.redirect = "https://169.254.169.254/latest"
    with pytest.raises(BadRequest, match="must not be fetched from"):
        by_proxy(f"https://{NAME}/data")
    assert proxy.asked == [f"CONNECT {NAME}:443 HTTP/1.1"]


def test_own_hosts_are_not_fetched_from_by_the_proxy(by_proxy: Fetch, proxy: Proxy) -> None:
    by_proxy._guard = Guard(hosts=["127.0.0.1"], proxied=True)
    with serving(Faulty(body=BODY)) as own:
        assert by_proxy(own.url).sha256 == SHA256
    assert proxy.asked == []


@pytest.mark.parametrize("url", ["https://p:3128", "http://p", "http://", "http://p:3128/x", "p:3128", "http://[p:1"])
def test_what_is_no_proxy_is_refused(url: str) -> None:
    with pytest.raises(BadRequest, match="is not the address of a proxy"):
        proxy_of(url)


# ---------------------------------------------------------------- as an operator sets it


async def staged(stager: Stager, uri: str) -> bytes:
    held = await stager.stage(uri)
    assert isinstance(held, Held)
    with held:
        return held.path.read_bytes()


async def test_what_an_operator_sets_is_what_holds(
    tmp_path: Path, authority: Authority, server: Faulty, proxy: Proxy, nowhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    settings = {"HEADRACE_DATA_DIR": str(tmp_path / "data"), "HEADRACE_STAGE_CA_FILE": str(authority.ca_file)}
    proxied = Stores(load(settings | {"HEADRACE_STAGE_PROXY_URL": proxy.url})).stager()
    assert await staged(proxied, f"https://{NAME}/data#sha256={SHA256}") == BODY
    assert len(proxy.asked) > 0
    straight = Stores(load(settings | {"HEADRACE_STAGE_HOSTS": "127.0.0.1"})).stager()
    with pytest.raises(NotFound, match="there is no server") as refused:
        await straight.stage(f"https://{NAME}/other")
    assert "HEADRACE_STAGE_PROXY_URL" in str(refused.value.hint)
    with serving(Faulty(body=BODY[:100])) as own:
        assert await staged(straight, own.url) == BODY[:100]


@pytest.mark.parametrize(
    "wrong",
    [
        {"HEADRACE_STAGE_PROXY_URL": "https://p:1"},
        {"HEADRACE_STAGE_CA_FILE": "/none"},
        {"HEADRACE_STAGE_CA_FILE": __file__},
        {"HEADRACE_S3_URL": "http://s3", "HEADRACE_S3_PROXY_URL": "http://p:1"},
        {"HEADRACE_S3_URL": "https://s3", "HEADRACE_S3_CA_FILE": "/none"},
    ],
)
def test_a_setting_that_cannot_be_used_is_named_at_once(wrong: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(BadSetting) as refused:
        Stores(load({"HEADRACE_DATA_DIR": str(tmp_path)} | wrong)).stager()
    assert list(wrong)[-1] in str(refused.value)
    assert refused.value.hint


async def test_an_s3_server_is_reached_by_its_proxy_and_has_to_prove_its_name(
    rgw: Rgw, tmp_path: Path, authority: Authority, nowhere: None
) -> None:
    from tests.test_blobs import open_bucket

    bucket = open_bucket(rgw)
    keys = rgw.credentials_file(tmp_path / "keys")
    settings = {
        "HEADRACE_DATA_DIR": str(tmp_path / "data"),
        "HEADRACE_BLOBS_URL": f"s3://{bucket.name}/{bucket.prefix}",
        "HEADRACE_S3_URL": "https://s3.example",
        "HEADRACE_S3_CREDENTIALS_FILE": str(keys),
    }
    port = int(rgw.url.rpartition(":")[2])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Speak TLS where the S3 server itself does not."""
        reading, writing = await asyncio.open_connection("127.0.0.1", port)
        async with closing(writer), closing(writing):
            await join((reader, writing), (reading, writer))

    made = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=authority.server("DNS:s3.example"))
    async with made:
        with proxying(Proxy(names={"s3.example:443": made.sockets[0].getsockname()})) as proxy:
            settings["HEADRACE_S3_PROXY_URL"] = proxy.url
            stores = Stores(load(settings | {"HEADRACE_S3_CA_FILE": str(authority.ca_file)}))
            uri = await stores.stager().store(BODY)
            assert bucket.read(f"{SHA256[:2]}/{SHA256}") == BODY
            before = len(proxy.asked)
            assert await staged(stores.stager(), uri) == BODY
            assert len(proxy.asked) > before
            stranger = Stores(load(settings))
            with pytest.raises(Unavailable, match="certificate"):
                await stranger.stager().store(BODY)
