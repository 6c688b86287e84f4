"""What an attempt says: its lines stay in the log, how far it is only for minutes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from headrace.wire import Note, Said, decode
from tests.doubles import MemoryLog
from workers.voice import Voice


@pytest.mark.parametrize(("lines", "hint"), [([], True), (["careful"], False)])
async def test_progress_alone_is_a_hint_and_lines_are_none(lines: list[str], hint: bool) -> None:
    delivery: Any = SimpleNamespace(invocation=SimpleNamespace(run_id="r", invocation_id="i"), at=1.0)
    log: Any = MemoryLog()
    voice = Voice(log, delivery, "w", 1, 0)
    for line in lines:
        voice.line("stdout", line)
    voice.said(Said(fraction=0.5, text="half"))
    (record,) = await voice.close()
    note = decode(record.body, Note)
    assert (record.hint, note.fraction, [text for _, text in note.lines]) == (hint, 0.5, lines)
