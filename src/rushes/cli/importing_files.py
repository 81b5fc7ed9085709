"""Workflows out of files: JSON as ComfyUI writes it, and the pictures and videos that it saves them in.

Reads only. Of a picture or video nothing is decoded but its metadata.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from rushes.catalog.paths import shown
from rushes.catalog.workflow import Graph, NotAGraph, as_graph
from rushes.errors import ManifestError

LARGEST: Final = 64 * 1024 * 1024
"""Bytes of a JSON file; the largest published workflows have about 2 MB."""
_GIVE: Final = "give a JSON file of ComfyUI's (Save, or Export (API))"
_EXIF_MAKE, _EXIF_MODEL = 0x010F, 0x0110
"""Where ComfyUI's WebP files keep `workflow:…` and `prompt:…`."""


class Source(NamedTuple):
    """What a file held."""

    graph: Graph | None
    """The API format: what ran."""
    pages: dict[str, Any] | None
    """The format of ComfyUI's pages, which has to be converted to run, and knows where weights come from."""


def read_source(file: Path) -> Source:
    """The workflow in ``file``. Raises ManifestError where there is none."""
    try:
        with file.open("rb") as stream:
            head = stream.read(16)
            json = stream.read(LARGEST) if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") else None
    except OSError as error:
        raise ManifestError(shown(file), "", f"cannot be read: {error.strerror}") from None
    if json is not None:
        return _of_value(file, _parsed(file, (head + json).removeprefix(b"\xef\xbb\xbf")))
    texts = _embedded(file, head)
    pages = _parsed(file, texts["workflow"].encode()) if texts.get("workflow") else None
    graph = _parsed(file, texts["prompt"].encode()) if texts.get("prompt") else None
    if graph is None and pages is None:
        raise ManifestError(
            shown(file),
            "",
            f"holds no workflow: {_GIVE}, or a PNG, WebP, MP4 or WebM that ComfyUI saved with its metadata",
        )
    return Source(_graph(file, graph) if graph else None, pages if isinstance(pages, dict) else None)


def _parsed(file: Path, text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ManifestError(shown(file), "", f"this is not JSON: {error}") from None


def _of_value(file: Path, value: Any) -> Source:
    if isinstance(value, dict) and isinstance(value.get("nodes"), list):
        return Source(None, value)
    if (
        isinstance(value, dict)
        and isinstance(value.get("prompt"), dict)
        and "class_type" not in value["prompt"]
    ):
        pages: Any = value  # the body of a call to /prompt
        for key in ("extra_data", "extra_pnginfo", "workflow"):
            pages = pages.get(key) if isinstance(pages, Mapping) else None
        return Source(_graph(file, value["prompt"]), pages if isinstance(pages, dict) else None)
    return Source(_graph(file, value), None)


def _graph(file: Path, value: Any) -> Graph:
    """``value`` as a graph; what other programs put between the nodes of one is left out."""
    nodes = value.values() if isinstance(value, dict) else ()
    if not any(isinstance(node, dict) and ("class_type" in node or "inputs" in node) for node in nodes):
        raise ManifestError(shown(file), "", f"this is no workflow: there is no node in it; {_GIVE}")
    if isinstance(value, dict):
        value = {
            id_: {**node, "inputs": _linked(node.get("inputs"), value)} if isinstance(node, dict) else node
            for id_, node in value.items()
            if not isinstance(node, dict) or "class_type" in node or "inputs" in node
        }
    try:
        return as_graph(value)
    except NotAGraph as error:
        raise ManifestError(shown(file), "", str(error)) from None


def _linked(inputs: Any, graph: Mapping[str, Any]) -> Any:
    """Links with the node's id as a text; lists that are no links as ComfyUI wants them written."""
    if not isinstance(inputs, dict):
        return inputs
    return {name: _link(value, graph) if isinstance(value, list) else value for name, value in inputs.items()}


def _link(value: list[Any], graph: Mapping[str, Any]) -> Any:
    match value:
        case [str(), int()]:
            return value
        case [int() as id_, int() as output] if str(id_) in graph:
            return [str(id_), output]
        case _:
            return {"__value__": value}


# -- pictures and videos --------------------------------------------------------------------------------------
def _embedded(file: Path, head: bytes) -> dict[str, str]:
    """The texts `prompt` and `workflow` that ComfyUI's own nodes leave in what they save."""
    reader: Callable[[Path], Mapping[str, Any]] = _of_video
    if head.startswith(b"\x89PNG") or (head.startswith(b"RIFF") and head[8:12] == b"WEBP"):
        reader = _of_picture
    elif head[4:8] != b"ftyp" and not head.startswith(b"\x1a\x45\xdf\xa3"):
        return {}
    try:
        found = reader(file)
    except Exception as error:  # the libraries' own, a dozen kinds
        raise ManifestError(shown(file), "", f"cannot be read: {error}") from None
    return {key.lower(): text for key, text in found.items() if isinstance(text, str)}


def _of_picture(file: Path) -> Mapping[str, Any]:
    from PIL import Image

    with Image.open(file) as picture:
        if picture.format == "PNG":
            return {str(key): text for key, text in picture.info.items()}
        exif = picture.getexif()
    found = {}
    for tag in (_EXIF_MAKE, _EXIF_MODEL):
        key, _, text = str(exif.get(tag, "")).partition(":")
        found[key] = text.rstrip("\0")
    return found


def _of_video(file: Path) -> Mapping[str, Any]:
    import av

    with av.open(str(file)) as container:
        return dict(container.metadata)
