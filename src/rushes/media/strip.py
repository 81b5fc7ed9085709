"""Take the text out of a generated file: ComfyUI writes the operator's whole workflow into what it saves.

Nothing is decoded, encoded or muxed anew. What is to go is cut out (PNG, JPEG, WebP, GIF) or, where other
parts of the file point to places by their offset (MP4, MOV, AVIF, WebM, Matroska), overwritten with the
container's own filler of the same length: ``free`` boxes and ``Void`` elements, all zeros. So pixels, packets,
time stamps, edit lists, rotation, colours, sound and the index in front stay as they are, byte for byte, by
construction. Only headers are read, save for JPEG and GIF, which have no lengths to skip by.

Of EXIF the orientation is kept where it turns the picture: without it the picture would lie on its side.

Sources: the PNG, GIF89a and WebP specifications, ITU T.81 (JPEG), ISO/IEC 14496-12 and 23008-12 (MP4, AVIF),
Apple's QuickTime File Format, RFC 8794 and 9559 (WebM), and what ComfyUI, Pillow and FFmpeg write.
"""

import contextlib
import os
import re
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from rushes.errors import MediaError
from rushes.media.sniff import SNIFF_BYTES, sniff

_MOST_PARTS: Final = 1_000_000  # more is no picture or video, but a way to keep us busy
_MOST_IN_MEMORY: Final = 1 << 29  # bytes of a JPEG or GIF file
_BLOCK: Final = 1 << 20


class _Edit(NamedTuple):
    """The bytes from ``start`` to ``end`` become ``data`` and then ``zeros`` bytes 0."""

    start: int
    end: int
    data: bytes = b""
    zeros: int = 0


class _Part(NamedTuple):
    """A box or element: its name, and where its header, its content and what follows it begin."""

    name: bytes
    start: int
    body: int
    end: int


class _Source:
    """An open file. Whatever is read beyond its end raises MediaError."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor, self.size = descriptor, size
        self._parts = 0

    def read(self, start: int, length: int) -> bytes:
        if start + length > self.size:
            _truncated()
        return os.pread(self.descriptor, length, start)

    def whole(self) -> bytes:
        if self.size > _MOST_IN_MEMORY:
            _refuse("is too large to be searched for metadata")
        return self.read(0, self.size)

    def blocks(self, start: int, end: int) -> Iterator[bytes]:
        return (self.read(at, min(_BLOCK, end - at)) for at in range(start, end, _BLOCK))

    def blank(self, start: int, end: int) -> bool:
        """Whether all bytes there are 0."""
        return all(block.count(0) == len(block) for block in self.blocks(start, end))

    def count(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            _refuse("has too many parts")


def _refuse(problem: str) -> NoReturn:
    raise MediaError("output_unreadable", f"The file {problem}, so its metadata cannot be taken out.")


def _truncated() -> NoReturn:
    _refuse("is truncated or corrupt")


def strip(path: Path) -> bool:
    """Take text, comments, EXIF and XMP out of the file at ``path``; whether there was anything to take.

    The file is replaced in one step, and only where there is something to take out. Files of other formats
    than PNG, JPEG, WebP, GIF, AVIF, MP4, MOV, WebM and Matroska are left alone. Blocks: call it in a thread.

    Raises :class:`MediaError` for a truncated or corrupt file, which then stays as it was, and OSError where
    the folder cannot be written to.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            _refuse("is no regular file")
        source = _Source(descriptor, status.st_size)
        edits = _edits(source)
        if edits:
            _replace(path, source, edits, stat.S_IMODE(status.st_mode))
        return bool(edits)
    finally:
        os.close(descriptor)


def _edits(source: _Source) -> list[_Edit]:
    found = sniff(head := source.read(0, min(SNIFF_BYTES, source.size)))
    # A Matroska file that is no WebM is none of the formats that are sniffed.
    name = found.format if found else "webm" if head.startswith(b"\x1a\x45\xdf\xa3") else None
    return sorted(_FORMATS[name](source)) if name else []


