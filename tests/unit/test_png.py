"""What the quick look at a PNG takes, and what it leaves to Pillow."""

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from rushes.media.png import plain_png


def saved(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def noise(mode: str, size: tuple[int, int] = (37, 21)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    data = bytes(zlib.crc32(bytes([n % 251, n // 251])) & 255 for n in range(size[0] * size[1] * channels))
    return Image.frombytes(mode, size, data)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def look(tmp_path: Path, data: bytes) -> tuple[int, int] | None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    found = plain_png(path)
    return None if found is None else (found.width, found.height)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_size_of_a_plain_picture(tmp_path, mode) -> None:
    assert (37, 21) == look(tmp_path, saved(noise(mode)))


def test_deep_samples_and_text_are_plain(tmp_path) -> None:
    about = PngImagePlugin.PngInfo()
    about.add_text("prompt", "x" * 5000)
    about.add_itxt("workflow", "ü")
    assert (37, 21) == look(tmp_path, saved(noise("RGB"), pnginfo=about, dpi=(72, 72)))
    assert (5, 4) == look(tmp_path, saved(Image.new("I;16", (5, 4))))


def test_words_are_taken_out_and_nothing_else(tmp_path) -> None:
    picture, about = noise("RGB"), PngImagePlugin.PngInfo()
    about.add_text("prompt", "secret")
    about.add_text("long", "secret" * 100, zip=True)
    about.add_itxt("workflow", "secret")
    about.add(b"tIME", bytes(7))
    path = tmp_path / "a.png"
    path.write_bytes(saved(picture, pnginfo=about, dpi=(72, 72)))
    found = plain_png(path)
    assert found is not None
    assert saved(picture, dpi=(72, 72)) == found.bare
    path.write_bytes(saved(picture, dpi=(72, 72)))
    assert (37, 21, None) == plain_png(path)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize(
    "data",
    [
        saved(noise("L").convert("P")),
        saved(noise("L").convert("1")),
        saved(noise("RGB"), exif=turned()),
        saved(noise("RGB"), save_all=True, append_images=[noise("RGB").rotate(180)]),
        saved(noise("RGB")).replace(b"\x89PNG", b"\x88PNG"),
        b"",
        b"GIF89a",
    ],
    ids=["palette", "bits", "turned", "moving", "signature", "empty", "gif"],
)
def test_anything_else_is_left_to_pillow(tmp_path, data) -> None:
    assert look(tmp_path, data) is None


def test_every_cut_and_every_flipped_byte_is_seen(tmp_path) -> None:
    whole = saved(noise("RGB", (5, 3)))
    assert (5, 3) == look(tmp_path, whole)
    for length in range(len(whole)):
        assert look(tmp_path, whole[:length]) is None, length
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1
        assert look(tmp_path, bytes(broken)) is None, place
    assert look(tmp_path, whole + b"\0") is None


def made(header: bytes, pixels: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


HEADER = struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)
ROWS = b"\0" * 14


def test_rows_that_lie_are_seen_though_their_checksums_are_right(tmp_path) -> None:
    assert (2, 2) == look(tmp_path, made(HEADER, zlib.compress(ROWS)))
    for rows in (ROWS[:-1], ROWS + b"\0", b"\5" + ROWS[1:], b""):
        assert look(tmp_path, made(HEADER, zlib.compress(rows))) is None
    assert look(tmp_path, made(HEADER, zlib.compress(ROWS) + b"more")) is None
    assert look(tmp_path, made(HEADER, b"no zlib")) is None


@pytest.mark.parametrize(
    "header",
    [
        struct.pack(">IIBBBBB", 0, 2, 8, 2, 0, 0, 0),
        struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 1),
        struct.pack(">IIBBBBB", 2, 2, 8, 5, 0, 0, 0),
        struct.pack(">IIBBBBB", 2**31, 2**31, 8, 2, 0, 0, 0),
        struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0),
    ],
    ids=["no width", "interlaced", "unknown colour", "huge", "large"],
)
def test_headers_that_are_left_to_pillow(tmp_path, header) -> None:
    assert look(tmp_path, made(header, zlib.compress(ROWS))) is None
