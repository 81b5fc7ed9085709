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
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit
from uuid import uuid4

from rushes.catalog.expressions import Expression
from rushes.catalog.model import FILE_ROLES, Model
from rushes.catalog.remotes import RemoteTable, remote_values
from rushes.engines.remote.base import RemoteFile, RemoteInput, RemoteJob, RemoteRefused
from rushes.requests.record import Progress

Text = Callable[[RemoteInput], Awaitable[str]]
"""Makes the text of an input file that stands for it at the vendor's."""

MOST_FILES: Final = 16
_MOST_LOOKED: Final = 10_000
"""Values of an answer that are looked at: so many are in no answer of a model that makes a few files."""
LONGEST_ADDRESS: Final = 8192
"""Characters of a file's address; signatures can be long."""
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
_BAR: Final = re.compile(
    r"(?<![0-9])([0-9]{1,3})%\s*\|[^|\r\n]{0,400}\|(?:\s*([0-9]{1,9})/([0-9]{1,9})(?![0-9]))?"
)
"""What tqdm prints: ``Sampling:  50%|█████     | 10/20 [00:05<00:05]``."""


class Found(NamedTuple):
    """An address in an answer, with what the answer says of its content; "" where it says nothing."""

    url: str
    content_type: str = ""


def files_in(answer: Any, kind: Literal["image", "video"]) -> list[Found]:
    """The files of ``kind`` in a model's answer, in its order, each once; the first :data:`MOST_FILES` of them.

    Looked at are ``{"url": …}`` objects and, under the usual keys, plain addresses. Where an answer has nothing of
    that kind, all the files that it has: what they are is for the fetcher to find out.
    """
    return _first(_Search(kind).usual(answer, _DEEPEST)) or _anywhere(answer, kind)


def _anywhere(answer: Any, kind: str) -> list[Found]:
    """Every ``{"url": …}`` that there is, of the kind or else of any."""
    fitting = _first(_fitting(_Search(kind).objects(answer, _DEEPEST), kind))
    return fitting or _first(_Search(kind).objects(answer, _DEEPEST))


def _first(found: Iterable[Found]) -> list[Found]:
    return list(islice(_once(found), MOST_FILES))


class _Search:
    """One walk through an answer, which ends after :data:`_MOST_LOOKED` values."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._left = _MOST_LOOKED

    def _goes_on(self) -> bool:
        self._left -= 1
        return self._left >= 0

    def usual(self, value: Any, depth: int) -> Iterator[Found]:
        """Files under the usual keys."""
        if not depth or not self._goes_on():
            return
        if isinstance(value, str) and _is_address(value):
            yield Found(value, _guessed(value))
        elif isinstance(value, list):
            for one in value:
                if self._left <= 0:
                    return
                yield from self.usual(one, depth - 1)
        elif isinstance(value, dict):
            if (file := _file(value)) is not None:
                yield file
                return
            for keys in _USUAL[self._kind]:
                below = chain.from_iterable(self.usual(value[key], depth - 1) for key in keys if key in value)
                if group := _first(_fitting(below, self._kind)):
                    yield from group
                    return

    def objects(self, value: Any, depth: int) -> Iterator[Found]:
        """Every ``{"url": …}`` anywhere."""
        if not self._goes_on():
            return
        if isinstance(value, dict) and (file := _file(value)) is not None:
            yield file
        elif depth and isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                if self._left <= 0:
                    return
                yield from self.objects(one, depth - 1)


def _file(value: Mapping[str, Any]) -> Found | None:
    url, said = value.get("url"), value.get("content_type")
    if not isinstance(url, str) or not _is_address(url):
        return None
    return Found(url, said if isinstance(said, str) and said else _guessed(url))


def _is_address(text: str) -> bool:
    if text.startswith(("data:image/", "data:video/")):
        return True
    return text.startswith(("https://", "http://")) and len(text) <= LONGEST_ADDRESS


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


def _fitting(found: Iterable[Found], kind: str) -> Iterator[Found]:
    """Those that are of ``kind``, or that say nothing of it: thumbnails, masks and archives are left out."""
    unsaid = ("", "application/octet-stream", "binary/octet-stream")
    for one in found:
        said = one.content_type.lower()
        if said.startswith(f"{kind}/") or said in unsaid:
            yield one


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
    which role (or ``width``, ``height``) each field of the vendor's gets, ``object/field`` those in an object; roles
    that the request has not are left out.

    ``text`` is asked for files that are in the input alone: it may upload them. Raises EngineError
    ``binding_failed``, and RemoteRefused ``remote_refused`` for a file that would be in no field: what is generated
    without it is not what was asked for.
    """
    tokens = {name: f"file-{uuid4().hex}" for name in job.files}
    given = remote_values(table, job.input, job.roles, tokens) if table.input else _usual(job, defaults, tokens)
    written = "\n".join(_texts(given))
    for name, token in tokens.items():
        if token not in written:
            raise RemoteRefused("remote_refused", _unused(table, job.model, name), field=name)
    texts = {token: await text(job.files[name]) for name, token in tokens.items()}
    return {name: _filled(value, texts) for name, value in given.items()}


def _usual(job: RemoteJob, defaults: Mapping[str, str], files: Mapping[str, str]) -> dict[str, Any]:
    roles = dict(job.roles)
    if "resolution" in roles:
        roles["width"], roles["height"] = roles["resolution"]
    for field in job.model.inputs:
        if field.role in FILE_ROLES and field.role not in roles and field.name in files:
            roles[field.role] = files[field.name]
    given: dict[str, Any] = {}
    for name, role in defaults.items():
        if role in roles:
            place, _, below = name.partition("/")
            if below:
                given.setdefault(place, {})[below] = roles[role]
            else:
                given[name] = roles[role]
    return given


def _unused(table: RemoteTable, model: Model, name: str) -> str:
    if table.input:
        return f"{table.kind} takes no {name}: the mapping in the manifest of {model.id} has no place for it."
    return f"{table.kind} takes no {name}: the manifest of {model.id} has no mapping that says where it goes."


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _filled(value: Any, texts: Mapping[str, str]) -> Any:
    """``value`` with what stands for each file in the place of its token."""
    if isinstance(value, dict):
        return {name: _filled(one, texts) for name, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, texts) for one in value]
    if isinstance(value, str):
        for token, text in texts.items():
            value = value.replace(token, text) if token in value else value
    return value


def own_field(table: RemoteTable, model: Model, defaults: Mapping[str, str], name: object) -> str | None:
    """The input of ours that the vendor's field ``name``, or a field in it, was made from, the first of several; None
    where there is none.
    """
    if not isinstance(name, str):
        return None
    roles: set[str] = set()
    fields = {name}
    mapped = [one for key, one in table.input.items() if key.partition("/")[0] == name]
    if mapped:
        expressions = [
            one for either in mapped for one in ((either,) if isinstance(either, Expression) else either)
        ]
        roles = {role for one in expressions for role in one.names}
        fields = {field for one in expressions for field in one.fields}
    elif not table.input:
        roles = {role for key, role in defaults.items() if key.partition("/")[0] == name}
    if roles & {"width", "height"}:
        roles.add("resolution")
    return next((one.name for one in model.inputs if one.role in roles or one.name in fields), None)
