"""`rushes demo`, as the README's first command ends."""

import subprocess
import sys
from pathlib import Path

import av
import psutil

from support.server import environment

EXPECTED = {
    "community_wan-2-2_vace-fun.mp4": (1024, 576, 81, 16),
    "community_wan-2-1_fusionx_image-to-video.mp4": (720, 480, 81, 16),
    "community_wan-2-2_first-last-frame.mp4": (720, 720, 81, 16),
    "wan-ai_wan-2-5_text-to-image.png": (1440, 810, 1, None),
}


def test_demo(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rushes.cli.main", "demo", "--output-dir", "out"],
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
    assert not [process for process in psutil.process_iter() if mark(process) == str(tmp_path)]


def mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("TEST_MARK")
    except psutil.Error:
        return None
