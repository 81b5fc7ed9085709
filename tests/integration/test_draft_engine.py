"""The draft engine, from a job to files that are decoded again."""

from pathlib import Path
from typing import Any, Literal

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from rushes.catalog.model import Model
from rushes.engines.base import Job, Produced
from rushes.engines.draft.engine import DraftEngine
from rushes.engines.draft.mark import Mark
from rushes.engines.draft.plan import plan
from rushes.engines.noop import NoopEngine
from rushes.errors import EngineError
from rushes.media.encode import VideoWriter
from rushes.requests.record import Progress

SAMPLES = Path(__file__).resolve().parents[2] / "src" / "rushes" / "catalog" / "samples"
PUPPY = (SAMPLES / "Runcomfy_Example_1259_1.png", SAMPLES / "Runcomfy_Example_1259_2.png")
WOMAN = SAMPLES / "RunComfy_examples_1235_1.png"
SMALL: dict[str, Any] = {"resolution": (192, 108), "frames": 13, "fps": 16, "seed": 7, "prompt": "a day"}


def job(folder: Path, output: Literal["image", "video"] = "video", **roles: Any) -> Job:
    model = Model("any/model", "Any model", "", (), output, (), (), Path())
    folder.mkdir(parents=True, exist_ok=True)
    return Job("r", 1, model, {}, roles, {}, folder)


def make(
    folder: Path, output: Literal["image", "video"] = "video", *, mark: bool = True, **roles: Any
) -> Produced:
    (made,) = DraftEngine(mark).run(job(folder, output, **roles), lambda progress: None)
    return made


def decoded(made: Produced) -> list[np.ndarray]:
    with av.open(made.path) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture
def footage(tmp_path: Path) -> Path:
    path = tmp_path / "source.mp4"
    with VideoWriter(path, 96, 96, 8) as writer:
        for number in range(8):
            writer.write(np.full((96, 96, 3), 20 + number * 25, np.uint8))
    return path


VIDEOS: dict[str, dict[str, Any]] = {
    "camera": {"start_image": WOMAN},
    "orbit": {"reference_image": WOMAN},
    "morph": {"start_image": PUPPY[0], "end_image": PUPPY[1]},
    "title": {},
}


@pytest.mark.parametrize("kind", VIDEOS)
@pytest.mark.parametrize(
    ("width", "height", "frames", "fps"), [(192, 108, 13, 16), (54, 96, 5, 24), (65, 49, 4, 12)]
)
def test_videos_are_exactly_what_was_asked_for(
    tmp_path: Path, kind: str, width: int, height: int, frames: int, fps: int
) -> None:
    wanted = {**VIDEOS[kind], "prompt": "x", "resolution": (width, height), "frames": frames, "fps": fps}
    assert kind == plan(job(tmp_path, **wanted)).kind
    made = make(tmp_path, **wanted)
    assert Produced(made.path, "video", "video/mp4", width, height, frames, float(fps)) == made
    with av.open(made.path) as container:
        stream = container.streams.video[0]
        assert (width, height, fps) == (stream.width, stream.height, stream.average_rate)
        assert "not a generation" in container.metadata["comment"]
    assert [(height, width, 3)] * frames == [frame.shape for frame in decoded(made)]


@pytest.mark.parametrize("roles", [{}, {"reference_image": WOMAN}])
@pytest.mark.parametrize("size", [(144, 81), (102, 137), (81, 144)])
def test_images_are_exactly_what_was_asked_for(
    tmp_path: Path, roles: dict[str, Any], size: tuple[int, int]
) -> None:
    made = make(tmp_path, "image", resolution=size, prompt="A fox", **roles)
    assert Produced(made.path, "image", "image/png", *size) == made
    with Image.open(made.path) as image:
        assert ("PNG", "RGB", size) == (image.format, image.mode, image.size)


