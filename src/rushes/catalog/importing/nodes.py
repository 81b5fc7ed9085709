"""What ComfyUI says of the nodes of one graph: types, bounds, choices and tooltips of their inputs.

The source is the answer of ``GET /object_info``, in both of its spellings: a choice is a list of values, or
``"COMBO"`` with ``options``. Custom nodes put anything there, so that nothing of it is trusted to have a shape.
Where a class is not described, or there is no description at all, types are guessed from the graph's values.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from rushes.catalog.audit_nodes import MEDIA_SUFFIXES, is_path_name, is_weight, loads_file
from rushes.catalog.workflow import Graph, Node

Target = tuple[str, str]
"""An input of a node: the node's id and the input's name."""
Link = tuple[str, int]
"""Where an input comes from: a node's id and the number of its output."""

NUMBERS: Final = ("INT", "FLOAT")
SCALARS: Final = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
"""Types whose values people type in; every other type comes from another node."""
FLOATS: Final = frozenset(
    {"cfg", "cfg_scale", "guidance", "guidance_scale", "shift", "denoise", "fps", "frame_rate", "strength"}
)
"""Inputs that are no whole numbers although a graph may hold one."""
PROMPTS: Final = frozenset({"text", "prompt", "positive", "positive_prompt", "negative", "negative_prompt"})
_IMAGE_LOADER: Final = re.compile(r"load_?image", re.IGNORECASE)
_VIDEO_LOADER: Final = re.compile(r"load_?video", re.IGNORECASE)
_OUTPUT_NODE: Final = re.compile(r"^(Save|Preview)|Save(Image|Video)|VideoCombine", re.IGNORECASE)
_TIDY_DIGITS: Final = 10
"""Digits behind the point that are kept: pages save 8.000000000000002 where 8 was typed."""


class Port(NamedTuple):
    """One input of a node."""

    type: str
    """As ComfyUI writes it, ``INT`` or ``MODEL``; ``COMBO`` for choices; empty where it cannot be told."""
    settings: Mapping[str, Any] = {}
    """``min``, ``max``, ``step``, ``tooltip``, ``multiline``, …"""
    options: tuple[Any, ...] = ()
    """The values of a choice."""

    @property
    def upload(self) -> str:
        """What a person uploads for it: "image", "video", "audio", "file", or nothing."""
        for kind in ("image", "video", "audio", "file"):
            if self.settings.get(f"{kind}_upload"):
                return kind
        return ""

    @property
    def tooltip(self) -> str:
        text = self.settings.get("tooltip")
        return " ".join(text.split()) if isinstance(text, str) else ""

    def number(self, key: str) -> float | None:
        """A finite number among the settings, or None."""
        value = self.settings.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return value if isinstance(value, int) or math.isfinite(value) else None


class Nodes:
    """The nodes of a graph with what is known of their classes."""

    def __init__(self, graph: Graph, object_info: Mapping[str, Any] | None) -> None:
        self.graph = graph
        self.described = object_info is not None
        self._info = object_info or {}
        self._linked = _output_types(self._info)

    def __iter__(self) -> Iterator[str]:
        return iter(self.graph)

    def inputs(self, id_: str) -> dict[str, Any]:
        inputs: dict[str, Any] = self.graph[id_]["inputs"]
        return inputs

    def class_of(self, id_: str) -> str:
        return str(self.graph[id_]["class_type"])

    def info(self, id_: str) -> Mapping[str, Any]:
        """The description of a node's class; empty where there is none."""
        found = self._info.get(self.class_of(id_))
        return found if isinstance(found, Mapping) else {}

    def title(self, id_: str) -> str:
        return title_of(self.graph[id_])

    def shown(self, id_: str) -> str:
        """A node in words: ``57 (KSampler)``."""
        return f"{id_} ({self.title(id_)})"

    def retitled(self, id_: str) -> bool:
        """Whether the workflow's author gave the node a title of its own."""
        class_, info = self.class_of(id_), self.info(id_)
        usual = {class_.lower(), str(info.get("display_name") or info.get("name") or class_).lower()}
        return bool(info) and self.title(id_).lower() not in usual

    def link(self, id_: str, name: str) -> Link | None:
        """The output that an input is connected to, if it is."""
        return as_link(self.inputs(id_).get(name), self.graph)

    def links(self, id_: str) -> Iterator[tuple[str, Link]]:
        """The connected inputs of a node."""
        for name in self.inputs(id_):
            link = self.link(id_, name)
            if link:
                yield name, link

    def outputs(self, id_: str) -> tuple[str, ...]:
        """The types of a node's outputs; empty where they are unknown, too."""
        types = self.info(id_).get("output")
        return tuple(map(str, types)) if isinstance(types, list | tuple) else ()

    def is_output(self, id_: str) -> bool:
        """Whether ComfyUI runs a graph for the sake of this node."""
        info = self.info(id_)
        if info:
            return bool(info.get("output_node"))
        return bool(_OUTPUT_NODE.search(self.class_of(id_)))

    def declared(self, id_: str, name: str) -> Port | None:
        """An input as its class declares it; None where it does not."""
        sections = self.info(id_).get("input")
        for section in ("required", "optional"):
            specs = sections.get(section) if isinstance(sections, Mapping) else None
            if isinstance(specs, Mapping) and name in specs:
                return _port(specs[name])
        return None

    def port(self, id_: str, name: str) -> Port:
        """An input as declared, or as its value looks."""
        declared = self.declared(id_, name)
        value = self.inputs(id_).get(name)
        if declared is None or declared.type in ("", "*") or "," in declared.type:
            return Port("") if as_link(value, self.graph) else _guess(self.class_of(id_), name, value)
        return declared

    def is_connection(self, port: Port) -> bool:
        """Whether inputs of this type can only be connected, not typed in."""
        return port.type not in SCALARS and port.type in self._linked

    def is_file_list(self, id_: str, name: str) -> bool:
        """Whether an input chooses among files on the server's disk."""
        port, value = self.port(id_, name), self.inputs(id_).get(name)
        if port.upload or "image_folder" in port.settings or "remote" in port.settings:
            return True
        shown = [value, *port.options[:50]] if port.type in ("COMBO", "STRING") else []
        return any(isinstance(one, str) and is_file_name(one) for one in shown)

    def is_path(self, id_: str, name: str) -> bool:
        """Whether the value of an input is, or becomes, a path on the server's disk."""
        return self.is_file_list(id_, name) or is_path_name(name) or loads_file(None, self.class_of(id_), name)


