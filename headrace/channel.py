"""A line between a child and its worker: frames of a four-byte length and a MessagePack message, on a socket.

This is the child's side, which blocks. It is a socket of its own, never stdin or stdout: those are the user's.
"""

from __future__ import annotations

import socket
import threading
from typing import Any

import msgspec

from headrace.wire import ToChild, encode

HEADER_BYTES = 4
TOGETHER_BYTES_MAX = 64 * 1024  # up to here header and body go in one piece; copying more costs more than a second send
READ_BYTES = 64 * 1024

_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToChild)


class HungUp(Exception):
    """The worker closed the line; there is nobody left to work for."""


class Channel:
    """The child's end of the line."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._left = b""
        # Print may be called in any thread, and by a destructor in the middle of a send.
        self._sending = threading.RLock()

    def receive(self) -> ToChild:
        """Wait for the next message.

        Raises:
            HungUp: the worker closed the line.
        """
        data = self._left or self._read(READ_BYTES)
        while len(data) < HEADER_BYTES:
            data += self._read(READ_BYTES)
        size = int.from_bytes(data[:HEADER_BYTES], "big")
        end = HEADER_BYTES + size
        if len(data) == end:  # nearly always: one frame came, and nothing else
            self._left = b""
            return _decode(data[HEADER_BYTES:])
        if len(data) > end:
            self._left = data[end:]
            return _decode(data[HEADER_BYTES:end])
        frame = bytearray(size)
        filled = len(data) - HEADER_BYTES
        frame[:filled] = data[HEADER_BYTES:]
        self._left = b""
        with memoryview(frame) as view:
            while filled < size:
                count = self._line.recv_into(view[filled:])
                if not count:
                    raise HungUp
                filled += count
            return _decode(view)

    def send(self, message: object) -> None:
        """Send one message; blocks while the worker does not read."""
        self.send_frame(encode(message))

    def send_frame(self, body: bytes) -> None:
        """Send one message that is encoded already."""
        header = len(body).to_bytes(HEADER_BYTES, "big")
        with self._sending:
            try:
                if len(body) <= TOGETHER_BYTES_MAX:
                    self._line.sendall(header + body)
                else:
                    self._line.sendall(header)
                    self._line.sendall(body)
            except (BrokenPipeError, ConnectionResetError) as error:
                raise HungUp from error

    def _read(self, size: int) -> bytes:
        try:
            data = self._line.recv(size)
        except ConnectionResetError as error:
            raise HungUp from error
        if not data:
            raise HungUp
        return data


def _decode(frame: bytes | memoryview) -> ToChild:
    message: ToChild = _decoder.decode(frame)
    return message
