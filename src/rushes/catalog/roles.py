"""From the fields of one model to the roles that every engine knows."""

from typing import Any, Final

from rushes.catalog.model import Model, Role
from rushes.catalog.resolution import parse_resolution

REPEATABLE: Final[frozenset[Role]] = frozenset({"reference_image", "other"})
"""Roles that several fields of one model may have. Every other role names one field."""


def roles_of(model: Model, input: dict[str, Any]) -> dict[str, Any]:  # noqa: A002
    """The values of ``input`` by role, with "resolution" as ``(width, height)`` in pixels.

    A field that is not in ``input`` (optional, without a default) has no role in the answer. The role "other"
    says nothing and is left out. Of several reference images the first one given has the role; engines that
    take more read the fields themselves. Raises ValueError where the resolution is none.
    """
    roles: dict[str, Any] = {}
    for field in model.inputs:
        if field.role == "other" or field.role in roles or field.name not in input:
            continue
        value = input[field.name]
        roles[field.role] = parse_resolution(value) if field.role == "resolution" else value
    return roles
