"""The numbers that people change: seeds, steps, guidance, shift, frames, frame rates.

One public number drives every node input that holds the same value for the same purpose: two samplers that
share one schedule share its steps. Where the second of them takes over, that step keeps its place in the
schedule (:func:`hand_over`).
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Final

from rushes.catalog.importing.fields import (
    Field,
    NotExposable,
    bounds,
    field_of,
    fitting,
    seed_bounds,
    storable,
)
from rushes.catalog.importing.flow import Flow
from rushes.catalog.importing.nodes import NUMBERS, Nodes, Target
from rushes.catalog.model import Role
from rushes.catalog.roles import REPEATABLE

TITLES: Final[dict[Role, str]] = {
    "frames": "Number of Frames",
    "fps": "Frames Per Second",
    "seed": "Seed",
    "steps": "Steps",
    "guidance": "Guidance Scale",
    "shift": "Shift",
}
"""The roles of numbers in the order of the schema, with the titles of their fields."""
_NAMES: Final[dict[str, Role]] = {
    "steps": "steps",
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "guidance": "guidance",
    "guidance_scale": "guidance",
    "shift": "shift",
    "length": "frames",
    "num_frames": "frames",
    "video_frames": "frames",
    "frame_count": "frames",
    "video_length": "frames",
    "frames_number": "frames",
    "fps": "fps",
    "frame_rate": "fps",
}
_WHOLE: Final[tuple[Role, ...]] = ("frames", "seed", "steps")
_SECONDS: Final = (1, 2, 3, 4, 5)
"""Lengths of video that are offered where a model only makes some numbers of frames."""
_USUAL_FPS: Final = 16
_MOST_FRAMES: Final = 100_000
_LARGE: Final = 2**31
"""Only seeds take numbers beyond it and are drawn anew by the pages."""


def number_fields(flow: Flow) -> tuple[list[Field], list[str]]:
    """The fields of all roles in :data:`TITLES`, and what the user should know of them."""
    found: dict[Role, list[Target]] = {role: [] for role in TITLES}
    for role, target in _candidates(flow):
        if target not in found[role] and not any(target in others for others in found.values()):
            found[role].append(target)
    fields, notes = [], []
    for role, targets in found.items():
        groups = _grouped(flow.nodes, role, targets)
        for position, group in enumerate(groups):
            try:
                fields.append(_field(flow, role, group, first=position == 0))
            except NotExposable:
                continue
        if role == "seed" and len(targets) > 1:
            notes.append(
                f"one seed drives {', '.join(f'{id_}.{name}' for id_, name in targets)}; take bindings out to "
                "keep some of them fixed"
            )
    _offer_lengths(flow, fields)
    return fields, notes


def _candidates(flow: Flow) -> Iterator[tuple[Role, Target]]:
    for id_ in flow.order:
        if flow.is_value(id_):
            continue  # seen through those that it feeds
        for name in flow.nodes.inputs(id_):
            origin = flow.origin(id_, name)
            role = role_of(flow, id_, name)
            if origin and role and flow.nodes.port(*origin).type in NUMBERS:
                value = flow.nodes.inputs(origin[0])[origin[1]]
                if not isinstance(value, bool) and isinstance(value, int | float) and storable(value):
                    yield role, origin


def role_of(flow: Flow, id_: str, name: str) -> Role | None:
    """What a number of a node is for, from its name and the node's other inputs."""
    inputs = flow.nodes.inputs(id_)
    if name in ("seed", "noise_seed") or name.endswith("_seed"):
        return None if inputs.get("add_noise") == "disable" else "seed"
    role = _NAMES.get(name)
    port = flow.nodes.port(id_, name)
    if role is None and port.settings.get("control_after_generate") and (port.number("max") or 0) > _LARGE:
        return "seed"
    if name == "length" and "width" not in inputs and not flow.makes_latents(id_):
        return None  # of a text, of an audio
    return role


