"""The burnt-in mark: the word DRAFT and a timecode, small, in the lower right corner."""

from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from rushes.media.encode import Frame

_SIZE: Final = 0.026
"""Height of the letters as a share of the shorter side."""
_SMALLEST: Final = 10
"""Pixels; smaller letters cannot be read."""
_SHADE: Final = 0.5
"""How much the plate darkens what lies under it."""
_INK: Final = np.array([244, 241, 234], np.float32)
_DOT: Final = np.array([232, 64, 48], np.float32)


def timecode(number: int, fps: float) -> str:
    """HH:MM:SS:FF of frame ``number``, non-drop: the frames of a second are counted at the rounded rate."""
    rate = max(1, round(fps))
    seconds, frame = divmod(number, rate)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}:{frame:02d}"


class Mark:
    """Stamps frames of one size. Everything that does not change, and each digit, is drawn once.

    ``fps`` None leaves the timecode out. Where the frame is too small, the mark gets shorter, then smaller.
    """

    def __init__(self, width: int, height: int, fps: float | None) -> None:
        self.fps = fps
        size = max(_SMALLEST, round(min(width, height) * _SIZE))
        words = ["DRAFT"] if fps is None else ["DRAFT 00:00:00:00", "DRAFT"]
        room = (width, height)
        plate = next((p for w in words if (p := _Plate(w, size)).fits(room)), None)
        while plate is None and size > 3:
            size -= 1
            small = _Plate("DRAFT", size)
            plate = small if small.fits(room) else None
        self._plate = plate
        if plate:
            gap = plate.gap
            self.box = (
                max(0, width - plate.width - gap),
                max(0, height - plate.height - gap),
                plate.width,
                plate.height,
            )
        else:
            self.box = (0, 0, 0, 0)
        """Left, top, width and height of what is changed, in pixels."""

    def stamp(self, frame: Frame, number: int) -> None:
        """Burn the mark into ``frame``, in place."""
        if self._plate is None:
            return
        x, y, w, h = self.box
        text = timecode(number, self.fps) if self.fps is not None else ""
        self._plate.onto(frame[y : y + h, x : x + w], text)


class _Plate:
    """A dark plate with a dot, a word and, where the word has room for it, a timecode of fixed width."""

    def __init__(self, word: str, size: int) -> None:
        font = ImageFont.load_default(size)
        self.cell = max(round(font.getlength(digit)) for digit in "0123456789")
        self.colon = round(font.getlength(":")) + 1
        self.gap = round(size * 1.9)
        pad, dot = round(size * 0.5), round(size * 0.52)
        label, _, code = word.partition(" ")
        self.height = round(size * 1.56)
        self.start = pad + dot + round(size * 0.4) + round(font.getlength(label))
        self.width = self.start + pad
        if code:
            self.start += round(size * 0.55)
            self.width = self.start + pad + code.count(":") * self.colon + 8 * self.cell
        self.has_code = bool(code)
        self.base = round(size * 1.14)
        ink = Image.new("L", (self.width, self.height), 0)
        ImageDraw.Draw(ink).text(
            (pad + dot + round(size * 0.4), self.base), label, font=font, fill=255, anchor="ls"
        )
        light = Image.new("L", ink.size, 0)
        light.paste(_disc(dot), (pad, round((self.height - dot) / 2)))
        inked, lit = (np.asarray(mask, np.float32)[..., None] / 255 for mask in (ink, light))
        plate = self._plate_shape(size)
        self._keep = (1 - plate) * (1 - inked) * (1 - lit)
        self._add = inked * _INK + lit * _DOT
        self._glyphs = {c: self._glyph(font, c) for c in "0123456789:"}

    def fits(self, room: tuple[int, int]) -> bool:
        return self.width + 2 * self.gap <= room[0] and self.height + 2 * self.gap <= room[1]

    def onto(self, patch: Frame, code: str) -> None:
        keep, add = self._keep, self._add
        if code and self.has_code:
            keep, add = keep.copy(), add.copy()
            x = self.start
            for character in code:
                alpha = self._glyphs[character]
                wide = min(alpha.shape[1], self.width - x)
                part = np.s_[:, x : x + wide]
                keep[part] *= 1 - alpha[:, :wide]
                add[part] = add[part] * (1 - alpha[:, :wide]) + _INK * alpha[:, :wide]
                x += wide
        patch[:] = np.clip(patch * keep + add + 0.5, 0, 255).astype(np.uint8)

    def _glyph(
        self, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, character: str
    ) -> npt.NDArray[np.float32]:
        wide = self.colon if character == ":" else self.cell
        tile = Image.new("L", (wide, self.height), 0)
        ImageDraw.Draw(tile).text((wide / 2, self.base), character, font=font, fill=255, anchor="ms")
        return (np.asarray(tile, np.float32) / np.float32(255))[..., None]

    def _plate_shape(self, size: int) -> npt.NDArray[np.float32]:
        large = Image.new("L", (self.width * 4, self.height * 4), 0)
        ImageDraw.Draw(large).rounded_rectangle(
            (0, 0, self.width * 4 - 1, self.height * 4 - 1), radius=round(size * 1.4), fill=255
        )
        shape = np.asarray(large.resize((self.width, self.height), Image.Resampling.BOX), np.float32)
        return (shape * np.float32(_SHADE / 255))[..., None]


def _disc(side: int) -> Image.Image:
    """Drawn at four times its size and shrunk, for a smooth edge."""
    large = Image.new("L", (side * 4, side * 4), 0)
    ImageDraw.Draw(large).ellipse((0, 0, side * 4 - 1, side * 4 - 1), fill=255)
    return large.resize((side, side), Image.Resampling.LANCZOS)
