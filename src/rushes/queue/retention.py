"""What the stores share about retention. Pure."""

from collections.abc import Collection, Mapping

from rushes.errors import InvalidInput
from rushes.requests.record import Source


def stored_values(sources: Mapping[str, Source]) -> list[str]:
    """The storage keys that a new request names: of uploads, and of other requests' outputs."""
    return sorted({source.value for source in sources.values() if source.kind == "stored"})


def gone(sources: Mapping[str, Source], swept: Collection[str]) -> InvalidInput:
    """The refusal of a submit that names files which retention has taken."""
    detail = [
        {"loc": [name], "msg": f"{name}: this file is no longer here; upload it again", "type": "input_gone"}
        for name, source in sources.items()
        if source.kind == "stored" and source.value in swept
    ]
    return InvalidInput.listing(detail)
