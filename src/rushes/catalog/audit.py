"""What is wrong with a model's workflow, and how to mend it: without a ComfyUI, or against what one has.

Pure: what a server or a disk holds comes in as :class:`Holdings`. Reads the model's folder, changes nothing.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final, Literal

import msgspec

from rushes.catalog.audit_nodes import (
    MEDIA_SUFFIXES,
    PATH_NAMES,
    Nodes,
    Spec,
    bad_link,
    is_path_name,
    is_weight,
    label,
    links,
    loads_file,
    plain_inputs,
    specs_of,
    weights_folder,
)
from rushes.catalog.audit_values import check_values
from rushes.catalog.bindings import Binder
from rushes.catalog.model import FILE_ROLES, Model
from rushes.catalog.nearest import nearest
from rushes.catalog.paths import MANIFEST, why_unsafe
from rushes.catalog.workflow import (
    Graph,
    NodePack,
    Weight,
    Workflow,
    has_workflow,
    read_graph,
    workflow_of,
)
from rushes.errors import ManifestError
from rushes.settings import REMOTE_KINDS

Severity = Literal["error", "warning", "note"]
"""error: requests fail, or a safety rule is broken. warning: something has no effect, or another one than it
says. note: worth knowing."""
_SAVES: Final[dict[str, str]] = {
    "SaveImage": "image",
    "PreviewImage": "image",
    "SaveImageWebsocket": "nothing",
    "SaveVideo": "video",
    "SaveWEBM": "video",
    "VHS_VideoCombine": "video",
    "SaveAnimatedWEBP": "either",
    "SaveAnimatedPNG": "either",
}
"""What the files of a node are; "either" where only the file itself tells."""
_TABLES: Final = ("comfyui", "wan", *REMOTE_KINDS)
"""Engines of Rushes that read a table of the manifest."""
_TEMPORARY: Final = ("PreviewImage", "MaskPreview", "PreviewAudio")


class Finding(msgspec.Struct, frozen=True):
    """One thing that was found."""

    severity: Severity
    model: str
    where: str
    """The node, input, public input or key that it is about."""
    kind: str
    """A stable word for scripts, such as ``unbound_input`` or ``missing_weights``."""
    text: str
    fix: str = ""


class Held(msgspec.Struct, frozen=True):
    """A file of weights on a disk."""

    bytes: int
    sha256: str | None = None
    """In hexadecimal; None where it was not computed."""


class Holdings(msgspec.Struct, frozen=True):
    """What one ComfyUI has, as far as is known: None and absent keys mean unknown."""

    name: str
    """Its address or folder."""
    nodes: Nodes | None = None
    classes: frozenset[str] | None = None
    """Those node classes of all models that it has, where ``nodes`` is not known."""
    packs: frozenset[str] | None = None
    """Folders of custom nodes, in lower case."""
    weights: Mapping[str, frozenset[str]] = {}
    """Names of the files by folder below ``models``."""
    files: Mapping[tuple[str, str], Held] = {}
    """By folder and name: the listed weights that were found on a disk."""
    inputs: frozenset[str] | None = None
    """Files in its input folder."""
    homes: Mapping[str, str] = {}
    """Where weights of a folder belong, for the commands that get them."""
    custom_nodes: str = "ComfyUI/custom_nodes"


class Needs(msgspec.Struct, frozen=True):
    """What to look for on a disk or a server before :func:`audit` can compare."""

    classes: frozenset[str]
    weights: tuple[Weight, ...]
    folders: frozenset[str]


def needs_of(model: Model, prefer: Sequence[str] = ()) -> Needs:
    """What the model's workflow asks of a ComfyUI; nothing where there is none, or it is broken."""
    try:
        workflow = workflow_of(model, prefer)
        graph = read_graph(model, workflow)
    except ManifestError:
        return Needs(frozenset(), (), frozenset())
    loaded = {weights_folder(c, name) for _, c, name, value in plain_inputs(graph) if is_weight(value)}
    return Needs(
        classes=frozenset(node["class_type"] for node in graph.values()),
        weights=workflow.weights,
        folders=frozenset({weight.folder for weight in workflow.weights} | loaded - {""}),
    )