def _grouped(nodes: Nodes, role: Role, targets: list[Target]) -> list[list[Target]]:
    """Targets that one field drives: those of one value; of seeds, all."""
    if role == "seed":
        return [targets] if targets else []
    groups: dict[Any, list[Target]] = {}
    for id_, name in targets:
        groups.setdefault(nodes.inputs(id_).get(name), []).append((id_, name))
    return list(groups.values())


def _field(flow: Flow, role: Role, group: list[Target], *, first: bool) -> Field:
    """One field for all of ``group``, within the bounds of each; further ones of a role have no role.

    Raises NotExposable where the node's type does not fit the role.
    """
    nodes, (id_, name) = flow.nodes, group[0]
    value = nodes.inputs(id_)[name]
    made = [field_of(flow, target, role) for target in group]
    field = made[0]
    if role in _WHOLE and field.type != "integer":
        raise NotExposable(f"{role} is a whole number, and {id_}.{name} is none")
    field.targets = list(group)
    if any(one.type == "integer" for one in made) or (role == "fps" and value == int(value)):
        field.type = "integer"
    field.minimum, field.maximum = bounds((port for one in group for port in flow.ports(one)), field.type)
    if role == "seed":
        seed_bounds(field)
    field.role = role if first else "other"
    if first and not nodes.retitled(id_):
        field.title = TITLES[role]
    if not first:
        field.remark = f"{TITLES[role].lower()} of another value than the input before has"
    field.default = fitting(field, value)
    return field


def _offer_lengths(flow: Flow, fields: list[Field]) -> None:
    """Numbers of frames that a node really makes, where it makes only every fourth or so."""
    fps = next((one.default for one in fields if one.role == "fps"), None)
    rate = fps if isinstance(fps, int | float) and fps > 0 else _USUAL_FPS
    for field in fields:
        own = field.default
        if field.role != "frames" or not isinstance(own, int):
            continue
        ports = [port for target in field.targets for port in flow.ports(target)]
        step = max((int(port.number("step") or 1) for port in ports), default=1)
        if step <= 1:
            continue
        low = int(field.minimum if field.minimum is not None else 1)
        offered = {low + round((seconds * rate - low) / step) * step for seconds in _SECONDS} | {own}
        high = _MOST_FRAMES if field.maximum is None else min(_MOST_FRAMES, field.maximum)
        field.enum = tuple(sorted({one for one in offered if low <= one <= high} | {own}))
        field.minimum = field.maximum = None
        field.remark = f"the node makes {low} and a multiple of {step} more; other numbers would be cut short"


def reference(field: Field) -> str:
    """A field's value as expressions name it."""
    return f"input[{field.name!r}]" if field.role in REPEATABLE else field.role


def hand_over(flow: Flow, fields: list[Field]) -> dict[Target, str]:
    """Expressions for the steps at which one sampler stops and the next goes on.

    Such a step keeps its place in the schedule: in the middle stays in the middle.
    """
    bound: dict[Target, str] = {}
    for field in fields:
        steps = field.default
        if not isinstance(steps, int) or steps < 1:
            continue
        for id_ in flow.order:
            if flow.origin(id_, "steps") not in field.targets:
                continue
            for name in ("start_at_step", "end_at_step"):
                at = flow.nodes.inputs(id_).get(name)
                if type(at) is not int:
                    continue
                if 0 < at < steps:
                    bound[id_, name] = _part(reference(field), Fraction(at, steps))
                    if field.enum is None:
                        field.minimum = max(2, field.minimum or 0)
                elif at == steps and name == "end_at_step":
                    bound[id_, name] = reference(field)
    return bound


def _part(steps: str, part: Fraction) -> str:
    if part == Fraction(1, 2):
        return f"{steps} // 2"
    share = f"round({steps} * {part.numerator} / {part.denominator})"
    return f"max(1, {share})" if part < Fraction(1, 2) else f"min({steps} - 1, {share})"
