"""Untrusted files: what is decoded, and what is refused."""

import contextlib
import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from PIL import Image, ImageCms, ImageDraw, ImageOps

from rushes.errors import MediaError
from rushes.media.inspect import ImageInfo, check_image, check_video, normalise_image

LIMIT = 100_000_000
FORMATS = ("png", "jpeg", "webp", "avif", "gif")
VIDEOS = (("mp4", "libx264"), ("mov", "libx264"), ("webm", "libvpx"), ("webm", "libvpx-vp9"))


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """A picture whose four corners differ, so that every turn and mirroring shows."""
    image = Image.new("RGB", (width, height))
    half = (width // 2, height // 2)
    corners = {(0, 0): "red", (half[0], 0): "lime", (0, half[1]): "blue", half: "white"}
    for corner, colour in corners.items():
        image.paste(colour, (*corner, corner[0] + half[0], corner[1] + half[1]))
    return image


def noisy(width: int = 160, height: int = 120) -> Image.Image:
    """A picture that compresses badly: its pixels are most of its file."""
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def saved(image: Image.Image, path: Path, format_: str, **options: object) -> Path:
    image.save(path, format_, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image).astype(int)


def movie(path: Path, muxer: str, codec: str, *, frames: int = 24, **options: str) -> Path:
    noise = np.random.default_rng(2)
    with av.open(str(path), "w", format=muxer, options=options) as container:
        stream = container.add_stream(codec, rate=12, options={"g": "6"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(
                noise.integers(0, 256, (48, 64, 3), dtype=np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def reason(check: object, *args: object) -> str:
    with pytest.raises(MediaError) as caught:
        check(*args)  # type: ignore[operator]
    return caught.value.reason


# -- images ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("format_", FORMATS)
def test_listed_images_are_normalised(tmp_path: Path, format_: str) -> None:
    src = saved(scene(), tmp_path / "src", format_)

    assert ImageInfo(48, 32, f"image/{format_}") == check_image(src, LIMIT)
    assert ImageInfo(48, 32, "image/png") == normalise_image(src, tmp_path / "out.png", LIMIT)
    assert np.abs(pixels(tmp_path / "out.png") - np.asarray(scene()).astype(int)).mean() < 6


@pytest.mark.parametrize("format_", ["tiff", "bmp", "ico", "ppm", "tga", "jpeg2000", "pdf", "eps"])
def test_images_that_pillow_knows_but_the_list_does_not(tmp_path: Path, format_: str) -> None:
    src = saved(scene(), tmp_path / "src.png", format_)

    assert reason(check_image, src, LIMIT) == "input_not_media"
    assert reason(normalise_image, src, tmp_path / "out.png", LIMIT) == "input_not_media"


def test_video_where_an_image_is_wanted_and_the_other_way(tmp_path: Path) -> None:
    video = movie(tmp_path / "v.mp4", "mp4", "libx264", frames=2)
    image = saved(scene(), tmp_path / "i.png", "png")

    assert reason(check_image, video, LIMIT) == "input_wrong_kind"
    assert reason(check_video, image, LIMIT) == "input_wrong_kind"


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_truncated_images_are_refused(tmp_path: Path, format_: str, share: float) -> None:
    whole = saved(noisy(), tmp_path / "whole", format_).read_bytes()
    src = tmp_path / "src"
    src.write_bytes(whole[: max(24, int(len(whole) * share))])

    assert reason(check_image, src, LIMIT) == "input_unreadable"
    assert reason(normalise_image, src, tmp_path / "out.png", LIMIT) == "input_unreadable"
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("format_", ["png", "gif"])
def test_corrupt_images_are_refused(tmp_path: Path, format_: str) -> None:
    """The other formats have no checksums: damage within their pixels is other pixels."""
    data = bytearray(saved(noisy(), tmp_path / "whole", format_).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    (tmp_path / "src").write_bytes(data)

    assert reason(check_image, tmp_path / "src", LIMIT) == "input_unreadable"


@pytest.mark.parametrize("format_", FORMATS)
def test_no_damage_escapes_as_another_error(tmp_path: Path, format_: str) -> None:
    """Random damage is refused or survives decoding; nothing else may come out."""
    whole = saved(scene(), tmp_path / "whole", format_).read_bytes()
    random = np.random.default_rng(3)
    src = tmp_path / "src"
    for _ in range(60):
        data = bytearray(whole)
        for position in random.integers(0, len(data), 8):
            data[position] = random.integers(256)
        src.write_bytes(data)
        with contextlib.suppress(MediaError):
            info = normalise_image(src, tmp_path / "out.png", LIMIT)
            assert (info.height, info.width, 3) == pixels(tmp_path / "out.png").shape


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["jpeg", "png", "webp"])
def test_exif_orientation_is_applied(tmp_path: Path, format_: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if format_ == "jpeg" else {"lossless": True} if format_ == "webp" else {}
    src = saved(scene(), tmp_path / "src", format_, exif=exif, **options)
    turned = scene()
    turned.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(turned)

    info = normalise_image(src, tmp_path / "out.png", LIMIT)
    out = pixels(tmp_path / "out.png")

    assert upright.size == (info.width, info.height)
    assert (info.width, info.height) == ((32, 48) if orientation > 4 else (48, 32))
    assert check_image(src, LIMIT).width == info.width
    for y, x in ((4, 4), (4, -5), (-5, 4), (-5, -5)):
        assert np.abs(out[y, x] - np.asarray(upright).astype(int)[y, x]).max() < 30
    with Image.open(tmp_path / "out.png") as written:
        assert dict(written.getexif()) == {}


@pytest.mark.parametrize(
    ("pixel", "flat"),
    [((255, 0, 0, 255), (255, 0, 0)), ((255, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 128), (127, 127, 127))],
)
def test_alpha_is_laid_on_white(tmp_path: Path, pixel: tuple[int, ...], flat: tuple[int, ...]) -> None:
    src = saved(Image.new("RGBA", (8, 8), pixel), tmp_path / "src", "png")
    normalise_image(src, tmp_path / "out.png", LIMIT)

    assert flat == tuple(pixels(tmp_path / "out.png")[4, 4])


def test_grey_with_alpha_is_laid_on_white(tmp_path: Path) -> None:
    src = saved(Image.new("LA", (8, 8), (0, 0)), tmp_path / "src", "png")
    normalise_image(src, tmp_path / "out.png", LIMIT)

    assert tuple(pixels(tmp_path / "out.png")[0, 0]) == (255, 255, 255)


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 0, 0, 255, 255, 0, 0])
    image.paste(2, (0, 0, 4, 8))
    for format_ in ("png", "gif"):
        src = saved(image, tmp_path / "src", format_, transparency=1)
        normalise_image(src, tmp_path / "out.png", LIMIT)
        out = pixels(tmp_path / "out.png")

        assert (tuple(out[0, 0]), tuple(out[0, 7])) == ((255, 0, 0), (255, 255, 255))


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (257, 1), (32768, 128), (65535, 255)])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, value: int, grey: int) -> None:
    src = saved(Image.fromarray(np.full((8, 8), value, np.uint16)), tmp_path / "src", "png")
    normalise_image(src, tmp_path / "out.png", LIMIT)

    assert (grey, grey, grey) == tuple(pixels(tmp_path / "out.png")[0, 0])


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_black_and_white(tmp_path: Path, mode: str) -> None:
    src = saved(Image.new(mode, (8, 8), 255), tmp_path / "src", "png")
    normalise_image(src, tmp_path / "out.png", LIMIT)

    assert tuple(pixels(tmp_path / "out.png")[0, 0]) == (255, 255, 255)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    src = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "src", "jpeg", quality=95)
    normalise_image(src, tmp_path / "out.png", LIMIT)
    red, green, blue = pixels(tmp_path / "out.png")[8, 8]

    assert red > 240
    assert green < 15
    assert blue < 15


