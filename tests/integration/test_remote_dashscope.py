"""The engine ``dashscope`` against a server that answers as Model Studio does."""

import base64
import io
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rushes.engines.remote.base import RemoteJob, RemoteRefused, Underway
from rushes.engines.remote.dashscope import (
    _OF_OLDER_WAN,
    _OF_WAN_2_5,
    DashScopeEngine,
    Limits,
    _within,
    fitting,
)
from rushes.media.inspect import check_image, check_video
from support.dashscope_jobs import (
    FORMATS,
    FRAMES,
    KEYFRAMES,
    SMALL,
    WAN_2_5,
    field_of,
    job_for,
    with_table,
)
from support.remote_dashscope import I2V, T2I, T2V, DashScopeStub
from support.remote_driving import brought, finished, submitted
from support.remote_stub import KEY, picture
from support.remote_vendors import DASHSCOPE, fixtures

stub, engine, _ = fixtures(DASHSCOPE)


async def made(engine: DashScopeEngine, job: RemoteJob, folder: Path) -> Path:
    """The one file that comes of a job."""
    [file] = (await finished(engine, await submitted(engine, job), job)).files
    return await brought(engine, file, folder / "out")


# -- text to image --------------------------------------------------------------------------------------------
async def test_a_picture_from_text(engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path) -> None:
    job = job_for(tmp_path, prompt="a red kite", negative_prompt="rain", aspect_ratio=SMALL)

    handle = await submitted(engine, job)
    first = await engine.poll(handle, job)
    path = await brought(engine, (await finished(engine, handle, job)).files[0], tmp_path / "out")

    assert isinstance(first, Underway)
    assert first.progress.stage == "queued"
    info = check_image(path, 10_000_000)
    assert (1024, 1024, "image/png") == (info.width, info.height, info.content_type)
    [call] = stub.calls("POST", "/api/v1/services/aigc/text2image/image-synthesis$")
    assert {
        "model": T2I,
        "input": {"prompt": "a red kite", "negative_prompt": "rain"},
        "parameters": {
            "size": "1280*1280",
            "n": 1,
            "prompt_extend": False,
            "watermark": False,
        },
    } == call.json
    assert ("enable", f"Bearer {KEY}") == (
        call.headers["x-dashscope-async"],
        call.headers["authorization"],
    )


@pytest.mark.parametrize(
    ("size", "least"), [(one, 1280 * 1280) for one in FORMATS] + [("1440:810 (16:9)", 768 * 768)]
)
async def test_each_format_of_the_seed_comes_in_exactly_its_size(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, size: str, least: int
) -> None:
    stub.least_pixels, stub.polls = least, 0
    job = job_for(tmp_path, aspect_ratio=size)

    path = await made(engine, job, tmp_path)

    info = check_image(path, 10_000_000)
    assert job.roles["resolution"] == (info.width, info.height)
    assert len(FORMATS) == 13