@pytest.mark.parametrize("roles", VIDEOS.values(), ids=VIDEOS)
def test_the_same_job_is_the_same_file(tmp_path: Path, roles: dict[str, Any]) -> None:
    first, second = (make(tmp_path / name, **SMALL, **roles).path.read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("kind", ["camera", "orbit", "title"])
def test_another_seed_is_another_file(tmp_path: Path, kind: str) -> None:
    files = {
        make(tmp_path / str(seed), **{**SMALL, **VIDEOS[kind], "seed": seed}).path.read_bytes()
        for seed in range(6)
    }
    assert len(files) > 2


def test_a_morph_begins_and_ends_on_its_pictures(tmp_path: Path) -> None:
    made = make(tmp_path, mark=False, **{**SMALL, **VIDEOS["morph"], "resolution": (240, 240)})
    frames = decoded(made)
    start, end = (
        cv2.resize(cv2.imread(str(p))[..., ::-1], (240, 240), interpolation=cv2.INTER_AREA) for p in PUPPY
    )
    assert cv2.PSNR(frames[0], start) > 32
    assert cv2.PSNR(frames[-1], end) > 32
    assert cv2.PSNR(frames[0], frames[-1]) < 25


def test_a_morph_moves_things_and_does_not_only_fade(tmp_path: Path) -> None:
    """A square that moves must be in one piece half way, not twice half there."""
    for name, left in (("a", 40), ("b", 60)):
        picture = np.full((120, 160, 3), 30, np.uint8)
        noise = np.random.default_rng(2).integers(120, 256, (10, 10, 3), dtype=np.uint8)
        picture[40:80, left : left + 40] = cv2.resize(noise, (40, 40))
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    roles = {"start_image": tmp_path / "a.png", "end_image": tmp_path / "b.png", "resolution": (160, 120)}
    frames = decoded(make(tmp_path / "out", mark=False, frames=9, fps=8, **roles))
    bright = frames[4][60].mean(axis=1) > 75
    assert int(bright.sum()) == pytest.approx(40, abs=8)
    assert float(np.flatnonzero(bright).mean()) == pytest.approx(69.5, abs=5)


@pytest.mark.parametrize("kind", ["camera", "title"])
def test_the_mark_changes_its_corner_alone(tmp_path: Path, kind: str) -> None:
    wanted = {**SMALL, **VIDEOS[kind], "resolution": (320, 180), "frames": 4}
    marked, bare = (decoded(make(tmp_path / str(mark), mark=mark, **wanted)) for mark in (True, False))
    x, y, w, h = Mark(320, 180, 16).box
    for a, b in zip(marked, bare, strict=True):
        difference = np.abs(a.astype(int) - b).mean(axis=2)
        assert difference[y : y + h, x : x + w].max() > 60
        difference[max(0, y - 16) : y + h + 16, max(0, x - 16) : x + w + 16] = 0  # the encoder's blocks
        assert difference.max() < 40
        assert difference.mean() < 2


def test_progress_is_honest(tmp_path: Path) -> None:
    told: list[Progress] = []
    DraftEngine().run(job(tmp_path, **SMALL, start_image=WOMAN), told.append)
    fractions = [progress.fraction for progress in told]
    assert sorted(fractions) == fractions
    assert (0.0, 1.0) == (fractions[0], fractions[-1])
    assert all(fraction < 1 for fraction in fractions[:-1])
    assert [(n, 13) for n in range(1, 14)] == [(p.step, p.steps) for p in told if p.stage == "rendering"][:13]


def test_a_source_video_is_cut_to_measure(tmp_path: Path, footage: Path) -> None:
    made = make(tmp_path / "out", mark=False, source_video=footage, resolution=(64, 48), frames=24, fps=16)
    levels = [float(frame.mean()) for frame in decoded(made)]
    assert len(levels) == 24
    assert levels[0] == pytest.approx(20, abs=4)
    assert levels[8] == pytest.approx(20 + 4 * 25, abs=4)  # half a second in: the fifth frame at 8 a second
    assert levels[16:] == pytest.approx([195] * 8, abs=4)  # the last one is held


def test_a_model_that_says_nothing_gets_sensible_measures(tmp_path: Path) -> None:
    for output, expected in (("video", (832, 480, 81, 16.0)), ("image", (1024, 1024, 1, 16.0))):
        wanted = plan(job(tmp_path, output))
        assert expected == (wanted.width, wanted.height, wanted.frames, wanted.fps)


@pytest.mark.parametrize("value", [-5, 2**80, "12", 3.0, None])
def test_any_seed_will_do(tmp_path: Path, value: Any) -> None:
    assert make(tmp_path, "image", resolution=(40, 30), seed=value).width == 40


@pytest.mark.parametrize(
    "roles",
    [
        {"resolution": (0, 10)},
        {"resolution": (10, 99999)},
        {"resolution": "large"},
        {"frames": 0},
        {"frames": float("nan")},
        {"fps": 0},
        {"fps": "fast"},
        {"seed": float("inf")},
        {"start_image": Path(__file__)},
        {"source_video": Path(__file__)},
    ],
)
def test_what_cannot_be_drawn_is_an_engine_error(tmp_path: Path, roles: dict[str, Any]) -> None:
    with pytest.raises(EngineError) as caught:
        make(tmp_path, **{**SMALL, **roles})
    assert caught.value.reason
    assert str(tmp_path) not in caught.value.message
    assert not [*tmp_path.glob("*.mp4")]


def test_the_noop_engine_makes_nothing(tmp_path: Path) -> None:
    engine = NoopEngine()
    wanted = job(tmp_path)
    engine.warm(wanted.model)
    assert engine.run(wanted, lambda progress: None) == []
    assert engine.name == "noop"
    assert not [*tmp_path.iterdir()]
