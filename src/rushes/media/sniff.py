"""What a file is, by its first bytes alone. Pure. Names, extensions and Content-Type headers are not asked.

Sources: the PNG, GIF and WebP specifications, ITU T.81 (JPEG), ISO/IEC 14496-12 and its brand registry (MP4,
AVIF), Apple's QuickTime File Format (MOV), RFC 8794 and RFC 9559 (WebM).
"""

from typing import Final, Literal

import msgspec

Kind = Literal["image", "video"]
Format = Literal["png", "jpeg", "webp", "avif", "gif", "mp4", "webm", "mov"]

SNIFF_BYTES: Final = 4096
"""How many first bytes decide."""


class Sniffed(msgspec.Struct, frozen=True):
    """``extension`` has its dot."""

    kind: Kind
    format: Format
    content_type: str
    extension: str


FORMATS: Final[dict[Format, Sniffed]] = {
    "png": Sniffed("image", "png", "image/png", ".png"),
    "jpeg": Sniffed("image", "jpeg", "image/jpeg", ".jpg"),
    "webp": Sniffed("image", "webp", "image/webp", ".webp"),
    "avif": Sniffed("image", "avif", "image/avif", ".avif"),
    "gif": Sniffed("image", "gif", "image/gif", ".gif"),
    "mp4": Sniffed("video", "mp4", "video/mp4", ".mp4"),
    "webm": Sniffed("video", "webm", "video/webm", ".webm"),
    "mov": Sniffed("video", "mov", "video/quicktime", ".mov"),
}
WANTED: Final[dict[Kind, str]] = {
    "image": "a PNG, JPEG, WebP, AVIF or GIF image",
    "video": "an MP4, WebM or MOV video",
}
"""The formats of a kind, in words for a message."""

_MP4_BRANDS: Final = frozenset(
    b"isom iso2 iso3 iso4 iso5 iso6 iso7 iso8 iso9 mp41 mp42 mp71 avc1 av01 hvc1 M4V  M4VH M4VP dash cmfc"
    b" MSNV XAVC".replace(b"M4V ", b"M4V_").split()
)
_MOV_ATOMS: Final = frozenset({b"moov", b"mdat", b"wide", b"pnot"})
"""What a QuickTime file from before ``ftyp`` begins with."""


def sniff(head: bytes) -> Sniffed | None:
    """The format of a file that begins with ``head`` (its first SNIFF_BYTES, or all of it), or None."""
    found = _format(head)
    return FORMATS[found] if found else None


def _format(head: bytes) -> Format | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        # Matroska and WebM share the container; the DocType element (0x4282) tells them apart.
        return "webm" if b"\x42\x82\x84webm" in head[:SNIFF_BYTES] else None
    if head[4:8] == b"ftyp":
        return _by_brand(head)
    return "mov" if head[4:8] in _MOV_ATOMS else None


def _by_brand(head: bytes) -> Format | None:
    size = min(int.from_bytes(head[:4], "big"), len(head), SNIFF_BYTES)
    major = head[8:12]
    brands = {major} | {head[i : i + 4] for i in range(16, size - 3, 4)}
    if brands & {b"avif", b"avis"}:
        return "avif"
    if major == b"qt  ":
        return "mov"
    if {brand.replace(b" ", b"_") for brand in brands} & _MP4_BRANDS:
        return "mp4"
    return "mov" if b"qt  " in brands else None


def looks_like_html(head: bytes) -> bool:
    """Whether this is a web page: the usual answer of a share link or of a login wall."""
    text = head[:SNIFF_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n\x0c").lower()
    return text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")) or (
        text.startswith((b"<?xml", b"<!--")) and b"<html" in text
    )