async def test_a_picture_of_another_size_than_asked_for_is_brought_to_it(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    stub.grows, stub.polls = 64, 0
    job = job_for(tmp_path)

    path = await made(engine, job, tmp_path)

    info = check_image(path, 10_000_000)
    assert (1024, 1024) == (info.width, info.height)


async def test_the_shipped_model_runs_there(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    assert engine.serves(WAN_2_5)
    job = job_for(tmp_path, WAN_2_5, prompt="x" * 2048, negative_prompt="rain", aspect_ratio=SMALL)

    await submitted(engine, job)

    [call] = stub.calls("POST", "image-synthesis")
    assert call.json["input"] == {"prompt": "x" * 2048, "negative_prompt": "rain"}
    assert call.json["parameters"] == {
        "size": "1280*1280",
        "n": 1,
        "prompt_extend": False,
        "watermark": False,
    }


async def test_the_manifest_says_what_goes_where(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    mapping = {
        "prompt": "prompt + '!'",
        "style": 1,
        "parameters": {"seed": "7", "size": "'1440*1440'"},
    }
    model = with_table(WAN_2_5, model=T2I, input=mapping, parameters={"prompt_extend": True, "n": 4})

    await submitted(engine, job_for(tmp_path, model, negative_prompt="rain"))

    [call] = stub.calls("POST", "image-synthesis")
    assert call.json["input"] == {"prompt": "a red kite!", "style": 1}
    assert call.json["parameters"] == {
        "seed": 7,
        "size": "1440*1440",
        "n": 1,  # whatever the manifest says: each one is paid for
        "prompt_extend": True,
        "watermark": False,
    }


@given(st.integers(16, 4096), st.integers(16, 4096), st.sampled_from([_OF_WAN_2_5, _OF_OLDER_WAN]))
def test_every_size_is_brought_within_the_limits(width: int, height: int, limits: Limits) -> None:
    found = fitting((width, height), limits)

    assert _within(found, limits)
    if limits.pixels[0] > width * height and width / height == found[0] / found[1]:
        assert found[0] >= width


def test_a_size_that_is_allowed_stays() -> None:
    assert fitting((1440, 1431), _OF_WAN_2_5) == (1440, 1431)
    assert fitting((1440, 810), _OF_WAN_2_5) == (1712, 960)
    assert fitting((640, 360), None) == (640, 360)


# -- videos ---------------------------------------------------------------------------------------------------
@pytest.fixture
def frames(tmp_path: Path) -> dict[str, Path]:
    files = {}
    for number, role in enumerate(("start_image", "end_image")):
        path = tmp_path / f"{role}.png"
        path.write_bytes(picture(640 + number, 360))
        files[field_of(FRAMES, role)] = path
    return files


def sent_picture(text: str) -> Image.Image:
    head, _, data = text.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


async def test_a_video_between_two_frames(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, frames: dict[str, Path]
) -> None:
    job = job_for(tmp_path, KEYFRAMES, frames)

    outcome = await finished(engine, await submitted(engine, job), job)
    path = await brought(engine, outcome.files[0], tmp_path / "out")

    assert check_video(path, 10_000_000).frames == 5
    [call] = stub.calls("POST", "/api/v1/services/aigc/image2video/video-synthesis$")
    assert sent_picture(call.json["input"]["first_frame_url"]).size == (640, 360)
    assert sent_picture(call.json["input"]["last_frame_url"]).size == (641, 360)
    assert call.json["input"]["prompt"] == job.roles["prompt"]
    assert call.json["parameters"]["resolution"] in ("480P", "720P")
    assert call.json["parameters"]["seed"] == job.roles["seed"] % 2**31
    assert "n" not in call.json["parameters"]


async def test_a_video_from_one_picture_by_mapping(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, frames: dict[str, Path]
) -> None:
    mapping = {
        "prompt": "prompt",
        "img_url": "start_image",
        "parameters": {"duration": "5 if frames < 100 else 10"},
    }
    name = field_of(FRAMES, "end_image")
    one = msgspec.structs.replace(FRAMES, inputs=tuple(field for field in FRAMES.inputs if field.name != name))
    model = with_table(one, model=I2V, input=mapping, parameters={"resolution": "480P", "audio": False})
    del frames[name]

    await submitted(engine, job_for(tmp_path, model, frames))

    [call] = stub.calls("POST", "/api/v1/services/aigc/video-generation/video-synthesis$")
    assert set(call.json["input"]) == {"prompt", "img_url"}
    assert call.json["parameters"]["resolution"] == "480P"
    assert call.json["parameters"]["audio"] is False
    assert call.json["parameters"]["duration"] in (5, 10)


async def test_a_video_from_text_takes_the_nearest_size_there_is(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path
) -> None:
    model = with_table(msgspec.structs.replace(WAN_2_5, output="video"), model=T2V)
    job = job_for(tmp_path, model, prompt="a red kite", aspect_ratio="810:1440 (9:16)")
    job = msgspec.structs.replace(job, roles=job.roles | {"frames": 161, "fps": 16, "seed": 2**40 + 3})

    await submitted(engine, job)

    [call] = stub.calls("POST", "video-generation/video-synthesis$")
    assert call.json["parameters"] == {
        "size": "720*1280",
        "duration": 10,
        "seed": 3,
        "prompt_extend": False,
        "watermark": False,
    }


async def test_a_picture_that_is_too_large_there_is_made_smaller(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, frames: dict[str, Path]
) -> None:
    frames[field_of(FRAMES, "start_image")].write_bytes(picture(2600, 1300))

    await submitted(engine, job_for(tmp_path, KEYFRAMES, frames))

    [call] = stub.calls("POST", "video-synthesis$")
    assert sent_picture(call.json["input"]["first_frame_url"]).size == (2000, 1000)
    assert len(call.json["input"]["first_frame_url"]) < 10_000_000


@pytest.mark.parametrize("role", ["end_image", "reference_image", "source_video"])
@pytest.mark.parametrize("mapping", [{}, {"prompt": "prompt", "img_url": "start_image"}], ids=["", "mapped"])
async def test_a_file_that_would_be_left_out_is_refused(
    engine: DashScopeEngine,
    stub: DashScopeStub,
    tmp_path: Path,
    frames: dict[str, Path],
    mapping: dict[str, str],
    role: str,
) -> None:
    inputs = tuple(
        msgspec.structs.replace(field, role=role) if field.role == "end_image" else field
        for field in FRAMES.inputs
    )
    name = field_of(FRAMES, "end_image")
    model = msgspec.structs.replace(FRAMES, inputs=inputs, required=("prompt",))
    job = job_for(tmp_path, with_table(model, model=I2V, input=mapping), frames)

    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(job)

    assert ("remote_refused", name, False) == (caught.value.reason, caught.value.field, caught.value.billed)
    assert f"no {role.replace('_', ' ')}: leave {name} out" in caught.value.message
    assert "[engines.dashscope.input]" in caught.value.message
    assert [] == stub.seen
    table = mapping | {"prompt": "prompt", "img_url": "start_image", "parameters": {"other_url": [role]}}
    await submitted(engine, job_for(tmp_path, with_table(model, model=I2V, input=table), frames))
    [call] = stub.calls("POST", "video-synthesis$")
    assert sent_picture(call.json["parameters"]["other_url"][0]).size == (641, 360)


async def test_a_picture_for_a_model_of_texts_is_refused(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, frames: dict[str, Path]
) -> None:
    del frames[field_of(FRAMES, "end_image")]
    job = job_for(tmp_path, with_table(FRAMES, model=T2V), frames)

    with pytest.raises(RemoteRefused, match="no start image: map it") as caught:
        await engine.submit(job)  # the model of ours cannot do without: nobody is told to leave it out

    assert field_of(FRAMES, "start_image") == caught.value.field
    assert [] == stub.seen


async def test_a_picture_alone_goes_to_a_model_that_takes_one(
    engine: DashScopeEngine, stub: DashScopeStub, tmp_path: Path, frames: dict[str, Path]
) -> None:
    del frames[field_of(FRAMES, "end_image")]

    await submitted(engine, job_for(tmp_path, with_table(FRAMES, model=I2V), frames))

    [call] = stub.calls("POST", "video-generation/video-synthesis$")
    assert {"prompt", "img_url"} <= set(call.json["input"])
    assert sent_picture(call.json["input"]["img_url"]).size == (640, 360)
