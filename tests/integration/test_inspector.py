"""The child process that decodes untrusted files: its limits, its end, its replacement."""

import asyncio
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from rushes.errors import MediaError, StoreUnavailable
from rushes.media.inspect import ImageInfo, VideoInfo
from rushes.media.inspector import Inspector


def picture(path: Path, format_: str = "png") -> Path:
    Image.new("RGB", (48, 32), "red").save(path, format_)
    return path


def movie(path: Path) -> Path:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(24):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def hundred_megapixels(path: Path) -> Path:
    """A small PNG that holds 9984 times 9984 black pixels, one bit each."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9984, 9984, 1, 0, 0, 0, 0))
    packed = zlib.compress(bytes(1 + 9984 // 8) * 9984, 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b""))
    return path


@pytest.fixture
async def inspector() -> AsyncIterator[Inspector]:
    inspector = Inspector()
    yield inspector
    await inspector.close()


async def test_child_checks_and_normalises(inspector: Inspector, tmp_path: Path) -> None:
    assert inspector.pid is None
    image = picture(tmp_path / "i", "jpeg")
    video = movie(tmp_path / "v")

    assert ImageInfo(48, 32, "image/jpeg") == await inspector.check(image, "image")
    child = inspector.pid
    assert ImageInfo(48, 32, "image/png") == await inspector.normalise(image, tmp_path / "o.png", "image")
    info = await inspector.normalise(video, tmp_path / "o.mp4", "video")
    assert isinstance(info, VideoInfo)
    assert info.frames == 24
    assert video.read_bytes() == (tmp_path / "o.mp4").read_bytes()
    with Image.open(tmp_path / "o.png") as out:
        assert ("PNG", "RGB", (48, 32)) == (out.format, out.mode, out.size)
    assert child == inspector.pid


async def test_child_brings_images_to_a_size(inspector: Inspector, tmp_path: Path) -> None:
    image = picture(tmp_path / "i", "jpeg")
    made = tmp_path / "o.png"

    assert ImageInfo(20, 30, "image/png") == await inspector.normalise(image, made, "image", size=(20, 30))
    with Image.open(made) as out:
        assert ("PNG", "RGB", (20, 30)) == (out.format, out.mode, out.size)


async def test_a_size_that_takes_too_much_is_refused(inspector: Inspector, tmp_path: Path) -> None:
    with pytest.raises(MediaError) as caught:
        await inspector.normalise(picture(tmp_path / "i"), tmp_path / "o.png", "image", size=(10_001, 10_000))

    assert caught.value.reason == "input_too_many_pixels"
    assert not (tmp_path / "o.png").exists()


async def test_refusals_come_through_with_their_reason(inspector: Inspector, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"<html>")
    with pytest.raises(MediaError) as caught:
        await inspector.normalise(bad, tmp_path / "o.png", "image")

    assert caught.value.reason == "input_not_media"
    assert not (tmp_path / "o.png").exists()


async def test_faults_of_this_machine_are_not_the_files(inspector: Inspector, tmp_path: Path) -> None:
    image = picture(tmp_path / "i")
    with pytest.raises(StoreUnavailable):
        await inspector.normalise(image, tmp_path / "missing" / "o.png", "image")


async def test_killed_child_costs_one_file(inspector: Inspector, tmp_path: Path) -> None:
    image = picture(tmp_path / "i")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it waits for a writer: the child stands still in the middle of a job
    await inspector.check(image, "image")
    killed = inspector.pid
    assert killed is not None
    job = asyncio.create_task(inspector.check(pipe, "image"))
    writer = await asyncio.to_thread(os.open, pipe, os.O_WRONLY)
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(MediaError) as caught:
        await job
    os.close(writer)

    assert caught.value.reason == "input_unreadable"
    assert (await inspector.check(image, "image")).width == 48
    assert inspector.pid not in (None, killed)


async def test_child_killed_between_files_is_replaced(inspector: Inspector, tmp_path: Path) -> None:
    image = picture(tmp_path / "i")
    await inspector.check(image, "image")
    killed = inspector.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    while inspector.pid is not None:
        await asyncio.sleep(0.01)

    assert (await inspector.check(image, "image")).width == 48


async def test_job_past_its_time_is_ended(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    inspector = Inspector(seconds=0.2)
    with pytest.raises(MediaError) as caught:
        await inspector.check(pipe, "image")

    assert caught.value.reason == "input_unreadable"
    assert inspector.pid is None
    await inspector.close()


async def test_cancelled_job_does_not_answer_the_next(inspector: Inspector, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    image = picture(tmp_path / "i")
    job = asyncio.create_task(inspector.check(pipe, "image"))
    writer = await asyncio.to_thread(os.open, pipe, os.O_WRONLY)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    os.close(writer)

    assert (await inspector.check(image, "image")).width == 48


async def test_memory_of_the_child_is_limited(tmp_path: Path) -> None:
    """Half a gigabyte is enough for the libraries but not for a hundred megapixels."""
    src = hundred_megapixels(tmp_path / "src")
    inspector = Inspector(memory=512 * 1024**2)
    small = picture(tmp_path / "i")
    with pytest.raises(MediaError) as caught:
        await inspector.normalise(src, tmp_path / "o.png", "image")

    assert caught.value.reason == "input_unreadable"
    assert (await inspector.check(small, "image")).width == 48
    await inspector.close()


async def test_largest_image_fits_the_memory(inspector: Inspector, tmp_path: Path) -> None:
    src = hundred_megapixels(tmp_path / "src")

    info = await inspector.check(src, "image")

    assert (info.width, info.height) == (9984, 9984)


async def test_secrets_do_not_reach_the_child(
    inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("RUSHES_DATABASE_URL", "postgresql://hidden")
    await inspector.check(picture(tmp_path / "i"), "image")
    environ = psutil.Process(inspector.pid).environ()

    assert "hidden" not in "".join(environ.values())


async def test_close_ends_the_child(tmp_path: Path) -> None:
    inspector = Inspector()
    await inspector.check(picture(tmp_path / "i"), "image")
    child = psutil.Process(inspector.pid)
    await inspector.close()

    assert not child.is_running()
    assert inspector.pid is None


_PARENT = """
import asyncio, sys
from pathlib import Path
from rushes.media.inspector import Inspector
assert not {"PIL", "av", "numpy"} & set(sys.modules)
async def main():
    inspector = Inspector()
    await inspector.check(Path(sys.argv[1]), "image")
    assert not {"PIL", "av", "numpy"} & set(sys.modules)
    print(inspector.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_child_dies_with_its_parent_which_imports_no_decoder(tmp_path: Path) -> None:
    image = picture(tmp_path / "i")
    with subprocess.Popen([sys.executable, "-c", _PARENT, str(image)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()

    gone, _ = psutil.wait_procs([child], timeout=30)
    assert [child] == gone
