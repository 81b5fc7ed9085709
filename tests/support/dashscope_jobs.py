"""Jobs for the engine ``dashscope``, and how they get on there."""

from pathlib import Path
from typing import Any

import msgspec

import rushes.catalog
from rushes.catalog.load import load_model
from rushes.catalog.model import Model
from rushes.catalog.roles import roles_of
from rushes.engines.remote.base import (
    RemoteInput,
    RemoteJob,
)
from support.remote_dashscope import KF2V, T2I
from support.remote_stub import picture

BUNDLED = Path(rushes.catalog.__file__).parent / "models"
WAN_2_5 = load_model(BUNDLED / "wan-ai/wan-2-5/text-to-image", BUNDLED)
FRAMES = load_model(BUNDLED / "community/wan-2-2/first-last-frame", BUNDLED)
FORMATS = next(field.enum for field in WAN_2_5.inputs if field.role == "resolution") or ()
SMALL = "1024:1024 (1:1)"


def with_table(model: Model, /, **table: Any) -> Model:
    return msgspec.structs.replace(model, options=model.options | {"dashscope": table})


PICTURES = with_table(WAN_2_5, model=T2I)
KEYFRAMES = with_table(FRAMES, model=KF2V)


def job_for(
    folder: Path, model: Model = PICTURES, files: dict[str, Path] | None = None, **given: Any
) -> RemoteJob:
    values = {field.name: field.default for field in model.inputs if field.default is not None}
    values |= given
    if model.output == "image":
        values = {"prompt": "a red kite", "aspect_ratio": SMALL} | given
    inputs = {name: RemoteInput(path, "image/png") for name, path in (files or {}).items()}
    values |= {name: str(path) for name, path in (files or {}).items()}
    roles = {
        role: value
        for role, value in roles_of(model, values).items()
        if not role.endswith("_image") and role != "source_video"
    }
    return RemoteJob("0198", model, values, roles, inputs, folder)


def frames_job(folder: Path, **table: Any) -> RemoteJob:
    """A video between two pictures; ``table`` is of the manifest."""
    files = {}
    for number, role in enumerate(("start_image", "end_image")):
        path = folder / f"{role}.png"
        path.write_bytes(picture(640 + number, 360))
        files[field_of(FRAMES, role)] = path
    return job_for(folder, with_table(FRAMES, **{"model": KF2V, **table}), files)


def field_of(model: Model, role: str) -> str:
    return next(field.name for field in model.inputs if field.role == role)
