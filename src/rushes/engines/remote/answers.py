"""What queues that run anybody's models have in common: an answer is the model's own JSON, and no two look alike.

Files are found in it by the keys that models use, progress in the bars that they print, and what a vendor says of one
of its fields is told of the field of ours that it was made from.
"""

import asyncio
import base64
import binascii
import mimetypes
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit

from rushes.catalog.expressions import Expression
from rushes.catalog.model import FILE_ROLES, Model
from rushes.catalog.remotes import RemoteTable
from rushes.engines.remote.base import RemoteFile, RemoteInput, RemoteJob, RemoteRefused
from rushes.engines.remote.inputs import values
from rushes.requests.record import Progress

Text = Callable[[RemoteInput], Awaitable[str]]
"""Makes the text of an input file that stands for it at the vendor's."""

MOST_FILES: Final = 64
_DEEPEST: Final = 8
_USUAL: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    kind: (
        (kind, f"{kind}s"),
        (f"{kind}_url", f"{kind}_urls", "url", "urls"),
        ("output", "outputs", "result", "results", "data", "file", "files", "media"),
    )
    for kind in ("image", "video")
}
"""Keys that hold the files of a model's output, by kind; the first group that has some is taken."""
_LOG_TAIL: Final = 20_000
"""Characters of a log that are looked at: the newest."""
_BAR: Final = re.compile(r"(?<!\d)(\d{1,3})%\s*\|[^|\r\n]*\|(?:\s*(\d+)/(\d+))?")
"""What tqdm prints: ``Sampling:  50%|█████     | 10/20 [00:05<00:05]``."""


class Found(NamedTuple):
    """An address in an answer, with what the answer says of its content; "" where it says nothing."""

    url: str
    content_type: str = ""


def files_in(answer: Any, kind: Literal["image", "video"]) -> list[Found]:
    """The files of ``kind`` in a model's answer, in its order, each once.

    Looked at are ``{"url": …}`` objects and, under the usual keys, plain addresses. Where an answer has nothing of
    that kind, all the files that it has: what they are is for the fetcher to find out.
    """
    found = list(_search(answer, kind, _DEEPEST)) or list(_objects(answer, _DEEPEST))
    return (_fitting(found, kind) or found)[:MOST_FILES]


def _search(value: Any, kind: str, depth: int) -> Iterator[Found]:
    if depth and isinstance(value, str) and _is_address(value):
        yield Found(value, _guessed(value))
    elif depth and isinstance(value, list):
        yield from _once(found for one in value for found in _search(one, kind, depth - 1))
    elif depth and isinstance(value, dict):
        if (file := _file(value)) is not None:
            yield file
            return
        for keys in _USUAL[kind]:
            below = [value[key] for key in keys if key in value]
            group = [found for one in below for found in _search(one, kind, depth - 1)]
            if fitting := _fitting(group, kind):
                yield from fitting
                return


def _objects(value: Any, depth: int) -> Iterator[Found]:
    """Every ``{"url": …}`` anywhere."""
    if isinstance(value, dict) and (file := _file(value)) is not None:
        yield file
    elif depth and isinstance(value, dict | list):
        below = value.values() if isinstance(value, dict) else value
        yield from _once(found for one in below for found in _objects(one, depth - 1))


def _file(value: Mapping[str, Any]) -> Found | None:
    url, said = value.get("url"), value.get("content_type")
    if not isinstance(url, str) or not _is_address(url):
        return None
    return Found(url, said if isinstance(said, str) and said else _guessed(url))


def _is_address(text: str) -> bool:
    return text.startswith(("https://", "http://", "data:image/", "data:video/"))


def _guessed(url: str) -> str:
    if url.startswith("data:"):
        return re.split("[;,]", url[5:100], maxsplit=1)[0]
    try:
        return mimetypes.guess_type(urlsplit(url).path)[0] or ""
    except ValueError:
        return ""


def _once(found: Iterable[Found]) -> Iterator[Found]:
    seen: set[str] = set()
    for one in found:
        if one.url not in seen:
            seen.add(one.url)
            yield one


def _fitting(found: Iterable[Found], kind: str) -> list[Found]:
    """Those that are of ``kind``, or that say nothing of it: thumbnails, masks and archives are left out."""
    unsaid = ("", "application/octet-stream", "binary/octet-stream")
    return [
        one
        for one in _once(found)
        if one.content_type.startswith(f"{kind}/") or one.content_type.lower() in unsaid
    ]


async def remote_files(
    found: Sequence[Found], folder: Path, keyed: Callable[[str], bool]
) -> tuple[RemoteFile, ...]:
    """What was found as the engine's outputs. Files that are in the answer itself are written to ``folder``;
    ``keyed`` says which addresses are the remote's own. Raises RemoteRefused ``remote_failed``.
    """
    files = []
    for number, one in enumerate(found):
        if not one.url.startswith("data:"):
            files.append(RemoteFile(url=one.url, keyed=keyed(one.url)))
            continue
        path = folder / f"answer-{number}"
        try:
            await asyncio.to_thread(_write_data, one.url, path)
        except (ValueError, binascii.Error):
            raise RemoteRefused(
                "remote_failed", "The answer holds a file that cannot be decoded.", billed=True
            ) from None
        files.append(RemoteFile(path=path))
    return tuple(files)


def _write_data(uri: str, path: Path) -> None:
    head, comma, body = uri.partition(",")
    if not comma:
        raise ValueError("no comma")
    data = unquote_to_bytes(body)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(data, validate=True) if head.endswith(";base64") else data)


def bar_in(logs: str, stage: str) -> Progress:
    """``stage`` with how far the newest progress bar of a log is; without one, the stage alone."""
    last = None
    for last in _BAR.finditer(logs[-_LOG_TAIL:]):  # noqa: B007  the last one is wanted
        pass
    if last is None:
        return Progress(stage=stage)
    percent, step, steps = last.groups()
    return Progress(
        fraction=min(int(percent), 100) / 100,
        stage=stage,
        step=int(step) if step else None,
        steps=int(steps) if steps else None,
    )


async def input_values(
    table: RemoteTable, job: RemoteJob, defaults: Mapping[str, str], text: Text
) -> dict[str, Any]:
    """The vendor's input for a job: what the manifest's mapping makes of it. Without a mapping ``defaults`` says
    which role (or ``width``, ``height``) each field of the vendor's gets; roles that the request has not are left
    out. Raises EngineError ``binding_failed``.
    """
    if table.input:
        return await values(table, job, text)
    roles = dict(job.roles)
    if "resolution" in roles:
        roles["width"], roles["height"] = roles["resolution"]
    for field in job.model.inputs:
        if field.role in FILE_ROLES and field.role not in roles and field.name in job.files:
            roles[field.role] = await text(job.files[field.name])
    return {name: roles[role] for name, role in defaults.items() if role in roles}


def own_field(table: RemoteTable, model: Model, defaults: Mapping[str, str], name: object) -> str | None:
    """The input of ours that the vendor's field ``name`` was made from, the first of several; None where there is
    none.
    """
    if not isinstance(name, str):
        return None
    roles: set[str] = set()
    fields = {name}
    if mapped := table.input.get(name):
        expressions = (mapped,) if isinstance(mapped, Expression) else mapped
        roles = {role for one in expressions for role in one.names}
        fields = {field for one in expressions for field in one.fields}
    elif not table.input and name in defaults:
        roles = {defaults[name]}
    if roles & {"width", "height"}:
        roles.add("resolution")
    return next((one.name for one in model.inputs if one.role in roles or one.name in fields), None)
