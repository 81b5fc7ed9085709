"""The one place that turns the text of a resolution into pixels.

The seeds write it in two ways, "1024x576 (16:9)" and "1440:810 (16:9)"; the ratio in brackets is for people
and is not read.
"""

import re
from typing import Final

SMALLEST_SIDE: Final = 16
"""Pixels. Tells a size from a bare ratio as well: "16:9" is no size."""
LARGEST_SIDE: Final = 16384
"""Pixels; the largest side that H.264, PNG and WebP readers commonly take."""

_SIZE: Final = re.compile(r"\s*([0-9]{1,5})\s*[x\u00d7*:]\s*([0-9]{1,5})\s*(?:\([^()]*\))?\s*", re.IGNORECASE)


def parse_resolution(text: str) -> tuple[int, int]:
    """``(width, height)`` in pixels. Raises ValueError with a message for users where ``text`` is no size."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(
            f'{text[:60]!r} is no resolution: write width x height in pixels, as in "1024x576 (16:9)"'
        )
    width, height = int(match[1]), int(match[2])
    if not (SMALLEST_SIDE <= width <= LARGEST_SIDE and SMALLEST_SIDE <= height <= LARGEST_SIDE):
        raise ValueError(
            f"{width}x{height} is no resolution: each side has {SMALLEST_SIDE} to {LARGEST_SIDE} pixels"
        )
    return width, height
