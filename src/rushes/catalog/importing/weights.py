"""Which weights and node packs a graph needs, and where they are to be had.

The graph names files. Where they come from is only in the format of ComfyUI's pages, in the nodes' properties:
``models`` (name, url, directory, hash) and ``cnr_id`` or ``aux_id`` (the pack).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from rushes.catalog.audit_nodes import is_weight, weights_folder
from rushes.catalog.importing.flow import Flow
from rushes.catalog.paths import why_unsafe
from rushes.catalog.workflow import NodePack, Weight

HUB: Final = "huggingface.co"
CORE: Final = "comfy-core"
"""What pages write as the pack of ComfyUI's own nodes."""
_CUSTOM: Final = "custom_nodes."
"""Begins the Python module of every node of a pack."""

_FOLDERS_BY_OUTPUT: Final = {
    "MODEL": "diffusion_models",
    "VAE": "vae",
    "CLIP": "text_encoders",
    "CLIP_VISION": "clip_vision",
    "CONTROL_NET": "controlnet",
    "UPSCALE_MODEL": "upscale_models",
    "STYLE_MODEL": "style_models",
    "AUDIO_ENCODER": "audio_encoders",
}
_MODEL_LOADERS: Final = frozenset(
    {
        "UNETLoader",
        "CheckpointLoader",
        "CheckpointLoaderSimple",
        "ImageOnlyCheckpointLoader",
        "UnetLoaderGGUF",
        "UnetLoaderGGUFAdvanced",
    }
)
"""Used where the classes are not described."""


def lora_places(flow: Flow) -> tuple[str, ...]:
    """The nodes that load a diffusion model, as their first output, in the graph's order."""
    return tuple(id_ for id_ in flow.nodes if id_ in flow.order and _loads_model(flow, id_))


def _loads_model(flow: Flow, id_: str) -> bool:
    if not flow.nodes.info(id_):
        return flow.nodes.class_of(id_) in _MODEL_LOADERS
    links = any(flow.nodes.port(id_, name).type == "MODEL" for name, _ in flow.nodes.links(id_))
    names_file = any(is_weight(value) for value in flow.nodes.inputs(id_).values())
    return flow.nodes.outputs(id_)[:1] == ("MODEL",) and names_file and not links


def weights_of(flow: Flow, workflow: Mapping[str, Any] | None) -> tuple[list[Weight], list[str]]:
    """The files that the graph's loaders name, and notes on those whose folder cannot be told."""
    known = _listed(workflow)
    found: dict[tuple[str, str], Weight] = {}
    notes = []
    for id_ in flow.order:
        for name, value in flow.nodes.inputs(id_).items():
            if not is_weight(value):
                continue
            file = str(value).replace("\\", "/")
            source = known.get(file.rpartition("/")[2], {})
            folder = str(source.get("directory") or _folder(flow, id_, name))
            if why_unsafe(file) or why_unsafe(folder):
                notes.append(
                    f"{id_}.{name} loads {value!r}; list it under [[engines.comfyui.weights]] with its folder"
                )
            else:
                found.setdefault((folder, file), _weight(file, folder, source))
    return list(found.values()), notes


def _folder(flow: Flow, id_: str, name: str) -> str:
    known = weights_folder(flow.nodes.class_of(id_), name)
    if known:
        return known
    outputs = flow.nodes.outputs(id_)
    return _FOLDERS_BY_OUTPUT.get(outputs[0], "") if outputs else ""


def _weight(file: str, folder: str, source: Mapping[str, Any]) -> Weight:
    repository, path = _place(str(source.get("url") or ""))
    digest = str(source.get("hash") or "").lower()
    sha256 = digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None
    return Weight(file=file, folder=folder, source=repository, path=path, sha256=sha256)


def _place(url: str) -> tuple[str, str]:
    """The repository on the hub and the path in it, else the address itself."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "", ""
    if parts.scheme != "https" or not parts.hostname:
        return "", ""
    match = re.fullmatch(r"/([^/]+/[^/]+)/(?:resolve|blob)/main/(.+)", unquote(parts.path))
    if parts.hostname == HUB and match and not why_unsafe(match[2]):
        return match[1], match[2]
    return url, ""


def node_packs(flow: Flow, workflow: Mapping[str, Any] | None) -> tuple[list[NodePack], list[str]]:
    """The packs of the custom nodes that run, and notes on those whose repository is not known.

    Pages name them; a server knows at least the folder that each is in.
    """
    named = _packs(workflow)
    found: dict[tuple[str, str], set[str]] = {}
    for id_ in flow.order:
        class_ = flow.nodes.class_of(id_)
        module = str(flow.nodes.info(id_).get("python_module") or "")
        if module and not module.startswith(_CUSTOM):
            continue
        pack = named.get(class_) or ((module.removeprefix(_CUSTOM), "") if module else None)
        if pack and pack[0] != CORE:
            found.setdefault(pack, set()).add(class_)
    packs, notes = [], []
    for (name, source), classes in found.items():
        nodes = tuple(sorted(classes))
        if source:
            packs.append(NodePack(name=name, source=source, nodes=nodes))
        else:
            notes.append(
                f"needs the node pack {name} ({', '.join(nodes)}); list it with its https address under "
                "[[engines.comfyui.node_packs]]"
            )
    return packs, notes


def _packs(workflow: Mapping[str, Any] | None) -> dict[str, tuple[str, str]]:
    """By class: the pack's name, and its repository where it is given."""
    found: dict[str, tuple[str, str]] = {}
    for node in page_nodes(workflow):
        properties = node.get("properties")
        if not isinstance(properties, Mapping):
            continue
        cnr, aux = properties.get("cnr_id"), properties.get("aux_id")
        name = cnr if isinstance(cnr, str) and cnr else aux
        if isinstance(name, str) and name:
            whole = isinstance(aux, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", aux)
            found.setdefault(str(node.get("type")), (name, f"https://github.com/{aux}" if whole else ""))
    return found


def _listed(workflow: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """The files that the pages know a source of, by their bare name."""
    found: dict[str, Mapping[str, Any]] = {}
    for node in page_nodes(workflow):
        properties = node.get("properties")
        models = properties.get("models") if isinstance(properties, Mapping) else None
        for model in models if isinstance(models, list) else ():
            if isinstance(model, Mapping) and isinstance(model.get("name"), str):
                found.setdefault(model["name"].replace("\\", "/").rpartition("/")[2], model)
    return found


def page_nodes(workflow: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Every node of a workflow as the pages save it, also those inside subgraphs."""
    if not workflow:
        return
    definitions = workflow.get("definitions")
    subgraphs = definitions.get("subgraphs") if isinstance(definitions, Mapping) else None
    for part in (workflow, *(subgraphs if isinstance(subgraphs, list) else ())):
        nodes = part.get("nodes") if isinstance(part, Mapping) else None
        for node in nodes if isinstance(nodes, list) else ():
            if isinstance(node, Mapping):
                yield node
