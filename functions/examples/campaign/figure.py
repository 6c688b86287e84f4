"""A line chart as a PNG, with NumPy and zlib alone: what an answer can show without a plotting library."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 44, 52  # margins
TICKS = 5
SCALE = 2  # of the letters
PAPER, INK, GRID = (255, 255, 255), (40, 40, 40), (225, 225, 225)
COLOURS = ((204, 51, 17), (0, 119, 187), (34, 136, 51), (170, 68, 153))

# A letter, and five rows of three dots for it, every row an octal digit.
GLYPHS = """
075557 126227 271747 371717 455711 574717 674757 771122 875757 975717
A25755 B65656 C34443 D65556 E74647 F74644 G34553 H55755 I72227 J11152 K55655 L44447 M57755
N65555 O25552 P65644 Q25563 R65655 S34216 T72222 U55557 V55552 W55775 X55255 Y55222 Z71247
.00002 -00700 +02720 =07070 ,00024 :02020 /11244 (24442 )21112
"""
LETTERS = {glyph[0]: glyph[1:] for glyph in GLYPHS.split()}
BLANK = "00000"
LETTER_WIDTH, LETTER_HEIGHT = 4 * SCALE, 5 * SCALE

Image = np.ndarray[Any, Any]


def chart(x: Sequence[float], lines: Mapping[str, Sequence[float]], *, title: str, x_label: str) -> bytes:
    """Return a PNG of up to four lines over the same ``x``, with axes, ticks and a legend.

    Raises:
        ValueError: there is nothing to draw, a value is not finite, or a line is not as long as ``x``.
    """
    values = np.array([list(line) for line in lines.values()], dtype=float)
    if len(x) < 2 or not 1 <= len(lines) <= len(COLOURS) or values.shape != (len(lines), len(x)):
        raise ValueError(f"{len(lines)} lines over {len(x)} points cannot be drawn")
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    image = np.full((HEIGHT, WIDTH, 3), PAPER, dtype=np.uint8)
    low, high = _room(float(values.min()), float(values.max()))
    begin, end = float(x[0]), float(x[-1])
    for part in np.linspace(0, 1, TICKS):
        row = round(HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM))
        column = round(LEFT + part * (WIDTH - LEFT - RIGHT))
        image[row, LEFT : WIDTH - RIGHT] = GRID
        image[TOP : HEIGHT - BOTTOM, column] = GRID
        said = f"{low + part * (high - low):.2f}"
        _write(image, said, LEFT - 8 - len(said) * LETTER_WIDTH, row - LETTER_HEIGHT // 2, INK)
        said = f"{begin + part * (end - begin):.3g}"
        _write(image, said, column - len(said) * LETTER_WIDTH // 2, HEIGHT - BOTTOM + 8, INK)
    image[TOP : HEIGHT - BOTTOM + 1, LEFT] = INK
    image[HEIGHT - BOTTOM, LEFT : WIDTH - RIGHT] = INK
    columns = LEFT + (np.asarray(x) - begin) / (end - begin) * (WIDTH - LEFT - RIGHT - 1)
    at = LEFT
    for colour, (name, line) in zip(COLOURS, zip(lines, values, strict=True), strict=False):
        _draw(image, columns, HEIGHT - BOTTOM - (line - low) / (high - low) * (HEIGHT - TOP - BOTTOM), colour)
        image[27:30, at : at + 3 * LETTER_WIDTH] = colour
        at = _write(image, name, at + 4 * LETTER_WIDTH, 24, INK) + 3 * LETTER_WIDTH
    _write(image, title, LEFT, 6, INK)
    _write(image, x_label, WIDTH - RIGHT - len(x_label) * LETTER_WIDTH, HEIGHT - BOTTOM + 28, INK)
    return png(image)


def png(image: Image) -> bytes:
    """Return an image, shape (height, width, 3) of bytes, as PNG."""
    height, width, _ = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, 3 * width)], axis=1)  # no filter

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # eight bits each of red, green and blue
    body = zlib.compress(rows.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _room(low: float, high: float) -> tuple[float, float]:
    """Return limits a little wider than the values, and never the same."""
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _draw(image: Image, columns: Image, rows: Image, colour: tuple[int, int, int]) -> None:
    """Draw lines from point to point, two dots thick."""
    for k in range(len(columns) - 1):
        count = int(max(abs(columns[k + 1] - columns[k]), abs(rows[k + 1] - rows[k]))) + 2
        across = np.linspace(columns[k], columns[k + 1], count).astype(int)
        down = np.linspace(rows[k], rows[k + 1], count).astype(int)
        for shift in (0, 1):
            image[np.clip(down + shift, 0, HEIGHT - 1), across] = colour


def _write(image: Image, text: str, left: int, top: int, colour: tuple[int, int, int]) -> int:
    """Write in capitals, and return the column behind the last letter; what has no letter here is left blank."""
    for letter in text.upper():
        for row, digit in enumerate(LETTERS.get(letter, BLANK)):
            for column in range(3):
                if int(digit, 8) & (4 >> column):
                    y, x = top + row * SCALE, left + column * SCALE
                    image[y : y + SCALE, x : x + SCALE] = colour
        left += LETTER_WIDTH
    return left
