"""Commands of the command line, run in the process of the test."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

ESCAPES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Ran:
    """What one command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        assert not ESCAPES.search(out + err)
        assert "Traceback" not in err or 'raise ValueError("[red]' in err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]
