"""Changes to a bound graph that every job needs. Pure: answers new graphs, changes none."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rushes.catalog.workflow import Graph, Node
from rushes.errors import EngineError

LORA_CLASS: Final = "LoraLoaderModelOnly"
FOLDER: Final = "rushes"
"""Everything of ours in ComfyUI's input and output folders lies below this one."""
_MARK: Final = "rushes"
"""The key of ``_meta``, which ComfyUI does not read, that tells a node of ours from the graph's own."""
_LONGEST_NAME: Final = 100
# A separator with an even number of "%" behind it stands outside of the tokens (%date:dd/MM%).
_SEPARATOR: Final = re.compile(r"[/\\](?=(?:[^%]*%[^%]*%)*[^%]*$)")


def with_loras(graph: Graph, after: Sequence[str], loras: Sequence[Mapping[str, Any]]) -> Graph:
    """The graph with a chain of LoRA loaders between output 0 of each node of ``after`` and all that use it.

    ``loras`` are applied in their order: ``path``, a file in ComfyUI's loras folder, and ``scale`` (1.0).
    Raises EngineError where the graph lacks a node of ``after``.
    """
    if not loras:
        return graph
    made = dict(graph)
    fresh = _fresh_ids(graph)
    for node_id in after:
        if node_id not in graph:
            raise EngineError(
                "workflow_refused",
                f"The model's manifest puts LoRAs behind node {node_id}, which its graph does not have.",
                began=False,
            )
        chain: Graph = {}
        end: list[Any] = [node_id, 0]
        for lora in loras:
            added = next(fresh)
            chain[added] = {
                "class_type": LORA_CLASS,
                "inputs": {
                    "model": end,
                    "lora_name": lora["path"],
                    "strength_model": float(lora.get("scale", 1.0)),
                },
                "_meta": {"title": f"LoRA {lora['path']}", _MARK: "loras"},
            }
            end = [added, 0]
        made = {key: _rewired(node, (node_id, 0), end) for key, node in made.items()} | chain
    return made


def is_added_lora(node: Node | None) -> bool:
    """Whether :func:`with_loras` made this node: its values are the request's, not the graph's."""
    return bool(node) and (node or {}).get("_meta", {}).get(_MARK) == "loras"


def with_prefix(graph: Graph, prompt_id: str) -> Graph:
    """The graph with every ``filename_prefix`` below ``rushes/<prompt id>``, the last part of each name kept.

    A folder of its own for every prompt: ComfyUI lists the whole folder for the next free number whenever it
    saves, and nothing of ours may be another prompt's. Linked prefixes stay as they are. Tokens such as
    ``%date:yyyy-MM-dd%`` and ``%width%`` survive; separators, drives and dots that would lead elsewhere do not.
    """
    made = {}
    for node_id, node in graph.items():
        prefix = node.get("inputs", {}).get("filename_prefix")
        if isinstance(prefix, str):
            inputs = node["inputs"] | {"filename_prefix": f"{FOLDER}/{prompt_id}/{_last_part(prefix)}"}
            node = node | {"inputs": inputs}
        made[node_id] = node
    return made


def _last_part(prefix: str) -> str:
    name = _SEPARATOR.split(prefix)[-1]
    name = re.sub(r"^[A-Za-z]:", "", name)
    name = re.sub(r"[\x00-\x1f\x7f]", "", re.sub(r"[/\\]", "-", name)).strip()[:_LONGEST_NAME]
    return name if name.strip(". ") else "output"


def _fresh_ids(graph: Graph) -> Iterator[str]:
    """Ids above every number in the graph's: numbers, as some node packs take ids for such. The parts of
    nested ids count too (``57:3``, ``12.0.3``), so that no node made at run time collides either.
    """
    numbers = [int(part) for node_id in graph for part in re.findall(r"\d{1,15}", node_id)]
    number = max(numbers, default=0)
    while True:
        number += 1
        yield str(number)


def _rewired(node: Node, old: tuple[str, int], new: list[Any]) -> Node:
    inputs = node.get("inputs", {})
    if not any(_is_link(value, old) for value in inputs.values()):
        return node
    return node | {"inputs": {name: new if _is_link(value, old) else value for name, value in inputs.items()}}


def _is_link(value: Any, to: tuple[str, int]) -> bool:
    return isinstance(value, list) and len(value) == 2 and (str(value[0]), value[1]) == to
