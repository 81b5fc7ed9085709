"""The pictures and videos that a generation starts from, as the pipelines take them.

What is generated is a little larger than what was asked for (:attr:`Plan.padded_width`), so pictures fill that size:
scaled until they cover it, and cut evenly at both ends, as the ComfyUI graphs of the same models do. A reference
picture is only looked at, so nothing of it is cut: the pipeline itself fits it into the size, on white.
"""

from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
import torch
from PIL import Image, ImageOps

from rushes.engines.wan.plan import Plan
from rushes.errors import EngineError
from rushes.media.encode import Frame, exact_fps, read_picture

FREE: Final = 0.5
"""Of 0 to 1: the grey that stands for frames which are the model's to invent. It is zero to the VAE."""


def fitted(path: Path, plan: Plan) -> Any:
    """The picture as a PIL image, RGB, of the padded size. Raises MediaError where it cannot be decoded."""
    return _cover(read_picture(path), plan)


def reference(path: Path) -> Any:
    """The picture as a PIL image, RGB, as it is. Raises MediaError where it cannot be decoded."""
    return Image.fromarray(read_picture(path))


def conditions(plan: Plan) -> dict[str, Any]:
    """``video`` and ``mask`` for the VACE pipeline; nothing where neither a video nor a frame was given.

    The mask is only there where frames are to stay as they are, the first or the last; a source video alone is what
    the generation is led by, for which the pipeline's own mask (everything is made anew) is the right one.
    """
    if plan.source_video is None and plan.start_image is None and plan.end_image is None:
        return {}
    frames = plan.generated_frames
    video = torch.full((frames, 3, plan.padded_height, plan.padded_width), FREE)
    if plan.source_video is not None:
        for number, frame in enumerate(_footage(plan.source_video, plan)):
            video[number] = frame
    kept = {0: plan.start_image, frames - 1: plan.end_image} if frames > 1 else {0: plan.start_image}
    mask = torch.ones_like(video)
    for number, path in kept.items():
        if path is not None:
            video[number] = _tensor(fitted(path, plan))
            mask[number] = 0
    found = {"video": video[None]}
    return found if mask.all() else {**found, "mask": mask[None]}


def _footage(path: Path, plan: Plan) -> list[torch.Tensor]:
    """The frames at the plan's rate, at the video's own speed, at most as many as are generated."""
    shown: list[torch.Tensor] = []
    began = moment = last = None
    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            length = 1 / Fraction(stream.average_rate or 25)
            for number, frame in enumerate(container.decode(stream)):
                moment = number * length
                if frame.pts is not None and frame.time_base is not None:
                    moment = frame.pts * frame.time_base
                began = moment if began is None else began
                _show(shown, last, moment - began, plan)
                last = frame
                if len(shown) == plan.generated_frames:
                    break
            if began is not None and moment is not None:
                _show(shown, last, moment - began + length, plan)
    except (av.FFmpegError, IndexError) as error:
        if not shown:
            raise EngineError("input_not_media", "The source video cannot be decoded.") from error
    if not shown:
        raise EngineError("input_not_media", "The source video has no frames.")
    return shown


def _show(shown: list[torch.Tensor], frame: av.VideoFrame | None, until: Fraction, plan: Plan) -> None:
    """Append ``frame`` for as long as it is seen: up to ``until``, in seconds from the video's beginning."""
    step = 1 / exact_fps(plan.fps) if plan.fps else Fraction(0)
    if frame is None or not len(shown) * step < until:
        return
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    picture = _tensor(_cover(np.ascontiguousarray(pixels, np.uint8), plan))
    while len(shown) * step < until and len(shown) < plan.generated_frames:
        shown.append(picture)


def _cover(pixels: Frame, plan: Plan) -> Any:
    size = (plan.padded_width, plan.padded_height)
    return ImageOps.fit(Image.fromarray(pixels), size, Image.Resampling.LANCZOS)


def _tensor(picture: Any) -> torch.Tensor:
    """Colours x height x width from 0 to 1, by the arithmetic of diffusers' ``pil_to_numpy``."""
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255.0).permute(2, 0, 1)
