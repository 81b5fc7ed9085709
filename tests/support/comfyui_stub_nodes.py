"""The stub's nodes: what `/object_info` says of them are ComfyUI 0.3.64's facts (comfyui_stub_nodes.json), while
its sentences are left empty.

They make real, small files. An IMAGE is an array (frames, height, width, 3) of uint8 here, where ComfyUI has a
float tensor. The test nodes come from the pack for the real ComfyUI.
"""

import copy
import hashlib
import importlib.util
import json
import os
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
from PIL import Image

Info = dict[str, Any]
HERE = Path(__file__).parent
_PROSE: Info = {"description": "", "category": ""}
"""What a real server has words for, and tests do not compare."""


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


class OutOfMemoryError(RuntimeError):
    """torch.OutOfMemoryError, which torch.cuda.OutOfMemoryError is another name of."""


OutOfMemoryError.__module__ = "torch"


class Folders:
    """ComfyUI's folder_paths, for one program. ``temp`` is emptied at its start."""

    def __init__(self, input_dir: Path, output_dir: Path, temp_dir: Path) -> None:
        self.input, self.output, self.temp = (p.resolve() for p in (input_dir, output_dir, temp_dir))

    def of_type(self, type_: str | None) -> Path | None:
        return {"input": self.input, "output": self.output, "temp": self.temp}.get(type_ or "")

    def annotated(self, name: str) -> tuple[str, Path | None]:
        for type_ in ("output", "input", "temp"):
            if name.endswith(f"[{type_}]"):
                return name[: -len(type_) - 3], self.of_type(type_)
        return name, None

    def input_path(self, name: str) -> Path:
        plain, folder = self.annotated(name)
        return (folder or self.input) / plain

    def save_path(self, folder: Path, prefix: str, width: int, height: int) -> tuple[str, str, int, str, str]:
        prefix = prefix.replace("%width%", str(width)).replace("%height%", str(height))
        normal = os.path.normpath(prefix)
        subfolder, name = os.path.dirname(normal), os.path.basename(normal)  # noqa: PTH119, PTH120
        full = Path(os.path.abspath(folder / subfolder))  # noqa: PTH100 - as ComfyUI does, links unresolved
        if not full.is_relative_to(folder):
            raise Exception(f"{full} is outside of the output folder {folder}")
        full.mkdir(parents=True, exist_ok=True)
        taken = [0]
        for entry in (path.name for path in full.iterdir()):
            rest = entry[len(name) + 1 :].split("_")[0]
            if entry.startswith(f"{name}_") and rest.isdigit():
                taken.append(int(rest))
        return str(full), name, max(taken) + 1, subfolder, prefix


class Node:
    """One class of nodes. ``info`` is its entry of /object_info; ``run`` returns (outputs, ui)."""

    def __init__(
        self,
        name: str,
        info: Info,
        run: Callable[..., tuple[tuple[Any, ...], Info]],
        *,
        check: Callable[[str], str | None] | None = None,
        changed: Callable[[str], Any] | None = None,
        checks: str = "",
    ) -> None:
        self.name, self.info, self.run = name, info, run
        self.check, self.changed, self.checks = check, changed, checks
        """``check`` looks at the one input ``checks``, instead of the usual checks of bounds and lists."""

    @property
    def is_output(self) -> bool:
        return bool(self.info["output_node"])

    def inputs(self) -> dict[str, tuple[bool, Any, Info]]:
        """(required, type, extra) of each input."""
        found = {}
        for category in ("required", "optional"):
            for name, entry in self.info["input"].get(category, {}).items():
                found[name] = (category == "required", entry[0], entry[1] if len(entry) > 1 else {})
        return found


