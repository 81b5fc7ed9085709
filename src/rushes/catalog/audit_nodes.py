"""What ComfyUI's `/object_info` says of a node's inputs, and whether a value or a link fits.

Follows `execution.validate_inputs` of ComfyUI: bounds and choices hold for plain values; the step of a number is
enforced by nobody, so that a size or a length beside it is silently changed, or fails, in the node.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from rushes.catalog.workflow import Graph, is_link

Nodes = Mapping[str, Mapping[str, Any]]
"""`/object_info`: node classes by name."""
WEIGHT_SUFFIXES: Final = (
    *(".safetensors", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl", ".sft"),  # folder_paths.py of ComfyUI
    *(".gguf", ".onnx"),  # of widespread packs
)
MEDIA_SUFFIXES: Final = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v", ".wav", ".mp3", ".flac", ".ogg"),
)
_LOADERS: Final = {
    "LoadImage": "image",
    "LoadImageMask": "image",
    "LoadVideo": "file",
    "LoadAudio": "audio",
    "VHS_LoadVideo": "video",
    "VHS_LoadAudioUpload": "audio",
}
"""Nodes that load a file out of ComfyUI's input folder, for where no server says so."""
_FOLDERS_BY_CLASS: Final = {
    "CLIPVisionLoader": "clip_vision",
    "UpscaleModelLoader": "upscale_models",
    "ModelPatchLoader": "model_patches",
    "WanVideoModelLoader": "diffusion_models",
    "WanVideoVACEModelSelect": "diffusion_models",
    "WanVideoVAELoader": "vae",
    "LoadWanVideoT5TextEncoder": "text_encoders",
    "LoadWanVideoClipTextEncoder": "clip_vision",
    "WanVideoLoraSelect": "loras",
}
_FOLDERS_BY_INPUT: Final = {
    "unet_name": "diffusion_models",
    "vae_name": "vae",
    "ckpt_name": "checkpoints",
    "lora_name": "loras",
    "lora": "loras",
    "clip_name": "text_encoders",
    "control_net_name": "controlnet",
    "style_model_name": "style_models",
    "gligen_name": "gligen",
    "hypernetwork_name": "hypernetworks",
    "audio_encoder_name": "audio_encoders",
}
PATH_NAMES: Final = ("filename_prefix", "subfolder", "directory", "folder", "path", "file", "filename")
"""Inputs whose value is surely a path."""
_PATH_WORDS: Final = re.compile(
    r"(?:^|[_ ])(?:path|dir|directory|folder|subfolder|file|filename)s?(?:[_ ](?:name|prefix|path))?$",
    re.IGNORECASE,
)
_SIZES: Final = ("width", "height")
_LENGTHS: Final = ("length", "num_frames")
_STRANGE_TYPE: Final = ("COMFY_", "*")
"""Types that a later ComfyUI makes up while a graph runs, and the one that fits all."""


class Spec(NamedTuple):
    """One input of a node class."""

    type: str
    required: bool
    choices: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    step: int | None = None
    upload: bool = False
    """Whether it names a file in ComfyUI's input folder."""


class Misfit(NamedTuple):
    """Why ComfyUI refuses a value ("bounds", "choice", "type"), or changes it without a word ("step")."""

    kind: Literal["bounds", "choice", "type", "step"]
    text: str


def specs_of(nodes: Nodes | None, class_type: str) -> dict[str, Spec]:
    """The inputs of a class. Without a server, the few whose steps are known from ComfyUI's own sources."""
    if nodes is None:
        return _known_specs(class_type)
    tables = nodes.get(class_type, {}).get("input")
    found = {}
    for section in ("required", "optional"):
        inputs = tables.get(section) if isinstance(tables, Mapping) else None
        for name, entry in inputs.items() if isinstance(inputs, Mapping) else ():
            if isinstance(entry, Sequence) and not isinstance(entry, str) and entry:
                found[str(name)] = _spec(entry, required=section == "required")
    return found


def _spec(entry: Sequence[Any], *, required: bool) -> Spec:
    more: Mapping[str, Any] = entry[1] if len(entry) > 1 and isinstance(entry[1], Mapping) else {}
    choices = entry[0] if isinstance(entry[0], list) else more.get("options")
    step = more.get("step")
    return Spec(
        type="COMBO" if isinstance(entry[0], list) else str(entry[0]),
        required=required,
        choices=tuple(choices) if isinstance(choices, list) else None,
        minimum=_number(more.get("min")),
        maximum=_number(more.get("max")),
        step=step if type(step) is int and step > 1 else None,
        upload=any(name.endswith("_upload") and bool(value) for name, value in more.items()),
    )


def _known_specs(class_type: str) -> dict[str, Spec]:
    side = 0
    if re.fullmatch(r"Wan\w*ToVideo", class_type) or class_type == "EmptyHunyuanLatentVideo":
        side = 16  # `comfy_extras/nodes_wan.py`, `nodes_hunyuan.py`
    elif class_type == "Wan22ImageToVideoLatent":
        side = 32
    found = {name: Spec("INT", required=True, minimum=side, step=side) for name in _SIZES if side}
    if side or class_type.startswith("WanVideo"):
        found |= {name: Spec("INT", required=False, minimum=1, step=4) for name in _LENGTHS}
    return found


