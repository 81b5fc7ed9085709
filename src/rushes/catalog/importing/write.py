"""The files of a model's folder, from a proposal: a manifest to read and edit, the graph, a sample."""

import json
from typing import Any

from rushes.catalog.importing import toml
from rushes.catalog.importing.fields import Field
from rushes.catalog.importing.propose import Proposal
from rushes.catalog.paths import MANIFEST, SAMPLE
from rushes.catalog.workflow import NodePack, Weight

GRAPH = "graph.json"
_LORAS = """\
# Requests may choose LoRAs out of ComfyUI's folder once this input stands here without its #:
# [[inputs]]
# name = "loras"
# title = "LoRAs"
# type = "loras"
# role = "loras"

"""
_INPUT_KEYS = ("default", "enum", "minimum", "maximum")


def files_of(proposal: Proposal, *, id_: str, name: str, source: str) -> dict[str, str]:
    """The files by name. ``source`` is what the workflow was read from, for a comment."""
    return {
        GRAPH: json.dumps(proposal.graph, indent=2, ensure_ascii=False) + "\n",
        SAMPLE: json.dumps(sample_of(proposal), indent=2, ensure_ascii=False) + "\n",
        MANIFEST: manifest_of(proposal, id_=id_, name=name, source=source),
    }


def sample_of(proposal: Proposal) -> dict[str, Any]:
    """A request with all that is required."""
    return {
        field.name: field.sample if field.default is None else field.default
        for field in proposal.fields
        if field.required
    }


def manifest_of(proposal: Proposal, *, id_: str, name: str, source: str) -> str:
    """`model.toml`."""
    parts = [
        toml.comment(f"{id_}, made of {source} by `rushes models import`."),
        toml.comment(
            f"Edit it as you like: a running server takes it over. `rushes models check {id_}` checks it."
        ),
        toml.comment(
            "Bounds are the nodes' own: narrow those of sizes, frames and steps to what your GPU can do."
        ),
        "\n",
        toml.pair("name", name),
        toml.pair("description", _description(proposal)),
        toml.pair("categories", proposal.categories),
        toml.pair("output", proposal.output),
        toml.pair("graph", GRAPH),
        toml.comment("Seconds; an attempt that takes longer is ended."),
        toml.pair("time_limit", 3600),
        toml.pair("required", tuple(field.name for field in proposal.fields if field.required)),
        "\n[price]\n",
        toml.pair("base_usd", 0.0),
        toml.pair("unit", "second" if proposal.output == "video" else "output"),
        "\n",
    ]
    parts += [_input(proposal, field) for field in proposal.fields]
    if proposal.loras:
        parts.append(_LORAS)
    parts.append(_engine(proposal))
    parts += [_weight(weight) for weight in proposal.weights]
    parts += [_pack(pack) for pack in proposal.packs]
    return "".join(parts).rstrip("\n") + "\n"


def _description(proposal: Proposal) -> str:
    roles = {field.role for field in proposal.fields}
    given = []
    if "prompt" in roles:
        given.append("a text prompt")
    images = sum(field.role in ("start_image", "end_image", "reference_image") for field in proposal.fields)
    if images:
        given.append("an image" if images == 1 else "images")
    if "source_video" in roles:
        given.append("a video")
    made = "a video" if proposal.output == "video" else "an image"
    return f"Makes {made}" + (f" from {' and '.join(given)}." if given else ".")


def _input(proposal: Proposal, field: Field) -> str:
    nodes = ", ".join(f"{id_} {proposal.titles[id_]}" for id_ in dict.fromkeys(id_ for id_, _ in field.targets))
    lines = [toml.comment(f"node {nodes}" + (f" ({field.remark})" if field.remark else ""))]
    lines += ["[[inputs]]\n", toml.pair("name", field.name), toml.pair("title", field.title)]
    if field.description:
        lines.append(toml.pair("description", field.description))
    lines.append(toml.pair("type", field.type))
    if field.role != "other":
        lines.append(toml.pair("role", field.role))
    for key in _INPUT_KEYS:
        value = getattr(field, key)
        if value is not None:
            lines.append(toml.pair(key, value))
    return "".join(lines) + "\n"


def _engine(proposal: Proposal) -> str:
    lines = ["[engines.comfyui]\n"]
    if proposal.outputs:
        lines += [toml.comment("The nodes whose files are the result."), toml.pair("outputs", proposal.outputs)]
    if proposal.loras:
        lines += [toml.comment("LoRAs go behind these nodes."), toml.pair("loras", proposal.loras)]
    lines += [
        "\n",
        toml.comment(
            "Inputs called NODE_INPUT set that input by themselves. Expressions here set further ones."
        ),
        "[engines.comfyui.bindings]\n",
    ]
    for (id_, name), expression in proposal.bindings.items():
        lines += [toml.pair(f"{id_}.{name}", expression)]
    return "".join(lines) + "\n"


def _weight(weight: Weight) -> str:
    lines = [
        "[[engines.comfyui.weights]]\n",
        toml.pair("file", weight.file),
        toml.pair("folder", weight.folder),
    ]
    for key, value in (("source", weight.source), ("path", weight.path), ("sha256", weight.sha256)):
        if value:
            lines.append(toml.pair(key, value))
    return "".join(lines) + "\n"


def _pack(pack: NodePack) -> str:
    return (
        "[[engines.comfyui.node_packs]]\n"
        + toml.pair("name", pack.name)
        + toml.pair("source", pack.source)
        + toml.pair("nodes", pack.nodes)
        + "\n"
    )
