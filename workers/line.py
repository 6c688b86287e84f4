"""The worker's end of the line to a child: frames in, frames out, and never a wait.

The child's end, and what a frame is, are in ``headrace.channel``.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

from headrace.channel import HEADER_BYTES

READ_BYTES = 64 * 1024


class Line:
    """A socket on which whole messages come and go. It holds one message of the largest size, and no more."""

    def __init__(
        self,
        *,
        message_bytes_max: int,
        on_message: Callable[[bytes | memoryview], None],
        on_too_large: Callable[[int], None],
        on_hung_up: Callable[[], None],
    ) -> None:
        """Open both ends; ``theirs`` is a descriptor for the child, to be closed by who hands it over.

        Args:
            message_bytes_max: the largest message that is read.
            on_message: takes each message.
            on_too_large: hears the size of a message that is too large; nothing is read from then on.
            on_hung_up: hears that the child has closed its end.
        """
        self._loop = asyncio.get_running_loop()
        self._ours, theirs = socket.socketpair()
        self.theirs = theirs.detach()
        self._ours.setblocking(False)
        self._message_bytes_max = message_bytes_max
        self._on_message = on_message
        self._on_too_large = on_too_large
        self._on_hung_up = on_hung_up
        self._came = bytearray()
        self._unsent: memoryview | None = None
        self._closed = False
        self._reading = True
        self._loop.add_reader(self._ours.fileno(), self.read)

    def send(self, body: bytes) -> bool:
        """Send a message. What the socket does not take now follows when it can.

        Returns:
            False if nobody is there to read it any more.
        """
        data = len(body).to_bytes(HEADER_BYTES, "big") + body
        if self._unsent is not None:
            self._unsent = memoryview(bytes(self._unsent) + data)
            return True
        try:
            sent = self._ours.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        if sent < len(data):
            self._unsent = memoryview(data)[sent:]
            self._loop.add_writer(self._ours.fileno(), self._send_rest)
        return True

    def read(self) -> bool:
        """Take what has come; return False when there is nothing left to read."""
        if not self._reading:
            return False
        try:
            data = self._ours.recv(READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._stop_reading()
            self._on_hung_up()
            return False
        if not self._came and len(data) == HEADER_BYTES + int.from_bytes(data[:HEADER_BYTES], "big"):
            self._on_message(memoryview(data)[HEADER_BYTES:])  # nearly always: one came, and nothing else
        else:
            self._came += data
            self._take_whole()
        return True

    def close(self) -> None:
        """Close our end."""
        self._stop_reading()
        if not self._closed:
            self._closed = True
            self._loop.remove_writer(self._ours.fileno())
            self._ours.close()

    def abandon(self) -> None:
        """Close both ends, where there will be no child."""
        self.close()
        os.close(self.theirs)

    def _take_whole(self) -> None:
        while len(self._came) >= HEADER_BYTES and self._reading:
            size = int.from_bytes(self._came[:HEADER_BYTES], "big")
            if size > self._message_bytes_max:
                self._stop_reading()
                self._on_too_large(size)
                return
            end = HEADER_BYTES + size
            if len(self._came) < end:
                return
            with memoryview(self._came) as came:
                message = bytes(came[HEADER_BYTES:end])
            del self._came[:end]
            self._on_message(message)

    def _send_rest(self) -> None:
        if self._unsent is not None:
            try:
                self._unsent = self._unsent[self._ours.send(self._unsent) :]
            except BlockingIOError:
                return
            except OSError:
                self._unsent = None
        if not self._unsent:
            self._unsent = None
            self._loop.remove_writer(self._ours.fileno())

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._came.clear()
            self._loop.remove_reader(self._ours.fileno())
