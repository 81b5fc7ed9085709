"""A model's workflow: the graph that ComfyUI runs, and what the manifest says of it.

Reads ``[engines.comfyui]`` of a manifest (:attr:`rushes.catalog.model.Model.options`) and the graph beside it.
What is wrong with either is raised as a ManifestError that names file, key and fix; no server is asked.
`docs/models.md` is the reference of the keys.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import orjson

from rushes.catalog.model import Model
from rushes.catalog.nearest import did_you_mean
from rushes.catalog.paths import MANIFEST, shown, why_unsafe
from rushes.errors import ManifestError

TABLE: Final = "engines.comfyui"
_ENGINE: Final = "comfyui"
_VARIANTS: Final = "variants"
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LINK_PARTS: Final = 2

Node = dict[str, Any]
"""One node of a graph in ComfyUI's API format: ``class_type``, ``inputs`` and perhaps ``_meta.title``."""
Graph = dict[str, Node]
"""Nodes by id. An input is a plain value or a link ``[node id, output number]``."""


class Weight(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of weights that a workflow loads."""

    file: str
    """Its name as the loader node has it."""
    folder: str
    """The folder below ComfyUI's ``models``, such as ``diffusion_models``."""
    source: str = ""
    """Repository on the hub, such as ``Comfy-Org/Wan_2.2_ComfyUI_Repackaged``, or an https address."""
    path: str = ""
    """Path in that repository."""
    bytes: int | None = None
    sha256: str | None = None
    licence: str = ""


class NodePack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Custom nodes that a workflow needs."""

    name: str
    source: str
    nodes: tuple[str, ...] = ()
    """The classes of this pack that the workflow uses."""


class Workflow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table ``[engines.comfyui]``, one variant of it chosen."""

    graph: str = ""
    """File name of the graph; empty takes the manifest's ``graph``."""
    bindings: dict[str, str] = {}
    """Expressions by the node input that they set, ``"57.steps"``; see :mod:`rushes.catalog.bindings`."""
    outputs: tuple[str, ...] = ()
    """Ids of the nodes whose files are the result; empty takes every node that saves files."""
    loras: tuple[str, ...] = ()
    """Ids of the nodes behind whose first output (a MODEL) LoRAs are put in."""
    weights: tuple[Weight, ...] = ()
    node_packs: tuple[NodePack, ...] = ()


class NotAGraph(ValueError):
    """A JSON value that is no graph in ComfyUI's API format; the message says why."""


_KEYS: Final = tuple(field.name for field in msgspec.structs.fields(Workflow))
_LISTED: Final[dict[str, type[msgspec.Struct]]] = {"weights": Weight, "node_packs": NodePack}


def is_link(value: object) -> bool:
    """Whether an input is a link to another node, by the rule of ComfyUI's ``graph_utils.is_link``."""
    return (
        isinstance(value, list)
        and len(value) == _LINK_PARTS
        and isinstance(value[0], str)
        and isinstance(value[1], int | float)
    )


def manifest_error(model: Model, key: str, problem: str) -> ManifestError:
    """An error in the manifest of ``model``."""
    return ManifestError(shown(model.folder / MANIFEST), key, problem)


def has_workflow(model: Model) -> bool:
    """Whether ComfyUI can run ``model`` at all: it names a graph, in a variant at least."""
    table = _table(model)
    variants = table.get(_VARIANTS)
    named = [table, *(variants.values() if isinstance(variants, Mapping) else ())]
    return bool(model.graph) or any(isinstance(one, Mapping) and one.get("graph") for one in named)


def variant_names(model: Model) -> tuple[str, ...]:
    """The variants of the model's workflow that its manifest has, in its order. Raises ManifestError."""
    return tuple(_variants(model, _table(model)))


def workflow_of(model: Model, prefer: Sequence[str] = ()) -> Workflow:
    """The workflow of ``model`` with the first of the preferred variants that it has.

    A variant's table replaces ``graph``, ``bindings``, ``outputs``, ``loras``, ``weights`` and ``node_packs`` as
    a whole key each. In the answer ``graph`` is always named. Raises ManifestError where the table is wrong, and
    where there is no graph, which is a model that ComfyUI cannot run.
    """
    table = _table(model)
    variants = _variants(model, table)
    chosen = next((name for name in prefer if name in variants), None)
    where = dict.fromkeys(_KEYS, TABLE)
    merged = {key: value for key, value in table.items() if key != _VARIANTS}
    if chosen is not None:
        where |= dict.fromkeys(variants[chosen], f"{TABLE}.{_VARIANTS}.{chosen}")
        merged |= variants[chosen]
    workflow = _convert(model, merged, where)
    if not workflow.graph:
        raise manifest_error(model, "graph", _no_graph(model, variants))
    _check_weights(model, workflow, where["weights"])
    _check_packs(model, workflow, where["node_packs"])
    return workflow


def read_graph(model: Model, workflow: Workflow) -> Graph:
    """The graph of ``workflow``, from the model's folder.

    Raises ManifestError where it cannot be read, is not in the API format, or links to what is not there, and
    where ``workflow`` names nodes that it does not have.
    """
    name = workflow.graph
    key = "graph" if name == model.graph else f"{TABLE}.graph"
    if not name or name != Path(name).name or why_unsafe(name):
        raise manifest_error(model, key, f"{name!r} must be the bare name of a file in the model's folder")
    file = model.folder / name
    try:
        value = orjson.loads(file.read_bytes())
    except OSError as error:
        raise manifest_error(model, key, f"{shown(file)} cannot be read: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise ManifestError(shown(file), "", f"this is not JSON: {error}") from None
    try:
        graph = as_graph(value)
    except NotAGraph as error:
        raise ManifestError(shown(file), "", str(error)) from None
    for word, ids in (("outputs", workflow.outputs), ("loras", workflow.loras)):
        _check_ids(model, f"{TABLE}.{word}", ids, graph)
    return graph


def as_graph(value: object) -> Graph:
    """``value`` where it is a graph in API format. Raises NotAGraph, which says what it is instead."""
    if not isinstance(value, dict):
        raise NotAGraph("must be a JSON object: export the workflow in ComfyUI's API format")
    if isinstance(value.get("nodes"), list) and "links" in value:
        raise NotAGraph(
            "this is a workflow as ComfyUI's page saves it, not its API format: run `rushes models import` on "
            'it, or export it with "Export (API)"'
        )
    if isinstance(value.get("prompt"), dict) and "class_type" not in value["prompt"]:
        raise NotAGraph('this is the body of a call to ComfyUI: keep only what stands under "prompt"')
    if not value:
        raise NotAGraph("there is no node in it: export the workflow in ComfyUI's API format")
    for id_, node in value.items():
        _check_node(id_, node)
    for id_, node in value.items():
        _check_links(id_, node, value)
    return value


def _check_node(id_: str, node: object) -> None:
    export = "export the workflow in ComfyUI's API format"
    if not isinstance(node, dict):
        raise NotAGraph(f"node {id_!r} is no JSON object: {export}")
    if not isinstance(node.get("class_type"), str) or not node["class_type"]:
        raise NotAGraph(f"node {id_!r} has no class_type: {export}")
    if not isinstance(node.get("inputs"), dict):
        raise NotAGraph(f'node {id_!r} ({node["class_type"]}) has no table "inputs": {export}')


def _check_links(id_: str, node: Node, graph: Graph) -> None:
    for name, value in node["inputs"].items():
        if not isinstance(value, list):
            continue
        if not is_link(value):
            raise NotAGraph(
                f"input {id_}.{name} holds a list that is no link [node id in quotes, output number]; "
                'a list as a value is written {"__value__": [...]}'
            )
        if value[0] not in graph:
            raise NotAGraph(
                f"input {id_}.{name} is linked to node {value[0]!r}, which is not in the graph: "
                "export the whole workflow"
            )


def _check_ids(model: Model, key: str, ids: Sequence[str], graph: Graph) -> None:
    for position, id_ in enumerate(ids):
        if id_ not in graph:
            raise manifest_error(model, key, f"there is no node {id_!r} in the graph; {_near(id_, graph)}")
        if id_ in ids[:position]:
            raise manifest_error(model, key, f"node {id_!r} stands here twice; once is enough")


def _near(id_: str, graph: Collection[str]) -> str:
    """Ids are short, and a graph may have hundreds of them."""
    some = list(graph)[:20]
    more = ", …" if len(graph) > len(some) else ""
    return f"{did_you_mean(id_, some)}{more}"


# -- the table ----------------------------------------------------------------------------------------------
def _table(model: Model) -> dict[str, Any]:
    table = model.options.get(_ENGINE, {})
    if not isinstance(table, dict):
        raise manifest_error(model, TABLE, "must be a table: [engines.comfyui]")
    return table


def _variants(model: Model, table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    variants = table.get(_VARIANTS, {})
    key = f"{TABLE}.{_VARIANTS}"
    if not isinstance(variants, dict):
        raise manifest_error(model, key, f"must be a table of tables: [{key}.NAME]")
    for name, variant in variants.items():
        if not isinstance(variant, dict):
            raise manifest_error(model, f"{key}.{name}", f"must be a table: [{key}.{name}]")
    return variants


def _no_graph(model: Model, variants: Mapping[str, Any]) -> str:
    names = [name for name, variant in variants.items() if variant.get("graph")]
    if names:
        return (
            f"{model.id} has a workflow only as {', '.join(names)}: name one of them in RUSHES_COMFYUI_VARIANTS"
        )
    return (
        f'{model.id} has no workflow, so ComfyUI cannot run it: add one and name its file, graph = "graph.json"'
    )


def _convert(model: Model, table: Mapping[str, Any], where: Mapping[str, str]) -> Workflow:
    """``table`` as a Workflow; ``where`` names for each key the table in the file that it comes from."""
    for key, value in table.items():
        if key not in _KEYS:
            known = (*_KEYS, _VARIANTS)
            raise manifest_error(
                model, f"{where.get(key, TABLE)}.{key}", f"there is no such key; {did_you_mean(key, known)}"
            )
        if key == "bindings" and isinstance(value, dict):
            _check_bindings(model, f"{where[key]}.{key}", value)
        if key in _LISTED and isinstance(value, list):
            _check_listed(model, f"{where[key]}.{key}", value, _LISTED[key])
    try:
        workflow = msgspec.convert(table, Workflow)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        key = path.rstrip("`").lstrip(".")
        stem = re.split(r"[.\[]", key)[0]
        raise manifest_error(model, f"{where.get(stem, TABLE)}.{key}", problem) from None
    return workflow if workflow.graph else msgspec.structs.replace(workflow, graph=model.graph or "")


def _check_bindings(model: Model, key: str, bindings: Mapping[str, Any]) -> None:
    for target, value in bindings.items():
        if isinstance(value, dict):
            fix = f'put the whole name in quotes: "{target}.{next(iter(value), "input")}" = …'
            raise manifest_error(model, f"{key}.{target}", fix)
        if not isinstance(value, str):
            text = str(value).capitalize() if isinstance(value, bool) else str(value)
            problem = f'an expression stands in quotes: "{target}" = "{text}"'
            raise manifest_error(model, f'{key}."{target}"', problem)


def _check_listed(model: Model, key: str, items: Sequence[Any], type_: type[msgspec.Struct]) -> None:
    known = [field.name for field in msgspec.structs.fields(type_)]
    for index, item in enumerate(items):
        for word in item if isinstance(item, dict) else ():
            if word not in known:
                problem = f"there is no such key; {did_you_mean(word, known)}"
                raise manifest_error(model, f"{key}[{index}].{word}", problem)


def _check_weights(model: Model, workflow: Workflow, table: str) -> None:
    seen: set[tuple[str, str]] = set()
    for index, weight in enumerate(workflow.weights):
        key = f"{table}.weights[{index}]"
        for name, path in (("file", weight.file), ("folder", weight.folder), ("path", weight.path)):
            problem = why_unsafe(path) if path or name != "path" else None
            if problem:
                example = "a name such as wan/model.safetensors is expected"
                raise manifest_error(model, f"{key}.{name}", f"{path!r} {problem}; {example}")
        if weight.source and not _REPOSITORY.fullmatch(weight.source) and not _is_https(weight.source):
            raise manifest_error(
                model, f"{key}.source", f"{weight.source!r} is neither owner/repository nor an https address"
            )
        if weight.path and not weight.source:
            raise manifest_error(model, f"{key}.path", "is a path in a repository: name it under source")
        if weight.bytes is not None and weight.bytes <= 0:
            raise manifest_error(model, f"{key}.bytes", "must be the file's size, above 0")
        if weight.sha256 is not None and not _SHA256.fullmatch(weight.sha256):
            raise manifest_error(model, f"{key}.sha256", "must be 64 hexadecimal digits")
        if (weight.folder, weight.file) in seen:
            raise manifest_error(model, f"{key}.file", f"{weight.folder}/{weight.file} is listed twice")
        seen.add((weight.folder, weight.file))


def _check_packs(model: Model, workflow: Workflow, table: str) -> None:
    for index, pack in enumerate(workflow.node_packs):
        key = f"{table}.node_packs[{index}]"
        if not pack.name.strip():
            raise manifest_error(model, f"{key}.name", "give the pack's name")
        if not _is_https(pack.source):
            raise manifest_error(model, f"{key}.source", f"{pack.source!r} must be an https address")


def _is_https(text: str) -> bool:
    return bool(re.fullmatch(r"https://[^\s/]+\S*", text))
