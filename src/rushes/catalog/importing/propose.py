"""From a graph to a proposed model: the inputs that people change, what they drive, and what comes out.

Pure. Nothing here is sure to be what the workflow's author wants: the proposal says what was guessed, and the
manifest that is written from it (:mod:`rushes.catalog.importing.write`) is meant to be edited.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from rushes.catalog.bindings import LONGEST_NAME, public_name, resolution_name
from rushes.catalog.importing.fields import Field, NotExposable, field_of
from rushes.catalog.importing.flow import Flow
from rushes.catalog.importing.nodes import Nodes, Target, tidied
from rushes.catalog.importing.numbers import hand_over, number_fields, reference
from rushes.catalog.importing.sizes import resolution_field
from rushes.catalog.importing.texts import extra_field, file_fields, prompt_fields
from rushes.catalog.importing.weights import lora_places, node_packs, weights_of
from rushes.catalog.model import FILE_ROLES
from rushes.catalog.nearest import did_you_mean, nearest
from rushes.catalog.roles import REPEATABLE
from rushes.catalog.workflow import Graph, NodePack, Weight

MOST_SHOWN: Final = 30
"""Nodes that an error lists."""
MOST_OF_A_NODE: Final = 6
"""Inputs that are proposed of one node because its author gave it a title."""
_TEMPORARY: Final = "preview"
_NOT_ON_DISK: Final = ("saveimagewebsocket",)
_VIDEO_WORDS: Final = ("video", "webm")
_OTHER_WORDS: Final = (
    *("audio", "latent", "3d", "glb", "svg", "text", "any", "lora", "loss"),
    *("model", "clip", "vae", "checkpoint"),
)


class CannotImport(ValueError):
    """Why no model can be made of a workflow, and what to do about it."""


class Proposal(msgspec.Struct):
    """A model to be written."""

    graph: Graph
    fields: list[Field]
    bindings: dict[Target, str]
    """What names alone do not bind, as expressions."""
    output: Literal["image", "video"]
    outputs: tuple[str, ...]
    """The nodes whose files are the result, where some of several are."""
    loras: tuple[str, ...]
    weights: list[Weight]
    packs: list[NodePack]
    categories: tuple[str, ...]
    notes: list[str]
    """What the user should know, one sentence each."""
    titles: dict[str, str]
    """Of every node, for comments."""


def propose(
    graph: Graph,
    object_info: Mapping[str, Any] | None = None,
    *,
    workflow: Mapping[str, Any] | None = None,
    expose: Sequence[str] = (),
) -> Proposal:
    """Propose a model for ``graph``.

    ``object_info`` is what a ComfyUI says of its nodes; ``workflow`` the same graph as its pages save it, which
    knows where weights come from; ``expose`` names further inputs, ``57.steps``. Raises CannotImport.
    """
    given = Nodes(graph, object_info)
    graph, notes = tidied(given)
    nodes = Nodes(graph, object_info)
    exposed = [_exposed(nodes, one) for one in expose]
    flow = Flow(nodes)
    notes += _doubts(flow)
    fields, bindings, more = _fields(flow, exposed)
    notes += more
    if not fields:
        raise CannotImport(
            "nothing in this workflow looks like an input: name at least one with --expose NODE.INPUT, such as "
            + "; ".join([_example(nodes), *_doubts(flow)])
        )
    _name(nodes, fields, bindings)
    for field in fields:
        followers = field.targets[len(_leading(field)) :]
        bindings |= dict.fromkeys(followers, reference(field))
    handed = hand_over(flow, fields)
    taken = {target for field in fields for target in field.targets}
    bindings |= {target: text for target, text in handed.items() if target not in taken}
    idle, left_out = _idle(flow)
    output, outputs, more = _outputs(flow)
    weights, unplaced = weights_of(flow, workflow)
    packs, unknown = node_packs(flow, workflow)
    return Proposal(
        graph={id_: made for id_, made in graph.items() if id_ not in idle},
        fields=fields,
        bindings=dict(sorted(bindings.items(), key=lambda one: list(graph).index(one[0][0]))),
        output=output,
        outputs=outputs,
        loras=lora_places(flow),
        weights=weights,
        packs=packs,
        categories=_categories(fields, output),
        notes=[*notes, *left_out, *more, *unplaced, *unknown],
        titles={id_: nodes.title(id_) for id_ in graph},
    )


# -- the inputs -----------------------------------------------------------------------------------------------
def _fields(flow: Flow, exposed: list[Target]) -> tuple[list[Field], dict[Target, str], list[str]]:
    """Every field in the order of the schema, bindings that some bring along, and notes."""
    files, notes = file_fields(flow)
    size, bindings, more = resolution_field(flow)
    notes += more
    numbers, more = number_fields(flow)
    notes += more
    output, _, _ = _outputs(flow)
    still = [field for field in numbers if field.role == "frames" and field.default == 1 and output == "image"]
    fields = [*files, *prompt_fields(flow), *([size] if size else [])]
    fields += [field for field in numbers if field not in still]
    taken = {target for field in [*fields, *still] for target in field.targets} | set(bindings)
    for target in _further(flow, taken):
        extra = extra_field(flow, target)
        if extra:
            taken.add(target)
            fields.append(extra)
    for target in exposed:
        if any(target in _leading(field) for field in fields):
            continue  # proposed anyway
        for field in fields:  # where it would follow another input, it is one of its own now
            field.targets = [one for one in field.targets if one != target]
        bindings.pop(target, None)
        if target[0] not in flow.order:
            shown = flow.nodes.shown(target[0])
            raise CannotImport(f"--expose {target[0]}.{target[1]}: node {shown} leads to no output")
        try:
            field = field_of(flow, target)
        except NotExposable as error:
            raise CannotImport(f"--expose {target[0]}.{target[1]}: {error}") from None
        if field.type == "string" and field.enum is None and flow.nodes.is_path(*target):
            raise CannotImport(f"--expose {target[0]}.{target[1]}: {_no_path(flow.nodes, target)}")
        fields.append(field)
    _tell_apart(fields)
    return fields, bindings, notes


def _no_path(nodes: Nodes, target: Target) -> str:
    """Why this one cannot be an input, and what can be done."""
    text = "it names a path on ComfyUI's disk, which no request may choose"
    if nodes.is_file_list(*target) and not nodes.info(target[0]):
        return f"{text}; give --comfyui URL, which knows the files to choose from"
    return text


def _tell_apart(fields: list[Field]) -> None:
    """Titles that several fields have get the node's id."""
    count = Counter(field.title for field in fields)
    for field in fields:
        if count[field.title] > 1 and field.role in REPEATABLE:
            field.title = f"{field.title} ({field.targets[0][0]})"


