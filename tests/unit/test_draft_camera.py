import random

import cv2
import numpy as np
import pytest

from rushes.engines.draft.camera import Camera, cover, ease
from rushes.engines.draft.moves import read
from rushes.engines.draft.plan import Plan
from rushes.media.encode import Frame


def plan(width: int = 192, height: int = 108, frames: int = 9, seed: int = 1) -> Plan:
    return Plan("camera", width, height, frames, 16.0, seed, "", "", "")


def textured(width: int = 480, height: int = 270) -> Frame:
    noise = np.random.default_rng(5).integers(0, 256, (height // 30, width // 30, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def flow(prompt: str, frames: int = 25) -> np.ndarray:
    """Movement of the content from the middle frame to the next one, rows x columns x (right, down)."""
    views = [*Camera(plan(frames=frames), textured(), read(prompt, random.Random(1))).views()]
    a, b = (cv2.cvtColor(view, cv2.COLOR_RGB2GRAY) for view in views[frames // 2 : frames // 2 + 2])
    return cv2.calcOpticalFlowFarneback(a, b, np.zeros((*a.shape, 2), np.float32), 0.5, 3, 21, 3, 7, 1.5, 0)


@pytest.mark.parametrize(
    ("prompt", "axis", "sign"),
    [
        ("pan left", 0, 1),
        ("pan right", 0, -1),
        ("truck left", 0, 1),
        ("truck right", 0, -1),
        ("tilt up", 1, 1),
        ("tilt down", 1, -1),
        ("crane up", 1, 1),
        ("crane down", 1, -1),
    ],
)
def test_the_content_moves_against_the_camera(prompt: str, axis: int, sign: int) -> None:
    moved = flow(prompt)
    along, across = np.median(moved[..., axis]), np.median(moved[..., 1 - axis])
    assert sign * along > 0.4
    assert abs(across) < abs(along) / 4


@pytest.mark.parametrize(("prompt", "sign"), [("dolly in", 1), ("zoom in", 1), ("dolly zooms out", -1)])
def test_the_content_grows_or_shrinks(prompt: str, sign: int) -> None:
    moved = flow(prompt)
    right = np.median(moved[:, 140:180, 0]) - np.median(moved[:, 12:52, 0])
    down = np.median(moved[75:100, :, 1]) - np.median(moved[8:33, :, 1])
    assert sign * right > 0.2
    assert sign * down > 0.1


def test_an_orbit_turns_the_plane() -> None:
    camera = Camera(plan(), textured(), read("orbit right", random.Random(1)))
    perspective = [camera.view(number)[2] / camera.view(number)[2, 2] for number in (0, 8)]
    assert perspective[0][0] * perspective[1][0] < 0
    middle = [camera.view(number) @ (0, 0, 1) for number in (0, 4, 8)]
    assert np.allclose([0, 0, 0], [x / z for x, _, z in middle], atol=0.5)


@pytest.mark.parametrize(
    "prompt", ["dolly in", "pan left, tilt up", "orbit left", "handheld crane down", "dutch angle"]
)
@pytest.mark.parametrize("size", [(480, 270), (270, 480), (100, 900)])
def test_no_border_is_ever_seen(prompt: str, size: tuple[int, int]) -> None:
    camera = Camera(plan(), textured(*size), read(prompt, random.Random(2)))
    camera.picture[:] = 200
    edge = np.zeros_like(camera.picture)
    for number in range(9):
        matrix = camera.to_pixels(camera.view(number))
        flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
        seen = cv2.warpPerspective(edge + 200, matrix, (192, 108), flags=flags, borderValue=(0, 0, 0))
        assert seen.min() == 200


def test_a_zoom_out_ends_on_the_whole_picture() -> None:
    picture = textured(384, 216)
    last = [*Camera(plan(), picture, read("zoom out", random.Random(1))).views()][-1]
    whole = cv2.resize(picture, (192, 108), interpolation=cv2.INTER_AREA)
    assert cv2.PSNR(last, whole) > 26


def test_motion_is_smooth() -> None:
    """The speed changes by far less than a pixel from frame to frame: no stepping."""
    camera = Camera(plan(frames=81), textured(), read("pan right", random.Random(1)))
    xs = np.array([(m := camera.view(number))[0, 2] / m[2, 2] for number in range(81)])
    assert np.abs(np.diff(xs, 2)).max() < 0.1
    assert (np.diff(xs) > 0).all()


def test_ease_starts_and_ends_at_rest() -> None:
    assert [0.0, 0.0, 0.5, 1.0, 1.0] == [ease(s) for s in (-1, 0, 0.5, 1, 2)]
    assert ease(0.01) < 0.001


@pytest.mark.parametrize("size", [(64, 48), (63, 47), (48, 64)])
@pytest.mark.parametrize("source", [(480, 270), (32, 32), (1, 300), (64, 48)])
def test_cover_fills_exactly(size: tuple[int, int], source: tuple[int, int]) -> None:
    covered = cover(np.full((source[1], source[0], 3), 77, np.uint8), *size)
    assert (size[1], size[0], 3) == covered.shape
    assert (covered == 77).all()


def test_cover_keeps_the_middle() -> None:
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, 30:70] = 255
    assert (cover(picture, 40, 40) == 255).all()
