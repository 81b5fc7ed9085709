"""`rushes demo`, as the README's first command ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import psutil
import pytest

from support.server import environment, eventually

EXPECTED = {
    "community_wan-2-2_vace-fun.mp4": (1024, 576, 81, 16),
    "community_wan-2-1_fusionx_image-to-video.mp4": (720, 480, 81, 16),
    "community_wan-2-2_first-last-frame.mp4": (720, 720, 81, 16),
    "wan-ai_wan-2-5_text-to-image.png": (1440, 810, 1, None),
}
COMMAND = [sys.executable, "-m", "rushes.cli.main", "demo", "--output-dir", "out"]


def test_demo(tmp_path: Path) -> None:
    done = subprocess.run(
        COMMAND,
        cwd=tmp_path,
        # a demo minds nobody's settings
        env=environment(engine="support.engines:Missing", port="1") | {"TEST_MARK": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    assert sorted(EXPECTED) == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name, (width, height, frames, fps) in EXPECTED.items():
        with av.open(str(tmp_path / "out" / name)) as container:
            stream = container.streams.video[0]
            assert (width, height) == (stream.width, stream.height)
            assert frames == sum(1 for _ in container.decode(stream))
            assert fps is None or fps == stream.average_rate
        row = next(line for line in done.stdout.splitlines() if name in line)
        assert "draft" in row
        assert f"{width}x{height}" in row
    assert "no generation" in done.stdout
    assert "What to run next" in done.stdout
    assert "in_queue" not in done.stderr
    assert not marked(tmp_path)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        (signal.SIGINT, 130),
        (signal.SIGKILL, -9),
    ],
)
def test_however_the_demo_ends_nothing_is_left_running(tmp_path: Path, number: int, status: int) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    demo = subprocess.Popen(
        COMMAND,
        cwd=tmp_path,
        env=environment() | {"TEST_MARK": str(tmp_path), "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # the demo, its server's supervisor, gateway, worker and a slot
        eventually(lambda: len(marked(tmp_path)) >= 5, 60, "all processes run")
        demo.send_signal(number)
        assert status == demo.wait(60)
        eventually(lambda: not marked(tmp_path), 10, "all processes are gone")
        if number != signal.SIGKILL:
            assert [] == list(scratch.iterdir())
    finally:
        for process in marked(tmp_path):
            process.kill()
        demo.wait()


def test_an_engine_that_cannot_start_is_no_reason_to_wait_for_ever(tmp_path: Path) -> None:
    (tmp_path / "first" / "av").mkdir(parents=True)
    (tmp_path / "first" / "av" / "__init__.py").write_text("raise ImportError('libx264.so: cannot open')\n")
    surroundings = environment()
    surroundings["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "first"), surroundings["PYTHONPATH"]])
    done = subprocess.run(
        COMMAND,
        cwd=tmp_path,
        env=surroundings | {"TEST_MARK": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert 1 == done.returncode, done.stderr
    assert "rushes: the engine does not start. The end of the private server's log:" in done.stderr
    assert "libx264.so: cannot open" in done.stderr
    assert "engine not started" in done.stderr
    assert "Traceback" not in done.stderr.split("The end of")[0]
    assert not marked(tmp_path)


def marked(folder: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if mark(process) == str(folder)]


def mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("TEST_MARK")
    except psutil.Error:
        return None