def _leading(field: Field) -> list[Target]:
    """What a field drives by its name."""
    return field.targets[:2] if field.role == "resolution" else field.targets[:1]


def _further(flow: Flow, taken: set[Target]) -> list[Target]:
    """Inputs that are proposed for their node's sake: of primitives, and of nodes that were given a title."""
    nodes = flow.nodes
    used = {id_ for id_, _ in taken}
    found: list[Target] = []
    for id_ in flow.order:
        inputs = [(id_, name) for name in nodes.inputs(id_) if (id_, name) not in taken]
        if flow.is_value(id_) or "denoise" in nodes.inputs(id_):
            found += [one for one in inputs if flow.is_value(id_) or _partial(nodes, one)]
        elif nodes.retitled(id_) and id_ not in used and not nodes.is_output(id_):
            loads = any(nodes.is_file_list(*one) for one in inputs)
            found += [] if loads else inputs[:MOST_OF_A_NODE]
    return found


def _partial(nodes: Nodes, target: Target) -> bool:
    """Whether this is a sampler's ``denoise`` that somebody turned down."""
    value = nodes.inputs(target[0]).get(target[1])
    return target[1] == "denoise" and isinstance(value, float) and value < 1


def _exposed(nodes: Nodes, text: str) -> Target:
    """The input that ``--expose`` names; one that the graph leaves out gets its default. Raises CannotImport."""
    splits = [(text[:at], text[at + 1 :]) for at, one in enumerate(text) if one == "."]
    target = next((one for one in splits if one[0] in nodes.graph), None)
    if target is None:
        raise CannotImport(f"--expose {text}: {_no_node(nodes, splits)}")
    id_, name = target
    link = nodes.link(id_, name)
    if link:
        plain = [one for one in nodes.inputs(link[0]) if not nodes.link(link[0], one)]
        fix = f"; expose {link[0]}.{plain[0]} instead" if plain else ""
        raise CannotImport(f"--expose {text}: it comes from node {nodes.shown(link[0])}{fix}")
    if name not in nodes.inputs(id_):
        port = nodes.declared(id_, name)
        default = port.settings.get("default") if port else None
        if not isinstance(default, str | int | float):
            known = [one for one in nodes.inputs(id_) if not nodes.link(id_, one)]
            hint = did_you_mean(name, known) if known else "it has none that can be set"
            raise CannotImport(f"--expose {text}: node {nodes.shown(id_)} has no such input; {hint}")
        nodes.inputs(id_)[name] = default
    return target


def _no_node(nodes: Nodes, splits: Sequence[Target]) -> str:
    """That there is no such node, and which there are."""
    known = [nodes.shown(id_) for id_ in nodes]
    if not known:
        return "there are no nodes"
    if not splits:
        return f"write NODE.INPUT, such as {_example(nodes)}"
    name = splits[0][0]
    called = {word.lower(): id_ for id_ in nodes for word in (nodes.class_of(id_), nodes.title(id_))}
    if meant := nearest(name, [], called):
        return f"write the node's number: {meant}.{splits[0][1]}"
    more = ", …" if len(known) > MOST_SHOWN else ""
    return f"there is no node {name}; the nodes are {', '.join(known[:MOST_SHOWN])}{more}"


