"""The few commands of Redis that the ledger uses, and its one script."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar

import redis.exceptions

from streams.ledger import READ, WRITE
from tests.simulation.loop import SimLoop

Value = bytes | dict[bytes, bytes] | dict[bytes, float]


def _raw(word: Any) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()


class SimRedis:
    """A Redis with faults: away, wiped, put back to an older state, and answers that are lost after the deed."""

    def __init__(self, loop: SimLoop, rng: random.Random) -> None:
        self._loop = loop
        self._rng = rng
        self.away = False
        self.lost_share = 0.0
        self.data: dict[bytes, Any] = {}
        self._scripts: set[str] = set()
        self._saved: dict[bytes, Any] = {}

    async def _reach(self) -> None:
        await asyncio.sleep(0.0001 + 0.0003 * self._rng.random())
        if self.away or (self.lost_share and self._rng.random() < self.lost_share):
            raise redis.exceptions.ConnectionError("Redis is away")

    async def _answered(self, found: Any) -> Any:
        if self.lost_share and self._rng.random() < self.lost_share:
            raise redis.exceptions.TimeoutError("the answer of Redis was lost")
        return found

    # ------------------------------------------------------------ commands

    async def get(self, key: str) -> bytes | None:
        await self._reach()
        found: bytes | None = await self._answered(self.data.get(_raw(key)))
        return found

    async def set(self, key: str, value: Any) -> None:
        await self._reach()
        self._do("SET", key, value)
        await self._answered(None)

    async def delete(self, *keys: Any) -> None:
        await self._reach()
        self._do("UNLINK", *keys)
        await self._answered(None)

    unlink = delete

    async def hgetall(self, key: str) -> dict[bytes, bytes]:
        await self._reach()
        return dict(self.data.get(_raw(key), {}))

    async def zcard(self, key: str) -> int:
        await self._reach()
        return len(self.data.get(_raw(key), ()))

    async def zrange(self, key: str, first: int, last: int) -> list[bytes]:
        await self._reach()
        members: dict[bytes, float] = self.data.get(_raw(key), {})
        return sorted(members, key=lambda m: (members[m], m))[first : last + 1]

    async def scan_iter(self, match: str, count: int = 10) -> AsyncIterator[bytes]:
        await self._reach()
        for key in [k for k in self.data if k.startswith(match.rstrip("*").encode())]:
            yield key

    async def script_load(self, script: str) -> str:
        await self._reach()
        self._scripts.add(script)
        return script

    async def evalsha(self, script: str, keys: int, *words: Any) -> Any:
        """Do what one of the two scripts of the ledger does."""
        await self._reach()
        if script not in self._scripts:
            raise redis.exceptions.NoScriptError("NOSCRIPT")
        return await self._answered(self._SCRIPTS[script](self, *words))

    def _read(self, packed: bytes) -> list[bytes | None]:
        words = _unpacked(packed)
        places = zip(words[::2], words[1::2], strict=True)
        return [self.data.get(_raw(key), {}).get(_raw(field)) for key, field in places]

    def _write(self, key: str, left: int, now: int, packed: bytes) -> int:
        """Do all, if the position is the one that the writer left."""
        there = int(self.data.get(_raw(key), b"0"))
        if there == left:
            at = 0
            while at < len(packed):
                number = int.from_bytes(packed[at : at + 4], "big")
                words: list[bytes] = []
                at += 4
                for _ in range(number):
                    size = int.from_bytes(packed[at : at + 4], "big")
                    words.append(packed[at + 4 : at + 4 + size])
                    at += 4 + size
                self._do(words[0].decode(), *words[1:])
            self._do("SET", key, now)
        return there

    _SCRIPTS: ClassVar[dict[str, Callable[..., Any]]] = {READ: _read, WRITE: _write}

    def _do(self, name: str, *words: Any) -> None:
        key, *rest = (_raw(w) for w in words)
        match name:
            case "SET":
                self.data[key] = rest[0]
            case "UNLINK":
                for one in (key, *rest):
                    self.data.pop(one, None)
            case "HSET":
                self.data.setdefault(key, {}).update(zip(rest[::2], rest[1::2], strict=True))
            case "HSETNX":
                self.data.setdefault(key, {}).setdefault(*rest)
            case "HINCRBY":
                of = self.data.setdefault(key, {})
                of[rest[0]] = str(int(of.get(rest[0], b"0")) + int(rest[1])).encode()
            case "ZADD":
                self.data.setdefault(key, {}).update(zip(rest[1::2], map(float, rest[::2]), strict=True))
            case "ZREM" | "HDEL":
                of = self.data.get(key, {})
                for member in rest:
                    of.pop(member, None)
                if not of:
                    self.data.pop(key, None)
            case _:
                raise ValueError(f"the ledger does not use {name}")

    # ------------------------------------------------------------ faults

    def wipe(self) -> None:
        """Start anew with nothing, not even the script."""
        self.data.clear()
        self._scripts.clear()

    def save(self) -> None:
        """Keep the present state."""
        self._saved = copy.deepcopy(self.data)

    def go_back(self) -> None:
        """Start anew with the state that was kept."""
        self.data = copy.deepcopy(self._saved)
        self._scripts.clear()


def _unpacked(packed: bytes) -> list[bytes]:
    """Return words that are each behind their length."""
    at = 0
    words: list[bytes] = []
    while at < len(packed):
        size = int.from_bytes(packed[at : at + 4], "big")
        words.append(packed[at + 4 : at + 4 + size])
        at += 4 + size
    return words
