import io

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rushes.media.sniff import FORMATS, SNIFF_BYTES, looks_like_html, sniff


def image(format_: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, format_)
    return file.getvalue()


def video(format_: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=format_) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("format_", ["png", "jpeg", "webp", "avif", "gif"])
def test_images_are_known_by_their_bytes(format_: str) -> None:
    assert FORMATS[format_] == sniff(image(format_)[:SNIFF_BYTES])


@pytest.mark.parametrize(
    ("format_", "muxer", "codec"),
    [("mp4", "mp4", "libx264"), ("mov", "mov", "libx264"), ("webm", "webm", "libvpx")],
)
def test_videos_are_known_by_their_bytes(format_: str, muxer: str, codec: str) -> None:
    assert FORMATS[format_] == sniff(video(muxer, codec)[:SNIFF_BYTES])


@pytest.mark.parametrize("format_", ["tiff", "bmp", "ico", "ppm", "pdf", "jpeg2000", "tga"])
def test_other_images_are_unknown(format_: str) -> None:
    assert sniff(image(format_)[:SNIFF_BYTES]) is None


@pytest.mark.parametrize(("muxer", "codec"), [("matroska", "libx264"), ("avi", "mpeg4"), ("mpegts", "libx264")])
def test_other_videos_are_unknown(muxer: str, codec: str) -> None:
    assert sniff(video(muxer, codec)[:SNIFF_BYTES]) is None


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\x89PNG",
        b"RIFF\x00\x00\x00\x00WAVEfmt ",
        b"8BPS\x00\x01",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"#EXTM3U\n#EXTINF:1,\nhttp://169.254.169.254/\n",
        b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic",
        b"\x00\x00\x00\x18ftypcrx \x00\x00\x00\x00crx isom"[:16],
        b"ID3\x04",
        b"%PDF-1.7",
        b"PK\x03\x04",
    ],
)
def test_what_is_not_in_the_list_is_unknown(head: bytes) -> None:
    assert sniff(head) is None


@pytest.mark.parametrize(
    ("brands", "format_"),
    [
        (b"isom\x00\x00\x02\x00isomiso2avc1mp41", "mp4"),
        (b"M4V \x00\x00\x00\x01isomM4V ", "mp4"),
        (b"XAVC\x01\x00\x1f\xffXAVCmp42iso2", "mp4"),
        (b"qt  \x00\x00\x02\x00qt  ", "mov"),
        (b"mif1\x00\x00\x00\x00mif1avifmiaf", "avif"),
        (b"avis\x00\x00\x00\x00avifavismsf1", "avif"),
    ],
)
def test_brands_decide(brands: bytes, format_: str) -> None:
    head = (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands

    assert FORMATS[format_] == sniff(head)


@given(st.binary(max_size=64))
def test_any_bytes_can_be_sniffed(head: bytes) -> None:
    assert sniff(head) in {None, *FORMATS.values()}


@pytest.mark.parametrize(
    "page",
    [b"<!DOCTYPE html><title>Sign in</title>", b"\xef\xbb\xbf\r\n <HTML>", b"<!-- x --><html>", b"<head>"],
)
def test_web_pages_are_recognised(page: bytes) -> None:
    assert looks_like_html(page)


@pytest.mark.parametrize("text", [b"", b"{}", b"<svg/>", b"<?xml version='1.0'?><Error/>"])
def test_other_text_is_no_web_page(text: bytes) -> None:
    assert not looks_like_html(text)
