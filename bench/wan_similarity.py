"""How alike two videos are: PSNR and SSIM of 8-bit frames."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]
_K1, _K2 = 0.01, 0.03
_WINDOW, _SIGMA = (11, 11), 1.5


def psnr(one: Sequence[Frame], other: Sequence[Frame]) -> float:
    """Of all frames together, in decibel: peak 255 over the mean squared difference; infinite for equal ones."""
    _check(one, other)
    squares = [float(np.mean((a.astype(np.float64) - b) ** 2)) for a, b in zip(one, other, strict=True)]
    mean = sum(squares) / len(squares)
    return math.inf if mean == 0 else 10 * math.log10(255**2 / mean)


def ssim(one: Sequence[Frame], other: Sequence[Frame]) -> float:
    """The mean over frames and colours, as in Wang et al. 2004: Gaussian windows of 11x11 pixels with sigma 1.5, of
    which only those count that lie in the frame as a whole.
    """
    _check(one, other)
    return float(np.mean([_frame(a, b) for a, b in zip(one, other, strict=True)]))


def _check(one: Sequence[Frame], other: Sequence[Frame]) -> None:
    if len(one) != len(other) or not one or any(a.shape != b.shape for a, b in zip(one, other, strict=False)):
        raise ValueError("the videos differ in size or in number of frames, or have none")
    if min(one[0].shape[:2]) < _WINDOW[0]:
        raise ValueError(f"frames have at least {_WINDOW[0]} pixels a side")


def _frame(one: Frame, other: Frame) -> float:
    a, b = one.astype(np.float64), other.astype(np.float64)
    mean_a, mean_b = _smooth(a), _smooth(b)
    spread_a, spread_b = _smooth(a * a) - mean_a**2, _smooth(b * b) - mean_b**2
    together = _smooth(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    over = (2 * mean_a * mean_b + c1) * (2 * together + c2)
    under = (mean_a**2 + mean_b**2 + c1) * (spread_a + spread_b + c2)
    return float(np.mean(over / under))


def _smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    edge = _WINDOW[0] // 2
    smooth: npt.NDArray[np.float64] = cv2.GaussianBlur(values, _WINDOW, _SIGMA).astype(np.float64)
    return smooth[edge:-edge, edge:-edge]
