"""Width and height as one public input: a resolution, with sizes to choose from."""

import math
from typing import Final

from rushes.catalog.importing.fields import Field, fitting
from rushes.catalog.importing.flow import Flow
from rushes.catalog.importing.nodes import Port, Target
from rushes.catalog.resolution import LARGEST_SIDE, SMALLEST_SIDE

TITLE: Final = "Resolution (W:H)"
STEP: Final = 16
"""Pixels. Latent models make multiples of it; other sizes come out smaller, or not at all."""
_RATIOS: Final = ((1, 1), (3, 4), (4, 3), (2, 3), (3, 2), (9, 16), (16, 9))
_NEAR: Final = 0.03
"""How far a size may be from a ratio and still be called by it, as a part of the ratio."""


def resolution_field(flow: Flow) -> tuple[Field | None, dict[Target, str], list[str]]:
    """The field for the size that is generated, bindings of further nodes of the same size, and notes."""
    pairs = _pairs(flow)
    if not pairs:
        return None, {}, []
    making = [pair for pair in pairs if flow.makes_latents(pair[0])]
    _, width, height = (making or pairs)[0]
    own = _size(flow, width, height)
    bindings: dict[Target, str] = {}
    notes = []
    for id_, other_width, other_height in pairs:
        if (other_width, other_height) == (width, height):
            continue
        if _size(flow, other_width, other_height) == own:
            bindings |= {other_width: "width", other_height: "height"}
        else:
            size = "x".join(map(str, _size(flow, other_width, other_height)))
            notes.append(f"node {flow.nodes.shown(id_)} keeps its own size, {size}; --expose it to change that")
    for target in (width, height):
        bindings.pop(target, None)
    ports = [port for target in (width, height) for port in flow.ports(target)]
    field = Field([width, height], "string", TITLE, role="resolution", enum=sizes(*own, ports))
    field.default = fitting(field, label(*own))
    return field, bindings, notes


def _pairs(flow: Flow) -> list[tuple[str, Target, Target]]:
    """Nodes with a width and a height that can be set to something else, and where each is kept."""
    found = []
    for id_ in flow.order:
        width, height = flow.origin(id_, "width"), flow.origin(id_, "height")
        if flow.is_value(id_) or width is None or height is None or width == height:
            continue
        sides = [flow.nodes.inputs(node).get(name) for node, name in (width, height)]
        typed = all(flow.nodes.port(*target).type == "INT" for target in (width, height))
        if typed and all(type(side) is int and SMALLEST_SIDE <= side <= LARGEST_SIDE for side in sides):
            found.append((id_, width, height))
    return found


def _size(flow: Flow, width: Target, height: Target) -> tuple[int, int]:
    return int(flow.nodes.inputs(width[0])[width[1]]), int(flow.nodes.inputs(height[0])[height[1]])


def sizes(width: int, height: int, ports: list[Port]) -> tuple[str, ...]:
    """The workflow's own size, and sizes of about as many pixels in the usual ratios, within the bounds."""
    step, low, high = STEP, SMALLEST_SIDE, LARGEST_SIDE
    for port in ports:
        step = math.lcm(step, max(1, int(port.number("step") or 1)))
        low = max(low, math.ceil(port.number("min") or 0))
        high = min(high, math.floor(port.number("max") or LARGEST_SIDE))
    found = {(width, height)}
    for across, down in _RATIOS:
        ideal = math.sqrt(width * height * across / down)
        one, other = round(ideal / step) * step, round(ideal * down / across / step) * step
        if low <= min(one, other) and max(one, other) <= high and step <= 8 * STEP:
            found.add((one, other))
    ordered = sorted(found, key=lambda size: (size[0] / size[1], size))
    return tuple(label(*size) for size in ordered)


def label(width: int, height: int) -> str:
    """A size as the schema writes it, ``1024x576 (16:9)``; the ratio is for people."""
    for across, down in _RATIOS:
        if abs(width * down / (height * across) - 1) <= _NEAR:
            return f"{width}x{height} ({across}:{down})"
    return f"{width}x{height}"
