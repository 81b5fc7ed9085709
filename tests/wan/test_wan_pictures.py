"""Pictures and videos as the pipelines take them; what leads a VACE generation."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra: pip install 'rushes[wan]'")

import msgspec
import numpy as np
import torch
from PIL import Image

from rushes.engines.wan import pictures
from rushes.engines.wan.denoise import Denoiser, Stop
from rushes.engines.wan.prompts import Embeddings
from rushes.errors import EngineError
from rushes.media.encode import VideoWriter
from support.tiny_diffusers import Kind
from support.wan_running import SMALL, fresh, picture, stock_latents

Tiny = Callable[[Kind], Path]
GREY = 0.5


def but(**changed: Any) -> Any:
    return msgspec.structs.replace(SMALL, **changed)


def footage(path: Path, frames: int, fps: float, size: tuple[int, int] = (64, 48)) -> Path:
    """A video whose frame n is of one grey, 8 n + 20."""
    with VideoWriter(path, *size, fps) as writer:
        for number in range(frames):
            writer.write(np.full((size[1], size[0], 3), 8 * number + 20, np.uint8))
    return path


def numbers(video: torch.Tensor) -> list[int | None]:
    """The frames of :func:`footage` in 1 x frames x colours x height x width; None for what is left free."""
    means = video[0].mean(dim=(1, 2, 3)).tolist()
    return [None if mean == GREY else round((mean * 255 - 20) / 8) for mean in means]


def test_a_picture_covers_the_padded_size_and_is_cut_evenly(tmp_path: Path) -> None:
    plan = but(width=60, height=40, left=2, top=4)
    thirds = np.zeros((48, 192, 3), np.uint8)
    thirds[:, :64], thirds[:, 64:128], thirds[:, 128:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(thirds).save(tmp_path / "wide.png")
    Image.fromarray(thirds.transpose(1, 0, 2)).resize((24, 96)).save(tmp_path / "tall.png")

    wide, tall = (np.asarray(pictures.fitted(tmp_path / name, plan)) for name in ("wide.png", "tall.png"))

    assert (48, 64, 3) == wide.shape == tall.shape
    assert [0, 255, 0] == wide[24, 32].tolist() == wide[24, 4].tolist() == wide[24, 59].tolist()
    assert [0, 255, 0] == tall[24, 32].tolist()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_a_picture_of_any_mode_is_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    if mode == "I;16":
        Image.fromarray(np.full((30, 40), 30000, np.uint16)).save(path)
    else:
        Image.new("RGB", (40, 30), (120, 130, 140)).convert(mode).save(path)

    for made in (pictures.fitted(path, SMALL), pictures.reference(path)):
        assert "RGB" == made.mode
        assert 100 < np.asarray(made).mean() < 150


def test_a_source_video_plays_at_its_own_speed(tmp_path: Path) -> None:
    for fps, expected in (
        (16, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (32, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        (8, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        (24, [0, 1, 3, 4, 6, 7, 9, 10, 12]),
    ):
        given = pictures.conditions(but(source_video=footage(tmp_path / f"{fps}.mp4", 20, fps)))
        assert expected == numbers(given["video"]), fps
        assert ["video"] == list(given)
        assert (1, 9, 3, 48, 64) == given["video"].shape


def test_what_a_short_source_video_leaves_is_free(tmp_path: Path) -> None:
    given = pictures.conditions(but(source_video=footage(tmp_path / "a.mp4", 4, 16)))
    assert [0, 1, 2, 3, *[None] * 5] == numbers(given["video"])
    given = pictures.conditions(but(source_video=footage(tmp_path / "b.mp4", 1, 8)))
    assert [0, 0, *[None] * 7] == numbers(given["video"])


def test_a_source_video_for_one_picture(tmp_path: Path) -> None:
    plan = but(source_video=footage(tmp_path / "a.mp4", 4, 16), fps=None, frames=1, generated_frames=1)
    assert [0] == numbers(pictures.conditions(plan)["video"])


def test_a_source_video_of_another_shape_and_turned(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    half = np.zeros((64, 192, 3), np.uint8)
    half[:, 96:] = 255  # its right half
    with VideoWriter(path, 192, 64, 16) as writer:
        for _ in range(9):
            writer.write(half.copy())
    upright = pictures.conditions(but(source_video=path))["video"][0, 0]
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4 + 40  # the matrix of the track's header: a quarter clockwise
    quarter = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:at] + quarter + data[at + 36 :])
    turned = pictures.conditions(but(source_video=path))["video"][0, 0]

    assert (3, 48, 64) == upright.shape == turned.shape
    assert upright[:, :, :28].max() < 0.1 < 0.9 < upright[:, :, 36:].min()
    assert turned[:, :20].max() < 0.1 < 0.9 < turned[:, 28:].min()  # what was right is below


@pytest.mark.parametrize("content", [b"", b"no video", None])
def test_a_source_video_that_is_none(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    if content is None:
        content = footage(path, 3, 16).read_bytes()[:600]
    path.write_bytes(content)
    with pytest.raises(EngineError) as caught:
        pictures.conditions(but(source_video=path))
    assert "input_not_media" == caught.value.reason


def test_first_and_last_frame_are_kept(tmp_path: Path) -> None:
    start, end = picture(tmp_path / "a.png", 64, 48, seed=1), picture(tmp_path / "b.png", 100, 48, seed=2)

    given = pictures.conditions(but(start_image=start, end_image=end))

    assert [0, *[1] * 7, 0] == given["mask"][0].mean(dim=(1, 2, 3)).tolist()
    assert [None] * 7 == numbers(given["video"][:, 1:-1])
    for number, path in ((0, start), (-1, end)):
        shown = given["video"][0, number].mul(255).round().permute(1, 2, 0).byte().numpy()
        assert np.array_equal(np.asarray(pictures.fitted(path, SMALL)), shown)

    source = footage(tmp_path / "a.mp4", 9, 16)
    both = pictures.conditions(but(start_image=start, source_video=source))
    assert [1, 2, 3, 4, 5, 6, 7, 8] == numbers(both["video"][:, 1:])
    assert [0, *[1] * 8] == both["mask"][0].mean(dim=(1, 2, 3)).tolist()


def test_nothing_given_is_nothing_told() -> None:
    assert {} == pictures.conditions(SMALL)


@pytest.mark.parametrize("kind", ["vace", "vace-two-experts"])
def test_vace_is_led_as_the_stock_pipeline_is(kind: Kind, tiny: Tiny, tmp_path: Path) -> None:
    source, reference = footage(tmp_path / "a.mp4", 20, 16), picture(tmp_path / "r.png", 80, 60)
    loaded = fresh(tiny(kind))
    plan = but(source_video=source, reference_images=(reference,))
    frames = pictures.conditions(plan)["video"][0]
    shown = [Image.fromarray(frame.mul(255).round().permute(1, 2, 0).byte().numpy()) for frame in frames]
    expected = stock_latents(tiny(kind), plan, video=shown, reference_images=[Image.open(reference)])

    made = Denoiser(loaded, Embeddings()).run(plan, Stop(), lambda *_: None)

    assert torch.equal(expected[:, :, 1:], made)
    free = Denoiser(loaded, Embeddings()).run(
        msgspec.structs.replace(plan, source_video=None), Stop(), lambda *_: None
    )
    assert not torch.equal(free, made)


def test_vace_keeps_the_frames_that_it_is_given(tiny: Tiny, tmp_path: Path) -> None:
    start = picture(tmp_path / "a.png", 64, 48, seed=1)
    plan = but(start_image=start)
    # Tensors, since half of all levels is none that a picture can have.
    video = torch.full((1, 9, 3, 48, 64), GREY)
    video[0, 0] = torch.from_numpy(np.asarray(Image.open(start)).astype(np.float32) / 255).permute(2, 0, 1)
    mask = torch.ones_like(video)
    mask[0, 0] = 0
    expected = stock_latents(tiny("vace"), plan, video=video, mask=mask)

    made = Denoiser(fresh(tiny("vace")), Embeddings()).run(plan, Stop(), lambda *_: None)

    assert torch.equal(expected, made)
