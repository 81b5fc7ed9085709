"""One job at one remote engine, without a worker: from the submit to files that are decoded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from rushes.catalog.model import FILE_ROLES, Input, Model
from rushes.catalog.roles import roles_of
from rushes.engines.remote.base import (
    Accepted,
    Finished,
    RemoteEngine,
    RemoteFile,
    RemoteInput,
    RemoteJob,
    RemoteRefused,
    RemoteUnavailable,
    Underway,
)
from rushes.engines.remote.outputs import conform, fetch_output
from rushes.media.fetch import FetchPolicy
from rushes.media.inspector import Inspector
from support.remote_stub import KEY, picture

PROMPT = Input("text", "Prompt", "string", "prompt")
IMAGE = Input("picture", "Image", "string", "start_image")
FRAMES = Input("length", "Frames", "integer", "frames")
SIZE = Input("size", "Size", "string", "resolution")
CLOUDFLARE = {
    "type": "https://developers.cloudflare.com/support/troubleshooting/http-status-codes/cloudflare-5xx-errors/",
    "title": "Error 524: A timeout occurred",
    "status": 524,
    "detail": "The origin web server timed out responding to this request.",
    "instance": "9a1b2c3d4e5f6789",
    "error_code": 524,
    "cloudflare_error": True,
    "retryable": True,
    "retry_after": 120,
}
"""What the network in front of an API writes in JSON (RFC 9457), in the API's place."""
_MOST_POLLS = 30


def queue_model(kind: str, table: Mapping[str, Any] | None, *inputs: Input, output: Any = "video") -> Model:
    """A model whose manifest has ``table`` as its ``[engines.<kind>]``; None: has none."""
    return Model(
        id="films/of/ours",
        name="Films of ours",
        description="",
        categories=(),
        output=output,
        inputs=inputs or (PROMPT, IMAGE, FRAMES),
        required=("text",),
        folder=Path("/models/films/of/ours"),
        options={} if table is None else {kind: dict(table)},
    )


def queue_job(
    model: Model, folder: Path, files: Mapping[str, RemoteInput] | None = None, **values: Any
) -> RemoteJob:
    """As the worker makes one: file roles are not among its roles."""
    given = dict(values) | {name: file.url or file.path.name for name, file in (files or {}).items()}
    roles = {role: value for role, value in roles_of(model, given).items() if role not in FILE_ROLES}
    return RemoteJob(
        request_id="0198c0de-0000-7000-8000-000000000001",
        model=model,
        input=given,
        roles=roles,
        files=dict(files or {}),
        folder=folder,
    )


def queue_film(
    model: Model, folder: Path, *, size: tuple[int, int] = (96, 64), url: str | None = None, **values: Any
) -> RemoteJob:
    """A job with a picture of ``size`` as its start, which came from ``url``."""
    source = folder / "in.png"
    source.write_bytes(picture(*size))
    files = {"picture": RemoteInput(source, "image/png", url)}
    return queue_job(model, folder, files, **({"text": "a fox in the snow"} | values))


async def refused(engine: RemoteEngine, job: RemoteJob) -> RemoteRefused:
    """Why a job that was accepted came to nothing."""
    handle = await submitted(engine, job)
    with pytest.raises(RemoteRefused) as caught:
        await to_end(engine, handle, job)
    assert KEY not in str(caught.value)
    return caught.value


async def not_taken(engine: RemoteEngine, job: RemoteJob) -> RemoteUnavailable:
    """Why a job was not accepted."""
    with pytest.raises(RemoteUnavailable) as caught:
        await engine.submit(job)
    assert KEY not in str(caught.value)
    return caught.value


async def submitted(engine: RemoteEngine, job: RemoteJob) -> str:
    """The handle."""
    answer = await engine.submit(job)
    assert isinstance(answer, Accepted)
    return answer.handle


async def to_end(engine: RemoteEngine, handle: str, job: RemoteJob) -> tuple[list[Underway], Finished]:
    """Poll without a pause; all that was said on the way, and the end."""
    said: list[Underway] = []
    for _ in range(_MOST_POLLS):
        answer = await engine.poll(handle, job)
        if isinstance(answer, Finished):
            return said, answer
        said.append(answer)
    raise AssertionError(f"not finished after {_MOST_POLLS} polls")


async def finished(engine: RemoteEngine, handle: str, job: RemoteJob) -> Finished:
    return (await to_end(engine, handle, job))[1]


async def brought(engine: RemoteEngine, file: RemoteFile, dest: Path, *, conforming: bool = True) -> Path:
    """The file on this machine, by the guarded fetcher; unless ``conforming`` is False in the size that was asked
    for.
    """
    fetched = await fetch_output(
        file, dest, engine_origin=engine.origin, headers=engine.headers(), policy=FetchPolicy()
    )
    if file.size is None or not conforming:
        return fetched.path
    inspector = Inspector()
    try:
        return await conform(inspector, fetched.path, file.size)
    finally:
        await inspector.close()


def picture_size(path: Path) -> tuple[int, int]:
    """Of a picture that decodes to its end."""
    with Image.open(path) as image:
        image.load()
        return image.size


def movie_shape(path: Path) -> tuple[int, int, int]:
    """Width, height and number of frames of a video that decodes to its end."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return frames[0].width, frames[0].height, len(frames)