def title_of(node: Node) -> str:
    """A node's title, else its class, on one line."""
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, Mapping) else None
    words = " ".join(title.split()) if isinstance(title, str) else ""
    return words or str(node.get("class_type", ""))


def as_link(value: Any, graph: Graph) -> Link | None:
    """``value`` as a link to a node of ``graph``, or None where it is none."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    node, output = value
    if isinstance(node, int) and not isinstance(node, bool):
        node = str(node)
    if not isinstance(node, str) or type(output) is not int or node not in graph:
        return None
    return node, output


def is_file_name(text: str) -> bool:
    return is_weight(text) or text.lower().endswith(MEDIA_SUFFIXES)


def tidied(nodes: Nodes) -> tuple[Graph, list[str]]:
    """The graph as it is written: titles, classes and inputs only, numbers in the types that the nodes have.

    Also takes out plain values of inputs that can only be connected, which converters and old pages leave
    behind and nodes then stumble over. The second answer names those.
    """
    graph: Graph = {}
    dropped = []
    for id_ in nodes:
        inputs = {}
        for name, value in nodes.inputs(id_).items():
            link = nodes.link(id_, name)
            port = nodes.port(id_, name)
            if link:
                inputs[name] = list(link)
            elif nodes.is_connection(port) and isinstance(value, str | int | float):
                dropped.append(
                    f"took the value {value!r} out of {name} of node {nodes.shown(id_)}: a {port.type} can only "
                    "come from another node"
                )
            else:
                inputs[name] = _number(value, port)
        graph[id_] = {
            "inputs": inputs,
            "class_type": nodes.class_of(id_),
            "_meta": {"title": nodes.title(id_)},
        }
    return graph, dropped


def _number(value: Any, port: Port) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if port.type == "INT" and isinstance(value, float) and value.is_integer():
        return int(value)
    if port.type == "FLOAT" and abs(value) < 2**53:
        return round(float(value), _TIDY_DIGITS)
    return value


def _output_types(info: Mapping[str, Any]) -> frozenset[str]:
    """Every type that some node puts out."""
    types: set[str] = set()
    for one in info.values():
        outputs = one.get("output") if isinstance(one, Mapping) else None
        if isinstance(outputs, list):
            types.update(out for out in outputs if isinstance(out, str))
    return frozenset(types)


def _port(spec: Any) -> Port:
    if not isinstance(spec, list | tuple) or not spec:
        return Port("")
    settings = spec[1] if len(spec) > 1 and isinstance(spec[1], Mapping) else {}
    if isinstance(spec[0], list | tuple):
        return Port("COMBO", settings, tuple(spec[0]))
    if spec[0] == "COMBO":
        options = settings.get("options")
        return Port("COMBO", settings, tuple(options) if isinstance(options, list | tuple) else ())
    return Port(spec[0] if isinstance(spec[0], str) else "", settings)


def _guess(class_: str, name: str, value: Any) -> Port:
    if isinstance(value, bool):
        return Port("BOOLEAN")
    if isinstance(value, int):
        return Port("FLOAT" if name in FLOATS else "INT")
    if isinstance(value, float):
        return Port("FLOAT")
    if not isinstance(value, str):
        return Port("")
    if name in ("image", "file", "video"):
        for kind, loader in (("image", _IMAGE_LOADER), ("video", _VIDEO_LOADER)):
            if loader.search(class_):
                return Port("COMBO", {f"{kind}_upload": True})
    return Port("STRING", {"multiline": name in PROMPTS})
