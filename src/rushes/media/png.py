"""Look a plain PNG through without Pillow, whose ways cost more over a small picture than its content.

Source: the PNG specification (W3C, third edition), 5.2 to 5.6, 7.2, 9.2 and 11.2.
"""

import struct
import zlib
from pathlib import Path
from typing import Final, NamedTuple

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_CHANNELS: Final = {0: 1, 2: 3, 4: 2, 6: 4}
"""Samples of a pixel by colour type; palettes are left to Pillow."""
_DEPTHS: Final = (8, 16)
_WORDS: Final = frozenset({b"tEXt", b"zTXt", b"iTXt", b"tIME"})
"""Chunks that tell of the picture, and of who made it."""
_HARMLESS: Final = frozenset({b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD"})
"""Chunks that change neither size, orientation nor number of pictures."""
_MOST_BYTES: Final = 16 << 20
"""Of the file, and of its pixels: with more of them Pillow's ways do not matter."""
_LAST_FILTER: Final = 4


class PlainPng(NamedTuple):
    width: int
    height: int
    bare: bytes | None
    """The file without texts and dates; None where it has none."""


def plain_png(path: Path) -> PlainPng | None:
    """A PNG that holds one upright picture and is whole: every checksum is right, every row there. None where it is
    anything else, or where there is any doubt. Raises OSError.
    """
    if path.stat().st_size > _MOST_BYTES:
        return None
    data = path.read_bytes()
    kept: list[bytes] = []
    try:
        parts = _picture(data, kept)
    except struct.error:  # it ends in the middle of a chunk
        return None
    size = None if parts is None else _checked(*parts)
    if size is None:
        return None
    bare = _SIGNATURE + b"".join(kept)
    return PlainPng(*size, bare if len(bare) < len(data) else None)


def _picture(data: bytes, kept: list[bytes]) -> tuple[bytes, list[bytes]] | None:
    """The header, and the parts of the compressed pixels; ``kept`` gets every chunk but the words."""
    if not data.startswith(_SIGNATURE):
        return None
    header, pixels, place = b"", [], len(_SIGNATURE)
    while place < len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, place + 8 + length)
        if zlib.crc32(body, zlib.crc32(name)) != checksum:
            return None
        if name not in _WORDS:
            kept.append(data[place : place + 12 + length])
        place += 12 + length
        if name == b"IHDR" and not header:
            header = body
        elif name == b"IDAT" and header:
            pixels.append(body)
        elif name == b"IEND":
            return (header, pixels) if place == len(data) else None
        elif name not in _HARMLESS and name not in _WORDS:
            return None
    return None


def _checked(header: bytes, pixels: list[bytes]) -> tuple[int, int] | None:
    width, height, depth, colour, *ways = struct.unpack(">IIBBBBB", header)
    if any(ways) or depth not in _DEPTHS or colour not in _CHANNELS or not (width and height):
        return None
    row = 1 + width * _CHANNELS[colour] * depth // 8
    if row * height > _MOST_BYTES:
        return None
    unpacking = zlib.decompressobj()
    try:
        raw = unpacking.decompress(b"".join(pixels), row * height + 1)
    except zlib.error:
        return None
    whole = len(raw) == row * height and unpacking.eof and not unpacking.unused_data
    return (width, height) if whole and max(raw[::row]) <= _LAST_FILTER else None
