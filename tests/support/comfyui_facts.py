"""What a ComfyUI says of its node classes, cut down to facts, so that it may be kept as data of these tests.

ComfyUI's sentences (tooltips, descriptions, categories, titles) are its authors' text under ComfyUI's licence, and
are not kept here. Names, types, bounds, defaults and choices are the interface that a client has to meet. What is
kept is listed below; whatever else a server says, also in versions to come, is left out.

Record the classes of a file again, and add some, with ``COMFYUI_DIR`` set::

    PYTHONPATH=tests python -m support.comfyui_facts tests/data/comfyui_object_info.json [CLASS ...]
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from support.comfyui import Comfy

OF_CLASSES: Final = (
    *("input", "input_order", "output", "output_is_list", "output_name", "name", "python_module"),
    *("output_node", "deprecated", "experimental", "api_node"),
)
OF_INPUTS: Final = (
    *("default", "min", "max", "step", "round", "options", "multiselect", "multiline", "dynamicPrompts"),
    *("control_after_generate", "forceInput", "lazy", "advanced", "display", "image_folder"),
    *("image_upload", "video_upload", "audio_upload", "file_upload"),
)
_FILES: Final = (
    ".safetensors",
    ".sft",
    ".ckpt",
    ".pt",
    ".pth",
    ".bin",
    ".gguf",
    ".png",
    ".jpg",
    ".webp",
    ".mp4",
)


def facts_of(info: dict[str, Any]) -> dict[str, Any]:
    """An entry of ``/object_info`` without prose. ``hidden`` inputs are names of types and stay as they are."""
    kept = {key: info[key] for key in OF_CLASSES if key in info}
    kept["input"] = {
        section: specs if section == "hidden" else {name: spec_of(spec) for name, spec in specs.items()}
        for section, specs in info["input"].items()
    }
    return kept


def spec_of(spec: list[Any]) -> list[Any]:
    """One input, ``[type, settings]`` or ``[type]``, without prose."""
    if len(spec) < 2:
        return spec
    type_, settings = spec
    kept = {key: settings[key] for key in OF_INPUTS if key in settings}
    if type_ == "STRING" and " " in str(kept.get("default", "")):
        kept["default"] = ""  # several words are somebody's text too
    return [type_, kept]


def without_files(info: dict[str, Any]) -> dict[str, Any]:
    """The entry as a server without weights and inputs has it: no choice is the name of a file."""
    for section, specs in info["input"].items():
        for spec in specs.values() if section != "hidden" else ():
            if isinstance(spec[0], list) and any(str(one).endswith(_FILES) for one in spec[0]):
                spec[0] = []
            if len(spec) > 1 and any(str(one).endswith(_FILES) for one in spec[1].get("options", ())):
                spec[1]["options"] = []
    return info


def lines_of(infos: dict[str, Any]) -> str:
    """JSON with a line for each class, so that what changed can be seen."""
    lines = [f" {json.dumps(name)}: {json.dumps(info)}" for name, info in infos.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    path, *more = sys.argv[1:]
    wanted = [*dict.fromkeys([*json.loads(Path(path).read_text("utf-8")), *more])]
    with tempfile.TemporaryDirectory() as folder:
        comfy = Comfy("real", Path(folder)).start()
        try:
            said = comfy.get("/object_info")
        finally:
            comfy.close()
    infos = {name: without_files(facts_of(said[name])) for name in wanted}
    Path(path).write_text(lines_of(infos), "utf-8")


if __name__ == "__main__":
    main()
