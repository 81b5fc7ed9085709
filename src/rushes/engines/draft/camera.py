"""A pinhole camera in front of a picture: every move is a plane homography per frame, with no border in view.

The picture is a plane; the camera stands before it, turned or displaced a little. All frames share one
magnification, the smallest at which the picture fills each of them, so a move begins or ends on the
whole picture wherever it can.
"""

import math
from collections.abc import Iterator
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from rushes.engines.draft.moves import Move
from rushes.engines.draft.plan import Plan
from rushes.media.encode import Frame

Matrix = npt.NDArray[np.float64]
"""3x3, from the output's pixels to the picture's, both counted from their middles."""

_FOCAL: Final = 1.35
"""Focal length as a share of the longer side: about 40 degrees across, a normal lens."""
_DEPTH: Final = 0.26
"""How much larger things get by one dolly."""
_PAN: Final = math.radians(5.5)
_TILT: Final = math.radians(4.5)
_TRUCK: Final = 0.11
"""Of the width, as the crane's is of the height."""
_ORBIT: Final = math.radians(15)
_ROLL: Final = math.radians(4)
_SHAKE: Final = 0.006
"""Of the longer side."""
_DETAIL: Final = 1.3
"""Pixels of the prepared picture per pixel of output: enough for the closest view of a dolly."""
_SPARE: Final = 1.6
"""How much wider (or taller) than the output's shape the picture may stay, for the camera to travel over."""


def ease(s: float) -> float:
    """Smoothstep from 0 to 1: starts and ends at rest."""
    s = min(1.0, max(0.0, s))
    return s * s * (3 - 2 * s)


def cover(picture: Frame, width: int, height: int, spare: float = 1.0) -> Frame:
    """The middle of ``picture``, scaled so that it fills ``width`` x ``height`` pixels.

    With ``spare`` above 1 it keeps up to that many times the width or height where the picture has it; the
    result is then larger than asked for on that side.
    """
    rows, columns = picture.shape[:2]
    scale = max(width / columns, height / rows)
    wide = min(width * spare, columns * scale)
    high = min(height * spare, rows * scale)
    left, top = (columns - wide / scale) / 2, (rows - high / scale) / 2
    x0, y0 = round(left), round(top)
    x1, y1 = max(x0 + 1, round(columns - left)), max(y0 + 1, round(rows - top))
    size = (max(width, round(wide)), max(height, round(high)))
    if scale == 1.0 and (x1 - x0, y1 - y0) == size:
        return picture[y0:y1, x0:x1].copy()
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4
    return np.asarray(cv2.resize(picture[y0:y1, x0:x1], size, interpolation=how), np.uint8)


class Camera:
    """The views of ``move`` over ``picture``, ``plan.frames`` of them."""

    def __init__(self, plan: Plan, picture: Frame, move: Move) -> None:
        self.plan, self.move = plan, move
        wide, high = math.ceil(plan.width * _DETAIL), math.ceil(plan.height * _DETAIL)
        self.picture = cover(picture, wide, high, spare=_SPARE)
        self._phases = [plan.random("shake").uniform(0, math.tau) for _ in range(12)]
        self._focal = _FOCAL * max(plan.width, plan.height)
        self._detail = wide / plan.width
        self._fill = 1.0
        self._open()

    def views(self) -> Iterator[Frame]:
        """Each frame in turn, newly allocated."""
        size = (self.plan.width, self.plan.height)
        for number in range(self.plan.frames):
            matrix = self.to_pixels(self.view(number))
            yield np.asarray(
                cv2.warpPerspective(
                    self.picture,
                    matrix,
                    size,
                    flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
                    borderMode=cv2.BORDER_REPLICATE,
                ),
                np.uint8,
            )

    def to_pixels(self, matrix: Matrix) -> Matrix:
        """``matrix`` for coordinates that count from the middle of the upper left pixel."""
        rows, columns = self.picture.shape[:2]
        into = _shift((columns - 1) / 2, (rows - 1) / 2)
        return into @ matrix @ _shift(-(self.plan.width - 1) / 2, -(self.plan.height - 1) / 2)

    def view(self, number: int) -> Matrix:
        """Where frame ``number`` looks."""
        plan, move = self.plan, self.move
        whole = ease(number / max(1, plan.frames - 1))
        half = whole - 0.5  # moves sideways are centred on the picture
        near = (1 + _DEPTH * abs(move.depth)) ** (-whole if move.depth >= 0 else whole - 1)
        shake = self._shake(number / plan.fps)
        orbit = move.orbit * _ORBIT * half
        yaw = move.pan * _PAN * half * 2 + shake[2]
        pitch = move.tilt * _TILT * half * 2 + shake[3]
        focal = self._focal
        # An orbiting camera keeps its eye on the middle while it goes around.
        around = focal * near * math.sin(orbit)
        x = (move.truck * _TRUCK * plan.width * half + shake[0]) * self._fill + around
        y = (-move.crane * _TRUCK * plan.height * half + shake[1]) * self._fill
        distance = focal * near * math.cos(orbit)
        turn = _turn(yaw - orbit, pitch, move.roll * _ROLL * half * 2 + shake[4])
        lens = np.diag((self._fill, self._fill, focal))
        stand = np.array([[distance, 0, x], [0, distance, y], [0, 0, 1]])
        scale = np.diag((self._detail, self._detail, 1.0))
        return np.asarray(scale @ stand @ turn @ lens, np.float64)

    def _shake(self, seconds: float) -> list[float]:
        """Sideways and upward pixels, then yaw, pitch and roll: slow sway with a little tremor on top."""
        size = self.move.shake * _SHAKE * max(self.plan.width, self.plan.height)
        angle = self.move.shake * math.radians(0.25)
        waves = [
            0.7 * math.sin(math.tau * sway * seconds + self._phases[2 * i])
            + 0.3 * math.sin(math.tau * tremor * seconds + self._phases[2 * i + 1])
            for i, (sway, tremor) in enumerate(
                [(0.37, 1.9), (0.43, 2.3), (0.31, 1.7), (0.29, 1.3), (0.23, 1.1)]
            )
        ]
        return [size * waves[0], size * waves[1], *(angle * wave for wave in waves[2:])]

    def _open(self) -> None:
        """Find the largest field of view, at most the whole picture, with which no frame shows a border."""
        numbers = [*range(self.plan.frames)]
        if len(numbers) > 400 and not self.move.shake:  # the extremes of a smooth curve need no more
            numbers = [*numbers[:: len(numbers) // 200], numbers[-1]]
        low, high = 0.2, 1.8  # ends at 1.0 where the first guess fits
        for _ in range(12):
            self._fill = (low + high) / 2
            if all(self._inside(number) for number in numbers):
                low = self._fill
                if low >= 1.0:
                    return
            else:
                high = self._fill
        self._fill = low

    def _inside(self, number: int) -> bool:
        rows, columns = self.picture.shape[:2]
        w, h = (self.plan.width - 1) / 2, (self.plan.height - 1) / 2
        corners = self.view(number) @ np.array([[-w, w, w, -w], [-h, -h, h, h], [1, 1, 1, 1]], float)
        seen = np.abs(corners[:2] / corners[2])
        return bool(
            (corners[2] > 0).all() and seen[0].max() <= (columns - 1) / 2 and seen[1].max() <= (rows - 1) / 2
        )


def _shift(x: float, y: float) -> Matrix:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def _turn(yaw: float, pitch: float, roll: float) -> Matrix:
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    cr, sr = math.cos(roll), math.sin(roll)
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return np.asarray(about_y @ about_x @ about_z, np.float64)
