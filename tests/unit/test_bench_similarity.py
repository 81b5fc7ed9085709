"""PSNR and SSIM of `bench/wan_deviation.py` against their definitions."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def similar() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "wan_similarity.py"
    spec = importlib.util.spec_from_file_location("bench_wan_similarity", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noise(seed: int, shape: tuple[int, int, int] = (32, 48, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_equal_videos(similar: ModuleType) -> None:
    video = [noise(0), noise(1)]
    assert math.inf == similar.psnr(video, video)
    assert pytest.approx(1.0) == similar.ssim(video, video)


def test_psnr_of_a_known_difference(similar: ModuleType) -> None:
    """All off by 5 in one of two frames: a mean square of 12.5."""
    grey = np.full((16, 16, 3), 100, np.uint8)
    assert pytest.approx(10 * math.log10(255**2 / 12.5)) == similar.psnr([grey, grey], [grey, grey + 5])


def test_ssim_of_flat_frames_is_that_of_their_means(similar: ModuleType) -> None:
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    flat = [np.full((16, 20, 3), value, np.uint8) for value in (100, 150)]
    assert pytest.approx(expected) == similar.ssim(flat[:1], flat[1:])


def test_ssim_by_the_definition(similar: ModuleType) -> None:
    """One window: the weighted means, spreads and covariance written out."""
    one, other = noise(2, (11, 11, 1))[..., 0], noise(3, (11, 11, 1))[..., 0]
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    a, b = one.astype(float), other.astype(float)
    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
    spread = (weights * (a - mean_a) ** 2).sum() + (weights * (b - mean_b) ** 2).sum()
    covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (
        (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (spread + c2))
    )
    assert pytest.approx(expected) == similar.ssim([one], [other])


def test_unlike_videos_are_refused(similar: ModuleType) -> None:
    for one, other in (([noise(0)], []), ([noise(0)], [noise(0), noise(0)]), ([noise(0)], [noise(0)[:16]])):
        with pytest.raises(ValueError, match="differ in size or in number"):
            similar.psnr(one, other)
