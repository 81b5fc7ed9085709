"""The prompt as a card, as on a storyboard: a quiet landscape, a viewfinder's guides, and the words set on it.

It is composed, and it does not look like an answer: the words are the content.
"""

import math
import random
from collections.abc import Iterator
from typing import Final

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from rushes.engines.draft.camera import Camera, cover
from rushes.engines.draft.moves import Move
from rushes.engines.draft.palette import Palette, palette
from rushes.engines.draft.plan import Plan
from rushes.engines.draft.scenery import Canvas, dithered, scenery
from rushes.engines.draft.typeset import Mask, Text, fit, ink
from rushes.media.encode import Frame

_PAPER: Final = np.array([250, 247, 240], np.float32)
_MARGIN: Final = 0.075
"""Of the shorter side."""
_WORDS: Final = 6000
"""Characters of a prompt that are set at most; no card could show more."""


class _Overlay:
    """What lies over every frame alike: ``frame * keep + add``."""

    def __init__(self, width: int, height: int) -> None:
        self.keep = np.ones((height, width, 3), np.float32)
        self.add = np.zeros((height, width, 3), np.float32)

    def shade(self, amount: npt.NDArray[np.float32]) -> None:
        """Darken by ``amount``, 0 to 1, rows x columns (either may be 1)."""
        self.keep *= 1 - amount[..., None]
        self.add *= 1 - amount[..., None]

    def lay(self, x: int, y: int, mask: npt.NDArray[np.float32], colour: npt.NDArray[np.float32]) -> None:
        """Lay ``colour`` where ``mask`` says, its upper left corner at ``x``, ``y``; cut at the borders."""
        rows, columns = self.keep.shape[:2]
        left, top = min(columns, max(0, x)), min(rows, max(0, y))
        cut = mask[top - y : rows - y, left - x : columns - x, None]
        place = np.s_[top : top + cut.shape[0], left : left + cut.shape[1]]
        self.keep[place] *= 1 - cut
        self.add[place] = self.add[place] * (1 - cut) + colour * cut

    def over(self, frame: Canvas) -> Canvas:
        return np.asarray(cv2.add(cv2.multiply(frame, self.keep), self.add), np.float32)

    def over_frame(self, frame: Frame) -> Frame:
        """The same for 8 bits, rounded."""
        under = cv2.multiply(frame, self.keep, dtype=cv2.CV_32F)
        return np.asarray(cv2.add(under, self.add, dtype=cv2.CV_8U), np.uint8)


class _Style(msgspec.Struct, frozen=True):
    """Measures in pixels, from the size of the picture."""

    width: int
    height: int
    margin: int
    small: int
    """Letters of the small print."""
    largest: int
    smallest: int
    """Letters of the prompt."""
    hair: int
    """A thin line."""


def _style(plan: Plan) -> _Style:
    short = min(plan.width, plan.height)
    return _Style(
        width=plan.width,
        height=plan.height,
        margin=max(2, round(short * _MARGIN)),
        small=max(5, round(short * 0.024)),
        largest=max(6, round(math.sqrt(plan.width * plan.height) * 0.088)),
        smallest=max(5, round(short * 0.019)),
        hair=max(1, round(short / 700)),
    )


def card(plan: Plan) -> Frame:
    """A picture of the prompt."""
    colours = palette(plan.prompt, _chance(plan, "palette"))
    canvas = scenery(plan.width, plan.height, colours, _chance(plan, "scenery"))
    overlay = _Overlay(plan.width, plan.height)
    _veil(overlay)
    _words(overlay, plan, colours)
    return dithered(overlay.over(canvas), _chance(plan, "grain"))


