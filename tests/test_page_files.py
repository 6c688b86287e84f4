"""The files of the live page, without a browser."""

from __future__ import annotations

import re

from gateway.page import FOLDER

PAGE_BYTES_MAX = 64_000


def test_the_page_stays_within_its_budget() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= PAGE_BYTES_MAX


def test_no_text_can_become_markup_and_no_file_comes_from_elsewhere() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text("utf-8")
        for way in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "style=",
        ):
            assert way not in text, (path.name, way)
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}, path.name


def test_every_file_of_the_page_is_asked_for_by_the_page() -> None:
    sources = {path.name: path.read_text("utf-8") for path in FOLDER.iterdir()}
    for name in sources.keys() - {"index.html"}:
        assert f"page/{name}" in sources["index.html"], name
    for text in sources.values():
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= sources.keys()
