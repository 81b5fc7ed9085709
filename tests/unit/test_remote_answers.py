"""What is found in the answers of models that each look different."""

from pathlib import Path
from typing import Any

import pytest

from rushes.engines.remote.answers import MOST_FILES, Found, bar_in, files_in, remote_files
from rushes.engines.remote.base import RemoteFile, RemoteRefused
from rushes.requests.record import Progress

MP4 = "https://v3.fal.media/files/a.mp4"
PNG = "https://v3.fal.media/files/a.png"
BARE = "https://cdn.example/4711"


@pytest.mark.parametrize(
    ("answer", "kind", "urls"),
    [
        (MP4, "video", [MP4]),
        ([PNG, PNG, BARE], "image", [PNG, BARE]),
        ({"video": {"url": MP4, "content_type": "video/mp4"}, "seed": 7, "prompt": PNG}, "video", [MP4]),
        ({"images": [{"url": PNG}, {"url": BARE, "content_type": "image/webp"}]}, "image", [PNG, BARE]),
        ({"image": {"url": PNG}, "mask_image": {"url": BARE}}, "image", [PNG]),
        ({"thumbnail": {"url": PNG}, "video": MP4}, "video", [MP4]),
        ({"output": {"video": [MP4]}}, "video", [MP4]),
        ({"data": {"images": [PNG]}}, "image", [PNG]),
        ({"video_url": MP4}, "video", [MP4]),
        ({"frames": {"url": f"{BARE}.zip"}, "clip": {"url": MP4}}, "video", [MP4]),
        ({"clip": {"url": BARE, "content_type": "application/octet-stream"}}, "video", [BARE]),
        ({"video": {"url": PNG, "content_type": "image/png"}}, "video", [PNG]),
        ({"images": [PNG]}, "video", []),
        ({"images": [{"url": PNG}]}, "video", [PNG]),
        ({"prompt": MP4, "video": None, "output": "a poem"}, "video", []),
        ({"video": {"url": "file:///etc/passwd"}, "image": {"url": 7}}, "video", []),
        ({"video": {"url": "https://[broken/a.mp4"}}, "video", ["https://[broken/a.mp4"]),
        (None, "image", []),
        (7, "image", []),
    ],
)
def test_files_in(answer: Any, kind: Any, urls: list[str]) -> None:
    assert urls == [found.url for found in files_in(answer, kind)]


def test_no_answer_is_too_deep_or_too_long() -> None:
    deep: Any = MP4
    for _ in range(5000):
        deep = {"output": [deep]}

    assert [] == files_in(deep, "video")
    assert MOST_FILES == len(files_in([f"{BARE}/{number}" for number in range(1000)], "image"))


async def test_files_in_the_answer_itself_are_written(tmp_path: Path) -> None:
    found = [Found("data:image/png;base64,aGVsbG8=", "image/png"), Found("data:image/svg,%68i"), Found(PNG)]
    files = await remote_files(found, tmp_path / "job", lambda url: url.endswith(".png"))

    assert (b"hello", b"hi") == tuple(file.path.read_bytes() for file in files[:2] if file.path)
    assert RemoteFile(url=PNG, keyed=True) == files[2]


@pytest.mark.parametrize(
    "uri", ["data:image/png;base64,%%%", "data:image/png;base64", "data:image/png;base64,a"]
)
async def test_a_file_in_the_answer_that_is_none(tmp_path: Path, uri: str) -> None:
    with pytest.raises(RemoteRefused) as caught:
        await remote_files([Found(uri)], tmp_path, lambda _: False)

    assert "remote_failed" == caught.value.reason


@pytest.mark.parametrize(
    ("logs", "progress"),
    [
        ("", Progress(stage="running")),
        ("Using seed: 7\nloss fell by 20% | fine", Progress(stage="running")),
        ("  0%|          | 0/4 [00:00<?]", Progress(stage="running", step=0, steps=4)),
        (
            "  0%|    | 0/4 [00:00<?]\r 25%|██  | 1/4 [00:01<00:03]\r 50%|████| 2/4",
            Progress(fraction=0.5, stage="running", step=2, steps=4),
        ),
        ("Sampling: 100%|████| 10/10 [00:05]", Progress(fraction=1.0, stage="running", step=10, steps=10)),
        ("done 30%|███       |", Progress(fraction=0.3, stage="running")),
        ("x" * 50_000 + "\n 75%|███ | 3/4", Progress(fraction=0.75, stage="running", step=3, steps=4)),
    ],
)
def test_bars(logs: str, progress: Progress) -> None:
    assert progress == bar_in(logs, "running")