def audit(model: Model, prefer: Sequence[str] = (), comfyui: Holdings | None = None) -> list[Finding]:
    """Everything that is found, the worst first. ``prefer`` names the variants of the workflow to take."""
    if not has_workflow(model):
        text = "has no graph: it does not run on ComfyUI"
        fix = "`rushes models import` makes a model of a workflow"
        return [Finding("note", model.id, MANIFEST, "no_graph", text, fix)]
    try:
        workflow = workflow_of(model, prefer)
        graph = read_graph(model, workflow)
        binder = Binder(model, workflow, graph)
    except ManifestError as error:
        where = ": ".join(filter(None, (error.file, error.key)))
        return [Finding("error", model.id, where, "manifest", error.problem)]
    found = _Audit(model, workflow, graph, binder, comfyui or Holdings("")).findings()
    order = ("error", "warning", "note")
    return sorted(dict.fromkeys(found), key=lambda one: order.index(one.severity))


def audit_engines(model: Model) -> list[Finding]:
    """Tables that no engine of Rushes reads. None is an error: an engine of one's own may have any name."""
    found = []
    for name in model.options:
        if name in _TABLES:
            continue
        guess, where = nearest(name, _TABLES), f"engines.{name}"
        if guess:
            text, fix = (
                f"there is no engine {name}; did you mean {guess}?",
                "rename the table, unless an engine of your own is called so",
            )
            found.append(Finding("warning", model.id, where, "unknown_engine", text, fix))
        else:
            text = "no engine of Rushes reads this table; one of your own may"
            found.append(Finding("note", model.id, where, "unknown_engine", text))
    return found


def download(weight: Weight, home: str) -> str:
    """A command that gets the weights into their folder, or what to do where the manifest names no source."""
    target = f"{home}/{weight.file}"
    if not weight.source:
        return f"put it at {target}; the manifest names no source"
    if weight.source.startswith("https://"):
        url = f"{weight.source}/{weight.path}" if weight.path else weight.source
        return shlex.join(["curl", "-fL", "--create-dirs", "-C", "-", "-o", target, url])
    path = weight.path or weight.file
    get = shlex.join(["hf", "download", weight.source, path, "--local-dir", home])
    if path == weight.file:
        return get
    folder = (
        f"{shlex.join(['mkdir', '-p', str(PurePosixPath(target).parent)])} && " if "/" in weight.file else ""
    )
    return f"{get} && {folder}{shlex.join(['mv', f'{home}/{path}', target])}"