def _replace(path: Path, source: _Source, edits: Sequence[_Edit], mode: int) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".strip-", dir=path.parent)
    fresh = Path(name)
    try:
        with open(descriptor, "w+b") as file:  # noqa: PTH123 - of a descriptor
            os.fchmod(descriptor, mode)
            place = 0
            for edit in (*edits, _Edit(source.size, source.size)):
                if not place <= edit.start <= edit.end <= source.size:
                    _truncated()  # parts that overlap
                file.writelines(source.blocks(place, edit.start))
                file.write(edit.data)
                file.writelines(bytes(min(_BLOCK, edit.zeros - at)) for at in range(0, edit.zeros, _BLOCK))
                place = edit.end
            file.flush()
            if _edits(_Source(descriptor, os.fstat(descriptor).st_size)):
                _refuse("keeps metadata")
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _turned(tiff: bytes) -> bytes:
    """EXIF with nothing but the orientation that ``tiff`` gives; empty where that turns nothing."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    with contextlib.suppress(struct.error):
        if order:
            (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
            (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
            for at in range(directory + 2, directory + 2 + 12 * entries, 12):
                tag, kind, count, value = struct.unpack_from(f"{order}HHIH", tiff, at)
                if (tag, kind, count) == (0x0112, 3, 1) and 2 <= value <= 8:
                    return struct.pack(">4sIHHHIHHI", b"MM\0*", 8, 1, 0x0112, 3, 1, value, 0, 0)
    return b""


# -- PNG ------------------------------------------------------------------------------------------------------
_PNG_KEPT: Final = frozenset(
    b"cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI bKGD hIST tRNS pHYs sPLT oFFs acTL fcTL fdAT".split()
)
"""How it looks. What goes is not listed: ComfyUI writes chunks of its own (``comf``) into animations."""


def _png(source: _Source) -> Iterator[_Edit]:
    place, pictures = 8, 0
    while True:
        source.count()
        length, name = struct.unpack(">I4s", source.read(place, 8))
        end = place + 12 + length
        if end > source.size or not name.isalpha():
            _truncated()
        if name == b"IEND":
            break
        pictures += name == b"IDAT"
        if name[0] & 0x20 and name not in _PNG_KEPT:  # a small first letter: not critical
            old, fresh = source.read(place, min(end - place, 1 << 16)), b""
            if name == b"eXIf" and (exif := _turned(old[8:])):
                fresh = struct.pack(f">I4s{len(exif)}sI", len(exif), name, exif, zlib.crc32(name + exif))
            if fresh != old:
                yield _Edit(place, end, fresh)
        place = end
    if not pictures:
        _truncated()
    if end < source.size:
        yield _Edit(end, source.size)


# -- JPEG -----------------------------------------------------------------------------------------------------
_FILL: Final = re.compile(rb"\xff+([^\xff])", re.DOTALL)
_AFTER_SCAN: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # neither a stuffed byte nor a restart


def _jpeg(source: _Source) -> Iterator[_Edit]:
    data, place, scans = source.whole(), 2, 0
    while True:
        source.count()
        found = _FILL.match(data, place)
        marker = found[1][0] if found else 0
        if found is None or marker in (0x00, 0xD8) or (marker == 0xD9 and not scans):
            _truncated()
        body = found.end()
        if marker == 0xD9:
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # these stand alone
            place = body
            continue
        end = body + int.from_bytes(data[body : body + 2], "big")
        if end < body + 2 or end > len(data):
            _truncated()
        fresh = _jpeg_segment(marker, data[body + 2 : end])
        if fresh is not None and fresh != data[place:end]:
            yield _Edit(place, end, fresh)
        place = end
        if marker == 0xDA:
            scans += 1
            following = _AFTER_SCAN.search(data, end)
            place = following.start() if following else _truncated()
    if body < len(data):
        yield _Edit(body, len(data))


def _jpeg_segment(marker: int, body: bytes) -> bytes | None:
    """What stands for the segment from now on; None where it stays."""
    if marker == 0xE1 and body.startswith(b"Exif\0\0"):
        exif = _turned(body[6:])
        return struct.pack(">HH6s", 0xFFE1, 8 + len(exif), b"Exif\0\0") + exif if exif else b""
    kept = {0xE0: b"", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}.get(marker)
    if kept is not None:
        return None if body.startswith(kept) else b""
    return b"" if 0xE1 <= marker <= 0xEF or marker == 0xFE else None


# -- WebP -----------------------------------------------------------------------------------------------------
_WEBP_KEPT: Final = (b"VP8X", b"ICCP", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")  # codespell:ignore ALPH


def _webp(source: _Source) -> Iterator[_Edit]:
    length = int.from_bytes(source.read(4, 4), "little")
    end = 8 + length + (length & 1)
    if end > source.size:
        _truncated()
    place, cut, exif, flags = 12, 0, b"", 0
    while place < end:
        source.count()
        start, (name, size) = place, struct.unpack("<4sI", source.read(place, 8))
        place += 8 + size + (size & 1)
        if place > end:
            _truncated()
        if name == b"VP8X":
            flags = start + 8
        elif name not in _WEBP_KEPT:
            old, fresh = source.read(start, min(place - start, 1 << 16)), b""
            if name == b"EXIF" and not exif and (exif := _turned(old[8:].removeprefix(b"Exif\0\0"))):
                fresh = struct.pack("<4sI", b"EXIF", len(exif)) + exif
            if fresh != old:
                yield _Edit(start, place, fresh)
                cut += place - start - len(fresh)
    was = source.read(flags, 1)[0]
    wanted = was & ~0x0C | (0x08 if exif else 0)  # EXIF 0x08, XMP 0x04
    if flags and wanted != was:
        yield _Edit(flags, flags + 1, bytes([wanted]))
    if cut:
        yield _Edit(4, 8, struct.pack("<I", end - 8 - cut))
    if end < source.size:
        yield _Edit(end, source.size)


# -- GIF ------------------------------------------------------------------------------------------------------
_GIF_KEPT: Final = (b"\xff\x0bNETSCAPE2.0", b"\xff\x0bANIMEXTS1.0", b"\xff\x0bICCRGBG1012")
"""The number of rounds, under two names, and the colour profile."""


def _gif(source: _Source) -> Iterator[_Edit]:
    data = source.whole()
    try:
        place = 13 + _colours(data[10])
        while data[place] != 0x3B:
            source.count()
            start, kind, label = place, data[place], data[place + 1]
            if kind == 0x2C:
                place = _gif_blocks(source, data, place + 11 + _colours(data[place + 9]))
            elif kind == 0x21:
                place = _gif_blocks(source, data, place + 2)
                if label != 0xF9 and not data.startswith(_GIF_KEPT, start + 1):
                    yield _Edit(start, place)
            else:
                _truncated()
    except IndexError:
        _truncated()
    if place + 1 < len(data):
        yield _Edit(place + 1, len(data))


def _colours(flags: int) -> int:  # bytes of the colour table
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _gif_blocks(source: _Source, data: bytes, place: int) -> int:
    while length := data[place]:
        source.count()
        place += 1 + length
    return place + 1


# -- MP4, MOV, AVIF -------------------------------------------------------------------------------------------
_DEPTH: Final = 4  # text lies no deeper
_BOXES: Final = frozenset(b"moov trak mdia moof traf".split())
_TECHNICAL: Final = frozenset(
    b"encoder major_brand minor_version compatible_brands handler_name vendor_id language duration creation_time"
    b" bps number_of_frames number_of_bytes alpha_mode stereo_mode _statistics_writing_app"
    b" _statistics_writing_date_utc _statistics_tags \xa9too \xa9swr \xa9enc".split()
)
"""What FFmpeg and mkvmerge note about their own work."""
_SHORT: Final = 256  # bytes; a longer note is not about that


def _boxes(source: _Source, start: int, end: int) -> Iterator[_Part]:
    while start < end:
        source.count()
        size, name = struct.unpack(">I4s", source.read(start, 8))
        header = 16 if size == 1 else 8
        size = int.from_bytes(source.read(start + 8, 8)) if size == 1 else size or end - start  # 0: to the end
        if size < header or start + size > end:
            _truncated()
        yield _Part(name, start, start + header, start + size)
        start += size


def _iso(source: _Source, vital: bytes = b"moov") -> Iterator[_Edit]:
    seen = 0
    for box in _boxes(source, 0, source.size):
        seen += box.name == vital
        picture = box.name == vital == b"meta"  # in AVIF, what the picture is made of
        yield from _avif_items(source, box) if picture else _iso_box(source, box)
    if not seen:
        _truncated()


def _iso_box(source: _Source, box: _Part, depth: int = 0) -> Iterator[_Edit]:
    if box.name in _BOXES and depth < _DEPTH:
        for inner in _boxes(source, box.body, box.end):
            yield from _iso_box(source, inner, depth + 1)
    elif (
        (box.name in (b"free", b"skip") and not source.blank(box.body, box.end))
        or (box.name == b"udta" and not _is_technical(source, box))
        or box.name in (b"meta", b"uuid")
    ):
        header = source.read(box.start, box.body - box.start)
        yield _Edit(box.start, box.end, header[:4] + b"free" + header[8:], box.end - box.body)


def _is_technical(source: _Source, box: _Part) -> bool:
    """Whether the box says nothing beyond what its writer notes about itself. What cannot be read is text."""
    end, versioned = box.end, box.name == b"meta" and source.read(box.body, 8)[4:] != b"hdlr"  # QuickTime: not
    if box.name == b"udta" and end - box.body >= 4 and source.blank(end - 4, end):
        end -= 4  # how QuickTime ends the list
    with contextlib.suppress(MediaError):
        for inner in _boxes(source, box.body + 4 * versioned, end):
            names = [inner.name]
            if inner.end - inner.start > 2 * _SHORT:
                return False
            if inner.name in (b"meta", b"ilst"):
                names = [] if _is_technical(source, inner) else names
            elif inner.name == b"keys":
                keys = _boxes(source, inner.body + 8, inner.end)
                names = [source.read(key.body, key.end - key.body) for key in keys]
            elif int.from_bytes(inner.name) <= _SHORT or inner.name in (b"hdlr", b"free"):
                continue  # the number of a key
            if not _TECHNICAL.issuperset(name.lower() for name in names):
                return False
        return True
    return False


def _avif_items(source: _Source, meta: _Part) -> Iterator[_Edit]:
    """Blanks the EXIF and the XMP of a picture; how it is turned stands elsewhere (``irot``, ``imir``)."""
    parts = {box.name: box for box in _boxes(source, meta.body + 4, meta.end)}
    if not {b"iinf", b"iloc"} <= parts.keys():
        _truncated()
    listing, texts = parts[b"iinf"], set()
    version = source.read(listing.body, 1)[0]
    for entry in _boxes(source, listing.body + (8 if version else 6), listing.end):
        width = 4 if source.read(entry.body, 1)[0] > 2 else 2
        if source.read(entry.body + 6 + width, 4) in (b"Exif", b"mime", b"uri "):
            texts.add(int.from_bytes(source.read(entry.body + 4, width)))
            # Readers pass over items of unknown kinds, and refuse EXIF that is empty.
            yield _Edit(entry.body + 6 + width, entry.body + 10 + width, b"skip")
    for item, start, end in _avif_places(source, parts[b"iloc"], parts.get(b"idat", meta).body):
        if item in texts:
            yield _Edit(start, end, b"", end - start)


def _avif_places(source: _Source, box: _Part, data: int) -> Iterator[tuple[int, int, int]]:
    """Items, and where their bytes begin and end (ISO/IEC 14496-12, 8.11.3); ``idat`` begins at ``data``."""
    place = box.body + 6
    version, sizes = source.read(box.body, 1)[0], source.read(box.body + 4, 2)
    wide = 4 if version > 1 else 2

    def number(size: int) -> int:
        nonlocal place
        source.count()
        place += size
        return int.from_bytes(source.read(place - size, size))

    for _ in range(number(wide)):
        item, method = number(wide), number(2) & 15 if version else 0
        number(2)  # which file: this one
        begin = number(sizes[1] >> 4) + (data if method == 1 else 0)
        for _ in range(number(2)):
            number(sizes[1] & 15 if version else 0)
            start = begin + number(sizes[0] >> 4)
            yield item, start, start + number(sizes[0] & 15)


# -- WebM, Matroska -------------------------------------------------------------------------------------------
_SEGMENT, _CLUSTER, _SIMPLE_TAG = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75", b"\x67\xc8"
_TAG, _TAG_NAME, _VOID, _CRC = b"\x73\x73", b"\x45\xa3", b"\xec", b"\xbf"
# Tags, Tag, Info, Tracks, TrackEntry
_NESTED: Final = frozenset(map(bytes.fromhex, ("1254c367", "7373", "1549a966", "1654ae6b", "ae")))
# Title, SegmentFilename, PrevFilename, NextFilename, a track's Name, Chapters, Attachments
_TEXTS: Final = frozenset(
    map(bytes.fromhex, ("7ba9", "7384", "3c83ab", "3e83bb", "536e", "1043a770", "1941a469"))
)


def _elements(source: _Source, start: int, end: int) -> Iterator[_Part]:
    """The elements there, a Segment's and an endless Cluster's among them as if they stood on this level."""
    while start < end:
        source.count()
        head = source.read(start, min(12, source.size - start)).ljust(12, b"\0")
        width = 9 - head[0].bit_length()
        more = 9 - head[width].bit_length() if width <= 4 else 9
        if more > 8:
            _truncated()
        body, unknown = start + width + more, (1 << 7 * more) - 1  # all ones: RFC 8794, 6.2
        name, size = head[:width], int.from_bytes(head[width : width + more]) & unknown
        endless = size == unknown
        if name not in (_SEGMENT, _CLUSTER) if endless else body + size > end:
            _truncated()
        following = body if endless or name == _SEGMENT else body + size
        yield _Part(name, start, body, following)
        start = following


def _matroska(source: _Source) -> Iterator[_Edit]:
    names = set()
    for part in _elements(source, 0, source.size):
        names.add(part.name)
        yield from _element(source, part)
    if not {_SEGMENT, _CLUSTER} <= names:
        _truncated()


def _element(source: _Source, part: _Part, depth: int = 0) -> Iterator[_Edit]:
    if part.name in _NESTED and depth < _DEPTH:
        inner = list(_elements(source, part.body, part.end))
        edits = [edit for element in inner for edit in _element(source, element, depth + 1)]
        notes = sum(element.name == _SIMPLE_TAG for element in inner)
        if part.name == _TAG and notes and len(edits) == notes:
            edits = [_void(part)]  # it must say something
        elif edits:  # the checksum no longer fits
            edits += [_void(element) for element in inner if element.name == _CRC]
        yield from edits
    elif (
        part.name in _TEXTS
        or (part.name == _SIMPLE_TAG and not _is_technical_tag(source, part))
        or (part.name == _VOID and not source.blank(part.body, part.end))
    ):
        yield _void(part)


def _is_technical_tag(source: _Source, tag: _Part) -> bool:
    return tag.end - tag.start <= _SHORT and any(
        element.name == _TAG_NAME
        and source.read(element.body, element.end - element.body).lower() in _TECHNICAL
        for element in _elements(source, tag.body, tag.end)
    )


def _void(part: _Part) -> _Edit:
    """Filler of the same length (RFC 8794, 11.3.2)."""
    length = part.end - part.start
    size = (0x80 | length - 2).to_bytes() if length < 9 else b"\x01" + (length - 9).to_bytes(7)
    return _Edit(part.start, part.end, _VOID + size, length - 1 - len(size))


_FORMATS: Final[dict[str, Callable[[_Source], Iterator[_Edit]]]] = {
    "png": _png,
    "jpeg": _jpeg,
    "webp": _webp,
    "gif": _gif,
    "avif": partial(_iso, vital=b"meta"),
    "mp4": _iso,
    "mov": _iso,
    "webm": _matroska,
}
