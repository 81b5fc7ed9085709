"""What the engine brings up to ComfyUI and back: names, copies, sizes, frames, and which files count at all."""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from rushes.engines.base import Produced
from rushes.engines.comfyui.engine import ComfyUIEngine
from rushes.errors import EngineError
from support.comfyui import Comfy, Graph
from support.comfyui_models import Models, Work, field, file_field, make_job
from support.comfyui_transcripts import empty, node, save
from support.comfyui_wire import Wire
from support.server import eventually

MakeEngine = Callable[..., ComfyUIEngine]


@pytest.fixture(params=["near", "far"])
def engine(request: pytest.FixtureRequest, comfy: Comfy, wire: Wire, make_engine: MakeEngine) -> ComfyUIEngine:
    """With a ComfyUI on this machine, whose output folder can be read, and with one that is elsewhere."""
    return make_engine(comfy.url if request.param == "near" else wire.url)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def decoded(made: Produced) -> list[np.ndarray]:
    with av.open(str(made.path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_an_image_is_copied_and_measured(engine: ComfyUIEngine, models: Models, tmp_path: Path) -> None:
    model = models.add({"1": empty(0xFF8000, width=70, height=50), "2": save("1")})
    job = make_job(model, tmp_path)
    (made,) = Work(engine, job).made()
    assert ("image", "image/png", 70, 50, 1, None) == (
        made.kind,
        made.content_type,
        made.width,
        made.height,
        made.frames,
        made.fps,
    )
    assert job.output_dir == made.path.parent
    assert [255, 128, 0] == pixels(made.path)[25, 35].tolist()


@pytest.mark.parametrize(("frames", "fps"), [(5, 16.0), (9, 12.5), (1, 24.0)])
def test_a_video_under_the_key_images_has_exactly_its_frames_and_fps(
    engine: ComfyUIEngine, models: Models, tmp_path: Path, frames: int, fps: float
) -> None:
    graph: Graph = {
        "1": empty(5, batch_size=frames),
        "2": node("CreateVideo", images=["1", 0], fps=fps),
        "3": node("SaveVideo", video=["2", 0], filename_prefix="video/x", format="auto", codec="auto"),
    }
    (made,) = Work(engine, make_job(models.add(graph, output="video"), tmp_path)).made()
    assert ("video", "video/mp4", 64, 64, frames, fps) == (
        made.kind,
        made.content_type,
        made.width,
        made.height,
        made.frames,
        made.fps,
    )
    assert frames == len(decoded(made))


def test_files_are_known_by_their_content_whatever_key_names_them(
    engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    """``gifs`` is VideoHelperSuite's word for mp4 files, ``images`` SaveWEBM's; text is neither."""
    graph: Graph = {
        "1": empty(6, batch_size=4),
        "2": node("RushesTestGifs", images=["1", 0], frame_rate=8.0, filename_prefix="g"),
        "3": node("SaveWEBM", images=["1", 0], filename_prefix="w", codec="vp9", fps=8.0, crf=32.0),
        "4": node("RushesTestSaveText", text="not a picture", filename_prefix="t"),
        "5": save("1"),
    }
    made = Work(engine, make_job(models.add(graph, output="video"), tmp_path)).made()
    assert [
        ("video", "video/mp4", 4, 8.0),
        ("video", "video/webm", 4, 8.0),
        *[("image", "image/png", 1, None)] * 4,
    ] == [(one.kind, one.content_type, one.frames, one.fps) for one in made]


def test_outputs_named_by_the_manifest_are_the_only_ones(
    engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    graph: Graph = {"1": empty(1), "2": save("1", "a"), "3": empty(2, width=32), "4": save("3", "b")}
    both = Work(engine, make_job(models.add(graph, id="test/both"), tmp_path)).made()
    assert [64, 32] == [one.width for one in both]
    only = Work(engine, make_job(models.add(graph, id="test/only", outputs=["4"]), tmp_path)).made()
    assert [32] == [one.width for one in only]


def test_temp_files_count_only_where_there_is_no_output(
    engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    preview = node("PreviewImage", images=["1", 0])
    alone = models.add({"1": empty(7, width=48), "2": preview}, id="test/alone")
    (made,) = Work(engine, make_job(alone, tmp_path)).made()
    assert ("image", 48) == (made.kind, made.width)
    graph: Graph = {"1": empty(8), "2": preview, "3": empty(9, width=32), "4": save("3")}
    (made,) = Work(engine, make_job(models.add(graph, id="test/beside"), tmp_path)).made()
    assert 32 == made.width


def test_a_workflow_that_makes_neither_image_nor_video_fails(
    engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    text = node("RushesTestSaveText", text="a poem", filename_prefix="t")
    with pytest.raises(EngineError) as raised:
        Work(engine, make_job(models.add({"1": text}), tmp_path)).made()
    assert ("no_output", False) == (raised.value.reason, raised.value.retryable)


def test_a_fully_cached_prompt_gives_its_files_to_both_requests(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    """Its history entry names the earlier prompt's very file: it must still be there, so nothing is moved."""
    model = models.add({"1": empty(0x102030), "2": node("PreviewImage", images=["1", 0])})
    before = set(comfy.temp_dir.rglob("*.png"))
    first, second, third = (Work(engine, make_job(model, tmp_path)).made()[0].path for _ in range(3))
    assert 3 == len({first, second, third})
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    # That there was something to mix up: ComfyUI made one file for all three.
    assert 1 == len(set(comfy.temp_dir.rglob("*.png")) - before)


def test_files_that_other_prompts_name_are_left_alone(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    graph: Graph = {
        "1": empty(0x405060),
        "2": node("PreviewImage", images=["1", 0]),
        "3": save("1", "shared/x"),
    }
    others = comfy.entry(comfy.queue_prompt(graph))
    model = models.add({"1": empty(0x405060), "2": node("PreviewImage", images=["1", 0])})
    Work(engine, make_job(model, tmp_path)).made()
    for output in others["outputs"].values():
        for file in output["images"]:
            assert 200 == comfy.request("GET", "/view", params=file).status_code
    again = comfy.entry(comfy.queue_prompt(graph))
    for output in again["outputs"].values():
        for file in output["images"]:
            assert 200 == comfy.request("GET", "/view", params=file).status_code


def test_history_of_ours_is_forgotten_after_the_copy_and_others_history_is_not(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    others = comfy.queue_prompt({"1": empty(1), "2": save("1", "others")})
    comfy.entry(others)
    model = models.add({"1": empty(2), "2": save("1")})
    for _ in range(3):
        Work(engine, make_job(model, tmp_path)).made()
    eventually(lambda: [others] == list(comfy.history()), 10, "our prompts are out of the history")


def test_names_that_uploads_return_are_used(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path, png: Path
) -> None:
    """ComfyUI takes another name where there is such a file with other bytes."""
    graph: Graph = {"1": node("LoadImage", image="example.png"), "2": save("1")}
    model = models.add(graph, file_field("1_image"))
    job = make_job(model, tmp_path, files={"1_image": png})
    stale = comfy.input_dir / "rushes" / f"{job.request_id}-1" / "1_image.png"
    stale.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(stale)
    (made,) = Work(engine, job).made()
    assert (pixels(png) == pixels(made.path)).all()
    assert 2 == len(list(stale.parent.iterdir()))


def test_each_attempt_has_its_own_folder_of_inputs(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path, png: Path
) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (24, 24), (1, 2, 3)).save(other)
    graph: Graph = {"1": node("LoadImage", image="example.png"), "2": save("1")}
    model = models.add(graph, file_field("1_image"))
    jobs = [make_job(model, tmp_path, files={"1_image": path}) for path in (png, other)]
    works = [Work(engine, job) for job in jobs]
    assert [80, 24] == [work.made()[0].width for work in works]
    folders = {path.parent.name for path in (comfy.input_dir / "rushes").rglob("1_image.png")}
    assert {f"{job.request_id}-1" for job in jobs} <= folders


def test_two_files_of_one_request_reach_their_own_nodes(
    engine: ComfyUIEngine, models: Models, tmp_path: Path, png: Path
) -> None:
    other = tmp_path / "picture" / "picture.png"  # the same name in another folder
    other.parent.mkdir()
    Image.new("RGB", (24, 24), (1, 2, 3)).save(other)
    graph: Graph = {
        "1": node("LoadImage", image="a.png"),
        "2": node("LoadImage", image="b.png"),
        "3": save("1", "first"),
        "4": save("2", "last"),
    }
    model = models.add(graph, file_field("1_image"), file_field("2_image", "end_image"))
    made = Work(engine, make_job(model, tmp_path, files={"1_image": png, "2_image": other})).made()
    assert [80, 24] == [one.width for one in made]


@pytest.mark.parametrize(("width", "height"), [(100, 60), (54, 96), (64, 48)])
def test_sizes_that_are_no_multiple_of_16_are_generated_larger_and_cropped_back(
    comfy: Comfy, engine: ComfyUIEngine, models: Models, tmp_path: Path, png: Path, width: int, height: int
) -> None:
    """As the built-in graphs do it: round up, generate, crop from the middle."""
    graph: Graph = {
        "1": node("LoadImage", image="a.png"),
        "2": node("ImageScale", image=["1", 0], upscale_method="bilinear", width=16, height=16, crop="center"),
        "3": node("RepeatImageBatch", image=["2", 0], amount=1),
        "4": node("ImageCrop", image=["3", 0], width=16, height=16, x=0, y=0),
        "5": node("CreateVideo", images=["4", 0], fps=8.0),
        "6": node("SaveVideo", video=["5", 0], filename_prefix="v", format="auto", codec="auto"),
        "7": save("2", "whole"),
    }
    model = models.add(
        graph,
        file_field("1_image"),
        field("size", f"{width}x{height}", role="resolution"),
        field("3_amount", 5, role="frames", minimum=1, maximum=200),
        field("5_fps", 12, role="fps", minimum=1, maximum=60),
        output="video",
        bindings={
            "2.width": "round_up(width, 16)",
            "2.height": "round_up(height, 16)",
            "4.width": "width",
            "4.height": "height",
            "4.x": "(round_up(width, 16) - width) // 2",
            "4.y": "(round_up(height, 16) - height) // 2",
        },
    )
    whole, video = sorted(
        Work(engine, make_job(model, tmp_path, files={"1_image": png})).made(), key=lambda one: one.kind
    )
    rounded = (-(-width // 16) * 16, -(-height // 16) * 16)
    assert rounded == (whole.width, whole.height)
    assert (width, height, 5, 12.0) == (video.width, video.height, video.frames, video.fps)
    left, top = (rounded[0] - width) // 2, (rounded[1] - height) // 2
    wanted = pixels(whole.path)[top : top + height, left : left + width].astype(int)
    assert 12 > np.abs(decoded(video)[0].astype(int) - wanted).mean()


def test_a_workflow_that_changes_on_disk_is_read_again(
    engine: ComfyUIEngine, models: Models, tmp_path: Path
) -> None:
    widths = []
    for width in (32, 40):
        model = models.add({"1": empty(3, width=width), "2": save("1")})
        widths.append(Work(engine, make_job(model, tmp_path)).made()[0].width)
    assert [32, 40] == widths
