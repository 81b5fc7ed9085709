"""A model as the catalog knows it: an id, an input schema whose fields have roles, and its folder.

Source of the dialect: the input schemas of the seed pages. They are JSON Schema objects but for the type
``float``; :func:`rushes.catalog.schema.standard` makes them standard.
"""

from pathlib import Path
from typing import Any, Literal

import msgspec

from rushes.catalog.routes import Route

Role = Literal[
    "prompt",
    "negative_prompt",
    "start_image",
    "end_image",
    "reference_image",
    "source_video",
    "resolution",
    "frames",
    "fps",
    "seed",
    "steps",
    "guidance",
    "shift",
    "loras",
    "other",
]
Type = Literal["string", "integer", "float", "boolean", "loras"]
"""Types of the seeds' dialect, and ``loras``: a list of LoRAs; see :mod:`rushes.catalog.loras`."""
FILE_ROLES: dict[str, Literal["image", "video"]] = {
    "start_image": "image",
    "end_image": "image",
    "reference_image": "image",
    "source_video": "video",
}
"""Roles whose value is a file, and of which kind."""


class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One field of the input, with the keywords of the seeds' dialect."""

    name: str
    title: str
    type: Type
    role: Role = "other"
    description: str = ""
    default: str | int | float | bool | None = None
    enum: tuple[str | int | float, ...] | None = None
    minimum: float | int | None = None
    maximum: float | int | None = None
    max_length: int | None = None
    min_length: int | None = None


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the operator asks for: ``base_usd`` for each ``unit`` of output (a second of video, or a file)."""

    base_usd: float = 0.0
    unit: Literal["second", "output"] = "output"
    note: str | None = None


class Model(msgspec.Struct, frozen=True):
    """One model, complete: what a gateway needs to validate and an engine to generate."""

    id: str
    name: str
    description: str
    categories: tuple[str, ...]
    output: Literal["image", "video"]
    inputs: tuple[Input, ...]
    required: tuple[str, ...]
    folder: Path
    price: Price = Price()
    time_limit: float = 3600.0
    """Seconds that one attempt may take before its child process is ended."""
    graph: str | None = None
    """File name of the workflow in API format, in the folder, for engines that run workflows."""
    sample: dict[str, Any] = {}
    """The sample input: what the documentation shows and `rushes demo` sends."""
    options: dict[str, Any] = {}
    """Tables of the manifest that belong to one engine, by the engine's name."""
    routes: tuple[Route, ...] = ()
    """Which engines may run it, in order; empty leaves that to :func:`rushes.catalog.routes.effective_routes`."""

    def field(self, role: Role) -> Input | None:
        """The first input with this role, or None."""
        return next((i for i in self.inputs if i.role == role), None)

    def files(self) -> dict[str, Literal["image", "video"]]:
        """The names of the file inputs, each with the kind of media it takes."""
        return {i.name: FILE_ROLES[i.role] for i in self.inputs if i.role in FILE_ROLES}
