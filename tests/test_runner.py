"""The child alone, at the other end of its line, without a pool."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.channel import HEADER_BYTES
from headrace.children import ChildLimits
from headrace.model import Code
from headrace.wire import JSON, Ask, FromChild, Granted, Invoke, Raised, Returned, Said, encode

CHILD = """
import socket, sys
from pathlib import Path
from headrace.channel import Channel
from headrace.runner import Runner
from headrace.children import ChildLimits
from headrace.wire import decode

limits = decode(bytes.fromhex(sys.argv[3]), ChildLimits)
Runner(Channel(socket.socket(fileno=int(sys.argv[1]))), limits, Path(sys.argv[2])).serve()
"""


class Line:
    """The worker's end."""

    def __init__(self, end: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.end = end
        self.process = process
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromChild)

    def send(self, message: Invoke | Granted, *, piecewise: bool = False) -> None:
        body = encode(message)
        frame = len(body).to_bytes(HEADER_BYTES, "big") + body
        for piece in [frame[i : i + 1] for i in range(len(frame))] if piecewise else [frame]:
            self.end.sendall(piece)

    def read(self) -> Any:
        size = int.from_bytes(self._exactly(HEADER_BYTES), "big")
        return self._decoder.decode(self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.end.recv(size - len(data))
            assert more, "the child hung up"
            data += more
        return data


def child(folder: Path, **limits: Any) -> Line:
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    folder.mkdir()
    coded = encode(ChildLimits(**limits)).hex()
    command = [sys.executable, "-P", "-c", CHILD, str(theirs.fileno()), str(folder), coded]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    theirs.close()
    return Line(ours, process)


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = child(tmp_path / "scratch")
    yield made
    made.end.close()
    made.process.communicate(timeout=30)


def invoke(text: str | None, body: bytes = b"null", *, version: str = "1", **more: Any) -> Invoke:
    code = None if text is None else Code(kind="source", module="shot", name="run", files={"shot.py": text})
    return Invoke(
        run_id="r",
        invocation_id="i",
        attempt=1,
        function="run",
        version=version,
        type=JSON,
        body=body,
        code=code,
        **more,
    )


def test_it_answers_on_its_line_and_never_on_stdout(tmp_path: Path) -> None:
    line = child(tmp_path / "scratch")
    line.send(invoke("import os\ndef run(data):\n    os.write(1, b'raw')\n    print('hello')\n    return data", b"7"))
    assert line.read() == Said(level="stdout", text="hello\n")
    answer = line.read()
    assert isinstance(answer, Returned)
    assert answer.result.body == b"7"
    line.end.close()
    assert line.process.communicate(timeout=30) == (b"raw", b"")
    assert line.process.returncode == 0


def test_the_code_comes_once(line: Line) -> None:
    line.send(invoke("def run(data): return data", b"1"))
    line.send(invoke(None, b"2"))
    assert [line.read().result.body, line.read().result.body] == [b"1", b"2"]


def test_a_version_whose_code_never_came_is_told_and_the_child_goes_on(line: Line) -> None:
    line.send(invoke(None, version="never"))
    answer = line.read()
    assert isinstance(answer, Raised)
    assert answer.error.kind == "load"
    line.send(invoke("def run(data): return 1"))
    assert isinstance(line.read(), Returned)


def test_frames_may_come_in_pieces_and_several_at_a_time(line: Line) -> None:
    line.send(invoke("def run(data): return len(data)", b'"abc"'), piecewise=True)
    assert line.read().result.body == b"3"
    frames = b""
    for n in range(100):
        body = encode(invoke(None, b'"%s"' % (b"x" * n)))
        frames += len(body).to_bytes(HEADER_BYTES, "big") + body
    line.end.sendall(frames)
    assert [int(line.read().result.body) for _ in range(100)] == list(range(100))


def test_a_payload_of_megabytes_comes_whole(line: Line) -> None:
    line.send(invoke("def run(data: bytes): return bytes(reversed(data))", bytes(range(256)) * 40_000))
    assert line.read().result.body == bytes(reversed(range(256))) * 40_000


def test_a_question_waits_for_its_answer(line: Line) -> None:
    line.send(invoke("def run(data, ctx):\n    ctx.log.info('first')\n    return str(ctx.stage('blob:1'))"))
    assert line.read() == Said(level="info", text="first")
    assert line.read() == Ask(what="stage", uri="blob:1")
    line.send(Granted(value="/data/1"))
    assert line.read().result.body == b'"/data/1"'


def test_it_asks_to_be_replaced_after_its_share_of_invocations(tmp_path: Path) -> None:
    line = child(tmp_path / "scratch", invocations_max=2)
    line.send(invoke("def run(data): return 1"))
    assert line.read().leave is False
    line.send(invoke(None))
    assert line.read().leave is True
    line.end.close()
    line.process.communicate(timeout=30)


def test_it_asks_to_be_replaced_when_it_holds_too_many_versions(tmp_path: Path) -> None:
    line = child(tmp_path / "scratch", versions_max=2)
    left = []
    for n in range(3):
        line.send(invoke("def run(data): return 1", version=str(n)))
        left.append(line.read().leave)
    assert left == [False, False, True]
    line.end.close()
    line.process.communicate(timeout=30)


def test_it_asks_to_be_replaced_when_processes_are_left_behind_but_not_for_those_of_its_module(line: Line) -> None:
    helper = "import subprocess\nHELPER = subprocess.Popen(['sleep', '3600'])\ndef run(data): return HELPER.pid"
    line.send(invoke("import subprocess\ndef run(data): return subprocess.Popen(['sleep', '3600']).pid", version="a"))
    left = line.read()
    assert left.leave is True
    line.send(invoke(helper, version="b"))
    kept = line.read()
    assert kept.leave is False
    for each in (left, kept):
        os.kill(int(each.result.body), 9)


def test_it_ends_when_the_worker_hangs_up_in_the_middle(line: Line) -> None:
    line.send(invoke("def run(data, ctx): ctx.stage('x')"))
    assert isinstance(line.read(), Ask)
    line.end.close()
    assert line.process.wait(timeout=30) == 0


def test_times_are_told_with_every_answer(line: Line) -> None:
    for text in ("def run(data): return 1", "def run(data): raise ValueError", "raise ValueError"):
        line.send(invoke(text, version=text))
        answer = line.read()
        assert 0 < answer.started_at <= answer.ended_at
