"""From one picture into another: both are bent along dense optical flow while one fades into the other.

The flow at a moment between is put together from the flows of both directions, as in Super SloMo (Jiang et al.,
2018, equation 4). Where the two directions contradict each other there is no true motion, for example between
two unrelated pictures; there the flow is held back and the fade alone remains, which smears nothing.
"""

from collections.abc import Iterator
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from rushes.engines.draft.camera import cover, ease
from rushes.engines.draft.plan import Plan
from rushes.media.encode import Frame

Field = npt.NDArray[np.float32]

_FLOW_SIDE: Final = 512
"""Pixels of the longer side at which the flow is sought: larger motions are found, and noise is not."""
_DOUBT: Final = 0.1
"""Round-trip error, as a share of the longer side, at which the flow counts for nothing."""


class Morph:
    """The way from ``start`` to ``end`` in ``plan.frames`` frames; the first and last are these."""

    def __init__(self, plan: Plan, start: Frame, end: Frame) -> None:
        self.plan = plan
        self.start = cover(start, plan.width, plan.height)
        self.end = cover(end, plan.width, plan.height)
        self.forth, self.back = flows(self.start, self.end)

    def views(self) -> Iterator[Frame]:
        """Each frame in turn, newly allocated."""
        rows, columns = self.start.shape[:2]
        x, y = np.meshgrid(np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32))
        here = np.dstack((x, y))
        for number in range(self.plan.frames):
            t = ease(number / (self.plan.frames - 1)) if self.plan.frames > 1 else 0.0
            if t in (0.0, 1.0):
                yield (self.end if t else self.start).copy()
                continue
            a = self._bent(self.start, here, -(1 - t) * t, t * t)
            b = self._bent(self.end, here, (1 - t) * (1 - t), -t * (1 - t))
            yield np.asarray(cv2.addWeighted(a, 1 - t, b, t, 0), np.uint8)

    def _bent(self, picture: Frame, here: Field, forth: float, back: float) -> Frame:
        where = cv2.addWeighted(self.forth, forth, self.back, back, 0)
        cv2.add(where, here, dst=where)
        x, y = cv2.split(where)
        bent = cv2.remap(picture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        return np.asarray(bent, np.uint8)


def flows(start: Frame, end: Frame) -> tuple[Field, Field]:
    """Where each pixel of ``start`` goes in ``end``, and back, in pixels, rows x columns x 2."""
    rows, columns = start.shape[:2]
    scale = min(1.0, _FLOW_SIDE / max(rows, columns))
    size = (max(16, round(columns * scale)), max(16, round(rows * scale)))
    grey = _contrasted(*(cv2.resize(p, size, interpolation=cv2.INTER_AREA) for p in (start, end)))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # DIS cuts the picture into as many stripes as there are threads: results would differ
    try:
        forth, back = _dis(grey[0], grey[1]), _dis(grey[1], grey[0])
    finally:
        cv2.setNumThreads(threads)
    forth, back = _trusted(forth, back), _trusted(back, forth)
    stretch = np.array([columns / size[0], rows / size[1]], np.float32)
    return _enlarged(forth, columns, rows) * stretch, _enlarged(back, columns, rows) * stretch


def _contrasted(*pictures: npt.ArrayLike) -> list[Frame]:
    """The pictures in the mixture of colours with most contrast: in grey, a blue ball on green is lost."""
    colours = np.stack([np.asarray(picture, np.float32) for picture in pictures])
    flat = colours.reshape(-1, 3)
    flat = flat - flat.mean(axis=0)
    _, axes = np.linalg.eigh(flat.T @ flat)
    mixed = (flat @ axes[:, -1]).reshape(colours.shape[:3])
    low, high = np.percentile(mixed, (0.5, 99.5))
    scaled = np.clip((mixed - low) * (255 / max(1.0, float(high - low))), 0, 255)
    return [np.asarray(picture, np.uint8) for picture in scaled]


def _dis(a: Frame, b: Frame) -> Field:
    finder = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    finder.setFinestScale(0)
    finder.setPatchSize(16)
    finder.setPatchStride(4)
    finder.setUseSpatialPropagation(True)
    return np.asarray(finder.calc(a, b, np.zeros((*a.shape, 2), np.float32)), np.float32)


def _trusted(flow: Field, opposite: Field) -> Field:
    """``flow``, held back where going there and back again does not end where it began; smoothed."""
    rows, columns = flow.shape[:2]
    x, y = np.meshgrid(np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32))
    there = cv2.remap(
        opposite, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    error = np.linalg.norm(flow + there, axis=2) / (_DOUBT * max(rows, columns))
    trust = cv2.GaussianBlur(np.exp(-error * error).astype(np.float32), (0, 0), 4)
    weighted = cv2.GaussianBlur(flow * trust[..., None], (0, 0), 6)
    weight = cv2.GaussianBlur(trust, (0, 0), 6)
    # Neighbours that agree fill in for a doubtful pixel; without any, it stays where it is.
    return np.asarray(weighted / np.maximum(weight, 0.15)[..., None], np.float32)


def _enlarged(flow: Field, columns: int, rows: int) -> Field:
    return np.asarray(cv2.resize(flow, (columns, rows), interpolation=cv2.INTER_CUBIC), np.float32)
