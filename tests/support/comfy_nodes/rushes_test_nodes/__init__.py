"""The test nodes as a custom-node pack of a real ComfyUI; never imported by the tests themselves."""

from typing import Any

import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image

from .behaviour import classes


class _Host:
    def progress(self, value: int, total: int, preview: Image.Image | None) -> None:
        # The hook of main.py raises where the prompt was interrupted.
        shown = None if preview is None else ("JPEG", preview, None)
        comfy.utils.ProgressBar(total).update_absolute(value, total, shown)

    def out_of_memory(self) -> Exception:
        return torch.cuda.OutOfMemoryError("Allocation on device")

    def pixels(self, images: Any) -> np.ndarray:
        return np.asarray((images * 255).clamp(0, 255).to(torch.uint8).cpu())

    def save_path(self, prefix: str, width: int, height: int) -> tuple[str, str, int, str, str]:
        return folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory(), width, height)


NODE_CLASS_MAPPINGS = classes(_Host())
