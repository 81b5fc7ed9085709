"""What the engine for Replicate's predictions makes of proxies, and of answers that nobody would expect."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rushes.engines.remote.base import (
    RemoteJob,
    RemoteRefused,
    RemoteUnavailable,
    Underway,
)
from rushes.engines.remote.replicate import INLINE_BYTES, ReplicateEngine
from rushes.requests.record import Progress
from support.remote_driving import queue_film, queue_model, refused, submitted, to_end
from support.remote_replicate import I2V, ReplicateStub
from support.remote_stub import Fault
from support.remote_vendors import REPLICATE, REPLICATE_TABLE, fixtures

SUBMIT = rf"^/v1/models/{I2V}/predictions$"
POLL = r"^/v1/predictions/[^/]+$"
stub, engine, job = fixtures(REPLICATE, polls=0)


def noise(job: RemoteJob, side: int) -> int:
    """Make the job's picture one that no compression makes small; its bytes."""
    path = job.files["picture"].path
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (side, side, 3), np.uint8)).save(path)
    return path.stat().st_size


async def test_a_file_without_a_place_is_refused_and_not_uploaded(
    engine: ReplicateEngine, stub: ReplicateStub, tmp_path: Path
) -> None:
    job = queue_film(queue_model("replicate", {"model": I2V, "input": {"prompt": "prompt"}}), tmp_path)
    assert noise(job, 320) > INLINE_BYTES
    with pytest.raises(RemoteRefused) as caught:
        await engine.submit(job)

    assert ("remote_refused", "picture", False) == (
        caught.value.reason,
        caught.value.field,
        caught.value.billed,
    )
    assert [] == stub.seen


async def test_a_file_in_several_fields_is_uploaded_once(
    engine: ReplicateEngine, stub: ReplicateStub, tmp_path: Path
) -> None:
    table = REPLICATE_TABLE | {"input": REPLICATE_TABLE["input"] | {"reference_images": ["start_image"]}}
    job = queue_film(queue_model("replicate", table), tmp_path)
    noise(job, 320)
    await to_end(engine, await submitted(engine, job), job)

    sent = stub.calls("POST", SUBMIT)[0].json["input"]
    assert 1 == len(stub.uploads)
    assert [upload["urls"]["get"] for upload in stub.uploads.values()] == sent["reference_images"]
    assert [sent["image"]] == sent["reference_images"]


async def test_outputs_of_some_megabytes_in_the_answer(
    engine: ReplicateEngine, stub: ReplicateStub, job: RemoteJob
) -> None:
    content = bytes(3 << 20)
    stub.shape = lambda _: "data:video/mp4;base64," + base64.b64encode(content).decode()
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert [content] == [file.path.read_bytes() for file in finished.files if file.path]


async def test_inputs_that_come_back_with_every_answer(
    engine: ReplicateEngine, stub: ReplicateStub, tmp_path: Path
) -> None:
    fields = {f"reference_{number}": "start_image" for number in range(6)}
    table = REPLICATE_TABLE | {"input": REPLICATE_TABLE["input"] | fields}
    job = queue_film(queue_model("replicate", table), tmp_path)
    assert INLINE_BYTES > noise(job, 256) > INLINE_BYTES * 3 // 4
    _, finished = await to_end(engine, await submitted(engine, job), job)

    assert 1 == len(finished.files)


@pytest.mark.parametrize("metrics", [{}, None, {"predict_time": 0}])
async def test_what_was_generated_and_then_refused_is_billed(
    engine: ReplicateEngine, stub: ReplicateStub, job: RemoteJob, metrics: Any
) -> None:
    text = "The input or output was flagged as sensitive. Please try again with different inputs. (E005)"
    stub.ends = {"status": "failed", "error": text, "metrics": metrics}
    error = await refused(engine, job)

    assert ("content_refused", True) == (error.reason, error.billed)


@pytest.mark.parametrize(
    ("body", "progress"),
    [
        (
            b'{"status": "processing", "logs": "5%|#| ' + b"9" * 4000 + b'/10"}',
            Progress(fraction=0.05, stage="running at replicate"),
        ),
        (b'{"status": "processing", "logs": {"a": 1}}', Progress(stage="running at replicate")),
        (b'{"status": ["succeeded"]}', Progress(stage="starting at replicate")),
    ],
)
async def test_odd_polls(
    engine: ReplicateEngine, stub: ReplicateStub, job: RemoteJob, body: bytes, progress: Progress
) -> None:
    handle = await submitted(engine, job)
    stub.fail("GET", POLL, Fault(200, body))
    answer = await engine.poll(handle, job)

    assert isinstance(answer, Underway)
    assert progress == answer.progress


@pytest.mark.parametrize(
    ("body", "pause"),
    [
        (b'{"retry_after": ' + b"9" * 4000 + b"}", 3600.0),
        (b'{"retry_after": -1e300}', 0.0),
        (b'{"detail": "resets in ~' + b"9" * 4000 + b's"}', None),
    ],
)
async def test_odd_pauses(
    engine: ReplicateEngine, stub: ReplicateStub, job: RemoteJob, body: bytes, pause: float | None
) -> None:
    stub.fail("POST", SUBMIT, Fault(429, body))
    with pytest.raises(RemoteUnavailable) as caught:
        await engine.submit(job)

    assert ("throttled", pause) == (caught.value.trouble, caught.value.retry_after)


async def test_handles_are_small(engine: ReplicateEngine, stub: ReplicateStub, job: RemoteJob) -> None:
    usual = await submitted(engine, job)
    urls = {"get": f"{stub.url}/{'a' * 5000}", "cancel": f"{stub.url}/mine"}
    stub.fail("POST", SUBMIT, Fault(201, {"id": "../../account", "urls": urls}))
    odd = await submitted(engine, job)
    with pytest.raises(RemoteRefused):
        await engine.poll(odd, job)

    assert {"id": next(iter(stub.jobs))} == json.loads(usual)
    assert {"id": "../../account", "cancel": f"{stub.url}/mine"} == json.loads(odd)
    assert "/v1/predictions/..%2F..%2Faccount" == stub.seen[-1].path