def _example(nodes: Nodes) -> str:
    for id_ in nodes:
        for name in nodes.inputs(id_):
            if not nodes.link(id_, name):
                return f"{id_}.{name}"
    return "57.steps"


def _name(nodes: Nodes, fields: list[Field], bindings: dict[Target, str]) -> None:
    """Give every field its name; where that does not bind by itself, or is taken, a binding as well."""
    known: dict[str, int] = {}
    for id_ in nodes:
        for input_ in nodes.inputs(id_):
            known[public_name(id_, input_)] = known.get(public_name(id_, input_), 0) + 1
    names: set[str] = set()
    for field in fields:
        sized = field.role == "resolution"
        name = resolution_name(field.targets[0], field.targets[1]) if sized else public_name(*field.targets[0])
        unique, number = name[:LONGEST_NAME], 2
        while unique in names or (unique != name and unique in known):
            unique, number = f"{name[: LONGEST_NAME - 4]}_{number}", number + 1
        names.add(unique)
        field.name = unique
        if sized and (unique != name or name.count("x") > 1):
            bindings |= {field.targets[0]: "width", field.targets[1]: "height"}
        elif not sized and (unique != name or known[name] > 1):
            bindings[field.targets[0]] = f"input[{unique!r}]"


# -- the rest -------------------------------------------------------------------------------------------------
def _doubts(flow: Flow) -> list[str]:
    """What makes the proposal less sure than it could be."""
    nodes = flow.nodes
    notes = []
    if not nodes.described:
        notes.append(
            "no ComfyUI was asked: types are guessed from the values, and there are no bounds, choices and "
            "descriptions; give --comfyui URL for them"
        )
    else:
        unknown = sorted({nodes.class_of(id_) for id_ in flow.order if not nodes.info(id_)})
        if unknown:
            notes.append(
                f"this ComfyUI has no {', '.join(unknown)}: it cannot run the workflow until it is newer or has the "
                "pack with them, and their inputs were guessed; import again then"
            )
    paid = sorted({nodes.class_of(id_) for id_ in flow.order if nodes.info(id_).get("api_node")})
    if paid:
        notes.append(
            f"{', '.join(paid)} call a paid service of somebody else's; requests need its key in ComfyUI"
        )
    return notes


def _idle(flow: Flow) -> tuple[list[str], list[str]]:
    """Nodes to leave out, as ComfyUI never runs them, and notes."""
    idle = [id_ for id_ in flow.nodes if id_ not in flow.order]
    if not idle:
        return [], []
    shown = f"{len(idle)} node(s) that lead to no output: {', '.join(idle[:10])}{', …' if idle[10:] else ''}"
    if all(flow.nodes.info(id_) for id_ in idle):
        return idle, [f"left out {shown}"]
    return [], [f"there are {shown}; one of them may be an output that nobody here knows"]


def _outputs(flow: Flow) -> tuple[Literal["image", "video"], tuple[str, ...], list[str]]:
    """What the workflow makes, the nodes that save it, and notes."""
    kinds: dict[str, str] = {id_: _kind(flow, id_) for id_ in flow.ends}
    media = [id_ for id_ in flow.ends if kinds[id_]]
    saving = [id_ for id_ in media if _TEMPORARY not in flow.nodes.class_of(id_).lower()]
    notes = []
    if not media:
        raise CannotImport(
            "no node of this workflow saves an image or a video: end it with Save Image or Save Video"
        )
    if not saving:
        notes.append(
            "the workflow only previews: its temporary files are the result; Save Image would keep them"
        )
    chosen = saving or media
    output: Literal["image", "video"] = "video" if any(kinds[id_] == "video" for id_ in chosen) else "image"
    chosen = [id_ for id_ in chosen if kinds[id_] == output]
    if len(chosen) > 1:
        notes.append(
            f"nodes {', '.join(chosen)} all save; every request gets all of their files: keep those that you want in "
            "outputs"
        )
    return output, tuple(chosen), notes


def _kind(flow: Flow, id_: str) -> str:
    """What a node saves, "image" or "video"; nothing where it saves neither."""
    word = flow.nodes.class_of(id_).lower()
    types = {flow.nodes.port(id_, name).type for name, _ in flow.nodes.links(id_)}
    if word in _NOT_ON_DISK:
        return ""
    if "VIDEO" in types or any(part in word for part in _VIDEO_WORDS):
        return "video"
    if "IMAGE" in types or ("image" in word and not types & {"MASK", "LATENT"}):
        return "image"
    if flow.nodes.info(id_) or any(part in word for part in _OTHER_WORDS):
        return ""
    return "image"


def _categories(fields: Sequence[Field], output: str) -> tuple[str, ...]:
    """Words to browse by, from what goes in and what comes out."""
    roles = {field.role for field in fields}
    kinds = {FILE_ROLES[role] for role in roles if role in FILE_ROLES}
    source = "video" if "video" in kinds else "image" if kinds else "text"
    found = [f"{source}-to-{output}"]
    if {"start_image", "end_image"} <= roles:
        found.append("first-last-frame")
    return tuple(found)