def loads_file(spec: Spec | None, class_type: str, name: str) -> bool:
    """Whether this input names a file in ComfyUI's input folder."""
    return spec.upload if spec else _LOADERS.get(class_type) == name


def is_path_name(name: str) -> bool:
    """Whether an input is called like one that takes a path, such as ``filename_prefix`` or ``output_path``."""
    return name in PATH_NAMES or bool(_PATH_WORDS.search(name))


def is_weight(value: Any) -> bool:
    """Whether a plain value of a graph is the name of a file of weights."""
    return isinstance(value, str) and value.lower().endswith(WEIGHT_SUFFIXES) and "\n" not in value


def weights_folder(class_type: str, name: str) -> str:
    """The folder below ``models`` out of which a loader takes its weights; "" where that is not known."""
    return _FOLDERS_BY_CLASS.get(class_type) or _FOLDERS_BY_INPUT.get(name.rstrip("0123456789"), "")


def misfit(spec: Spec, name: str, value: Any) -> Misfit | None:
    """What is wrong with a plain value of an input, if anything."""
    if spec.choices is not None:
        if value in spec.choices or isinstance(value, list | dict):
            return None
        shown = ", ".join(repr(choice) for choice in spec.choices[:8])
        rest = len(spec.choices) - 8
        more = f" and {rest} more" if rest > 0 else ""
        return Misfit(
            "choice", f"{_short(value)} is not one of {shown}{more}" if shown else "there are no choices"
        )
    if spec.type not in ("INT", "FLOAT"):
        return None
    number = _number(value)
    if number is None:
        return Misfit("type", f"{_short(value)} is no number")
    if spec.minimum is not None and number < spec.minimum:
        return Misfit("bounds", f"{value} is below the node's smallest, {spec.minimum:g}")
    if spec.maximum is not None and number > spec.maximum:
        return Misfit("bounds", f"{value} is above the node's largest, {spec.maximum:g}")
    return _off_step(spec, name, value)


def _off_step(spec: Spec, name: str, value: Any) -> Misfit | None:
    if spec.type != "INT" or spec.step is None:
        return None
    number = _number(value)
    smallest = spec.minimum or 0
    if number is None or not math.isfinite(number) or not math.isfinite(smallest):
        return None
    whole, first = int(number), int(smallest)
    base = first % spec.step
    if (whole - first) % spec.step == 0 or (name in _SIZES and whole % spec.step == 0):
        return None
    want = f"a multiple of {spec.step}" if not base else f"a multiple of {spec.step} and {base} more"
    return Misfit("step", f"{value} is not {want}")


def bad_link(graph: Graph, nodes: Nodes | None, spec: Spec | None, link: Sequence[Any]) -> str | None:
    """What is wrong with a link ``[node id, output number]``, if anything."""
    source = graph[link[0]]["class_type"]
    outputs = (nodes or {}).get(source, {}).get("output")
    if not isinstance(outputs, list) or type(link[1]) is not int:
        return None
    if not 0 <= link[1] < len(outputs):
        return f"node {link[0]} ({source}) has no output {link[1]}"
    given = outputs[link[1]]
    if spec is None or not isinstance(given, str) or spec.choices is not None:
        return None
    if any(mark in kind for kind in (given, spec.type) for mark in _STRANGE_TYPE):
        return None
    if {one.strip() for one in given.split(",")} & {one.strip() for one in spec.type.split(",")}:
        return None
    return f"output {link[1]} of node {link[0]} is {given}, and {spec.type} is needed"


def plain_inputs(graph: Graph) -> Iterator[tuple[str, str, str, Any]]:
    """``(node id, class, input, value)`` of every input that is no link."""
    for id_, node in graph.items():
        for name, value in node["inputs"].items():
            if not is_link(value):
                yield id_, node["class_type"], name, value


def links(graph: Graph) -> Iterator[tuple[str, str, str, Sequence[Any]]]:
    """``(node id, class, input, link)`` of every input that is a link."""
    for id_, node in graph.items():
        for name, value in node["inputs"].items():
            if is_link(value):
                yield id_, node["class_type"], name, value


def primitive(graph: Graph, link: Sequence[Any]) -> float | None:
    """The number that a link carries where it comes out of a primitive node, else None."""
    source = graph[link[0]]
    if not str(source["class_type"]).startswith("Primitive"):
        return None
    return _number(source["inputs"].get("value"))


def label(graph: Graph, id_: str, name: str = "") -> str:
    """A node for people: ``57.steps (KSamplerAdvanced "High noise")``."""
    node = graph.get(id_, {})
    class_type = node["class_type"]
    meta = node.get("_meta")
    title = str(meta.get("title") or "") if isinstance(meta, Mapping) else ""
    words = class_type if title in ("", class_type) else f'{class_type} "{title}"'
    return f"{id_}.{name} ({words})" if name else f"{id_} ({words})"


def _number(value: Any) -> float | None:
    """A number as ComfyUI takes it: texts are converted, truth values are 0 and 1. Integers stay exact."""
    if isinstance(value, int | float):
        return value
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
