import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from rushes.errors import MediaError
from rushes.media.encode import VideoWriter, exact_fps, read_picture, write_png


def frames(width: int, height: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    base = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (width + count, height))
    return [np.ascontiguousarray(base[:, i : i + width]) for i in range(count)]


def write(path: Path, width: int = 64, height: int = 48, fps: float = 16, count: int = 20) -> list[np.ndarray]:
    given = frames(width, height, count)
    with VideoWriter(path, width, height, fps, comment="a test") as writer:
        for frame in given:
            writer.write(frame.copy())
    assert count == writer.frames
    return given


@pytest.mark.parametrize(
    ("width", "height", "fps", "count", "pixels"),
    [
        (64, 48, 16, 20, "yuv420p"),
        (54, 96, 24, 81, "yuv420p"),
        (64, 48, 23.976, 12, "yuv420p"),
        (64, 48, 12.5, 1, "yuv420p"),
        (65, 47, 16, 5, "yuv444p"),
        (2, 2, 1, 3, "yuv420p"),
    ],
)
def test_what_was_asked_for_is_in_the_file(
    tmp_path: Path, width: int, height: int, fps: float, count: int, pixels: str
) -> None:
    path = tmp_path / "a.mp4"
    write(path, width, height, fps, count)
    with av.open(path) as container:
        stream = container.streams.video[0]
        shown = [frame.pts * stream.time_base for frame in container.decode(video=0)]
        context = stream.codec_context
        assert ("h264", width, height, pixels) == (context.name, stream.width, stream.height, context.pix_fmt)
        assert exact_fps(fps) == stream.average_rate
        assert count == len(shown) == stream.frames
        assert [n / exact_fps(fps) for n in range(count)] == pytest.approx(shown, abs=1e-4)
        assert count / fps == pytest.approx(float(stream.duration * stream.time_base), rel=1e-3)
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert (1, 1, 1, 1) == tags


def test_the_index_stands_before_the_frames(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4")
    content = (tmp_path / "a.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_the_same_frames_are_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", count=40)
    write(tmp_path / "b.mp4", count=40)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_pictures_and_colours_survive(tmp_path: Path) -> None:
    given = write(tmp_path / "a.mp4")
    red = np.zeros((48, 64, 3), np.uint8)
    red[:] = (200, 30, 40)
    with VideoWriter(tmp_path / "red.mp4", 64, 48, 16) as writer:
        writer.write(red)
    with av.open(tmp_path / "a.mp4") as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert all(cv2.PSNR(a, b) > 30 for a, b in zip(given, decoded, strict=True))
    with av.open(tmp_path / "red.mp4") as container:
        shown = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(shown.astype(int) - (200, 30, 40)).max() <= 4


def test_an_error_in_between_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    given = frames(64, 48, 1)[0]
    with pytest.raises(ZeroDivisionError), VideoWriter(path, 64, 48, 16) as writer:
        writer.write(given if writer.frames else given[: 48 // writer.frames])
    assert not path.exists()


def test_a_folder_that_is_not_there_is_an_error_not_a_hang(tmp_path: Path) -> None:
    given = frames(64, 48, 30)
    with pytest.raises(OSError), VideoWriter(tmp_path / "none" / "a.mp4", 64, 48, 16) as writer:
        [writer.write(frame) for frame in given]


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow beyond a few kilobytes: writes fail as on a full disk."""
    script = textwrap.dedent(f"""
        import resource, signal
        from pathlib import Path
        import numpy as np
        from rushes.media.encode import VideoWriter

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, MOST))
        noise = np.random.default_rng(1).integers(0, 256, (20, 96, 128, 3), dtype=np.uint8)
        path = Path({str(tmp_path / "a.mp4")!r})
        try:
            with VideoWriter(path, 128, 96, 16) as writer:
                for frame in noise:
                    writer.write(frame)
        except OSError:
            print("refused", path.exists())
    """)
    for limit in (1000, 40_000, 100_000):
        limited = script.replace("MOST", str(limit))
        ran = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == "refused False"


def test_a_frame_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="48x64x3"), VideoWriter(tmp_path / "a.mp4", 64, 48, 16) as writer:
        writer.write(np.zeros((64, 48, 3), np.uint8))


@pytest.mark.parametrize(("width", "height", "fps"), [(0, 48, 16), (64, 9000, 16), (64, 48, 0), (64, 48, 1e6)])
def test_what_cannot_be_encoded_is_refused(tmp_path: Path, width: int, height: int, fps: float) -> None:
    with pytest.raises(MediaError):
        VideoWriter(tmp_path / "a.mp4", width, height, fps)


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (16, Fraction(16)),
        (24.0, Fraction(24)),
        (23.976, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (12.5, Fraction(25, 2)),
    ],
)
def test_exact_rates(fps: float, expected: Fraction) -> None:
    assert expected == exact_fps(fps)


def test_png_is_lossless_and_says_what_it_is(tmp_path: Path) -> None:
    picture = frames(63, 47, 1)[0]
    write_png(tmp_path / "a.png", picture, comment="a test")
    assert (picture == read_picture(tmp_path / "a.png")).all()
    with Image.open(tmp_path / "a.png") as image:
        assert ("RGB", "a test") == (image.mode, image.text["Comment"])


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.png", b"<html>"), ("b.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError):
            read_picture(tmp_path / name)
    with pytest.raises(MediaError):
        read_picture(tmp_path / "missing.png")
