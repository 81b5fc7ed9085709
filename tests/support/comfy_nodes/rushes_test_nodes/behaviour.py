"""What the test nodes do, the same in the stub and in a real ComfyUI; what differs is behind `Host`.

The stub loads this file by its path, a real ComfyUI as a part of the pack beside it. Nothing here may import
ComfyUI, torch or anything of the tests.
"""

import json
import os
import time
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from PIL import Image


class Host(Protocol):
    """What a node needs of the program that it runs in."""

    def progress(self, value: int, total: int, preview: Image.Image | None) -> None:
        """Report a step as samplers do. Raises where the prompt was interrupted."""

    def out_of_memory(self) -> Exception: ...

    def pixels(self, images: Any) -> np.ndarray:
        """An IMAGE as (frames, height, width, 3) of uint8."""

    def save_path(self, prefix: str, width: int, height: int) -> tuple[str, str, int, str, str]:
        """ComfyUI's folder_paths.get_save_image_path for the output folder."""


_counts: dict[str, int] = {}


def classes(host: Host) -> dict[str, type]:
    """The node classes, bound to ``host``, by the names that graphs use."""

    class Sleep:
        """Takes its time; only once where ``marker`` is the path of a file that it can make, then half a second."""

        CATEGORY = "rushes/test"
        RETURN_TYPES = ("IMAGE",)
        FUNCTION = "run"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
            return {
                "required": {
                    "image": ("IMAGE",),
                    "seconds": ("FLOAT", {"default": 0.1, "min": 0.0, "max": 600.0, "step": 0.01}),
                    "steps": ("INT", {"default": 4, "min": 1, "max": 10000}),
                },
                "optional": {
                    "preview": ("BOOLEAN", {"default": False}),
                    "seed": ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF}),
                    "marker": ("STRING", {"default": ""}),
                },
            }

        def run(
            self,
            image: Any,
            seconds: float,
            steps: int,
            *,
            preview: bool = False,
            seed: int = 0,
            marker: str = "",
        ) -> tuple[Any]:
            if marker and not _made(marker):
                seconds, steps = min(seconds, 0.5), min(steps, 10)
            for step in range(steps):
                time.sleep(seconds / steps)
                shown = Image.new("RGB", (8, 8), (step % 256, 128, seed % 256)) if preview else None
                host.progress(step + 1, steps, shown)
            return (image,)

    class Fail(Sleep):
        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
            return {"required": {"image": ("IMAGE",), "reason": ("STRING", {"default": "no luck"})}}

        def run(self, image: Any, reason: str) -> tuple[Any]:  # type: ignore[override]
            raise ValueError(f"{reason}: {os.path.abspath(__file__)} is a file of the server")  # noqa: PTH100

    class OutOfMemory(Sleep):
        """Runs out of memory the first ``times`` times for a ``key``."""

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
            return {
                "required": {
                    "image": ("IMAGE",),
                    "times": ("INT", {"default": 1, "min": 0, "max": 1000}),
                    "key": ("STRING", {"default": ""}),
                }
            }

        def run(self, image: Any, times: int, key: str) -> tuple[Any]:  # type: ignore[override]
            _counts[key] = _counts.get(key, 0) + 1
            if _counts[key] <= times:
                raise host.out_of_memory()
            return (image,)

    class Crash(Sleep):
        """Ends the whole program; once, where ``marker`` is the path of a file that it can make."""

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
            return {"required": {"image": ("IMAGE",), "marker": ("STRING", {"default": ""})}}

        def run(self, image: Any, marker: str) -> tuple[Any]:  # type: ignore[override]
            if marker and not _made(marker):
                return (image,)
            os._exit(9)

    class Hang(Sleep):
        """Does not look whether it was interrupted, as a stuck kernel does not."""

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
            return {
                "required": {
                    "image": ("IMAGE",),
                    "seconds": ("FLOAT", {"default": 60.0, "min": 0.0, "max": 3600.0}),
                }
            }

        def run(self, image: Any, seconds: float) -> tuple[Any]:  # type: ignore[override]
            time.sleep(seconds)
            return (image,)

    class SaveText:
        """A file that is neither image nor video, and a ``text`` entry that is no file at all."""

        CATEGORY = "rushes/test"
        RETURN_TYPES = ()
        FUNCTION = "save"
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
            return {
                "required": {
                    "text": ("STRING", {"default": "hello"}),
                    "filename_prefix": ("STRING", {"default": "text"}),
                }
            }

        def save(self, text: str, filename_prefix: str) -> dict[str, Any]:
            folder, name, counter, subfolder, _ = host.save_path(filename_prefix, 0, 0)
            file = f"{name}_{counter:05}_.txt"
            (Path(folder) / file).write_text(text)
            entry = {"filename": file, "subfolder": subfolder, "type": "output"}
            return {"ui": {"text": [text], "files": [entry]}}

    class Gifs:
        """Saves as VideoHelperSuite's VHS_VideoCombine does: the key is ``gifs`` whatever the file is."""

        CATEGORY = "rushes/test"
        RETURN_TYPES = ()
        FUNCTION = "save"
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
            return {
                "required": {
                    "images": ("IMAGE",),
                    "frame_rate": ("FLOAT", {"default": 8.0, "min": 1.0, "max": 120.0}),
                    "filename_prefix": ("STRING", {"default": "AnimateDiff"}),
                },
                "hidden": {"prompt": "PROMPT"},
            }

        def save(
            self, images: Any, frame_rate: float, filename_prefix: str, prompt: Any = None
        ) -> dict[str, Any]:
            pixels = host.pixels(images)
            height, width = pixels.shape[1:3]
            folder, name, counter, subfolder, _ = host.save_path(filename_prefix, width, height)
            first = f"{name}_{counter:05}.png"
            Image.fromarray(pixels[0]).save(Path(folder) / first)
            file = f"{name}_{counter:05}.mp4"
            write_video(Path(folder) / file, pixels, frame_rate, {"prompt": prompt})
            entry = {
                "filename": file,
                "subfolder": subfolder,
                "type": "output",
                "format": "video/h264-mp4",
                "frame_rate": frame_rate,
                "workflow": first,
                "fullpath": str(Path(folder) / file),
            }
            return {"ui": {"gifs": [entry]}}

    return {
        "RushesTestSleep": Sleep,
        "RushesTestFail": Fail,
        "RushesTestOutOfMemory": OutOfMemory,
        "RushesTestCrash": Crash,
        "RushesTestHang": Hang,
        "RushesTestSaveText": SaveText,
        "RushesTestGifs": Gifs,
    }


def _made(marker: str) -> bool:
    """Whether this was the first to make the file."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def write_video(path: Path, pixels: np.ndarray, fps: float, metadata: dict[str, Any]) -> None:
    """Frames (n, height, width, 3) of uint8 as h264 in yuv420p, as ComfyUI's SaveVideo writes them."""
    with av.open(str(path), "w", options={"movflags": "use_metadata_tags"}) as container:
        for key, value in metadata.items():
            container.metadata[key] = json.dumps(value)
        stream = container.add_stream("h264", rate=Fraction(round(fps * 1000), 1000))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in pixels:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