def behaviour() -> ModuleType:
    """The pack's code without its __init__, which only a real ComfyUI can import."""
    path = HERE / "comfy_nodes" / "rushes_test_nodes" / "behaviour.py"
    spec = importlib.util.spec_from_file_location("rushes_test_behaviour", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Nodes(Mapping[str, Node]):
    """Every class the stub knows. ``progress`` is what samplers call at each step."""

    def __init__(self, folders: Folders, progress: Callable[[int, int, Image.Image | None], None]) -> None:
        self._folders = folders
        self._progress = progress
        self._behaviour = behaviour()
        self._temp_name = "".join(random.choice("abcdefghijklmnopqrstupvxyz") for _ in range(5))
        self._nodes: dict[str, Node] = {}
        infos = json.loads((HERE / "comfyui_stub_nodes.json").read_text())
        for name, info in infos.items():
            run = getattr(self, f"_{name}")
            self._nodes[name] = Node(name, info, run)
        self._nodes["LoadImage"] = self._loader("LoadImage", "image", infos["LoadImage"], self._digest)
        self._nodes["LoadVideo"] = self._loader("LoadVideo", "file", infos["LoadVideo"], self._modified)
        for name, class_ in self._behaviour.classes(self).items():
            self._nodes[name] = Node(name, _info_of(name, class_), _runner(class_))

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    def __iter__(self) -> Any:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def object_info(self, name: str) -> Info:
        info: Info = {**_PROSE, "display_name": name, **copy.deepcopy(self._nodes[name].info)}
        files = sorted(p.name for p in self._folders.input.iterdir() if p.is_file())
        if name == "LoadImage":
            info["input"]["required"]["image"][0] = [f for f in files if f.endswith((".png", ".jpg", ".webp"))]
        if name == "LoadVideo":
            info["input"]["required"]["file"][1]["options"] = [
                f for f in files if f.endswith((".mp4", ".webm"))
            ]
        return info

    # -- the pack's host --------------------------------------------------------------------------------
    def progress(self, value: int, total: int, preview: Image.Image | None) -> None:
        self._progress(value, total, preview)

    def out_of_memory(self) -> Exception:
        return OutOfMemoryError("Allocation on device")

    def pixels(self, images: np.ndarray) -> np.ndarray:
        return images

    def save_path(self, prefix: str, width: int, height: int) -> tuple[str, str, int, str, str]:
        return self._folders.save_path(self._folders.output, prefix, width, height)

    # -- loading ----------------------------------------------------------------------------------------
    def _loader(self, name: str, checks: str, info: Info, changed: Callable[[str], Any]) -> Node:
        kind = "image" if name == "LoadImage" else "video"

        def check(value: str) -> str | None:
            exists = self._folders.input_path(value).exists()
            return None if exists else f"Invalid {kind} file: {value}"

        return Node(name, info, getattr(self, f"_{name}"), check=check, changed=changed, checks=checks)

    def _digest(self, image: str) -> str:
        return hashlib.sha256(self._folders.input_path(image).read_bytes()).hexdigest()

    def _modified(self, file: str) -> float:
        return self._folders.input_path(file).stat().st_mtime

    def _LoadImage(self, image: str) -> tuple[tuple[Any, ...], Info]:  # noqa: N802 - named for the classes
        with Image.open(self._folders.input_path(image)) as opened:
            pixels = np.asarray(opened.convert("RGB"))[None]
        return (pixels, np.zeros((1, 64, 64))), {}

    def _LoadVideo(self, file: str) -> tuple[tuple[Any, ...], Info]:  # noqa: N802
        with av.open(str(self._folders.input_path(file))) as container:
            rate = container.streams.video[0].average_rate or Fraction(1)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return ((np.stack(frames), rate),), {}

    # -- between ----------------------------------------------------------------------------------------
    def _EmptyImage(  # noqa: N802
        self, width: int, height: int, batch_size: int = 1, color: int = 0
    ) -> tuple[tuple[Any, ...], Info]:
        rgb = [(color >> 16) & 0xFF, (color >> 8) & 0xFF, color & 0xFF]
        return (np.broadcast_to(np.array(rgb, np.uint8), (batch_size, height, width, 3)),), {}

    def _ImageScale(  # noqa: N802
        self, image: np.ndarray, upscale_method: str, width: int, height: int, crop: str
    ) -> tuple[tuple[Any, ...], Info]:
        filters = {"nearest-exact": 0, "bilinear": 2, "area": 4, "bicubic": 3, "lanczos": 1}
        old_height, old_width = image.shape[1:3]
        left = top = 0
        if crop == "center":
            old, new = old_width / old_height, width / height
            left = round((old_width - old_width * (new / old)) / 2) if old > new else 0
            top = round((old_height - old_height * (old / new)) / 2) if old < new else 0
        scaled = [
            np.asarray(
                Image.fromarray(frame[top : old_height - top, left : old_width - left]).resize(
                    (width, height), filters[upscale_method]
                )
            )
            for frame in image
        ]
        return (np.stack(scaled),), {}

    def _ImageCrop(  # noqa: N802
        self, image: np.ndarray, width: int, height: int, x: int, y: int
    ) -> tuple[tuple[Any, ...], Info]:
        x, y = min(x, image.shape[2] - 1), min(y, image.shape[1] - 1)
        return (image[:, y : y + height, x : x + width],), {}

    def _RepeatImageBatch(self, image: np.ndarray, amount: int) -> tuple[tuple[Any, ...], Info]:  # noqa: N802
        return (np.tile(image, (amount, 1, 1, 1)),), {}

    def _ImageFromBatch(  # noqa: N802
        self, image: np.ndarray, batch_index: int, length: int
    ) -> tuple[tuple[Any, ...], Info]:
        first = min(len(image) - 1, batch_index)
        return (image[first : first + length],), {}

    def _CreateVideo(self, images: np.ndarray, fps: float) -> tuple[tuple[Any, ...], Info]:  # noqa: N802
        return ((images, Fraction(fps)),), {}

    def _GetVideoComponents(self, video: tuple[np.ndarray, Fraction]) -> tuple[tuple[Any, ...], Info]:  # noqa: N802
        return (video[0], None, float(video[1])), {}

    def _PrimitiveInt(self, value: Any) -> tuple[tuple[Any, ...], Info]:  # noqa: N802
        return (value,), {}

    _PrimitiveFloat = _PrimitiveString = _PrimitiveInt

    # -- saving -----------------------------------------------------------------------------------------
    def _save_images(
        self, images: np.ndarray, prefix: str, type_: str, prompt: Any
    ) -> tuple[tuple[Any, ...], Info]:
        folder = self._folders.of_type(type_)
        assert folder is not None
        height, width = images.shape[1:3]
        full, name, counter, subfolder, _ = self._folders.save_path(folder, prefix, width, height)
        entries = []
        for number, image in enumerate(images):
            file = f"{name.replace('%batch_num%', str(number))}_{counter + number:05}_.png"
            Image.fromarray(np.ascontiguousarray(image)).save(Path(full) / file, pnginfo=_png_text(prompt))
            entries.append({"filename": file, "subfolder": subfolder, "type": type_})
        return (), {"images": entries}

    def _SaveImage(self, images: np.ndarray, filename_prefix: str, prompt: Any) -> tuple[Any, Info]:  # noqa: N802
        return self._save_images(images, filename_prefix, "output", prompt)

    def _PreviewImage(self, images: np.ndarray, prompt: Any) -> tuple[Any, Info]:  # noqa: N802
        return self._save_images(images, f"ComfyUI_temp_{self._temp_name}", "temp", prompt)

    def _SaveVideo(  # noqa: N802
        self,
        video: tuple[np.ndarray, Fraction],
        filename_prefix: str,
        format: str,  # noqa: A002 - ComfyUI's name
        codec: str,
        prompt: Any,
    ) -> tuple[Any, Info]:
        pixels, rate = video
        height, width = pixels.shape[1:3]
        full, name, counter, subfolder, _ = self.save_path(filename_prefix, width, height)
        if format not in ("auto", "mp4"):
            raise ValueError("Only MP4 format is supported for now")
        if codec not in ("auto", "h264"):
            raise ValueError("Only H264 codec is supported for now")
        file = f"{name}_{counter:05}_.mp4"
        self._behaviour.write_video(Path(full) / file, pixels, float(rate), {"prompt": prompt})
        return (), _animated(file, subfolder)

    def _SaveWEBM(  # noqa: N802
        self, images: np.ndarray, filename_prefix: str, codec: str, fps: float, crf: float, prompt: Any
    ) -> tuple[Any, Info]:
        height, width = images.shape[1:3]
        full, name, counter, subfolder, _ = self.save_path(filename_prefix, width, height)
        file = f"{name}_{counter:05}_.webm"
        with av.open(str(Path(full) / file), "w") as container:
            container.metadata["prompt"] = json.dumps(prompt)
            name = {"vp9": "libvpx-vp9", "av1": "libsvtav1"}[codec]
            stream = container.add_stream(name, rate=Fraction(round(fps * 1000), 1000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.bit_rate = 0
            stream.options = {"crf": str(crf)}
            for image in images:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return (), _animated(file, subfolder)

    def _SaveAnimatedWEBP(  # noqa: N802
        self,
        images: np.ndarray,
        filename_prefix: str,
        fps: float,
        lossless: bool,
        quality: int,
        method: str,
        prompt: Any,
    ) -> tuple[Any, Info]:
        height, width = images.shape[1:3]
        full, name, counter, subfolder, _ = self.save_path(filename_prefix, width, height)
        file = f"{name}_{counter:05}_.webp"
        first, *rest = [Image.fromarray(np.ascontiguousarray(image)) for image in images]
        first.save(
            Path(full) / file,
            save_all=True,
            append_images=rest,
            duration=int(1000.0 / fps),
            lossless=lossless,
            quality=quality,
            method={"default": 4, "fastest": 0, "slowest": 6}[method],
        )
        return (), {**_animated(file, subfolder), "animated": (len(images) != 1,)}


def _animated(file: str, subfolder: str) -> Info:
    return {"images": [{"filename": file, "subfolder": subfolder, "type": "output"}], "animated": (True,)}


def _png_text(prompt: Any) -> Any:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("prompt", json.dumps(prompt))
    return text


def _info_of(name: str, class_: Any) -> Info:
    """What server.py's node_info says of a class in the old form."""
    types = json.loads(json.dumps(class_.INPUT_TYPES()))
    return {
        "input": types,
        "input_order": {category: list(inputs) for category, inputs in types.items()},
        "output": list(class_.RETURN_TYPES),
        "output_is_list": [False] * len(class_.RETURN_TYPES),
        "output_name": list(class_.RETURN_TYPES),
        "name": name,
        "python_module": "custom_nodes.rushes_test_nodes",
        "output_node": getattr(class_, "OUTPUT_NODE", False),
    }


def _runner(class_: Any) -> Callable[..., tuple[tuple[Any, ...], Info]]:
    def run(**inputs: Any) -> tuple[tuple[Any, ...], Info]:
        result = getattr(class_(), class_.FUNCTION)(**inputs)
        return ((), result["ui"]) if isinstance(result, dict) else (result, {})

    return run
