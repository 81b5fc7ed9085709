"""Check and normalise untrusted image and video files. Decodes: run it in the child of
:mod:`rushes.media.inspector`, never in a process that must live on.

A file is taken for what its first bytes say and opened as that alone: neither Pillow nor FFmpeg is left to
guess among the many formats that they know. Everything is decoded in full, as only that finds a truncated or
corrupt file; sizes are read from the header before anything is decoded.
"""

import contextlib
import struct
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import msgspec

from rushes.errors import MediaError
from rushes.media.sniff import SNIFF_BYTES, WANTED, Kind, Sniffed, sniff

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from PIL.Image import Image

PNG_COMPRESSION: Final = 1
"""zlib's fastest: on photographs a tenth larger than its default and five times as fast."""
FULL_DECODE_PIXELS: Final = 4_000_000_000
"""Longer videos (1080p: over a minute) are decoded at their key frames only, and all their packets are read."""
_CODECS: Final = frozenset({"h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "prores", "mjpeg"})
"""The video codecs that the listed containers commonly hold; FFmpeg's several hundred others stay unused."""
_UNKNOWN_SIZE: Final = 1 << 60
"""An element that ends where the next one of its level begins (RFC 8794, 6.2)."""
_CLUSTER: Final = b"\x1f\x43\xb6\x75"
_EBML_NAMES: Final = frozenset(
    name.to_bytes((name.bit_length() + 7) // 8, "big")
    for name in (
        # in a Segment: SeekHead Info Tracks Cluster Cues, Attachments Chapters Tags Void CRC-32
        *(0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1F43B675, 0x1C53BB6B),
        *(0x1941A469, 0x1043A770, 0x1254C367, 0xEC, 0xBF),
        # in a Cluster: Timestamp SimpleBlock BlockGroup PrevSize Position SilentTracks EncryptedBlock
        *(0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0x5854, 0xAF),
    )
)


class ImageInfo(msgspec.Struct, frozen=True):
    """An image as a viewer shows it: sizes in pixels, after its EXIF orientation."""

    width: int
    height: int
    content_type: str
    kind: Kind = "image"


class VideoInfo(msgspec.Struct, frozen=True):
    """A video as a player shows it: sizes in pixels after its rotation, duration in seconds."""

    width: int
    height: int
    frames: int
    fps: float
    duration: float
    codec: str
    content_type: str
    kind: Kind = "video"


def _sniffed(path: Path, kind: Kind) -> Sniffed:
    with path.open("rb") as file:
        sniffed = sniff(file.read(SNIFF_BYTES))
    if sniffed is None:
        raise MediaError("input_not_media", f"The file is not {WANTED[kind]}.")
    if sniffed.kind != kind:
        raise MediaError("input_wrong_kind", f"The file is {sniffed.content_type}; wanted is {WANTED[kind]}.")
    return sniffed


def _too_many_pixels(max_pixels: int) -> MediaError:
    return MediaError(
        "input_too_many_pixels",
        f"The file has more than {max_pixels / 1e6:g} megapixels. Scale it down first.",
    )


def _unreadable(sniffed: Sniffed, problem: str) -> MediaError:
    return MediaError(
        "input_unreadable", f"The {sniffed.format.upper()} file {problem}. Save or export it again."
    )


# -- images ---------------------------------------------------------------------------------------------------
def check_image(path: Path, max_pixels: int) -> ImageInfo:
    """Decode the image (of an animation the first frame). Raises MediaError."""
    with _guarded(path, max_pixels) as sniffed, _decoded(path, sniffed, max_pixels) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        width, height = reversed(image.size) if turned else image.size
    return ImageInfo(width, height, sniffed.content_type)


def normalise_image(src: Path, dest: Path, max_pixels: int, size: tuple[int, int] | None = None) -> ImageInfo:
    """Write the image to ``dest`` as PNG: RGB with 8 bits, sRGB, upright, without alpha and metadata; where a
    ``size`` is given, of exactly that width and height in pixels: scaled until it covers it, and cropped evenly.

    Alpha is laid on white: models know no transparency, cut-outs are drawn for the white of a page, and
    black would grow a dark fringe around every soft edge. Raises MediaError, and OSError where ``dest``
    cannot be written.
    """
    from PIL import Image, ImageOps

    if size is not None and size[0] * size[1] > max_pixels:
        raise _too_many_pixels(max_pixels)
    with _guarded(src, max_pixels) as sniffed, _decoded(src, sniffed, max_pixels) as image:
        rgb = _to_rgb(ImageOps.exif_transpose(image))
        if size is not None and rgb.size != size:
            rgb = ImageOps.fit(rgb, size, method=Image.Resampling.LANCZOS)
    rgb.info.clear()  # else the PNG would carry the source's profile, comments and orientation on
    rgb.save(dest, "PNG", compress_level=PNG_COMPRESSION)
    return ImageInfo(rgb.width, rgb.height, "image/png")


@contextlib.contextmanager
def _guarded(path: Path, max_pixels: int) -> Iterator[Sniffed]:
    """Whatever Pillow raises over the file becomes a MediaError."""
    from PIL import Image, ImageFile, UnidentifiedImageError

    sniffed = _sniffed(path, "image")
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    before = Image.MAX_IMAGE_PIXELS
    # Pillow warns above this and raises above its double, also for what a frame declares beyond its canvas.
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield sniffed
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _too_many_pixels(max_pixels) from None
    except UnidentifiedImageError:
        raise _unreadable(sniffed, "is damaged at its beginning") from None
    except MemoryError:
        raise _unreadable(sniffed, "takes more memory to decode than is allowed") from None
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error) as error:
        raise _unreadable(sniffed, "is truncated or corrupt") from error
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def _decoded(path: Path, sniffed: Sniffed, max_pixels: int) -> "Iterator[Image]":
    """The decoded image, opened as the one format that it is."""
    from PIL import Image

    if sniffed.format == "webp" and _webp_pixels(path) > max_pixels:
        raise _too_many_pixels(max_pixels)
    formats = [sniffed.format.upper()]
    if sniffed.format == "png":
        with Image.open(path, formats=formats) as unchecked:
            unchecked.verify()  # all chunks' checksums: loading skips those of the pixels
    # The file is ours to close: of an animation Pillow keeps it open, for the frames to come.
    with path.open("rb") as file, Image.open(file, formats=formats) as image:
        if image.width * image.height > max_pixels:
            raise _too_many_pixels(max_pixels)
        image.load()
        yield image


def _webp_pixels(path: Path) -> int:
    """Width times height by the header: libwebp reserves whole canvases when Pillow merely opens a file."""
    with path.open("rb") as file:
        head = file.read(32).ljust(32, b"\0")
    if head[12:16] == b"VP8X":
        return (int.from_bytes(head[24:27], "little") + 1) * (int.from_bytes(head[27:30], "little") + 1)
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return ((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1)
    return (int.from_bytes(head[26:28], "little") & 0x3FFF) * (int.from_bytes(head[28:30], "little") & 0x3FFF)


def _to_rgb(image: "Image") -> "Image":
    from PIL import Image

    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = _sixteen_to_eight(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        colour = _to_srgb(rgba.convert("RGB"), profile)
        flat = Image.new("RGB", rgba.size, "white")
        flat.paste(colour, mask=alpha)
        return flat
    if image.mode in ("P", "1", "LA", "PA"):
        image = image.convert("RGB")
    return _to_srgb(image, profile)


def _sixteen_to_eight(image: "Image") -> "Image":
    """Grey of 16 or 32 bits to 8, scaled: Pillow's own conversion clips instead."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float32)
    grey = Image.fromarray(np.clip(values / 257.0 + 0.5, 0, 255).astype(np.uint8))
    grey.info = dict(image.info)
    transparent = grey.info.get("transparency")
    if isinstance(transparent, int):
        grey.info["transparency"] = round(transparent / 257)
    return grey


def _to_srgb(image: "Image", profile: bytes | None) -> "Image":
    """Colours by the embedded profile, where there is one that fits; else as they are."""
    from PIL import ImageCms

    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            import io

            converted = ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                ImageCms.createProfile("sRGB"),
                outputMode="RGB",
            )
            if converted is not None:
                return converted
    return image if image.mode == "RGB" else image.convert("RGB")


# -- videos ---------------------------------------------------------------------------------------------------
def check_video(path: Path, max_pixels: int) -> VideoInfo:
    """Decode the video. Raises MediaError.

    Every packet is read and every frame decoded (see FULL_DECODE_PIXELS); the container's own sizes are held
    against the file's length, as a player would quietly stop at the end of a truncated one.
    """
    import av
    import av.error

    sniffed = _sniffed(path, "video")
    if not is_whole(path, sniffed):
        raise _unreadable(sniffed, "is truncated")
    demuxer = "matroska" if sniffed.format == "webm" else "mov"
    try:
        # Only this demuxer and only this file: playlists and references lead nowhere.
        options = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"}
        with av.open(str(path), format=demuxer, options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise MediaError("input_not_media", "The file has no picture, only sound. Give a video.")
            return _decode(container.streams.video[0], container, sniffed, max_pixels)
    except (av.error.FFmpegError, ValueError, OSError, EOFError, UnicodeError) as error:
        raise _unreadable(sniffed, "is truncated or corrupt") from error
    except MemoryError:
        raise _unreadable(sniffed, "takes more memory to decode than is allowed") from None


def _decode(stream: "VideoStream", container: "InputContainer", sniffed: Sniffed, max_pixels: int) -> VideoInfo:
    codec = stream.codec.canonical_name
    if codec not in _CODECS:
        raise MediaError(
            "input_not_media", f"The video's codec {codec} is not supported. Use H.264, H.265, AV1, VP8 or VP9."
        )
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > max_pixels:
        raise _too_many_pixels(max_pixels)
    if width <= 0 or height <= 0:
        raise _unreadable(sniffed, "declares no size")
    stream.codec_context.thread_count = 2
    declared = stream.frames or int((container.duration or 0) / 1e6 * float(stream.average_rate or 30))
    if declared * width * height > FULL_DECODE_PIXELS:
        stream.codec_context.skip_frame = "NONKEY"
    pictures = packets = rotation = 0
    start, end = None, Fraction(0)
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise _unreadable(sniffed, "is truncated or corrupt")
        if packet.size and packet.pts is not None:
            packets += 1
            moment = packet.pts * packet.time_base
            start = moment if start is None else min(start, moment)
            end = max(end, moment + (packet.duration or 0) * packet.time_base)
        for frame in packet.decode():
            if frame.width * frame.height > max_pixels:
                raise _too_many_pixels(max_pixels)
            pictures += 1
            rotation = frame.rotation
    if not pictures:
        raise _unreadable(sniffed, "has no pictures")
    if rotation % 180:
        width, height = height, width
    duration = float(end - (start or Fraction(0)))
    fps = float(stream.average_rate or 0) or (packets / duration if duration else 0.0)
    return VideoInfo(width, height, packets, round(fps, 3), duration, codec, sniffed.content_type)


def is_whole(path: Path, sniffed: Sniffed) -> bool:
    with path.open("rb") as file:
        length = file.seek(0, 2)
        file.seek(0)
        return _ebml_is_whole(file, length) if sniffed.format == "webm" else _boxes_are_whole(file, length)


def _boxes_are_whole(file: BinaryIO, length: int) -> bool:
    """Whether the boxes of the top level (ISO/IEC 14496-12, 4.2) end where the file does, with a ``moov``."""
    position, names = 0, set()
    while position + 8 <= length:
        file.seek(position)
        size, name = struct.unpack(">I4s", file.read(8))
        if size == 1:
            large = file.read(8)
            size = int.from_bytes(large, "big") if len(large) == 8 else 0
        elif size == 0:
            size = length - position  # to the end of the file
        if size < 8 or position + size > length:
            return False
        names.add(name)
        position += size
    return b"moov" in names


def _ebml_is_whole(file: BinaryIO, length: int) -> bool:
    """Whether the Segment ends within the file and its elements follow each other without a gap.

    FFmpeg looks for the next good place after damage and goes on as if nothing had been.
    """
    file.seek(4)
    header = _vint(file)
    if header is None:
        return False
    file.seek(header, 1)
    if file.read(4) != b"\x18\x53\x80\x67":
        return False
    size = _vint(file)
    if size is None:
        return False
    position = file.tell()
    end = length if size == _UNKNOWN_SIZE else position + size
    while position < end <= length:
        file.seek(position)
        name = _ebml_name(file)
        size = _vint(file)
        if size is None or name not in _EBML_NAMES:
            return False
        # Into a cluster, over everything else. Only a cluster may leave its size open.
        position = file.tell() + (0 if name == _CLUSTER else size)
    return position == end


def _ebml_name(file: BinaryIO) -> bytes:
    first = file.read(1)
    return first + file.read(8 - first[0].bit_length()) if first and first[0] > 0x0F else b""


def _vint(file: BinaryIO) -> int | None:
    """A variable-size integer of EBML (RFC 8794, 4), _UNKNOWN_SIZE, or None where there is none."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    width = 9 - first[0].bit_length()
    rest = file.read(width - 1)
    if len(rest) != width - 1:
        return None
    most = (1 << 7 * width) - 1
    value = int.from_bytes(first + rest, "big") & most
    return _UNKNOWN_SIZE if value == most else value