def linear_profile() -> bytes:
    """The sRGB profile with its curves made straight (ICC.1: type `curv` with one entry, gamma 1.0)."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", data, 128)
    for entry in range(132, 132 + 12 * count, 12):
        name, offset, _ = struct.unpack_from(">4sII", data, entry)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            data[offset : offset + 14] = b"curv" + bytes(4) + struct.pack(">IH", 1, 0x0100)
            struct.pack_into(">I", data, entry + 8, 14)
    return bytes(data)


@pytest.mark.parametrize(
    ("profile", "shown"),
    [
        (linear_profile(), 188),  # half of the light is 188 in sRGB (IEC 61966-2-1)
        (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), 128),
        (b"junk", 128),
    ],
)
def test_embedded_profile_is_applied_and_left_out(tmp_path: Path, profile: bytes, shown: int) -> None:
    grey = Image.new("RGB", (8, 8), (128, 128, 128))
    src = saved(grey, tmp_path / "src", "png", icc_profile=profile)
    normalise_image(src, tmp_path / "out.png", LIMIT)

    assert (shown, shown, shown) == pytest.approx(tuple(pixels(tmp_path / "out.png")[0, 0]), abs=1)
    with Image.open(tmp_path / "out.png") as written:
        assert "icc_profile" not in written.info


# -- to a size ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(48, 48), (96, 64), (24, 16), (31, 90), (200, 7), (48, 32), (1, 1)])
@pytest.mark.parametrize("format_", FORMATS)
def test_an_image_is_brought_to_exactly_a_size(tmp_path: Path, format_: str, size: tuple[int, int]) -> None:
    src = saved(scene(), tmp_path / "src", format_)

    assert ImageInfo(*size, "image/png") == normalise_image(src, tmp_path / "out.png", LIMIT, size)
    assert size == pixels(tmp_path / "out.png").shape[1::-1]


def test_an_image_of_its_size_is_not_resampled(tmp_path: Path) -> None:
    src = saved(noisy(), tmp_path / "src", "png")
    normalise_image(src, tmp_path / "out.png", LIMIT, (160, 120))

    assert np.array_equal(np.asarray(noisy()), pixels(tmp_path / "out.png"))


def test_what_is_cropped_for_a_size_is_the_rim_on_both_sides(tmp_path: Path) -> None:
    for turned in (False, True):
        striped = Image.new("RGB", (120, 40), (0, 0, 255))
        striped.paste((255, 255, 255), (40, 0, 80, 40))
        src = saved(
            striped.transpose(Image.Transpose.ROTATE_90) if turned else striped, tmp_path / "src", "png"
        )
        normalise_image(src, tmp_path / "out.png", LIMIT, (20, 20))
        made = pixels(tmp_path / "out.png")

        assert (made[1:19] if turned else made[:, 1:19]).min() > 250


def test_an_image_keeps_its_proportions_at_a_size(tmp_path: Path) -> None:
    disc = Image.new("RGB", (300, 200))
    ImageDraw.Draw(disc).ellipse((100, 50, 199, 149), "white")
    normalise_image(saved(disc, tmp_path / "src", "png"), tmp_path / "out.png", LIMIT, (100, 100))
    white = pixels(tmp_path / "out.png")[..., 0] > 127

    assert (50, 50) == pytest.approx((white.any(0).sum(), white.any(1).sum()), abs=1)


def test_an_image_is_turned_upright_before_it_is_brought_to_a_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter clockwise: the red corner is then the right upper one
    src = saved(scene(), tmp_path / "src", "png", exif=exif)
    normalise_image(src, tmp_path / "out.png", LIMIT, (16, 24))
    made = pixels(tmp_path / "out.png")

    assert ([255, 0, 0], [0, 0, 255]) == (made[4, 12].tolist(), made[4, 4].tolist())


@pytest.mark.parametrize("size", [None, (32, 32), (64, 64)])
def test_transparency_is_white_and_deep_grey_is_grey_at_any_size(
    tmp_path: Path, size: tuple[int, int] | None
) -> None:
    for made, shown in (
        (Image.new("RGBA", (64, 64), (0, 0, 0, 0)), 255),
        (Image.new("LA", (64, 64), (0, 0)), 255),
        (Image.new("LA", (64, 64), (0, 255)), 0),
        (Image.fromarray(np.full((64, 64), 20000, np.uint16)), 78),
    ):
        normalise_image(saved(made, tmp_path / "src", "png"), tmp_path / "out.png", LIMIT, size)
        assert (shown, shown) == (pixels(tmp_path / "out.png").min(), pixels(tmp_path / "out.png").max())


def test_a_profile_is_applied_before_an_image_is_brought_to_a_size(tmp_path: Path) -> None:
    grey = Image.new("RGB", (8, 8), (128, 128, 128))
    src = saved(grey, tmp_path / "src", "png", icc_profile=linear_profile())
    normalise_image(src, tmp_path / "out.png", LIMIT, (4, 4))

    assert (188, 188, 188) == pytest.approx(tuple(pixels(tmp_path / "out.png")[0, 0]), abs=1)


@pytest.mark.parametrize("format_", ["gif", "webp", "png", "avif"])
def test_first_frame_of_an_animation(tmp_path: Path, format_: str) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    src = saved(first, tmp_path / "src", format_, save_all=True, append_images=[second], duration=100)
    normalise_image(src, tmp_path / "out.png", LIMIT)
    red, _, blue = pixels(tmp_path / "out.png")[8, 8]

    assert red > 240
    assert blue < 15


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that declares, and holds, a huge picture."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row * 64) for _ in range(height // 64)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def webp_header(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bombs() -> dict[str, bytes]:
    gif = b"GIF89a" + struct.pack("<HHBBB", 20000, 20000, 0, 0, 0)
    gif += b"\x2c" + struct.pack("<HHHHB", 0, 0, 20000, 20000, 0) + b"\x02\x01\x44\x00\x3b"
    frame = io.BytesIO()
    Image.new("L", (16, 16)).save(frame, "jpeg")
    jpeg = bytearray(frame.getvalue())
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 60000, 60000)
    return {
        "png": png_bomb(16384, 16384),
        "gif": gif,
        "jpeg": bytes(jpeg),
        "webp": webp_header(16384, 16384),
    }


@pytest.mark.parametrize("format_", ["png", "gif", "jpeg", "webp"])
def test_decompression_bombs_are_refused_by_their_header(tmp_path: Path, format_: str) -> None:
    src = tmp_path / "src"
    src.write_bytes(bombs()[format_])
    before = psutil.Process().memory_info().rss

    assert reason(normalise_image, src, tmp_path / "out.png", LIMIT) == "input_too_many_pixels"
    assert psutil.Process().memory_info().rss - before < 100_000_000


@pytest.mark.parametrize("format_", FORMATS)
def test_pixel_limit_is_exact(tmp_path: Path, format_: str) -> None:
    src = saved(scene(40, 30), tmp_path / "src", format_)

    assert check_image(src, 1200).width == 40
    assert reason(check_image, src, 1199) == "input_too_many_pixels"
    assert Image.MAX_IMAGE_PIXELS != 1199


# -- videos ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("muxer", "codec"), VIDEOS)
def test_listed_videos_are_decoded(tmp_path: Path, muxer: str, codec: str) -> None:
    info = check_video(movie(tmp_path / "v", muxer, codec), LIMIT)
    kind = {"mp4": "video/mp4", "mov": "video/quicktime", "webm": "video/webm"}[muxer]

    assert (64, 48, 24, 12.0, kind) == (info.width, info.height, info.frames, info.fps, info.content_type)
    assert info.duration == pytest.approx(2.0, abs=0.1)


def test_fragmented_and_faststart_videos(tmp_path: Path) -> None:
    fast = movie(tmp_path / "fast", "mp4", "libx264", movflags="faststart")
    pieces = movie(tmp_path / "pieces", "mp4", "libx264", movflags="frag_keyframe+empty_moov")
    live = movie(tmp_path / "live", "webm", "libvpx", live="1")

    assert [check_video(path, LIMIT).frames for path in (fast, pieces, live)] == [24, 24, 24]


@pytest.mark.parametrize(("muxer", "codec"), VIDEOS)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_truncated_videos_are_refused(tmp_path: Path, muxer: str, codec: str, share: float) -> None:
    options = {} if muxer == "webm" else {"movflags": "faststart"}
    whole = movie(tmp_path / "whole", muxer, codec, **options).read_bytes()
    src = tmp_path / "src"
    src.write_bytes(whole[: int(len(whole) * share)])

    assert reason(check_video, src, LIMIT) == "input_unreadable"


@pytest.mark.parametrize(("muxer", "codec"), VIDEOS)
def test_corrupt_videos_are_refused(tmp_path: Path, muxer: str, codec: str) -> None:
    data = bytearray(movie(tmp_path / "whole", muxer, codec).read_bytes())
    start, end = len(data) // 4, len(data) * 3 // 4
    data[start:end] = np.random.default_rng(4).bytes(end - start)
    (tmp_path / "src").write_bytes(data)

    assert reason(check_video, tmp_path / "src", LIMIT) == "input_unreadable"


def test_file_with_sound_alone(tmp_path: Path) -> None:
    src = tmp_path / "sound.mp4"
    with av.open(str(src), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts, frame.time_base = 44100, 0, Fraction(1, 44100)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())

    assert reason(check_video, src, LIMIT) == "input_not_media"


@pytest.mark.parametrize("muxer", ["matroska", "mpegts", "avi", "flv"])
def test_containers_outside_the_list(tmp_path: Path, muxer: str) -> None:
    codec = "mpeg4" if muxer == "avi" else "libx264"

    assert reason(check_video, movie(tmp_path / "v.mp4", muxer, codec), LIMIT) == "input_not_media"


def test_playlist_is_no_video(tmp_path: Path) -> None:
    """FFmpeg itself would go and fetch what a playlist names."""
    src = tmp_path / "v.mp4"
    src.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/x.ts\n")

    assert reason(check_video, src, LIMIT) == "input_not_media"


def test_video_of_too_many_pixels(tmp_path: Path) -> None:
    src = movie(tmp_path / "v.mp4", "mp4", "libx264", frames=2)

    assert check_video(src, 64 * 48).width == 64
    assert reason(check_video, src, 64 * 48 - 1) == "input_too_many_pixels"
