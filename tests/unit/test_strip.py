import io
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, ImageSequence, PngImagePlugin

from rushes.errors import MediaError
from rushes.media.strip import strip

WORD = "xylograph"
WORKFLOW = json.dumps({"6": {"class_type": "CLIPTextEncode", "inputs": {"text": f"{WORD} " * 40}}})
LEAKS = (b"xylograph", b"CLIPTextEncode", b"class_type")
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{WORD}</x:xmpmeta>'.encode()


def pictures(count: int, width: int = 48, height: int = 32) -> list[Image.Image]:
    rng = np.random.default_rng(7)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for _ in range(count)]


def exif(orientation: int | None = None) -> bytes:
    data = Image.Exif()
    data[0x0110] = "prompt:" + WORKFLOW
    if orientation:
        data[0x0112] = orientation
    return data.tobytes()


def shown(data: bytes) -> list[tuple[bytes, Any, Any]]:
    """All frames of an image as they are drawn, upright, with their times and the profile."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # Pillow learns of a PNG's EXIF only then
        return [
            (
                ImageOps.exif_transpose(frame).convert("RGBA").tobytes(),
                frame.info.get("duration"),
                (image.info.get("loop"), image.info.get("icc_profile")),
            )
            for frame in ImageSequence.Iterator(image)
        ]


def png(**options: Any) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add(b"gAMA", struct.pack(">I", 45455))
    text.add(b"cHRM", bytes(range(32)))
    text.add_text("prompt", WORKFLOW)
    text.add_text("workflow", WORKFLOW, zip=True)
    text.add_itxt("parameters", WORKFLOW)
    text.add(b"comf", b"prompt\0" + WORKFLOW.encode(), after_idat=True)
    text.add(b"tIME", bytes(7), after_idat=True)
    return image("PNG", pnginfo=text, dpi=(300, 300), **options)


def image(format_: str, frames: int = 1, **options: Any) -> bytes:
    file = io.BytesIO()
    first, *others = pictures(frames)
    if others:
        options |= {"save_all": True, "append_images": others, "duration": 62, "loop": 3}
    first.save(file, format_, **options)
    return file.getvalue()


IMAGES: dict[str, Callable[[], bytes]] = {
    "png": lambda: png(icc_profile=ICC, exif=exif()),
    "png turned": lambda: png(exif=exif(6)),
    "apng": lambda: png(frames=4),
    "jpeg": lambda: image("JPEG", exif=exif(), icc_profile=ICC, comment=WORKFLOW, xmp=XMP, dpi=(96, 96)),
    "jpeg turned": lambda: image("JPEG", exif=exif(8), comment=WORKFLOW),
    "jpeg progressive": lambda: image("JPEG", exif=exif(), progressive=True, quality=95, comment=WORKFLOW),
    "jpeg restarts": lambda: image("JPEG", restart_marker_blocks=1, comment=WORKFLOW),
    "webp": lambda: image("WEBP", exif=exif(), icc_profile=ICC, xmp=XMP),
    "webp turned": lambda: image("WEBP", exif=exif(3), lossless=True),
    "webp moving": lambda: image("WEBP", frames=4, exif=exif(), xmp=XMP, lossless=True),
    "gif": lambda: image("GIF", comment=WORKFLOW),
    "gif moving": lambda: image("GIF", frames=4, comment=WORKFLOW),
    "avif": lambda: image("AVIF", exif=exif(), icc_profile=ICC, xmp=XMP),
    "avif turned": lambda: image("AVIF", exif=exif(6)),
    "avif moving": lambda: image("AVIF", frames=3, exif=exif(), xmp=XMP),
    "png with a tail": lambda: image("PNG") + WORKFLOW.encode(),
    "jpeg with a tail": lambda: image("JPEG") + WORKFLOW.encode(),
    "gif with a tail": lambda: image("GIF") + WORKFLOW.encode(),
    "webp with a tail": lambda: image("WEBP") + WORKFLOW.encode(),
}


def has_leak(data: bytes) -> bool:
    return any(leak in data for leak in LEAKS)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_loses_its_text_and_nothing_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    before = IMAGES[name]()
    path.write_bytes(before)
    path.chmod(0o640)
    assert has_leak(before)

    assert True is strip(path)

    after = path.read_bytes()
    assert not has_leak(after)
    assert shown(before) == shown(after)
    assert 0o640 == path.stat().st_mode & 0o777
    assert [path] == list(tmp_path.iterdir())
    with Image.open(path) as clean, Image.open(io.BytesIO(before)) as dirty:
        # Where a JPEG says nothing of its size, Pillow makes 72 dpi out of the mere presence of EXIF.
        looks = ["icc_profile", "gamma", "chromaticity", *(["dpi"] if name in ("png", "apng", "jpeg") else [])]
        assert [dirty.info.get(key) for key in looks] == [clean.info.get(key) for key in looks]
        assert not {"prompt", "workflow", "parameters", "comment", "xmp"} & clean.info.keys()
    stamp = path.stat()
    assert False is strip(path)
    assert stamp.st_ino == path.stat().st_ino


def test_chunks_with_zipped_text_go_too(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(png(frames=3))
    strip(path)
    assert [b"IHDR", b"gAMA", b"cHRM", b"pHYs", b"acTL", b"fcTL", b"IDAT"] == [
        *dict.fromkeys(name for name, _ in chunks(path.read_bytes()) if name not in (b"IEND", b"fdAT"))
    ]


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        found.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        assert zlib.crc32(data[place + 4 : place + 8 + length]) == int.from_bytes(
            data[place + 8 + length : place + 12 + length]
        )
        place += 12 + length
    return found


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


KEPT = [b"gAMA", b"sRGB", b"iCCP", b"pHYs", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"PLTE"]
GOES = [b"tEXt", b"zTXt", b"iTXt", b"comf", b"tIME", b"prVt", b"eXIf"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(parts=st.lists(st.tuples(st.sampled_from(KEPT + GOES), st.binary(max_size=40))))
def test_any_order_of_chunks_keeps_the_kept_ones(parts: list[tuple[bytes, bytes]], tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    parts = [(b"IHDR", bytes(13)), *parts, (b"IDAT", b"x"), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    assert any(name in GOES for name, _ in parts) is strip(path)
    assert [part for part in parts if part[0] not in GOES] == chunks(path.read_bytes())


# -- videos ---------------------------------------------------------------------------------------------------
def video(
    muxer: str,
    codec: str,
    movflags: str = "",
    *,
    text: bool = True,
    rate: Fraction = Fraction(16),
    sound: str = "",
    rotated: bool = False,
    extra: dict[str, str] | None = None,
) -> bytes:
    descriptor, file = tempfile.mkstemp()  # an index in front takes a file that can be read again
    os.close(descriptor)
    options = ({"movflags": movflags} if movflags else {}) | (extra or {})
    with av.open(file, "w", format=muxer, options=options) as container:
        if text:
            for key in ("prompt", "workflow", "comment", "title"):
                container.metadata[key] = WORKFLOW
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if codec == "libx264":
            stream.options = {"bf": "2", "g": "6"}
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = 1
        context.color_range = 1
        if text:
            stream.metadata["title"] = WORKFLOW
        audio = container.add_stream(sound, rate=48000) if sound else None
        for picture in pictures(13, 64, 48):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode(None))
        if audio is not None:
            planes, layout = ((2, 9600), "fltp") if sound == "aac" else ((1, 19200), "flt")
            wave = av.AudioFrame.from_ndarray(np.zeros(planes, np.float32), format=layout, layout="stereo")
            wave.sample_rate = 48000
            container.mux(audio.encode(wave))
            container.mux(audio.encode(None))
    data = Path(file).read_bytes()
    Path(file).unlink()
    if rotated:  # the matrix of the track's header: 90 degrees
        at = data.index(b"tkhd") + 4 + 40
        data = data[:at] + struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30) + data[at + 36 :]
    return data


VIDEOS: dict[str, Callable[[], bytes]] = {
    "mp4": lambda: video("mp4", "libx264"),
    "mp4 as ComfyUI saves": lambda: video("mp4", "libx264", "use_metadata_tags", sound="aac"),
    "mp4 faststart": lambda: video("mp4", "libx264", "faststart", rate=Fraction(30000, 1001)),
    "mp4 in fragments": lambda: video("mp4", "libx264", "frag_keyframe+empty_moov"),
    "mp4 rotated": lambda: video("mp4", "libx264", rotated=True),
    "mov": lambda: video("mov", "libx264", sound="aac"),
    "mov with tags": lambda: video("mov", "libx264", "use_metadata_tags"),
    "webm": lambda: video("webm", "libvpx-vp9", sound="libopus", rate=Fraction(24000, 1001)),
    "webm live": lambda: video("webm", "libvpx-vp9", extra={"live": "1"}),
    "mkv": lambda: video("matroska", "libx264", sound="aac"),
}


def played(data: bytes) -> list[Any]:
    """All that a player is given: packets with their times, pictures, rates and colours."""
    with av.open(io.BytesIO(data)) as container:
        found: list[Any] = [
            (
                s.type, s.codec_context.name, s.time_base, s.start_time, s.duration, s.frames,
                s.average_rate if s.type == "video" else None, s.codec_context.extradata,
            )
            for s in container.streams
        ]  # fmt: skip
        found += [container.start_time, container.duration]
        context = container.streams.video[0].codec_context
        found += [context.color_primaries, context.color_trc, context.colorspace, context.color_range]
        for packet in container.demux():
            found.append((packet.stream_index, packet.pts, packet.dts, packet.duration, packet.is_keyframe))
            found.append(bytes(packet))
    with av.open(io.BytesIO(data)) as container:
        found += [(f.pts, f.rotation, f.to_ndarray().tobytes()) for f in container.decode(video=0)]
    return found


def words(data: bytes) -> dict[str, str]:
    with av.open(io.BytesIO(data)) as container:
        keys = dict(container.metadata)
        for stream in container.streams:
            keys |= stream.metadata
    return {key.lower(): value for key, value in keys.items()}


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_loses_its_text_and_nothing_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    before = VIDEOS[name]()
    path.write_bytes(before)
    assert has_leak(before)

    assert True is strip(path)

    after = path.read_bytes()
    assert not has_leak(after)
    assert played(before) == played(after)
    assert len(before) == len(after)
    assert not {"prompt", "workflow", "comment", "title"} & words(after).keys()
    assert (before.find(b"moov") < before.find(b"mdat")) == (after.find(b"moov") < after.find(b"mdat"))
    assert [path] == list(tmp_path.iterdir())
    assert False is strip(path)


@pytest.mark.parametrize(
    ("muxer", "codec", "movflags"),
    [
        ("mp4", "libx264", ""),
        ("mp4", "libx264", "use_metadata_tags+faststart"),
        ("mov", "libx264", ""),
        ("mov", "libx264", "use_metadata_tags"),
        ("webm", "libvpx-vp9", ""),
        ("matroska", "libx264", ""),
    ],
)
def test_what_a_muxer_notes_about_itself_stays(muxer: str, codec: str, movflags: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(video(muxer, codec, movflags, text=False))
    before = path.stat()
    assert False is strip(path)
    assert (before.st_ino, before.st_mtime_ns) == (path.stat().st_ino, path.stat().st_mtime_ns)
    assert "encoder" in words(path.read_bytes())


def test_text_hides_in_no_other_box(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    plain = video("mp4", "libx264", text=False)
    text = WORKFLOW.encode()
    boxes = b"".join(
        struct.pack(">I4s", 8 + len(body), name) + body
        for name, body in (
            (b"free", text),
            (b"skip", text),
            (b"uuid", bytes.fromhex("be7acfcb97a942e89c71999491e3afac") + text),
            (b"meta", bytes(4) + text),
        )
    )
    large = struct.pack(">I4sQ", 1, b"free", 16 + len(text)) + text
    path.write_bytes(plain + boxes + large)
    assert True is strip(path)
    assert not has_leak(path.read_bytes())
    assert played(plain) == played(path.read_bytes())


def test_a_broken_box_of_text_goes_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    plain = video("mp4", "libx264", text=False)
    path.write_bytes(plain.replace(b"\xa9too", b"\xa9cmt").replace(b"\x00\x2dilst", b"\xff\xffilst"))
    assert True is strip(path)
    assert "comment" not in words(path.read_bytes())


def test_chapters_and_attachments_of_matroska_go(tmp_path: Path) -> None:
    path = tmp_path / "out.mkv"
    plain = video("matroska", "libx264", text=False)
    text = WORKFLOW.encode()
    length = (1 << 56 | len(text)).to_bytes(8)
    # Attachments, Chapters and a dirty Void after the Segment: read as if they stood in it
    path.write_bytes(
        plain
        + b"\x19\x41\xa4\x69"
        + length
        + text
        + b"\x10\x43\xa7\x70"
        + length
        + text
        + b"\xec"
        + length
        + text
    )
    assert True is strip(path)
    assert not has_leak(path.read_bytes())
    assert played(plain) == played(path.read_bytes())


# -- what cannot be used --------------------------------------------------------------------------------------
def outcome(path: Path) -> bool:
    """Whether the file was refused."""
    try:
        strip(path)
    except MediaError as error:
        return error.reason == "output_unreadable"
    return False


@pytest.mark.parametrize("name", [*IMAGES, *VIDEOS])
def test_a_truncated_file_is_an_error_or_has_lost_its_text(name: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    whole = (IMAGES | VIDEOS)[name]().removesuffix(WORKFLOW.encode())
    refused = 0
    lengths = sorted({*range(12, len(whole), max(1, len(whole) // 40)), len(whole) - 1})
    for length in lengths:
        path.write_bytes(whole[:length])
        failed = outcome(path)
        refused += failed
        assert whole[:length] == path.read_bytes() if failed else not has_leak(path.read_bytes())
        assert [path] == list(tmp_path.iterdir())
    # A fragmented or live file that ends between two parts is whole as far as its headers go.
    assert refused >= len(lengths) - 4


@pytest.mark.parametrize("name", [*IMAGES, *VIDEOS])
def test_damage_never_raises_anything_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    whole = bytearray((IMAGES | VIDEOS)[name]())
    rng = np.random.default_rng(3)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 4):
            damaged[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
        path.write_bytes(damaged)
        assert not outcome(path) or damaged == path.read_bytes()


@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) * 1_000_002,
        struct.pack(">I4s", 8, b"moov") + struct.pack(">I4s", 8, b"wide") * 1_000_002,
        b"GIF89a" + bytes(7) + b"\x21\xfe\x01." * 1_000_002,
        b"".join(struct.pack(">I4s", 8 * (5000 - n), b"moov") for n in range(5000)),
        b"\xff\xd8" + b"\xff" * 10_000_000,
        b"\x1a\x45\xdf\xa3\x80" + b"\x18\x53\x80\x67\xff" * 100_000,
    ],
    ids=["chunks", "boxes", "blocks", "nested", "fill", "segments"],
)
def test_a_hostile_file_ends_soon(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(data)
    outcome(path)
    assert data == path.read_bytes()


def test_other_formats_are_left_alone(tmp_path: Path) -> None:
    for name, data in {
        "a.txt": WORKFLOW.encode(),
        "a.bmp": image("BMP") + WORKFLOW.encode(),
        "a.avi": video("avi", "mpeg4"),
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
        assert False is strip(tmp_path / name)
        assert data == (tmp_path / name).read_bytes()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(MediaError):
            strip(path)
    with pytest.raises(FileNotFoundError):
        strip(tmp_path / "absent")
