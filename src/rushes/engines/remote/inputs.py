"""A request's values and files in the form that remotes take them."""

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rushes.catalog.remotes import RemoteTable, remote_values
from rushes.engines.remote.base import RemoteInput, RemoteJob


async def data_uri(file: RemoteInput) -> str:
    """The file itself as text. What was checked is what is sent: the address that the user gave may answer with
    something else by now, and may be one that the remote cannot reach.
    """
    return await asyncio.to_thread(_data_uri, file.path, file.content_type)


def _data_uri(path: Path, content_type: str) -> str:
    return f"data:{content_type};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


async def picture_uri(file: RemoteInput, *, longest: int, most_bytes: int) -> str:
    """The picture itself as text, made smaller where a vendor takes no more than ``longest`` pixels a side or
    ``most_bytes`` as a file: scaled down, and as JPEG where PNG is still too large. Others go as they are.
    """
    return await asyncio.to_thread(_picture_uri, file, longest, most_bytes)


def _picture_uri(file: RemoteInput, longest: int, most_bytes: int) -> str:
    from PIL import Image

    with Image.open(file.path) as opened:
        if max(opened.size) <= longest and file.path.stat().st_size <= most_bytes:
            return _data_uri(file.path, file.content_type)
        picture = opened.convert("RGB")
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    picture.info.clear()
    for kind, options in (("PNG", {"compress_level": 6}), ("JPEG", {"quality": 95}), ("JPEG", {"quality": 80})):
        made = io.BytesIO()
        picture.save(made, kind, **options)
        if made.tell() <= most_bytes:
            break
    return f"data:image/{kind.lower()};base64,{base64.b64encode(made.getvalue()).decode('ascii')}"


async def values(
    table: RemoteTable, job: RemoteJob, text: Callable[[RemoteInput], Awaitable[str]] = data_uri
) -> dict[str, Any]:
    """What the table's mapping makes of the job; ``text`` makes of a file what stands for it there."""
    return remote_values(table, job.input, job.roles, await texts(job, text))


async def texts(job: RemoteJob, text: Callable[[RemoteInput], Awaitable[str]] = data_uri) -> dict[str, str]:
    """What stands for each file of the job there, by field."""
    return {name: await text(file) for name, file in job.files.items()}


def unsent(texts: Mapping[str, str], sent: Any) -> Iterator[str]:
    """The files, by field, whose text stands in no text anywhere in ``sent``."""
    found = list(_texts(sent))
    return (name for name, text in texts.items() if not any(text in one for one in found))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _texts(below)