def still(plan: Plan, picture: Frame) -> Frame:
    """``picture`` cropped to the size asked for, with the prompt as a caption along its foot."""
    style = _style(plan)
    canvas = cover(picture, plan.width, plan.height).astype(np.float32)
    overlay = _Overlay(plan.width, plan.height)
    caption = _fitted(plan.prompt, style, round(plan.height * 0.24), style.largest // 2)
    foot = style.height - style.margin - 2 * style.small
    if caption:
        y = np.arange(plan.height, dtype=np.float32)[:, None]
        top = foot - caption.height - plan.height * 0.14
        overlay.shade(0.8 * np.clip((y - top) / (plan.height * 0.24), 0, 1) ** 1.3)
        overlay.lay(style.margin, foot - caption.height, ink(caption), _PAPER)
    _guides(overlay, style)
    return np.asarray(np.clip(overlay.over(canvas) + 0.5, 0, 255), np.uint8)


def title(plan: Plan, move: Move) -> Iterator[Frame]:
    """Frames of a title card: the camera moves over the landscape while the words stand still."""
    colours = palette(plan.prompt, _chance(plan, "palette"))
    wide, high = math.ceil(plan.width * 1.3), math.ceil(plan.height * 1.3)
    backdrop = dithered(scenery(wide, high, colours, _chance(plan, "scenery")), _chance(plan, "grain"))
    overlay = _Overlay(plan.width, plan.height)
    _veil(overlay)
    _words(overlay, plan, colours)
    for view in Camera(plan, backdrop, move).views():
        yield overlay.over_frame(view)


def _chance(plan: Plan, purpose: str) -> random.Random:
    """Another prompt is another card, also for models without a seed."""
    return plan.random(f"{purpose}:{plan.prompt}")


def _veil(overlay: _Overlay) -> None:
    """Darken the side and the foot where the words stand, so that they read on any landscape."""
    rows, columns = overlay.keep.shape[:2]
    x = np.linspace(0, 1, columns, dtype=np.float32)[None, :]
    y = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
    overlay.shade(np.asarray(0.36 * np.clip(1 - x / 0.95, 0, 1) ** 0.8 * np.clip(0.35 + y, 0, 1), np.float32))
    overlay.shade(np.asarray(0.26 * np.clip((y - 0.3) / 0.7, 0, 1) + 0 * x, np.float32))


def _words(overlay: _Overlay, plan: Plan, colours: Palette) -> None:
    """Guides, the model's name above, the prompt large, what to avoid small, the measures at the foot."""
    style = _style(plan)
    accent = np.array(colours.light, np.float32)
    _guides(overlay, style)
    left, top = style.margin, style.margin
    heading = fit(plan.title, max(8, style.width - 2 * left), style.small, style.small, style.small)
    overlay.lay(left, top, ink(heading) * 0.85, _PAPER)
    top += heading.height + style.small
    bar = np.ones((2 * style.hair, min(style.width, 3 * style.small)), np.float32)
    overlay.lay(left, top, bar, accent)
    top += style.small

    foot = style.height - style.margin - round(style.small * 1.1)
    measures = fit(_measures(plan), round(style.width * 0.56), style.small, style.small, style.small)
    overlay.lay(left, foot, ink(measures) * 0.62, _PAPER)
    foot -= round(style.small * 1.1)
    if plan.negative:
        avoid = _fitted(f"Without: {plan.negative}", style, round(style.height * 0.11), style.small)
        if avoid:
            foot -= avoid.height
            overlay.lay(left, foot, ink(avoid) * 0.66, _PAPER)
            foot -= style.small
    prompt = _prompt(plan.prompt or "No prompt", style, foot - top)
    if prompt:
        inked = ink(prompt)
        _shadow(overlay, left, foot - prompt.height, inked, style)
        overlay.lay(left, foot - prompt.height, inked, _PAPER)


def _fitted(text: str, style: _Style, height: int, largest: int) -> Text | None:
    """``text`` in the width of the picture; None where there is nothing or no room at all."""
    width = style.width - 2 * style.margin
    if not text or width < 8 or height < 6:
        return None
    if style.width > style.height * 1.2:
        width = round(width * (0.86 if len(text) < 700 else 1.0))  # a shorter line reads better
    return fit(text[:_WORDS], width, height, largest, min(largest, style.smallest))


def _prompt(text: str, style: _Style, height: int) -> Text | None:
    """Large in the lower half where that can be read well; else as large as the whole height allows."""
    half = _fitted(text, style, min(height, round(style.height * 0.44)), style.largest)
    if half is None or half.size >= 2 * style.small:
        return half
    return _fitted(text, style, height, 2 * style.small)


def _shadow(overlay: _Overlay, x: int, y: int, inked: Mask, style: _Style) -> None:
    """A soft dark around the letters, which the eye takes for contrast."""
    soft = 6 * style.hair
    spread = cv2.copyMakeBorder(inked, soft, soft, soft, soft, cv2.BORDER_CONSTANT, value=0)
    spread = cv2.GaussianBlur(spread, (0, 0), soft / 2.5)
    overlay.lay(x - soft, y - soft, np.asarray(0.45 * spread, np.float32), np.zeros(3, np.float32))


def _measures(plan: Plan) -> str:
    parts = [f"{plan.width} x {plan.height}"]
    if plan.frames > 1:
        parts.append(f"{plan.frames} frames at {plan.fps:g} fps")
    return "   /   ".join([*parts, f"seed {plan.seed}"])


def _guides(overlay: _Overlay, style: _Style) -> None:
    """The lines of thirds, faint, and the four corners of a viewfinder."""
    hair, inset = style.hair, style.margin // 2
    for third in (1, 2):
        across = np.full((hair, style.width), 0.10, np.float32)
        down = np.full((style.height, hair), 0.10, np.float32)
        overlay.lay(0, round(style.height * third / 3), across, _PAPER)
        overlay.lay(round(style.width * third / 3), 0, down, _PAPER)
    arm = max(2, round(style.margin * 0.5))
    for x in (inset, style.width - inset - arm):
        for y in (inset, style.height - inset - hair):
            overlay.lay(x, y, np.full((hair, arm), 0.55, np.float32), _PAPER)
    for x in (inset, style.width - inset - hair):
        for y in (inset, style.height - inset - arm):
            overlay.lay(x, y, np.full((arm, hair), 0.55, np.float32), _PAPER)
