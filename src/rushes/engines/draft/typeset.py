"""Text set into a box: the largest size at which it fits, broken into lines as its script allows."""

import functools
import unicodedata
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from rushes.engines.draft.fonts import base, font, right_to_left, runs

Mask = npt.NDArray[np.float32]
"""Rows x columns, 0 to 1: how much ink."""

_MEASURE: Final = 64
"""Pixels: widths are measured once at this size and scaled."""
_TOLERANCE: Final = 1.02
"""A line measured as a whole may be this much wider than its words: kerning, and rounding at other sizes."""
_LEADING: Final = 1.34
_CLOSED: Final = frozenset(
    ",.;:!?%)]}、。」』】〉》»ー々ゝゞぁぃぅぇぉっゃゅょァィゥェォッャュョ…\u2019\u201d\uff0c\uff0e\uff1a\uff1b\uff01\uff1f\uff09"
)
"""Signs that may not begin a line."""


class Text(msgspec.Struct, frozen=True):
    """Lines at a size in pixels; ``width`` and ``height`` of the whole, in pixels; ``face``, a font's number."""

    lines: tuple[str, ...]
    size: int
    width: int
    height: int
    face: int

    @property
    def leading(self) -> int:
        return round(self.size * _LEADING)


def fit(text: str, width: int, height: int, largest: int, smallest: int) -> Text:
    """``text`` in ``width`` x ``height`` pixels; what does not fit at ``smallest`` ends in an ellipsis."""
    low, high = max(1, smallest), max(1, smallest, largest)
    face = base(text)
    best = _set(text, width, low, face)
    while low < high:
        middle = (low + high + 1) // 2
        tried = _set(text, width, middle, face)
        if tried.height <= height and tried.width <= width * _TOLERANCE:
            best, low = tried, middle
        else:
            high = middle - 1
    room = max(1, (height - best.size) // best.leading + 1)
    if len(best.lines) > room:
        last = best.lines[room - 1]
        while last and advance(last + "…", face) * best.size / _MEASURE > width:
            last = last[:-1]
        best = _sized((*best.lines[: room - 1], last.rstrip() + "…"), best.size, face)
    return best


def ink(text: Text) -> Mask:
    """``text`` drawn, ``text.height`` x ``text.width``; lines that run to the left stand on the right."""
    sheet = Image.new("L", (max(1, text.width), max(1, text.height)), 0)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(text.lines):
        base = round(text.size * 0.82) + number * text.leading
        pieces = runs(line, text.face)
        backwards = right_to_left(line)
        x = 0.0
        if backwards:
            pieces = pieces[::-1]
            x = max(0.0, text.width - sum(font(n, text.size).getlength(p) for p, n in pieces))
        for piece, fontnumber in pieces:
            face = font(fontnumber, text.size)
            draw.text((x, base), piece, font=face, fill=255, anchor="ls")
            x += face.getlength(piece)
    return np.asarray(sheet, np.float32) / np.float32(255)


@functools.lru_cache(maxsize=16384)
def advance(text: str, face: int = 0) -> float:
    """Width of ``text`` in pixels at 64 pixels a letter."""
    return float(sum(font(number, _MEASURE).getlength(piece) for piece, number in runs(text, face)))


def _set(text: str, width: int, size: int, face: int) -> Text:
    room = width * _MEASURE / size
    lines: list[str] = []
    line, used = "", 0.0
    for token in _tokens(text):
        for part in _parts(token, room, face):
            wide = advance(part, face)
            if line and used + advance(part.rstrip(), face) > room:
                lines.append(line.rstrip())
                line, used = "", 0.0
                part = part.lstrip()
            line, used = line + part, used + wide
    return _sized((*lines, line.rstrip()), size, face)


def _sized(lines: tuple[str, ...], size: int, face: int) -> Text:
    width = max((advance(line, face) for line in lines), default=0.0) * size / _MEASURE
    leading = round(size * _LEADING)
    return Text(lines, size, round(width + 1), round(size * 1.12) + leading * (len(lines) - 1), face)


def _tokens(text: str) -> list[str]:
    """Pieces between which a line may be broken: words with the space behind them, single ideographs."""
    tokens: list[str] = []
    for character in text:
        alone = unicodedata.east_asian_width(character) in {"W", "F"}
        fresh = not tokens or tokens[-1].endswith(" ") or alone or _is_wide(tokens[-1][-1])
        if fresh and character != " " and character not in _CLOSED and not unicodedata.combining(character):
            tokens.append(character)
        elif tokens:
            tokens[-1] += character
    return tokens


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in {"W", "F"}


def _parts(token: str, room: float, face: int) -> list[str]:
    """``token``, cut where it alone is wider than a line."""
    if advance(token.rstrip(), face) <= room or len(token) < 2:
        return [token]
    half = len(token) // 2
    return [*_parts(token[:half], room, face), *_parts(token[half:], room, face)]
