"""What is found in the answers of models that each look different."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rushes.catalog.model import Input
from rushes.catalog.remotes import remote_table
from rushes.engines.remote.answers import (
    MOST_FILES,
    Found,
    bar_in,
    files_in,
    input_values,
    remote_files,
)
from rushes.engines.remote.base import RemoteFile, RemoteInput, RemoteRefused
from rushes.requests.record import Progress
from support.remote_driving import IMAGE, PROMPT, queue_job, queue_model

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


class Counted(list[Any]):
    """A list that knows how many of its values were looked at."""

    looked_at = 0

    def __iter__(self) -> Iterator[Any]:
        for one in super().__iter__():
            self.looked_at += 1
            yield one


@pytest.mark.parametrize("wrapped", [lambda urls: urls, lambda urls: {"video": urls}])
def test_a_search_ends_with_the_files_it_needs(wrapped: Callable[[Any], Any]) -> None:
    urls = Counted(f"{BARE}/{number}" for number in range(1000))
    files_in(wrapped(urls), "video")
    objects = Counted({"url": f"{BARE}/{number}.mp4"} for number in range(1000))
    files_in({"clips": objects}, "video")

    assert (MOST_FILES, MOST_FILES) == (urls.looked_at, objects.looked_at)


@pytest.mark.parametrize(
    "junk", [PNG, MP4, "a poem", 7, {"url": PNG}, {"url": f"{BARE}.zip", "content_type": "application/zip"}]
)
@pytest.mark.parametrize("key", ["video", "data", "clips"])
def test_a_search_ends_where_there_is_only_junk(junk: Any, key: str) -> None:
    values = Counted([junk] * 200_000)
    files_in({key: values}, "video")

    assert 0 < values.looked_at < 50_000


def test_what_is_too_long_for_an_address_is_none() -> None:
    long = "https://v3.fal.media/" + "a" * 10_000
    data = "data:video/mp4;base64," + "A" * 100_000

    assert [] == files_in({"video": long, "clip": {"url": long}}, "video")
    assert [data] == [found.url for found in files_in({"video": {"url": data}}, "video")]


def test_a_kind_may_be_written_large() -> None:
    answer = {"video": [{"url": PNG, "content_type": "IMAGE/PNG"}, {"url": BARE, "content_type": "Video/MP4"}]}

    assert [BARE] == [found.url for found in files_in(answer, "video")]


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


async def test_only_files_of_the_input_are_made_text(tmp_path: Path) -> None:
    other = Input("other", "Other image", "string", "start_image")
    asked: list[str] = []

    async def text(file: RemoteInput) -> str:
        asked.append(file.path.name)
        return f"<{file.path.name}>"

    async def sent(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
        model = queue_model("fal", {"model": "a/b"} | mapping, PROMPT, IMAGE, other)
        files = {name: RemoteInput(tmp_path / name, "image/png") for name in names}
        table = remote_table(model, "fal")
        assert table is not None
        job = queue_job(model, tmp_path, files, text="a fox")
        return await input_values(table, job, {"prompt": "prompt", "image": "start_image"}, text)

    fields = {"images": ["start_image", "input['other']"], "first": {"url": "start_image"}}
    both = {"images": ["<picture>", "<other>"], "first": {"url": "<picture>"}}
    assert both == await sent({"input": fields}, "picture", "other")
    assert {"prompt": "a fox", "image": "<other>"} == await sent({}, "other")
    assert ["picture", "other", "other"] == asked
    for mapping in ({}, {"input": {"image": "start_image"}}):
        with pytest.raises(RemoteRefused) as caught:
            await sent(mapping, "picture", "other")
        assert ("remote_refused", "other") == (caught.value.reason, caught.value.field)
    assert ["picture", "other", "other"] == asked


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
        ("5%|#| " + "9" * 5000 + "/10", Progress(fraction=0.05, stage="running")),
        ("5%|#| 1/" + "9" * 5000, Progress(fraction=0.05, stage="running")),
        ("5%|#| 9999999999/10", Progress(fraction=0.05, stage="running")),
        ("9" * 5000 + "%|#| 1/10", Progress(stage="running")),
        ("²%|#| ²/10 ٣%|#| ٣/10", Progress(stage="running")),
        ("x" * 50_000 + "\n 75%|███ | 3/4", Progress(fraction=0.75, stage="running", step=3, steps=4)),
    ],
)
def test_bars(logs: str, progress: Progress) -> None:
    assert progress == bar_in(logs, "running")
