"""The texts and files that people give: prompts, images, videos."""

from collections import deque
from typing import Final

from rushes.catalog.importing.fields import Field, NotExposable, default_title, field_of
from rushes.catalog.importing.flow import Flow, Pole
from rushes.catalog.importing.nodes import PROMPTS, Target
from rushes.catalog.model import Role
from rushes.catalog.samples import sample_names

SAMPLE_VIDEO: Final = "https://example.com/your-video.mp4"
SAMPLE_PROMPT: Final = "A red fox in fresh snow, morning light"

_NO_PROMPT: Final = ("expression", "code", "script", "filename", "path", "regex", "format")
"""Parts of names of texts that are not written for a model."""
_ENDS: Final[dict[str, Role]] = {
    **dict.fromkeys(
        ("start_image", "start_frame", "first_frame", "first_frame_image", "first_image", "init_image"),
        "start_image",
    ),
    **dict.fromkeys(("end_image", "end_frame", "last_frame", "last_frame_image", "last_image"), "end_image"),
    **dict.fromkeys(
        ("reference_image", "reference_images", "reference", "ref_image", "ref_images", "subject_image"),
        "reference_image",
    ),
}
"""Inputs of nodes that say what an image is for."""
_BEGINNINGS: Final = ("pixels", "latent_image")
_TITLES: Final[dict[Role, str]] = {
    "start_image": "Start Image",
    "end_image": "End Image",
    "reference_image": "Reference Image",
    "source_video": "Source Video",
}


def prompt_fields(flow: Flow) -> list[Field]:
    """A field for every prompt. One positive and one negative have those roles: the first to be used."""
    poles = flow.poles()
    found: dict[Role, list[Field]] = {"prompt": [], "negative_prompt": []}
    for id_ in flow.order:
        if flow.nodes.is_output(id_):
            continue
        for name, value in flow.nodes.inputs(id_).items():
            if not isinstance(value, str) or not _is_prompt(flow, (id_, name), marked=id_ in poles):
                continue
            fields = found["negative_prompt" if _is_negative(flow, id_, name, poles.get(id_)) else "prompt"]
            same = next((one for one in fields if value and one.default == value), None)
            if same:
                same.targets.append((id_, name))
            else:
                fields.append(field_of(flow, (id_, name)))
    for role, fields in found.items():
        for field in fields[:1]:
            field.role = role
            field.title = "Prompt" if role == "prompt" else "Negative Prompt"
            field.required = role == "prompt"
            field.sample = field.default or (SAMPLE_PROMPT if field.required else None)
    return [*found["prompt"], *found["negative_prompt"]]


def _is_negative(flow: Flow, id_: str, name: str, poles: set[Pole] | None) -> bool:
    """Whether a prompt says what to avoid: by its own name, by where it leads to, by its node's title."""
    if "negative" in name or "positive" in name:
        return "negative" in name
    return poles == {"negative"} if poles else "negative" in flow.nodes.title(id_).lower()


def _is_prompt(flow: Flow, target: Target, *, marked: bool) -> bool:
    id_, name = target
    port = flow.nodes.port(id_, name)
    if port.type != "STRING" or any(word in name.lower() for word in _NO_PROMPT):
        return False
    if flow.nodes.is_file_list(id_, name):
        return False
    long = bool(port.settings.get("multiline") or port.settings.get("dynamicPrompts"))
    return long or name in PROMPTS or (marked and flow.is_value(id_))


def file_fields(flow: Flow) -> tuple[list[Field], list[str]]:
    """A field for every image and video that somebody would upload, and notes on what cannot be one."""
    fields: list[Field] = []
    notes = []
    taken: set[Role] = set()
    for id_ in flow.order:
        for name, value in flow.nodes.inputs(id_).items():
            port = flow.nodes.port(id_, name)
            if not port.upload or not isinstance(value, str):
                continue
            if port.upload not in ("image", "video") or (port.upload == "video" and "source_video" in taken):
                what = "a second video" if port.upload == "video" else f"a file of the kind {port.upload}"
                notes.append(
                    f"{id_}.{name} takes {what}, which cannot be an input yet; it stays {value!r}, which must lie "
                    "in ComfyUI's input folder"
                )
                continue
            role, remark = _purpose(flow, id_) if port.upload == "image" else ("source_video", "")
            if role in taken and role != "reference_image":
                role, remark = "reference_image", f"a second {_TITLES[role].lower()}, called a reference here"
            taken.add(role)
            fields.append(_file_field(flow, (id_, name), role, remark, len(fields)))
    order = list(_TITLES)
    return sorted(fields, key=lambda one: order.index(one.role)), notes


def _file_field(flow: Flow, target: Target, role: Role, remark: str, number: int) -> Field:
    titled = flow.nodes.retitled(target[0])
    title = default_title(flow.nodes, target) if titled else _TITLES[role]
    tooltip = flow.nodes.port(*target).tooltip
    field = Field([target], "string", title, role=role, description=tooltip, required=True, remark=remark)
    if role == "source_video":
        field.sample = SAMPLE_VIDEO
    else:
        names = sample_names()
        field.sample = names[number % len(names)] if names else "https://example.com/your-image.png"
    return field


def _purpose(flow: Flow, id_: str) -> tuple[Role, str]:
    """What an image is for, from the inputs that it leads to, nearest first; and a remark where that is a guess."""
    seen = {id_}
    waiting = deque([id_])
    guess: Role = "reference_image"
    while waiting:
        at = waiting.popleft()
        for user, name, _ in flow.consumers.get(at, ()):
            if name in _ENDS:
                return _ENDS[name], ""
            if name in _BEGINNINGS:
                guess = "start_image"
            # what a sampler makes of it is no longer the image
            samples = any(input_ in ("positive", "negative", "guider") for input_ in flow.nodes.inputs(user))
            if user not in seen and not samples:
                seen.add(user)
                waiting.append(user)
    return guess, "the role is a guess: no node says what the image is for"


def extra_field(flow: Flow, target: Target) -> Field | None:
    """The field for an input that is proposed for its node's sake; None where it is none that people change."""
    id_, name = target
    value = flow.nodes.inputs(id_).get(name)
    hidden = flow.nodes.link(id_, name) or flow.nodes.is_path(id_, name)
    if hidden or not isinstance(value, str | int | float):
        return None
    try:
        return field_of(flow, target)
    except NotExposable:
        return None
