"""Jobs for the engine ``dashscope``, and how they get on there."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

import rushes.catalog
from rushes.catalog.load import load_model
from rushes.catalog.model import Model
from rushes.catalog.roles import roles_of
from rushes.engines.remote.base import (
    Accepted,
    Finished,
    RemoteInput,
    RemoteJob,
    RemoteRefused,
)
from rushes.engines.remote.configured import RemoteConfig, Secret
from rushes.engines.remote.dashscope import DashScopeEngine
from rushes.engines.remote.outputs import conform, fetch_output
from rushes.media.fetch import FetchPolicy
from rushes.media.inspector import Inspector
from support.remote_dashscope import KF2V, T2I
from support.remote_stub import KEY, RemoteStub

BUNDLED = Path(rushes.catalog.__file__).parent / "models"
WAN_2_5 = load_model(BUNDLED / "wan-ai/wan-2-5/text-to-image", BUNDLED)
FRAMES = load_model(BUNDLED / "community/wan-2-2/first-last-frame", BUNDLED)
FORMATS = next(field.enum for field in WAN_2_5.inputs if field.role == "resolution") or ()
SMALL = "1024:1024 (1:1)"


def engine_for(stub: RemoteStub) -> DashScopeEngine:
    return DashScopeEngine(RemoteConfig("studio", "dashscope", stub.url, Secret(KEY)), seconds=20)


def with_table(model: Model, /, **table: Any) -> Model:
    return msgspec.structs.replace(model, options=model.options | {"dashscope": table})


PICTURES = with_table(WAN_2_5, model=T2I)
KEYFRAMES = with_table(FRAMES, model=KF2V)


def job_for(
    folder: Path, model: Model = PICTURES, files: dict[str, Path] | None = None, **given: Any
) -> RemoteJob:
    values = {field.name: field.default for field in model.inputs if field.default is not None}
    values |= given
    if model.output == "image":
        values = {"prompt": "a red kite", "aspect_ratio": SMALL} | given
    inputs = {name: RemoteInput(path, "image/png") for name, path in (files or {}).items()}
    values |= {name: str(path) for name, path in (files or {}).items()}
    roles = {
        role: value
        for role, value in roles_of(model, values).items()
        if not role.endswith("_image") and role != "source_video"
    }
    return RemoteJob("0198", model, values, roles, inputs, folder)


def field_of(model: Model, role: str) -> str:
    return next(field.name for field in model.inputs if field.role == role)


async def finished(engine: DashScopeEngine, handle: str, job: RemoteJob) -> Finished:
    for _ in range(5):
        answer = await engine.poll(handle, job)
        if isinstance(answer, Finished):
            return answer
    raise AssertionError("it does not end")


async def submitted(engine: DashScopeEngine, job: RemoteJob) -> str:
    accepted = await engine.submit(job)
    assert isinstance(accepted, Accepted)
    return accepted.handle


async def fetched(engine: DashScopeEngine, outcome: Finished, folder: Path) -> Path:
    [file] = outcome.files
    found = await fetch_output(
        file, folder / "out", engine_origin=engine.origin, headers=engine.headers(), policy=FetchPolicy()
    )
    if file.size is None:
        return found.path
    inspector = Inspector()
    try:
        return await conform(inspector, found.path, file.size)
    finally:
        await inspector.close()


async def refusal(engine: DashScopeEngine, job: RemoteJob) -> RemoteRefused:
    """How a job ends that does not succeed."""
    with pytest.raises(RemoteRefused) as caught:
        await finished(engine, await submitted(engine, job), job)
    return caught.value