def size_of(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


class _Audit:
    """One look at one workflow."""

    def __init__(
        self, model: Model, workflow: Workflow, graph: Graph, binder: Binder, comfyui: Holdings
    ) -> None:
        self._model, self._workflow, self._graph, self._binder = model, workflow, graph, binder
        self._has = comfyui
        self._bound = {target: field for field, targets in binder.targets.items() for target in targets}
        self._fields = {field.name: field for field in model.inputs}

    def findings(self) -> Iterator[Finding]:
        yield from self._unbound()
        yield from self._paths()
        yield from self._loaded_files()
        yield from self._classes()
        yield from self._links()
        yield from self._missing_inputs()
        yield from self._listed_weights()
        yield from self._present_weights()
        yield from self._outputs()
        for value in check_values(self._model, self._graph, self._binder, self._has.nodes):
            if value.weight is not None and value.weight in self._used_weights():
                continue  # said with a command that gets them
            yield Finding(value.severity, self._model.id, value.where, value.kind, value.text, value.fix)

    def _say(self, severity: Severity, where: str, kind: str, text: str, fix: str = "") -> Finding:
        return Finding(severity, self._model.id, where, kind, text, fix)

    def _node(self, id_: str, name: str = "") -> str:
        return label(self._graph, id_, name)

    def _spec(self, class_type: str, name: str) -> Spec | None:
        """What the server says of an input; None without one."""
        return specs_of(self._has.nodes, class_type).get(name) if self._has.nodes is not None else None

    # -- inputs -----------------------------------------------------------------------------------------
    def _unbound(self) -> Iterator[Finding]:
        for name in self._binder.unbound:
            needed = name in self._model.required or name in self._model.files()
            yield self._say(
                "error" if needed else "warning",
                name,
                "unbound_input",
                "reaches no node of the graph: it has no effect",
                'bind it under [engines.comfyui.bindings], as in "57.steps" = "steps", or take the input out',
            )

    def _paths(self) -> Iterator[Finding]:
        for id_, class_type, name, value in plain_inputs(self._graph):
            if not isinstance(value, str):
                continue
            names_file = self._names_file(class_type, name, value)
            if not names_file and not is_path_name(name):
                continue
            field = self._fields.get(self._bound.get((id_, name), ""))
            if field and field.role not in FILE_ROLES and field.enum is None and field.type == "string":
                yield self._say(
                    "error",
                    field.name,
                    "unsafe_path",
                    f"lets a caller choose any path: {self._node(id_, name)} names a file",
                    "give it an enum, or a role that takes a file",
                )
            choices = self._spec(class_type, name)
            why = why_unsafe(value) if value and names_file else None
            if why and not (choices and choices.choices and value in choices.choices):
                yield self._unsafe(id_, name, value, why)

    def _unsafe(self, id_: str, name: str, value: str, why: str) -> Finding:
        if name == "filename_prefix":
            text = f"{value!r} {why}; its last part alone is used"
            return self._say("warning", self._node(id_, name), "unsafe_path", text, "write a plain name")
        text, fix = f"{value!r} {why}", "name the file as ComfyUI's list has it, below its own folder"
        return self._say("error", self._node(id_, name), "unsafe_path", text, fix)

    def _names_file(self, class_type: str, name: str, value: str) -> bool:
        spec = self._spec(class_type, name)
        if is_weight(value) or loads_file(spec, class_type, name) or name in PATH_NAMES:
            return True
        return len(value) < 300 and "\n" not in value and value.lower().endswith(MEDIA_SUFFIXES)

    def _loaded_files(self) -> Iterator[Finding]:
        """Loaders that go on loading what was in the workflow when it was saved."""
        for id_, class_type, name, value in plain_inputs(self._graph):
            spec = self._spec(class_type, name)
            if not loads_file(spec, class_type, name):
                continue
            field = self._fields.get(self._bound.get((id_, name), ""))
            if field is None:
                when = "every request loads"
            elif field.name not in self._model.required and field.default is None:
                when = f"a request without {field.name} loads"
            else:
                continue
            there = self._has.inputs
            if spec is not None and spec.choices is not None:
                there = frozenset(map(str, spec.choices))
            if there is None or value not in there:
                yield self._say(
                    "warning" if there is None else "error",
                    self._node(id_, name),
                    "left_over_file",
                    f"{when} the graph's own {value!r}, which has to lie in ComfyUI's input folder",
                    "bind it to a file input, give that a default or make it required, or put the file there",
                )

    # -- nodes ------------------------------------------------------------------------------------------
    def _known(self, class_type: str) -> bool | None:
        if self._has.nodes is not None:
            return class_type in self._has.nodes
        return None if self._has.classes is None else class_type in self._has.classes

    def _classes(self) -> Iterator[Finding]:
        missing: dict[str, list[str]] = {}
        for id_, node in self._graph.items():
            if self._known(node["class_type"]) is False:
                missing.setdefault(node["class_type"], []).append(id_)
        for pack in self._workflow.node_packs:
            gone = {name: missing.pop(name) for name in pack.nodes if name in missing}
            if gone:
                yield self._missing_pack(pack, gone)
            elif self._packs_folder(pack) is False and self._has.nodes is None and not pack.nodes:
                yield self._missing_pack(pack, {})
        for class_type, ids in missing.items():
            guess = nearest(class_type, self._has.nodes) if self._has.nodes else None
            known = f"did you mean {guess}? Else " if guess else ""
            yield self._say(
                "error",
                ", ".join(self._node(id_) for id_ in ids),
                "missing_node",
                f"there is no node class {class_type}",
                f"{known}install the pack that has it, or a newer ComfyUI, "
                "and list the pack under [[engines.comfyui.node_packs]]",
            )
        yield from self._unlisted_packs()

    def _missing_pack(self, pack: NodePack, gone: Mapping[str, Sequence[str]]) -> Finding:
        where = ", ".join(self._node(id_) for ids in gone.values() for id_ in ids) or pack.name
        what = f", which has {', '.join(gone)}" if gone else ""
        if self._packs_folder(pack):
            text = f"the node pack {pack.name}{what}, is there but does not load: see ComfyUI's log"
            fix = f"install its requirements.txt with ComfyUI's Python; its source is {pack.source}"
        else:
            text = f"the node pack {pack.name}{what}, is missing"
            folder = f"{self._has.custom_nodes}/{_pack_folder(pack)}"
            fix = f"{shlex.join(['git', 'clone', pack.source, folder])}, then install its requirements.txt"
        return self._say("error", where, "missing_pack", text, f"{fix}; start ComfyUI again")

    def _packs_folder(self, pack: NodePack) -> bool | None:
        if self._has.packs is None:
            return None
        return bool({_pack_folder(pack).lower(), pack.name.lower()} & self._has.packs)

    def _unlisted_packs(self) -> Iterator[Finding]:
        listed = {name for pack in self._workflow.node_packs for name in pack.nodes}
        used = {node["class_type"]: id_ for id_, node in self._graph.items()}
        for pack in self._workflow.node_packs:
            if pack.nodes and not used.keys() & set(pack.nodes):
                text = "is listed, but the graph uses none of its nodes"
                yield self._say("warning", f"node_packs: {pack.name}", "unused_pack", text, "take it out")
        for class_type, id_ in used.items():
            module = str((self._has.nodes or {}).get(class_type, {}).get("python_module", ""))
            if module.startswith("custom_nodes.") and class_type not in listed:
                text = f"comes from the node pack {module.partition('.')[2]}, which is not listed"
                fix = "list it under [[engines.comfyui.node_packs]] with its source, for other machines"
                yield self._say("warning", self._node(id_), "unlisted_pack", text, fix)

    def _links(self) -> Iterator[Finding]:
        for id_, class_type, name, link in links(self._graph):
            spec = self._spec(class_type, name)
            if problem := bad_link(self._graph, self._has.nodes, spec, link):
                fix = "mend the graph in ComfyUI and export it again"
                yield self._say("error", self._node(id_, name), "bad_link", problem, fix)

    def _missing_inputs(self) -> Iterator[Finding]:
        for id_, node in self._graph.items():
            inputs = node["inputs"]
            specs = specs_of(self._has.nodes, node["class_type"]) if self._has.nodes is not None else {}
            for name, spec in specs.items():
                reached = name in inputs or any(key.startswith(f"{name}.") for key in inputs)
                if spec.required and not reached and not spec.type.startswith("COMFY_"):
                    text, fix = "is required and has no value", "set it in ComfyUI and export the graph again"
                    yield self._say("error", self._node(id_, name), "missing_input", text, fix)

    # -- weights ----------------------------------------------------------------------------------------
    def _used_weights(self) -> dict[str, tuple[str, str]]:
        """The names in loaders, each with one ``(node id, input)``; those of public inputs' enums, too."""
        used = {value: (id_, name) for id_, _, name, value in plain_inputs(self._graph) if is_weight(value)}
        for (id_, name), field in self._bound.items():
            enum = self._fields[field].enum if field in self._fields else None
            used |= {value: (id_, name) for value in enum or () if isinstance(value, str) and is_weight(value)}
        return used

    def _listed_weights(self) -> Iterator[Finding]:
        used = self._used_weights()
        listed = {weight.file for weight in self._workflow.weights}
        for value, (id_, name) in used.items():
            if value not in listed:
                yield self._say(
                    "warning",
                    self._node(id_, name),
                    "unlisted_weights",
                    f"{value!r} is not among the manifest's weights",
                    "add it under [[engines.comfyui.weights]] with its folder and source",
                )
        for weight in self._workflow.weights:
            if weight.file not in used:
                text = f"{weight.file!r} is listed, but no loader of the graph names it"
                yield self._say("warning", "weights", "unused_weights", text, "take it out, or mend the name")

    def _present_weights(self) -> Iterator[Finding]:
        listed = {weight.file: weight for weight in self._workflow.weights}
        used = self._used_weights()
        for name in (*used, *(file for file in listed if file not in used)):
            id_, input_name = used.get(name, ("", ""))
            class_type = str(self._graph.get(id_, {}).get("class_type"))
            folder = listed[name].folder if name in listed else weights_folder(class_type, input_name)
            weight = listed.get(name) or Weight(file=name, folder=folder or "?")
            there = self._offered(class_type, input_name)
            if there is None:
                there = self._has.weights.get(folder)
            where = self._node(id_, input_name) if id_ else "weights"
            if there is not None and name not in there:
                yield self._missing_weights(weight, where, there)
            elif held := self._has.files.get((weight.folder, name)):
                yield from self._damaged(weight, held, where)

    def _offered(self, class_type: str, name: str) -> frozenset[str] | None:
        spec = self._spec(class_type, name)
        return None if spec is None or spec.choices is None else frozenset(map(str, spec.choices))

    def _missing_weights(self, weight: Weight, where: str, there: frozenset[str]) -> Finding:
        facts = [f"in {weight.folder}", size_of(weight.bytes) if weight.bytes else "", weight.licence]
        text = f"the weights {weight.file} are missing ({', '.join(filter(None, facts))})"
        last = PurePosixPath(weight.file.replace("\\", "/")).name
        near = sorted(name for name in there if PurePosixPath(name.replace("\\", "/")).name == last)
        home = self._has.homes.get(weight.folder, f"ComfyUI/models/{weight.folder}")
        fix = f"there is {near[0]!r}: write that into the graph" if near else download(weight, home)
        return self._say("error", where, "missing_weights", text, fix)

    def _damaged(self, weight: Weight, held: Held, where: str) -> Iterator[Finding]:
        home = self._has.homes.get(weight.folder, f"ComfyUI/models/{weight.folder}")
        fix = f"remove it and get it again: {download(weight, home)}"
        if weight.bytes is not None and held.bytes != weight.bytes:
            text = f"{weight.file} has {held.bytes} bytes instead of {weight.bytes}"
            yield self._say("error", where, "damaged_weights", text, fix)
        elif weight.sha256 and held.sha256 and held.sha256.lower() != weight.sha256.lower():
            text = f"{weight.file} has the sha256 {held.sha256} instead of {weight.sha256}"
            yield self._say("error", where, "damaged_weights", text, fix)

    # -- outputs ----------------------------------------------------------------------------------------
    def _saves(self, id_: str) -> str | None:
        """What a node saves: "image", "video", "either", "unknown", or None where it saves nothing."""
        class_type = self._graph[id_]["class_type"]
        info = (self._has.nodes or {}).get(class_type)
        if class_type in _SAVES:
            return _SAVES[class_type] if _SAVES[class_type] != "nothing" else None
        if info is not None and not info.get("output_node"):
            return None
        if info is None and not class_type.startswith("Save"):
            used = any(link[0] == id_ for *_, link in links(self._graph))
            return None if used or self._has.nodes is not None else "unknown"
        takes = {spec.type for spec in specs_of(self._has.nodes, class_type).values()}
        return "video" if "VIDEO" in takes else "unknown"

    def _outputs(self) -> Iterator[Finding]:
        wanted = self._workflow.outputs or tuple(self._graph)
        saved: dict[str, Any] = {}
        for id_ in wanted:
            if id_ not in self._graph:
                text = f"there is no node {id_!r} in the graph"
                yield self._say("error", "outputs", "missing_output", text, "name nodes that save files")
                continue
            kind = self._saves(id_)
            if kind is not None:
                saved[id_] = kind
            elif self._workflow.outputs and self._known(self._graph[id_]["class_type"]) is not False:
                text, fix = "is named in outputs, but saves no file", "name a node that saves files"
                yield self._say("error", self._node(id_), "missing_output", text, fix)
        makes = self._model.output
        if not saved:
            text = f"nothing in the graph saves {'an image' if makes == 'image' else 'a video'}"
            yield self._say("error", "outputs", "missing_output", text, f"add a Save{makes.title()} node")
        elif all(kind in ("image", "video") for kind in saved.values()) and makes not in saved.values():
            text = f"the model makes {makes}s, but the graph saves {'/'.join(sorted(set(saved.values())))}s"
            fix = f"set output, or save with Save{makes.title()}"
            yield self._say("error", ", ".join(map(self._node, saved)), "wrong_output", text, fix)
        elif all(self._graph[id_]["class_type"] in _TEMPORARY for id_ in saved):
            text = "the outputs are previews: temporary files that ComfyUI removes when it starts"
            fix = f"save with Save{makes.title()}"
            yield self._say("warning", ", ".join(map(self._node, saved)), "temporary_output", text, fix)


def _pack_folder(pack: NodePack) -> str:
    """The folder that cloning the pack makes."""
    return PurePosixPath(pack.source.removesuffix("/").removesuffix(".git")).name
